//! The full audit: every count, list and link against every other.

use std::collections::BTreeMap;

use umbra_shared::Level;

use crate::mmu::Mmu;
use crate::ptelist::PteLists;
use crate::spte::{Frame, SpteRef};

impl Mmu {
    /// Checks the whole structure. Costs time in proportion to it.
    ///
    /// # Errors
    /// Names the first thing that does not hold.
    pub fn audit(&self) -> Result<(), String> {
        let mut leaves: BTreeMap<SpteRef, (Frame, Level)> = BTreeMap::new();
        let mut links: BTreeMap<SpteRef, u32> = BTreeMap::new();
        let mut in_use = 0;
        for page in 1..self.arena.end() {
            let header = self.arena.header(page);
            if !header.in_use() {
                continue;
            }
            in_use += 1;
            let level = header.role.level();
            let mut present = 0;
            for index in 0..512 {
                let at = SpteRef::new(page, index);
                let spte = self.arena.spte(at);
                if !spte.present() {
                    continue;
                }
                present += 1;
                if spte.is_leaf(level) {
                    self.audit_leaf(at, level)?;
                    leaves.insert(at, (spte.frame(), level));
                } else {
                    links.insert(at, spte.child());
                }
            }
            if present != header.present {
                return Err(format!("page {page} has {present} entries and counts {}", header.present));
            }
            if self.arena.find(header.gfn, header.role) != Some(page) {
                return Err(format!("page {page} is not found by its gfn {} and role", header.gfn));
            }
            if header.is_root() != self.roots.at(header.root()).is_some_and(|root| root.page == page) {
                return Err(format!("page {page} and the table of roots disagree"));
            }
            if header.parents.is_empty() != header.is_root() {
                return Err(format!("page {page} is an orphan, or a root with parents"));
            }
        }
        if in_use != self.arena.in_use() {
            return Err(format!("{in_use} pages in use, {} counted", self.arena.in_use()));
        }
        self.audit_rmaps(&mut leaves)?;
        self.audit_parents(links)?;
        if in_use > self.config.quota() {
            return Err(format!("{in_use} pages above the quota of {}", self.config.quota()));
        }
        Ok(())
    }

    fn audit_leaf(&self, at: SpteRef, level: Level) -> Result<(), String> {
        let spte = self.arena.spte(at);
        let first = spte.frame();
        let end = first.0 + level.frames();
        if first.0 & (level.frames() - 1) != 0 || end > self.config.memory_frames {
            return Err(format!("leaf {at:?} of {level:?} maps {first:?}, which is not aligned or beyond memory"));
        }
        if self.slots.gfn_of(first).is_none() || self.slots.gfn_of(Frame(end - 1)).is_none() {
            return Err(format!("leaf {at:?} maps {first:?}, which no slot has"));
        }
        if spte.writable() && !spte.mmu_writable() {
            return Err(format!("leaf {at:?} is open although writes are not permitted"));
        }
        let open = spte.writable() && level > Level::K4;
        let touched = self.arena.header(at.page()).touched >> (at.index() >> 6) & 1 != 0;
        if let Some(track) = &self.track
            && open
            && first >= self.config.first_tracked
            && !track.strategy.admit(track, first, level, touched)
            && track.twins.iter().all(|twin| !twin.is_of(first))
        {
            return Err(format!("huge leaf {at:?} is open under {}", track.strategy.name()));
        }
        Ok(())
    }

    fn audit_rmaps(&self, leaves: &mut BTreeMap<SpteRef, (Frame, Level)>) -> Result<(), String> {
        if !self.rmaps.counts_hold() {
            return Err("a region of reverse maps counts wrong".into());
        }
        for (frame, level, head) in self.rmaps.lists() {
            let mut cursor = PteLists::walk(head);
            let mut count = 0;
            while let Some(at) = self.lists.next(&mut cursor) {
                count += 1;
                if leaves.remove(&at) != Some((frame, level)) {
                    return Err(format!("reverse map of {frame:?} {level:?} names {at:?}, which is no such leaf"));
                }
            }
            if count != self.lists.count(head) {
                return Err(format!("reverse map of {frame:?} has {count} entries and counts otherwise"));
            }
        }
        match leaves.first_key_value() {
            None => Ok(()),
            Some((at, (frame, _))) => Err(format!("leaf {at:?} of {frame:?} is in no reverse map")),
        }
    }

    fn audit_parents(&self, mut links: BTreeMap<SpteRef, u32>) -> Result<(), String> {
        for page in 1..self.arena.end() {
            let header = self.arena.header(page);
            let mut cursor = PteLists::walk(header.parents);
            let mut paths = 0;
            while let Some(parent) = self.lists.next(&mut cursor) {
                paths += 1;
                if links.remove(&parent) != Some(page) {
                    return Err(format!("page {page} names a parent {parent:?} that does not link to it"));
                }
                let above = self.arena.header(parent.page());
                if above.role.level().number() != header.role.level().number() + 1 {
                    return Err(format!("page {page} is linked from the wrong level"));
                }
                if above.shared() && !header.shared() {
                    return Err(format!("page {page} is not marked as shared, its parent is"));
                }
                if !header.shared() && self.first_path(parent) != (header.root(), header.l2_base) {
                    return Err(format!("page {page} does not know its L2 address"));
                }
            }
            if paths > 1 && !header.shared() {
                return Err(format!("page {page} has {paths} parents and is not marked as shared"));
            }
        }
        match links.first_key_value() {
            None => Ok(()),
            Some((at, child)) => Err(format!("link {at:?} is not among the parents of page {child}")),
        }
    }
}
