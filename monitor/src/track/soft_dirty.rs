//! `soft-dirty`: bit 55 of pagemap's entries, cleared by `/proc/self/clear_refs` for the whole process at once.
//!
//! To read and to clear are two calls, and the second also clears what the first has not seen: a write between them is lost, unless the
//! guest stands still from the one to the other, as it does where snapshots are taken this way.

use super::Tracker;
use super::area::{self, Area};
use crate::guest::Machine;
use crate::hostmm::pagemap::{ClearRefs, Pagemap, is_soft_dirty};
use crate::hostmm::{Stretch, missing};
use crate::kvm::memory::HostMemory;
use crate::kvm::{Backing, Error};
use crate::pages::PageSet;
use umbra_shared::{Level, PAGE_SIZE};

/// The areas' writes by soft-dirty bits.
pub struct SoftDirty {
    pagemap: Pagemap,
    clear: ClearRefs,
    areas: Vec<Area>,
    /// An entry for each page.
    entries: Vec<u64>,
}

/// Whether this kernel has the bits at all: without them, clearing succeeds and no write sets any. A private page tells.
pub fn check() -> Result<(), Error> {
    let (pagemap, mut clear) = (Pagemap::open()?, ClearRefs::open()?);
    let memory = HostMemory::new(PAGE_SIZE, Backing::Anonymous)?;
    let is_dirty = |pagemap: &Pagemap| {
        let mut entry = [0];
        pagemap.entries(Stretch { start: memory.hva(), pages: 1 }, &mut entry)?;
        Ok::<_, Error>(is_soft_dirty(entry[0]))
    };
    let _ = memory.set_first_word(0, 1);
    clear.clear_soft_dirty()?;
    let before = is_dirty(&pagemap)?;
    let written = memory.set_first_word(0, 2);
    if before || !written || !is_dirty(&pagemap)? {
        let silent =
            "a page that was written has no soft-dirty bit (/proc/self/clear_refs takes the 4 and does nothing)";
        return Err(missing("CONFIG_MEM_SOFT_DIRTY", silent));
    }
    Ok(())
}

impl SoftDirty {
    /// A tracker of `areas`.
    pub fn new(areas: Vec<Area>) -> Result<Self, Error> {
        if areas.iter().any(|area| area.granule == Level::M2) {
            // Linux, fs/proc/task_mmu.c: clear_refs_walk_ops has no hugetlb_entry.
            return Err(missing("soft-dirty for hugetlbfs", "no kernel clears the bits of its pages"));
        }
        let pages = usize::try_from(area::pages(&areas)).unwrap_or(usize::MAX);
        Ok(Self { pagemap: Pagemap::open()?, clear: ClearRefs::open()?, areas, entries: vec![u64::MAX; pages] })
    }

    fn read(&mut self) -> Result<(), Error> {
        let mut rest = &mut self.entries[..];
        for area in &self.areas {
            let pages = usize::try_from(area.stretch.pages).unwrap_or(usize::MAX).min(rest.len());
            let (own, behind) = rest.split_at_mut(pages);
            self.pagemap.entries(area.stretch, own)?;
            rest = behind;
        }
        Ok(())
    }

    fn found(&self, into: &mut PageSet) {
        (0..).zip(&self.entries).filter(|(_, entry)| is_soft_dirty(**entry)).for_each(|(page, _)| {
            into.insert(page);
        });
    }
}

impl Tracker for SoftDirty {
    fn start(&mut self, _machine: &Machine) -> Result<(), Error> {
        self.clear.clear_soft_dirty()
    }

    fn harvest(&mut self, _machine: &Machine) -> Result<(), Error> {
        self.read()
    }

    fn clear(&mut self, _machine: &Machine) -> Result<(), Error> {
        self.clear.clear_soft_dirty()
    }

    fn clears(&self) -> bool {
        true
    }

    fn stop(&mut self, _machine: &Machine) -> Result<(), Error> {
        // Nothing ends it: pages that are still protected fault once more.
        Ok(())
    }

    fn report(&mut self, _machine: &Machine, into: &mut PageSet) {
        self.found(into);
    }
}

#[cfg(test)]
mod tests {
    use super::super::area::tests::{set, two, write};
    use super::*;

    /// With the bits: each write once. Without: the probe says so.
    #[test]
    fn the_bits_work_or_the_probe_says_that_they_do_not() {
        let (memory, areas) = two(Backing::Anonymous);
        (0..12).for_each(|page| write(&memory, page, 1));
        let mut tracker = SoftDirty::new(areas).unwrap();
        tracker.clear.clear_soft_dirty().unwrap();
        write(&memory, 4, 2);
        write(&memory, 11, 2);
        tracker.read().unwrap();
        let mut found = PageSet::new(12);
        tracker.found(&mut found);
        match check() {
            Ok(()) => assert_eq!(found, set(&[4, 11])),
            Err(error) => {
                assert!(error.to_string().contains("CONFIG_MEM_SOFT_DIRTY"), "{error}");
                assert_ne!(found, set(&[4, 11]));
            }
        }
    }
}
