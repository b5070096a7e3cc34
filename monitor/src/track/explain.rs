//! What a tracker may report although it was not written: predicted page by page from the tracker's definition and from what
//! the guest is known to have done, without a look at the tracker's output.

use super::Kind;
use crate::pages::PageSet;
use umbra_shared::Level;
use umbra_shared::layout::Slot;

/// What may be over-reported, harvest by harvest.
///
/// - *Initially all set*: the first harvest reports every page (api.rst, 7.18).
/// - *First mapped by a read*: a read fault on a page of a logged slot maps it writable and marks it dirty at once (Linux, `make_spte`
///   in arch/x86/kvm/mmu/spte.c). The guest has touched every page before logging begins, so this can only happen where a
///   huge mapping was dropped to be split: the first write to it maps the written page alone, and the others fault in when
///   they are read. KVM that splits eagerly (`kvm.eager_page_split`) never drops one.
#[derive(Debug)]
pub struct Expectation {
    all: bool,
    /// Where huge mappings may be dropped: what is not known to be mapped at 4 KiB yet.
    dropped: Option<Dropped>,
}

#[derive(Debug)]
struct Dropped {
    slots: Vec<Slot>,
    /// Pages not known to be mapped at 4 KiB.
    unmapped: PageSet,
    /// A page for each huge mapping that was written to, and so dropped: its first.
    opened: PageSet,
}

impl Expectation {
    /// For a tracker over `slots`. `drops_huge` says that KVM drops huge mappings in order to split them.
    #[must_use]
    pub fn new(kind: Kind, slots: &[Slot], drops_huge: bool) -> Self {
        let dropped = drops_huge.then(|| {
            let pages = slots.iter().map(|slot| slot.pages).sum();
            let mut unmapped = PageSet::new(pages);
            unmapped.fill();
            Dropped { slots: slots.to_vec(), unmapped, opened: PageSet::new(pages) }
        });
        Self { all: kind.initially_all_set(), dropped }
    }

    /// The pages that this harvest may report beyond `written`, when the guest `read` those pages since the last one.
    pub fn explained(&mut self, written: &PageSet, read: &PageSet) -> PageSet {
        let mut explained = PageSet::new(written.capacity());
        if let Some(dropped) = &mut self.dropped {
            dropped.explain(written, read, &mut explained);
        }
        if std::mem::take(&mut self.all) {
            explained.fill();
        }
        explained.without(written)
    }
}

impl Dropped {
    fn explain(&mut self, written: &PageSet, read: &PageSet, explained: &mut PageSet) {
        // A page that was read after its huge mapping had been dropped in an earlier round is mapped for sure.
        let surely: Vec<_> = read.iter().filter(|&page| self.opened.contains(self.first_of_huge(page))).collect();
        for page in written.iter() {
            self.opened.insert(self.first_of_huge(page));
        }
        for page in read.iter() {
            if self.unmapped.contains(page) && self.opened.contains(self.first_of_huge(page)) {
                explained.insert(page);
            }
        }
        for page in written.iter().chain(surely) {
            self.unmapped.remove(page);
        }
    }

    /// The first page of the 2 MiB that `page` is in. Slots begin at 2 MiB boundaries ([`umbra_shared::layout::slots`]).
    fn first_of_huge(&self, page: u64) -> u64 {
        let slot = self.slots.iter().rev().find(|slot| slot.first_page <= page);
        let first = slot.map_or(0, |slot| slot.first_page);
        page - (page - first) % Level::M2.frames()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_shared::layout;

    const PAGES: u64 = 2 * 700;

    fn slots() -> Vec<Slot> {
        layout::slots(PAGES, 2, Level::K4).unwrap().collect()
    }

    fn set(pages: &[u64]) -> PageSet {
        let mut set = PageSet::new(PAGES);
        for &page in pages {
            assert!(set.insert(page));
        }
        set
    }

    #[test]
    fn only_the_first_harvest_of_init_set_reports_all() {
        let mut expectation = Expectation::new(Kind::ClearInitSet, &slots(), false);
        assert_eq!(expectation.explained(&set(&[1]), &set(&[])).count(), PAGES - 1);
        assert_eq!(expectation.explained(&set(&[1]), &set(&[2])).count(), 0);
    }

    #[test]
    fn reads_explain_only_where_a_huge_mapping_was_dropped() {
        let mut eager = Expectation::new(Kind::Bitmap, &slots(), false);
        assert_eq!(eager.explained(&set(&[1]), &set(&[2, 3])).count(), 0);
        let mut lazy = Expectation::new(Kind::Bitmap, &slots(), true);
        // Slot 1 begins at page 700: 700 to 1211 are one huge page, 600 belongs to slot 0's second one.
        assert_eq!(lazy.explained(&set(&[701]), &set(&[2, 600, 703, 1300])), set(&[703]));
        // Page 703 may have been read before the drop: it may be reported once more, and is then mapped for sure.
        assert_eq!(lazy.explained(&set(&[701]), &set(&[703, 704])), set(&[703, 704]));
        assert_eq!(lazy.explained(&set(&[701]), &set(&[703, 704])).count(), 0);
        // A written page is mapped.
        assert_eq!(lazy.explained(&set(&[3]), &set(&[701])).count(), 0);
    }
}
