//! `twin`: the first write to a 2 MiB leaf traps, the leaf is copied and opened as a whole; the harvest closes it and
//! compares, as distributed shared memory does. Leaves of 4 KiB trap as with `write-protect`.

use umbra_shared::Level;

use super::{Leaf, Strategy, Tracking, Trapped};
use crate::config::{Config, NoMemory, Split};
use crate::defects::Defect;
use crate::memory::{Env, L1Memory};
use crate::mmu::Mmu;
use crate::spte::{Frame, Spte};

const PAGES: u64 = 512;

/// Huge leaves stay huge: a fault and a copy each 2 MiB and round. A write of the bytes that were there is not seen.
#[derive(Clone, Copy, Debug)]
pub struct Twin;

/// A copy of 2 MiB; pages of zeroes are left out.
#[derive(Debug)]
pub struct Copied {
    first: Frame,
    pages: Vec<Option<Box<[u64; 512]>>>,
}

impl Copied {
    fn of(memory: &dyn L1Memory, first: Frame) -> Result<Self, NoMemory> {
        let mut pages = Vec::new();
        pages.try_reserve_exact(512).map_err(|_| NoMemory)?;
        let mut buffer = [0; 512];
        for page in 0..PAGES {
            pages.push(memory.copy_page(first.plus(page), &mut buffer).then(|| Box::new(buffer)));
        }
        Ok(Self { first, pages })
    }

    /// Heap bytes.
    pub(crate) fn bytes(&self) -> u64 {
        (self.pages.capacity() * size_of::<Option<Box<[u64; 512]>>>()
            + self.pages.iter().flatten().count() * size_of::<[u64; 512]>()) as u64
    }

    /// Whether it is a copy of the leaf at `first`.
    pub(crate) fn is_of(&self, first: Frame) -> bool {
        self.first == first
    }

    /// Pages whose content differs now.
    fn changed(&self, memory: &dyn L1Memory) -> Vec<Frame> {
        let mut buffer = [0; 512];
        let frames = (0..PAGES).map(|page| self.first.plus(page));
        let changed = frames.zip(&self.pages).filter(|(frame, was)| {
            let now = memory.copy_page(*frame, &mut buffer).then_some(&buffer);
            match (was, now) {
                (None, None) => false,
                (Some(was), Some(now)) => **was != *now,
                (Some(only), None) => only.iter().any(|&word| word != 0),
                (None, Some(only)) => only.iter().any(|&word| word != 0),
            }
        });
        changed.map(|(frame, _)| frame).collect()
    }
}

impl Strategy for Twin {
    fn name(&self) -> &'static str {
        "twin"
    }

    fn check(&self, config: &Config) -> Result<(), String> {
        if matches!(config.split, Split::Eager | Split::EagerClear) {
            return Err(
                "twin copies huge leaves, and an eager split leaves none: take split=lazy or split=shatter".into()
            );
        }
        if config.by_l2 {
            return Err(
                "twin compares L1's pages and cannot tell which alias was written: drop the report by L2 frame".into(),
            );
        }
        Ok(())
    }

    fn arm(&self, spte: Spte, _: Level) -> Spte {
        spte.closed()
    }

    fn admit(&self, _: &Tracking, _: Frame, _: Level, _: bool) -> bool {
        false
    }

    fn admit_word(&self, _: &Tracking, _: Frame, _: bool) -> u64 {
        0
    }

    fn traps_huge(&self, track: &Tracking, level: Level) -> bool {
        level == Level::M2 && track.twins.len() < track.max_twins as usize
    }

    fn trap_huge(&self, mmu: &mut Mmu, env: &mut Env<'_>, leaf: &Leaf) -> Result<Trapped, NoMemory> {
        let first = mmu.arena.spte(leaf.at).frame();
        if leaf.level > Level::M2 {
            return Ok(Trapped::Split);
        }
        let Some(track) = &mut mmu.track else { return Ok(Trapped::Split) };
        if !track.twins.iter().any(|twin| twin.first == first) {
            if track.twins.len() >= track.max_twins as usize {
                return Ok(Trapped::Split);
            }
            track.twins.push(Copied::of(env.memory, first)?);
            mmu.stats.twins += 1;
        }
        mmu.open(env, leaf.at, Some(leaf.path()));
        Ok(Trapped::Opened)
    }

    fn harvest(&self, mmu: &mut Mmu, env: &mut Env<'_>) {
        let Some(track) = &mut mmu.track else { return };
        let twins = std::mem::take(&mut track.twins);
        if !mmu.defect(Defect::TwinLeftOpen) {
            for twin in &twins {
                mmu.close_leaves(env, twin.first, Level::M2);
            }
        }
        // Closed for every processor before anything is compared.
        mmu.finish(env);
        let Some(track) = &mut mmu.track else { return };
        for twin in &twins {
            for frame in twin.changed(env.memory) {
                track.dirty.insert(frame);
            }
        }
    }

    fn rearm(&self, mmu: &mut Mmu, env: &mut Env<'_>, frame: Frame, level: Level) {
        // An open huge leaf has a copy that is older than the clear: its next harvest compares.
        if level == Level::K4 {
            mmu.close_leaves(env, frame, level);
        }
    }
}
