//! `pagemap` and `pagemap-2step`: asynchronous write protection by userfaultfd, and `PAGEMAP_SCAN`.
//!
//! The kernel takes a page's protection off at the first write to it; a page without protection is one that was written.
//!
//! - `pagemap` scans and protects again in one call. Under the page table's lock a write comes before, and is reported, or after, and is reported by
//!   the next scan. KVM drops its mappings of the *whole* range for that, so that the guest faults them all in again.
//! - `pagemap-2step` scans, then protects what the scan reported, and nothing else. A page that was written between the two is either one that
//!   was reported: its bytes are read after the protection. Or it was not: then it is not protected, and the next scan reports it.
//!   To close the gaps between reported pages for fewer calls would lose such a write.

use super::Tracker;
use super::area::{self, Area};
use crate::guest::Machine;
use crate::hostmm::pagemap::{Pagemap, Regions, Scan};
use crate::hostmm::userfault::{Mode, Userfault};
use crate::kvm::Error;
use crate::pages::PageSet;

/// Which order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Scan and protect in one call.
    AtOnce,
    /// Scan, then protect what was reported.
    TwoSteps,
}

/// The areas' writes by pagemap.
pub struct WrittenPages {
    order: Order,
    userfault: Userfault,
    pagemap: Pagemap,
    areas: Vec<Area>,
    regions: Regions,
    protections: u64,
}

impl WrittenPages {
    /// A tracker of `areas`.
    pub fn new(areas: Vec<Area>, order: Order) -> Result<Self, Error> {
        Ok(Self {
            order,
            userfault: Userfault::open(Mode::Asynchronous)?,
            pagemap: Pagemap::open()?,
            regions: Regions::for_pages(area::pages(&areas) + areas.len() as u64),
            areas,
            protections: 0,
        })
    }

    fn begin(&self) -> Result<(), Error> {
        self.areas.iter().try_for_each(|area| {
            self.userfault.register(area.stretch)?;
            self.userfault.protect(area.stretch, true)
        })
    }

    fn scan(&mut self) -> Result<(), Error> {
        let scan = match self.order {
            Order::AtOnce => Scan::AndProtect,
            Order::TwoSteps => Scan::Only,
        };
        self.regions.clear();
        self.areas.iter().try_for_each(|area| self.pagemap.scan(area.stretch, scan, &mut self.regions))
    }

    fn protect(&mut self) -> Result<(), Error> {
        if self.order == Order::AtOnce {
            return Ok(());
        }
        for found in self.regions.iter() {
            self.userfault.protect(found, true)?;
            self.protections += 1;
        }
        Ok(())
    }

    fn found(&self, into: &mut PageSet) {
        self.regions.iter().for_each(|found| area::insert(&self.areas, found, into));
    }

    fn end(&self) -> Result<(), Error> {
        self.areas.iter().try_for_each(|area| self.userfault.unregister(area.stretch))
    }
}

impl Tracker for WrittenPages {
    fn start(&mut self, _machine: &Machine) -> Result<(), Error> {
        self.begin()
    }

    fn harvest(&mut self, _machine: &Machine) -> Result<(), Error> {
        self.scan()
    }

    fn clear(&mut self, _machine: &Machine) -> Result<(), Error> {
        self.protect()
    }

    fn clears(&self) -> bool {
        self.order == Order::TwoSteps
    }

    fn stop(&mut self, _machine: &Machine) -> Result<(), Error> {
        self.end()
    }

    fn report(&mut self, _machine: &Machine, into: &mut PageSet) {
        self.found(into);
    }

    fn counters(&self, _machine: &Machine) -> Vec<(&'static str, u64)> {
        let (calls, short) = self.regions.calls();
        let mut counters = vec![("pagemap_scans", calls), ("pagemap_scans_cut_short", short)];
        if self.order == Order::TwoSteps {
            counters.push(("pagemap_protections", self.protections));
        }
        counters
    }
}

#[cfg(test)]
mod tests {
    use super::super::area::tests::{set, two, write};
    use super::*;
    use crate::kvm::Backing;

    fn found(tracker: &WrittenPages) -> PageSet {
        let mut into = PageSet::new(12);
        tracker.found(&mut into);
        into
    }

    #[test]
    fn both_orders_report_each_write_once() {
        for order in [Order::AtOnce, Order::TwoSteps] {
            for backing in [Backing::Anonymous, Backing::Thp, Backing::Shmem] {
                let (memory, areas) = two(backing);
                (0..12).for_each(|page| write(&memory, page, 1));
                let Ok(mut tracker) = WrittenPages::new(areas, order) else { return };
                tracker.begin().unwrap();
                for pages in [&[0, 4, 5, 11][..], &[], &[2, 3]] {
                    for &page in pages {
                        write(&memory, page, 2);
                    }
                    tracker.scan().unwrap();
                    tracker.protect().unwrap();
                    assert_eq!(found(&tracker), set(pages), "{order:?} {backing}");
                }
                tracker.end().unwrap();
            }
        }
    }

    /// What the second step must not protect: a page that was written after the scan had passed it.
    #[test]
    fn a_write_between_the_steps_is_reported_by_the_next_scan() {
        let (memory, areas) = two(Backing::Anonymous);
        (0..12).for_each(|page| write(&memory, page, 1));
        let Ok(mut tracker) = WrittenPages::new(areas, Order::TwoSteps) else { return };
        tracker.begin().unwrap();
        write(&memory, 0, 2);
        write(&memory, 2, 2);
        tracker.scan().unwrap();
        // Page 0 was reported: its new bytes are read after the protection. Page 1, between two reported ones, was not.
        write(&memory, 0, 3);
        write(&memory, 1, 3);
        tracker.protect().unwrap();
        assert_eq!(found(&tracker), set(&[0, 2]));
        tracker.scan().unwrap();
        tracker.protect().unwrap();
        assert_eq!(found(&tracker), set(&[1]));
    }
}
