//! What a tracker may report although it was not written: predicted page by page from the tracker's definition and from what
//! the guest is known to have done, without a look at the tracker's output.

use super::Kind;
use crate::pages::PageSet;

/// What may be over-reported, harvest by harvest.
///
/// - *Initially all set*: the first harvest reports every page (api.rst, 7.18).
/// - *First mapped by a read*: a read fault on a page of a logged slot maps it writable and marks it dirty at once (Linux,
///   `make_spte` in arch/x86/kvm/mmu/spte.c). That can only happen to a page which was read and which KVM does not hold mapped at
///   4 KiB; `unmapped` says for which pages that is possible.
#[derive(Debug)]
pub struct Expectation {
    all: bool,
    /// Pages of which a read may still be the first touch that KVM sees since it began to log.
    unmapped: PageSet,
}

impl Expectation {
    /// For a tracker over `pages` pages. `keeps_mappings` says that KVM still maps, after logging began, every page that the guest had touched before:
    /// so it is with two-dimensional paging when huge pages are split rather than dropped.
    #[must_use]
    pub fn new(kind: Kind, pages: u64, keeps_mappings: bool) -> Self {
        let mut unmapped = PageSet::new(pages);
        if !keeps_mappings {
            unmapped.fill();
        }
        Self { all: kind.initially_all_set(), unmapped }
    }

    /// The pages that this harvest may report beyond `written`, when the guest `read` those pages since the last one.
    pub fn explained(&mut self, written: &PageSet, read: &PageSet) -> PageSet {
        let mut explained = PageSet::new(written.capacity());
        if std::mem::take(&mut self.all) {
            explained.fill();
        } else {
            for page in read.iter().filter(|&page| self.unmapped.contains(page)) {
                explained.insert(page);
            }
        }
        explained.without(written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(pages: &[u64]) -> PageSet {
        let mut set = PageSet::new(8);
        for &page in pages {
            assert!(set.insert(page));
        }
        set
    }

    #[test]
    fn only_the_first_harvest_of_init_set_reports_all() {
        let mut expectation = Expectation::new(Kind::ClearInitSet, 8, true);
        assert_eq!(expectation.explained(&set(&[1]), &set(&[])).count(), 7);
        assert_eq!(expectation.explained(&set(&[1]), &set(&[2])).count(), 0);
    }

    #[test]
    fn reads_explain_only_where_mappings_may_be_gone() {
        assert_eq!(Expectation::new(Kind::Bitmap, 8, true).explained(&set(&[1]), &set(&[2, 3])).count(), 0);
        let explained = Expectation::new(Kind::Bitmap, 8, false).explained(&set(&[1]), &set(&[1, 2, 3]));
        assert_eq!(explained, set(&[2, 3]));
    }
}
