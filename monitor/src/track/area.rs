//! The tracked slots as Linux sees them: stretches of host memory.

use crate::guest::Machine;
use crate::hostmm::{Hva, Stretch};
use crate::kvm::Backing;
use crate::kvm::memory::HostMemory;
use crate::pages::PageSet;
use umbra_shared::Level;

/// A slot's memory.
#[derive(Clone, Copy, Debug)]
pub struct Area {
    /// Number of its first page among the tracked ones.
    pub first_page: u64,
    /// Where it lies.
    pub stretch: Stretch,
    /// The smallest pages that Linux maps it by: those of hugetlbfs are never split.
    pub granule: Level,
}

impl Area {
    /// The `pages` tracked pages from `first_page` on, which lie in `memory`.
    pub fn new(first_page: u64, pages: u64, memory: &HostMemory) -> Self {
        let granule = if memory.backing() == Backing::Hugetlb { Level::M2 } else { Level::K4 };
        Self { first_page, stretch: Stretch { start: memory.hva(), pages }, granule }
    }

    /// The areas of a machine's tracked slots.
    pub fn of(machine: &Machine) -> Vec<Self> {
        let slots = machine.vm().slots().iter();
        slots.map(|slot| Self::new(slot.place.first_page, slot.place.pages, &slot.memory)).collect()
    }
}

/// How many pages the areas have.
pub fn pages(areas: &[Area]) -> u64 {
    areas.iter().map(|area| area.stretch.pages).sum()
}

/// Puts the pages of `found`, which lies in one of the areas, into `into`. What lies elsewhere is left out.
pub fn insert(areas: &[Area], found: Stretch, into: &mut PageSet) {
    for area in areas {
        if let Some(first) = area.stretch.page(found.start) {
            let part = area.stretch.part(first, found.pages);
            (first..first + part.pages).for_each(|page| {
                into.insert(area.first_page + page);
            });
        }
    }
}

/// The whole page (of the area's granule) at `address`; `None` outside of all areas.
pub fn page_at(areas: &[Area], address: Hva) -> Option<Stretch> {
    areas.iter().find_map(|area| Some(area.stretch.part_of(area.granule, area.stretch.page(address)?, 1)))
}

/// The pages of `set` as stretches of pages that lie one behind the other, each in one area. No page lies in one that is not in `set`.
pub fn stretches<'a>(areas: &'a [Area], set: &'a PageSet) -> impl Iterator<Item = Stretch> + 'a {
    let mut pages = set.iter().peekable();
    std::iter::from_fn(move || {
        loop {
            let first = pages.next()?;
            let Some(area) = areas.iter().rev().find(|area| area.first_page <= first) else { continue };
            let offset = first - area.first_page;
            let mut length = 1;
            while offset + length < area.stretch.pages && pages.next_if_eq(&(first + length)).is_some() {
                length += 1;
            }
            let part = area.stretch.part(offset, length);
            if part.pages > 0 {
                return Some(part);
            }
        }
    })
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use umbra_shared::PAGE_SIZE;

    /// Two slots' memory of 5 and 7 pages, and the areas of it.
    pub fn two(backing: Backing) -> ([HostMemory; 2], Vec<Area>) {
        let memory = [5, 7].map(|pages| HostMemory::new(pages * PAGE_SIZE, backing).unwrap());
        let areas = vec![Area::new(0, 5, &memory[0]), Area::new(5, 7, &memory[1])];
        (memory, areas)
    }

    /// Writes tracked page `page`.
    pub fn write(memory: &[HostMemory; 2], page: u64, value: u64) {
        let written =
            if page < 5 { memory[0].set_first_word(page, value) } else { memory[1].set_first_word(page - 5, value) };
        assert!(written, "page {page}");
    }

    /// The set of these pages.
    pub fn set(pages: &[u64]) -> PageSet {
        let mut set = PageSet::new(12);
        for &page in pages {
            assert!(set.insert(page));
        }
        set
    }

    #[test]
    fn stretches_end_with_their_area_and_cover_what_is_in_the_set() {
        let (_memory, areas) = two(Backing::Anonymous);
        let set = set(&[0, 1, 3, 4, 5, 6, 11]);
        let found: Vec<_> = stretches(&areas, &set).collect();
        let part = |area: usize, first, pages| areas[area].stretch.part(first, pages);
        assert_eq!(found, [part(0, 0, 2), part(0, 3, 2), part(1, 0, 2), part(1, 6, 1)]);
        let mut again = PageSet::new(12);
        for stretch in found {
            insert(&areas, stretch, &mut again);
        }
        assert_eq!(again, set);
    }

    #[test]
    fn addresses_find_their_page() {
        let (_memory, areas) = two(Backing::Anonymous);
        let address = Hva(areas[1].stretch.start.plus(3).0 + 17);
        assert_eq!(page_at(&areas, address), Some(areas[1].stretch.part(3, 1)));
        assert_eq!(page_at(&areas, areas[1].stretch.end()), None);
        let huge = [Area { granule: Level::M2, ..areas[1] }];
        assert_eq!(page_at(&huge, address), Some(areas[1].stretch));
        assert_eq!(pages(&areas), 12);
    }
}
