//! Tracking under test: what was written, and whether each report agrees with it.

use std::collections::BTreeSet;

use umbra_shared::L2Gfn;

use super::World;
use crate::config::MmuError;
use crate::dirty::PageSet;
use crate::memory::L1Memory;
use crate::spte::Frame;

impl World {
    pub(super) fn start(&mut self) -> Result<(), String> {
        match self.mmu.start(&mut self.walker.env()) {
            Ok(()) if !self.tracking => {}
            Err(MmuError::Tracking) if self.tracking => return Ok(()),
            other => return Err(format!("{other:?}")),
        }
        self.tracking = true;
        self.forget_truth();
        if self.setup.config.strategy.starts_all_set() {
            for slot in self.slots.slots() {
                self.initial.insert_range(slot.first, slot.frames);
            }
        }
        Ok(())
    }

    fn forget_truth(&mut self) {
        let frames = self.setup.config.memory_frames;
        self.truth.clear();
        self.truth_l2.clear();
        self.ever_l2.clear();
        self.before.clear();
        (self.reported, self.initial) = (PageSet::new(frames), PageSet::new(frames));
    }

    pub(super) fn harvest(&mut self) -> Result<(), String> {
        if !self.tracking {
            let refused = self.mmu.harvest(&mut self.walker.env(), &mut self.harvested);
            return if refused == Err(MmuError::NotTracking) { Ok(()) } else { Err(format!("{refused:?}")) };
        }
        let count = self.mmu.harvest(&mut self.walker.env(), &mut self.harvested).map_err(|error| error.to_string())?;
        if count != self.harvested.len() {
            return Err(format!("{count} pages counted, {} reported", self.harvested.len()));
        }
        let twin = self.setup.config.strategy.compares();
        for &frame in &self.truth {
            let seen = self.harvested.contains(frame) || twin && self.unchanged(frame);
            if !seen {
                return Err(format!("{frame:?} was written and is not reported"));
            }
        }
        for frame in self.harvested.iter() {
            let explained = self.truth.contains(&frame)
                || self.initial.contains(frame)
                || twin && (self.reported.contains(frame) || self.before.contains_key(&frame));
            if !explained {
                return Err(format!("{frame:?} is reported and was not written"));
            }
        }
        self.harvest_l2()?;
        self.reported.union(&self.harvested);
        self.before.clear();
        Ok(())
    }

    fn unchanged(&self, frame: Frame) -> bool {
        let mut now = [0; 512];
        self.walker.memory.copy_page(frame, &mut now);
        self.before.get(&frame).is_none_or(|before| **before == now)
    }

    fn harvest_l2(&mut self) -> Result<(), String> {
        if !self.setup.config.by_l2 {
            return Ok(());
        }
        let Some(frames) = self.mmu.harvest_l2().map_err(|error| error.to_string())? else { return Ok(()) };
        let frames: BTreeSet<L2Gfn> = frames.into_iter().collect();
        if let Some((l2, frame)) = self.truth_l2.iter().find(|(l2, _)| !frames.contains(l2)) {
            return Err(format!("L2 {l2} ({frame:?}) was written and is not reported by L2 frame"));
        }
        // Other frames can only be there because they share a shadow page, and so their place in a table.
        match frames.iter().find(|l2| !self.ever_l2.contains(&(l2.0 & 511))) {
            Some(l2) => Err(format!("L2 {l2} is reported, shares no table with a written one")),
            None => Ok(()),
        }
    }

    pub(super) fn clear(&mut self, first: u64, count: u64) -> Result<(), String> {
        let result = self.mmu.clear(&mut self.walker.env(), Frame(first), count);
        if !self.tracking {
            return if result == Err(MmuError::NotTracking) { Ok(()) } else { Err(format!("{result:?}")) };
        }
        result.map_err(|error| error.to_string())?;
        let end = first + count;
        let cleared: Vec<Frame> = self.reported.iter().filter(|frame| (first..end).contains(&frame.0)).collect();
        for frame in cleared {
            self.reported.remove(frame);
            self.initial.remove(frame);
            self.truth.remove(&frame);
            self.truth_l2.retain(|_, written| *written != frame);
        }
        Ok(())
    }

    pub(super) fn stop(&mut self) -> Result<(), String> {
        match self.mmu.stop(&mut self.walker.env()) {
            Ok(()) if self.tracking => {}
            Err(MmuError::NotTracking) if !self.tracking => return Ok(()),
            other => return Err(format!("{other:?}")),
        }
        self.tracking = false;
        self.forget_truth();
        Ok(())
    }
}
