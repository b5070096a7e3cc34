//! What a tracker may report although it was not written: predicted page by page from the tracker's definition and from what
//! the guest is known to have done, without a look at the tracker's output.

use super::Kind;
use crate::host;
use crate::kvm::Backing;
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
/// - *Marked by 2 MiB*: the trackers outside KVM look at marks in the host's page table, and where Linux keeps a huge mapping whole there is one
///   mark for all of it. hugetlbfs never splits. Huge shmem under `pagemap`: the first write drops the mapping and its mark, and with it
///   512 pages count as written (`wp_huge_pmd` in mm/memory.c); `uffd-wp` is exact there, since to protect it is to split it (`pgtable_split_needed` in
///   mm/mprotect.c). Anonymous huge pages are split by the first write to a page that userfaultfd protects; to soft-dirty bits they are one page.
/// - *Resident*: `mincore` reports what is in memory, and the guest has touched every page before tracking begins.
#[derive(Debug)]
pub struct Expectation {
    all: bool,
    /// `mincore`: whatever is resident.
    resident: bool,
    /// Slots whose pages are marked by 2 MiB.
    marked_whole: Option<Vec<Slot>>,
    /// Where huge mappings may be dropped: what is not known to be mapped at 4 KiB yet.
    dropped: Option<Dropped>,
}

/// What the host does, as far as it decides what a tracker over-reports.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// KVM drops huge mappings in order to split them.
    pub drops_huge_mappings: bool,
    /// A memfd's pages are huge where they fit.
    pub huge_shmem: bool,
}

impl Host {
    /// This host.
    #[must_use]
    pub fn here() -> Self {
        Self { drops_huge_mappings: host::drops_huge_mappings(), huge_shmem: host::huge_shmem() }
    }
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
    /// For a tracker over `slots`, whose memory is of `backing`.
    #[must_use]
    pub fn new(kind: Kind, slots: &[Slot], backing: Backing, host: Host) -> Self {
        let drops_huge = kind.is_of_kvm() && backing.is_huge() && host.drops_huge_mappings;
        let huge_shmem = backing == Backing::ShmemHuge || backing == Backing::Shmem && host.huge_shmem;
        let marked_whole = match kind {
            Kind::Pagemap | Kind::PagemapTwoSteps => backing == Backing::Hugetlb || huge_shmem,
            Kind::UffdWp => backing == Backing::Hugetlb,
            Kind::SoftDirty => backing.is_huge() || huge_shmem,
            _ => false,
        };
        let dropped = drops_huge.then(|| {
            let pages = slots.iter().map(|slot| slot.pages).sum();
            let mut unmapped = PageSet::new(pages);
            unmapped.fill();
            Dropped { slots: slots.to_vec(), unmapped, opened: PageSet::new(pages) }
        });
        Self {
            all: kind.initially_all_set(),
            resident: kind == Kind::Mincore,
            marked_whole: marked_whole.then(|| slots.to_vec()),
            dropped,
        }
    }

    /// Whether the next harvest must report every page: *initially all set* promises that of the first.
    #[must_use]
    pub const fn promises_all(&self) -> bool {
        self.all
    }

    /// The pages that this harvest may report beyond `written`, when the guest `read` those pages since the last one.
    pub fn explained(&mut self, written: &PageSet, read: &PageSet) -> PageSet {
        let mut explained = PageSet::new(written.capacity());
        if let Some(dropped) = &mut self.dropped {
            dropped.explain(written, read, &mut explained);
        }
        for slot in self.marked_whole.iter().flatten() {
            whole_huge_pages(slot, written, &mut explained);
        }
        if std::mem::take(&mut self.all) || self.resident {
            explained.fill();
        }
        explained.without(written)
    }
}

/// Adds the pages of each 2 MiB of `slot` that a written page lies in. Slots begin at 2 MiB boundaries, in the guest and in the host.
fn whole_huge_pages(slot: &Slot, written: &PageSet, explained: &mut PageSet) {
    let frames = Level::M2.frames();
    for first in (0..slot.pages).step_by(usize::try_from(frames).unwrap_or(1)) {
        let pages = slot.first_page + first..slot.first_page + (first + frames).min(slot.pages);
        if pages.clone().any(|page| written.contains(page)) {
            pages.for_each(|page| {
                explained.insert(page);
            });
        }
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

    fn expect(kind: Kind, backing: Backing, drops_huge_mappings: bool) -> Expectation {
        Expectation::new(kind, &slots(), backing, Host { drops_huge_mappings, huge_shmem: false })
    }

    #[test]
    fn only_the_first_harvest_of_init_set_reports_all() {
        let mut expectation = expect(Kind::ClearInitSet, Backing::Thp, false);
        assert_eq!(expectation.explained(&set(&[1]), &set(&[])).count(), PAGES - 1);
        assert_eq!(expectation.explained(&set(&[1]), &set(&[2])).count(), 0);
    }

    #[test]
    fn reads_explain_only_where_a_huge_mapping_was_dropped() {
        let mut eager = expect(Kind::Bitmap, Backing::Thp, false);
        assert_eq!(eager.explained(&set(&[1]), &set(&[2, 3])).count(), 0);
        let mut small = expect(Kind::Bitmap, Backing::Anonymous, true);
        assert_eq!(small.explained(&set(&[1]), &set(&[2, 3])).count(), 0);
        let mut lazy = expect(Kind::Bitmap, Backing::Thp, true);
        // Slot 1 begins at page 700: 700 to 1211 are one huge page, 600 belongs to slot 0's second one.
        assert_eq!(lazy.explained(&set(&[701]), &set(&[2, 600, 703, 1300])), set(&[703]));
        // Page 703 may have been read before the drop: it may be reported once more, and is then mapped for sure.
        assert_eq!(lazy.explained(&set(&[701]), &set(&[703, 704])), set(&[703, 704]));
        assert_eq!(lazy.explained(&set(&[701]), &set(&[703, 704])).count(), 0);
        // A written page is mapped.
        assert_eq!(lazy.explained(&set(&[3]), &set(&[701])).count(), 0);
    }

    #[test]
    fn one_mark_for_a_huge_page_explains_all_of_it() {
        let whole: Vec<u64> = (700..1212).filter(|&page| page != 701).collect();
        for (kind, backing, huge_shmem, marked_whole) in [
            (Kind::Pagemap, Backing::Hugetlb, false, true),
            (Kind::PagemapTwoSteps, Backing::Shmem, true, true),
            (Kind::Pagemap, Backing::Shmem, false, false),
            (Kind::Pagemap, Backing::Thp, true, false),
            (Kind::UffdWp, Backing::Hugetlb, false, true),
            (Kind::UffdWp, Backing::Shmem, true, false),
            (Kind::SoftDirty, Backing::Thp, false, true),
            (Kind::SoftDirty, Backing::Anonymous, true, false),
            (Kind::Clear, Backing::Hugetlb, false, false),
        ] {
            let host = Host { drops_huge_mappings: false, huge_shmem };
            let mut expectation = Expectation::new(kind, &slots(), backing, host);
            let expected = if marked_whole { set(&whole) } else { set(&[]) };
            for _ in 0..2 {
                assert_eq!(expectation.explained(&set(&[701]), &set(&[3])), expected, "{kind} {backing}");
            }
        }
        // The last 2 MiB of a slot end with the slot.
        let mut expectation = expect(Kind::Pagemap, Backing::Hugetlb, false);
        assert_eq!(expectation.explained(&set(&[699]), &set(&[])), set(&(512..699).collect::<Vec<_>>()));
    }

    #[test]
    fn whatever_is_resident_explains_mincore() {
        let mut expectation = expect(Kind::Mincore, Backing::Thp, true);
        for _ in 0..2 {
            assert_eq!(expectation.explained(&set(&[1]), &set(&[])).count(), PAGES - 1);
        }
    }
}
