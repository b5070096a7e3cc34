//! `lazy-huge` (seed 000): everything counts as dirty at first, so nothing is closed at the start. A clear closes the
//! leaves of its range, huge ones as they are; their first write splits them.

use umbra_shared::Level;

use super::{Strategy, Tracking};
use crate::config::Config;
use crate::memory::Env;
use crate::mmu::Mmu;
use crate::spte::{Frame, Spte};

/// Enabling costs nothing; the first round reports all of memory.
#[derive(Clone, Copy, Debug)]
pub struct LazyHuge;

impl Strategy for LazyHuge {
    fn name(&self) -> &'static str {
        "lazy-huge"
    }

    fn check(&self, config: &Config) -> Result<(), String> {
        if config.by_l2 {
            return Err(
                "lazy-huge starts with every L1 page set, which no L2 frame stands for: drop the report by L2 \
                        frame or take another strategy"
                    .into(),
            );
        }
        Ok(())
    }

    fn starts_all_set(&self) -> bool {
        true
    }

    fn arm(&self, _: &Tracking, spte: Spte, _: Level) -> Spte {
        spte
    }

    fn admit(&self, track: &Tracking, frame: Frame, level: Level, _: bool) -> bool {
        // What is dirty needs no trap until it is cleared, and a clear finds every alias.
        track.dirty.contains_range(frame, level.frames())
    }

    fn admit_word(&self, track: &Tracking, first: Frame, _: bool) -> u64 {
        track.dirty.word(first)
    }

    fn rearm(&self, mmu: &mut Mmu, env: &mut Env<'_>, frame: Frame, level: Level) {
        mmu.close_leaves(env, frame, level);
    }
}
