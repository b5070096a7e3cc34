//! `dirty-bit`: small leaves stay open, hardware sets their dirty flags, and the harvest scans for them.

use umbra_shared::Level;

use super::{Strategy, Tracking};
use crate::memory::Env;
use crate::mmu::Mmu;
use crate::spte::{Frame, Spte};

/// No faults on small leaves; every harvest looks at every entry.
#[derive(Clone, Copy, Debug)]
pub struct DirtyBit;

/// Small leaves open and clean, huge ones closed: a huge leaf's flag would say too little.
pub(super) const fn arm(spte: Spte, level: Level) -> Spte {
    if level as u8 > 1 { spte.clean().closed() } else { spte.clean() }
}

impl Strategy for DirtyBit {
    fn name(&self) -> &'static str {
        "dirty-bit"
    }

    fn uses_dirty_bits(&self) -> bool {
        true
    }

    fn arm(&self, _: &Tracking, spte: Spte, level: Level) -> Spte {
        arm(spte, level)
    }

    fn admit(&self, _: &Tracking, _: Frame, level: Level, _: bool) -> bool {
        level == Level::K4
    }

    fn admit_word(&self, _: &Tracking, _: Frame, _: bool) -> u64 {
        u64::MAX
    }

    fn harvest(&self, mmu: &mut Mmu, env: &mut Env<'_>) {
        mmu.scan_dirty(env, false);
    }

    fn rearm(&self, mmu: &mut Mmu, env: &mut Env<'_>, frame: Frame, level: Level) {
        mmu.clean_leaves(env, frame, level);
    }
}
