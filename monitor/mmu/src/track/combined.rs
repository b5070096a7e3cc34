//! `combined` (seed 003): the first write to a block of 64 entries traps; the whole block is then open, its writes are
//! noticed by dirty flags, and the harvest scans open blocks alone. A clear closes the blocks again.

use umbra_shared::Level;

use super::dirty_bit::arm;
use super::{Leaf, Strategy, Tracking};
use crate::memory::Env;
use crate::mmu::Mmu;
use crate::spte::{Frame, Spte};

/// A fault every 64 neighbours instead of every page; the harvest costs what was touched.
#[derive(Clone, Copy, Debug)]
pub struct Combined;

impl Strategy for Combined {
    fn name(&self) -> &'static str {
        "combined"
    }

    fn uses_dirty_bits(&self) -> bool {
        true
    }

    fn arm(&self, _: &Tracking, spte: Spte, level: Level) -> Spte {
        arm(spte, level).closed()
    }

    fn admit(&self, _: &Tracking, _: Frame, level: Level, touched: bool) -> bool {
        level == Level::K4 && touched
    }

    fn admit_word(&self, _: &Tracking, _: Frame, touched: bool) -> u64 {
        if touched { u64::MAX } else { 0 }
    }

    fn trap(&self, mmu: &mut Mmu, env: &mut Env<'_>, leaf: &Leaf) {
        mmu.open_block(env, leaf);
    }

    fn harvest(&self, mmu: &mut Mmu, env: &mut Env<'_>) {
        mmu.scan_dirty(env, true);
    }

    fn rearm(&self, mmu: &mut Mmu, env: &mut Env<'_>, frame: Frame, level: Level) {
        if level == Level::K4 {
            mmu.close_blocks(env, frame);
        }
    }
}
