//! `log`: as `dirty-bit`, but hardware writes the L2 frame of every flag that it sets to a log of 512 entries, as PML
//! does (SDM 3C 29.3.6). The harvest reads the log instead of scanning.

use umbra_shared::Level;

use super::dirty_bit::arm;
use super::{Strategy, Tracking};
use crate::memory::Env;
use crate::mmu::Mmu;
use crate::spte::{Frame, Spte};

/// Entries of the log; a write that needs one more exits first.
pub const LOG_ENTRIES: usize = 512;

/// An exit every 512 pages; the harvest costs what was written, not what is mapped.
#[derive(Clone, Copy, Debug)]
pub struct Log;

impl Strategy for Log {
    fn name(&self) -> &'static str {
        "log"
    }

    fn uses_dirty_bits(&self) -> bool {
        true
    }

    fn uses_log(&self) -> bool {
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

    fn harvest(&self, mmu: &mut Mmu, _: &mut Env<'_>) {
        mmu.drain_log();
    }

    fn rearm(&self, mmu: &mut Mmu, env: &mut Env<'_>, frame: Frame, level: Level) {
        mmu.clean_leaves(env, frame, level);
    }
}
