//! `mincore`: the pages that are in memory, whoever touched them and when. It has no way to begin, to clear or to end.

use super::Tracker;
use super::area::{self, Area};
use crate::guest::Machine;
use crate::hostmm::residency;
use crate::kvm::Error;
use crate::pages::PageSet;

/// The areas' resident pages.
pub struct Resident {
    areas: Vec<Area>,
    /// A byte for each page.
    pages: Vec<u8>,
}

impl Resident {
    /// A tracker of `areas`.
    pub fn new(areas: Vec<Area>) -> Self {
        let pages = usize::try_from(area::pages(&areas)).unwrap_or(usize::MAX);
        Self { areas, pages: vec![u8::MAX; pages] }
    }

    fn read(&mut self) -> Result<(), Error> {
        let mut rest = &mut self.pages[..];
        for area in &self.areas {
            let pages = usize::try_from(area.stretch.pages).unwrap_or(usize::MAX).min(rest.len());
            let (own, behind) = rest.split_at_mut(pages);
            residency::read(area.stretch, own)?;
            rest = behind;
        }
        Ok(())
    }

    fn found(&self, into: &mut PageSet) {
        (0..).zip(&self.pages).filter(|(_, byte)| residency::is_resident(**byte)).for_each(|(page, _)| {
            into.insert(page);
        });
    }
}

impl Tracker for Resident {
    fn start(&mut self, _machine: &Machine) -> Result<(), Error> {
        Ok(())
    }

    fn harvest(&mut self, _machine: &Machine) -> Result<(), Error> {
        self.read()
    }

    fn clear(&mut self, _machine: &Machine) -> Result<(), Error> {
        Ok(())
    }

    fn clears(&self) -> bool {
        false
    }

    fn stop(&mut self, _machine: &Machine) -> Result<(), Error> {
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
    use crate::kvm::Backing;

    #[test]
    fn what_was_ever_touched_is_reported() {
        let (memory, areas) = two(Backing::Shmem);
        let mut tracker = Resident::new(areas);
        for (page, all) in [(4, &[4][..]), (11, &[4, 11]), (4, &[4, 11])] {
            write(&memory, page, 1);
            tracker.read().unwrap();
            let mut found = PageSet::new(12);
            tracker.found(&mut found);
            assert_eq!(found, set(all));
        }
    }
}
