//! `twin+log`: each 2 MiB of memory by what pays there. Where few pages are written they are logged one by one; where more than
//! [`Config::break_even`] were, the leaf is made huge, copied and compared. Each harvest decides by what it found.
//!
//! The log is that of `log`, and small leaves are what it needs; but where something beside the MMU logs every page whatever
//! the leaf's size ([`Config::logs_huge`]: KVM's log of a window), leaves stay huge, and the mapper is told which memory
//! is to be logged.

use umbra_shared::Level;

use super::dirty_bit::arm;
use super::{Leaf, Strategy, Tracking, Trapped, Twin};
use crate::config::{Config, NoMemory};
use crate::memory::Env;
use crate::mmu::Mmu;
use crate::spte::{Frame, Spte};

/// A trap and a copy where much is written, an entry of the log for each page where little is.
#[derive(Clone, Copy, Debug)]
pub struct TwinLog;

impl Strategy for TwinLog {
    fn name(&self) -> &'static str {
        "twin+log"
    }

    fn check(&self, config: &Config) -> Result<(), String> {
        Twin.check(config)
    }

    fn uses_dirty_bits(&self) -> bool {
        true
    }

    fn uses_log(&self) -> bool {
        true
    }

    fn compares(&self) -> bool {
        true
    }

    fn arm(&self, track: &Tracking, spte: Spte, level: Level) -> Spte {
        if track.logs_huge && level == Level::M2 { spte } else { arm(spte, level) }
    }

    fn admit(&self, track: &Tracking, frame: Frame, level: Level, _: bool) -> bool {
        let logged = level == Level::K4 || level == Level::M2 && track.logs_huge;
        logged && !track.is_dense(frame)
    }

    fn admit_word(&self, track: &Tracking, first: Frame, _: bool) -> u64 {
        if track.is_dense(first) { 0 } else { u64::MAX }
    }

    fn traps_huge(&self, track: &Tracking, frame: Frame, level: Level) -> bool {
        track.is_dense(frame) && Twin.traps_huge(track, frame, level)
    }

    fn trap_huge(&self, mmu: &mut Mmu, env: &mut Env<'_>, leaf: &Leaf) -> Result<Trapped, NoMemory> {
        let frame = mmu.arena.spte(leaf.at).frame();
        if leaf.level == Level::M2 && mmu.copies_if_dense(env, frame)? {
            mmu.open(env, leaf.at, Some(leaf.path()));
            return Ok(Trapped::Opened);
        }
        Ok(Trapped::Split)
    }

    fn harvest(&self, mmu: &mut Mmu, env: &mut Env<'_>) {
        mmu.drain_log();
        mmu.compare_twins(env);
        mmu.choose_by_density(env);
    }

    fn rearm(&self, mmu: &mut Mmu, env: &mut Env<'_>, frame: Frame, level: Level) {
        let Some(track) = &mmu.track else { return };
        match (track.is_dense(frame), level) {
            (true, Level::K4) => {
                // A flag that stays would be taken for a write when the leaf goes.
                mmu.clean_leaves(env, frame, level);
                mmu.close_leaves(env, frame, level);
            }
            (false, Level::M2) if track.logs_huge => {}
            (false, _) => mmu.clean_leaves(env, frame, level),
            // Its copy is older than the clear, and a leaf without one is closed.
            (true, _) => {}
        }
    }
}

impl Mmu {
    /// Copies the leaf at `frame` where memory is written densely. Where it is not, or there is no room for a copy, what is to be
    /// logged huge may be opened without one.
    fn copies_if_dense(&mut self, env: &mut Env<'_>, frame: Frame) -> Result<bool, NoMemory> {
        let Some(track) = &self.track else { return Ok(false) };
        let (dense, logs_huge) = (track.is_dense(frame), track.logs_huge);
        if dense && self.copy_huge(env, frame)? {
            return Ok(true);
        }
        if dense && logs_huge {
            self.set_dense(env, frame, false);
        }
        Ok(logs_huge)
    }

    /// Decides for each 2 MiB that was written how it is tracked from now on. Which way is better is found out a harvest late, and the
    /// way back needs a little less than the break-even: memory at the edge shall not go to and fro.
    fn choose_by_density(&mut self, env: &mut Env<'_>) {
        let Some(track) = &self.track else { return };
        if track.logs_huge && track.dense.is_empty() {
            return;
        }
        let regions = self.config.first_tracked.0.div_ceil(512)..self.config.memory_frames.div_ceil(512);
        for first in regions.map(|region| Frame(region << 9)) {
            let Some(track) = &self.track else { return };
            let written = track.dirty.count_region(first);
            if written == 0 {
                continue;
            }
            if !track.is_dense(first) {
                self.count_logged(env, first, written);
            } else if written < self.config.break_even - self.config.break_even / 8 {
                self.set_dense(env, first, false);
            }
        }
    }

    /// So many of the 512 pages from `first` on were logged since the last harvest, by whoever does that.
    pub fn count_logged(&mut self, env: &mut Env<'_>, first: Frame, written: u32) {
        let Some(track) = &self.track else { return };
        // What would find no room for its copy stays with the log.
        let room = track.dense.len() < u64::from(track.max_twins);
        if written >= self.config.break_even && !track.is_dense(first) && room && self.make_huge(env, first) {
            self.set_dense(env, first, true);
            self.finish(env);
        }
    }

    /// Of 512 pages, how many must be written that to copy them is cheaper than to log them.
    #[must_use]
    pub const fn break_even(&self) -> u32 {
        self.config.break_even
    }

    /// Whether a leaf of 2 MiB maps the memory at `first`, or will at its next fault: tables that split one are dropped.
    fn make_huge(&mut self, env: &mut Env<'_>, first: Frame) -> bool {
        let split = self.drop_split_tables(env, first);
        split || !self.rmaps.head(first, Level::M2).is_empty()
    }

    /// From now on the 2 MiB at `first` is written densely, or not. What maps it is closed for that: its next write decides.
    fn set_dense(&mut self, env: &mut Env<'_>, first: Frame, dense: bool) {
        let first = Frame(first.0 & !511);
        if dense {
            self.drain_log();
            self.close_leaves(env, first, Level::M2);
            for page in 0..Level::M2.frames() {
                // What their flags say was logged, and is marked.
                self.clean_leaves(env, first.plus(page), Level::K4);
                self.close_leaves(env, first.plus(page), Level::K4);
            }
            // Before nobody logs it any more.
            self.finish(env);
            self.stats.made_dense += 1;
        }
        let Some(track) = &mut self.track else { return };
        if dense {
            track.dense.insert(Frame(first.0 >> 9));
        } else {
            track.dense.remove(Frame(first.0 >> 9));
        }
        if track.logs_huge {
            env.mapper.log_writes(first, !dense);
        }
    }
}
