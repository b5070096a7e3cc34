//! `write-protect`: every leaf is closed, and the first write to a page traps.

use umbra_shared::Level;

use super::{Strategy, Tracking};
use crate::memory::Env;
use crate::mmu::Mmu;
use crate::spte::{Frame, Spte};

/// Exact to the page, at one fault a page and round.
#[derive(Clone, Copy, Debug)]
pub struct WriteProtect;

impl Strategy for WriteProtect {
    fn name(&self) -> &'static str {
        "write-protect"
    }

    fn arm(&self, _: &Tracking, spte: Spte, _: Level) -> Spte {
        spte.closed()
    }

    fn admit(&self, _: &Tracking, _: Frame, _: Level, _: bool) -> bool {
        false
    }

    fn admit_word(&self, _: &Tracking, _: Frame, _: bool) -> u64 {
        0
    }

    fn rearm(&self, mmu: &mut Mmu, env: &mut Env<'_>, frame: Frame, level: Level) {
        mmu.close_leaves(env, frame, level);
    }
}
