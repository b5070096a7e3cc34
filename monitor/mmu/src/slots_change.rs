//! L1's memory map changes: slots that move, vanish or go read-only.

use umbra_shared::{Gfn, Level};

use crate::config::MmuError;
use crate::defects::Defect;
use crate::memory::{Env, Slot, Slots};
use crate::mmu::Mmu;
use crate::spte::Frame;

impl Mmu {
    /// Replaces L1's memory map. Whatever was mapped through a range that changed is gone when this returns, and so are
    /// shadow pages whose guest table lies in one.
    ///
    /// # Errors
    /// [`MmuError::BadSlots`]: the new map contradicts itself, and the old one stays.
    pub fn memory_changed(&mut self, env: &mut Env<'_>, slots: &[Slot]) -> Result<(), MmuError> {
        let new = Slots::new(slots, self.config.memory_frames).map_err(MmuError::BadSlots)?;
        for (gfn, frames) in self.slots.changed(&new) {
            let was = self.slots.find(gfn);
            if let Some(was) = was {
                let read_only = new.find(gfn).is_some_and(|now| now.frame == was.frame && !now.writable);
                if !(read_only && self.defect(Defect::ReadOnlyStaysWritable)) {
                    self.zap_frames(env, was.frame, frames);
                }
            }
            self.zap_tables(env, gfn, frames);
        }
        self.slots = new;
        self.finish(env);
        Ok(())
    }

    /// Zaps every leaf that maps one of `count` frames from `first`.
    fn zap_frames(&mut self, env: &mut Env<'_>, first: Frame, count: u64) {
        let end = first.0.saturating_add(count).min(self.config.memory_frames);
        for level in [Level::G1, Level::M2] {
            let mut at = first.0 & !(level.frames() - 1);
            while at < end {
                self.zap_leaves(env, Frame(at), level);
                at += level.frames();
            }
        }
        let mut at = first.0;
        while at < end {
            if self.rmaps.has_small(Frame(at)) {
                self.zap_leaves(env, Frame(at), Level::K4);
                at += 1;
            } else {
                at = (at | 511) + 1;
            }
        }
    }

    fn zap_leaves(&mut self, env: &mut Env<'_>, frame: Frame, level: Level) {
        while let Some(at) = self.rmaps.head(frame, level).oldest() {
            self.drop_spte(env, at);
        }
    }

    /// Zaps shadow pages over tables, or splits of leaves, in the range.
    fn zap_tables(&mut self, env: &mut Env<'_>, gfn: Gfn, frames: u64) {
        for page in 1..self.arena.end() {
            let header = self.arena.header(page);
            if !header.in_use() {
                continue;
            }
            let span = if header.role.direct() { header.role.level().frames() * 512 } else { 1 };
            if header.gfn.0 < gfn.0.saturating_add(frames) && header.gfn.0.saturating_add(span) > gfn.0 {
                self.zap_page(env, page);
            }
        }
    }
}
