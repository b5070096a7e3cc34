//! The tracked memory: the loops that everything else here exists for.
//!
//! Few instructions an access, because the lab's unit is the executed instruction. An entry of a plan has bit 31 set if it writes,
//! so with the base moved down by `2^31` pages the entry itself, unmasked, leads to the page, and likewise to its stamp.

use super::tsc;
use crate::workload::plan::{Plan, WRITE};
use core::ops::Range;
use umbra_shared::histogram::Histogram;
use umbra_shared::layout::TRACKED_BASE;
use umbra_shared::pattern::Pattern;
use umbra_shared::{PAGE_SHIFT, PAGE_SIZE};

/// What executing a plan came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Executed {
    /// Writes made.
    pub writes: u64,
    /// TSC ticks from before the first access to after the last.
    pub ticks: u64,
}

/// All tracked pages, contiguous in linear addresses.
#[derive(Clone, Copy)]
pub struct Tracked {
    base: *mut u64,
    pages: u64,
}

// SAFETY: linear addresses that mean the same on every vCPU; all accesses are volatile.
unsafe impl Send for Tracked {}

impl Tracked {
    /// The tracked memory of `pages` pages.
    ///
    /// # Safety
    /// That many pages are mapped at [`TRACKED_BASE`], and nothing else of this program is there.
    #[must_use]
    pub(super) unsafe fn mapped(pages: u64) -> Self {
        Self { base: core::ptr::with_exposed_provenance_mut(TRACKED_BASE as usize), pages }
    }

    fn check(&self, plan: &Plan) {
        assert!(plan.pages() <= self.pages, "the plan is for {} pages, {} are mapped", plan.pages(), self.pages);
    }

    /// Where an entry without [`WRITE`] leads.
    #[inline]
    fn to_read(self, entry: u32) -> *const u64 {
        self.base.wrapping_byte_add((u64::from(entry) << PAGE_SHIFT) as usize)
    }

    /// Where an entry with [`WRITE`] leads: as above, from a base that makes up for the bit.
    #[inline]
    fn to_write(self, entry: u32) -> *mut u64 {
        let base = self.base.wrapping_byte_sub((u64::from(WRITE) << PAGE_SHIFT) as usize);
        base.wrapping_byte_add((u64::from(entry) << PAGE_SHIFT) as usize)
    }

    /// The first word of a page. Panics if it is not mapped.
    #[must_use]
    pub fn read(self, page: u64) -> u64 {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        // SAFETY: it is mapped, and nothing else of this program is there.
        unsafe { self.base.wrapping_byte_add((page << PAGE_SHIFT) as usize).read_volatile() }
    }

    /// Stores it. Panics if the page is not mapped.
    pub fn write(self, page: u64, value: u64) {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        // SAFETY: as above.
        unsafe { self.base.wrapping_byte_add((page << PAGE_SHIFT) as usize).write_volatile(value) }
    }

    /// Stores a word of a page. Panics if it has no such word, or is not mapped.
    pub fn write_word(self, page: u64, word: usize, value: u64) {
        assert!(page < self.pages && word < PAGE_SIZE as usize / 8, "word {word} of page {page} of {}", self.pages);
        // SAFETY: as above.
        unsafe { self.base.wrapping_byte_add((page << PAGE_SHIFT) as usize + word * 8).write_volatile(value) }
    }

    /// Executes the plan with `round`'s stamps: the bare loop. Writes are counted by the lengths of their runs, and four at a time are
    /// recognised at once, so that a write costs about six instructions.
    #[inline(never)]
    #[must_use]
    pub fn timed(self, plan: &Plan, round: u64) -> Executed {
        self.check(plan);
        let stamps = stamps_of(round);
        // SAFETY: a plan's pages are below its `pages`, all of which are mapped, and nothing else of this program is there.
        let write = |entry: u32| unsafe { self.to_write(entry).write_volatile(stamps.wrapping_add(u64::from(entry))) };
        let mut rest = plan.entries();
        let mut writes = 0;
        let begin = tsc::now();
        while !rest.is_empty() {
            let before = rest.len();
            while let Some((four, after)) = rest.split_first_chunk::<4>() {
                if four[0] & four[1] & four[2] & four[3] & WRITE == 0 {
                    break;
                }
                four.iter().copied().for_each(write);
                rest = after;
            }
            while let Some((&entry, after)) = rest.split_first().filter(|(entry, _)| **entry & WRITE != 0) {
                write(entry);
                rest = after;
            }
            writes += (before - rest.len()) as u64;
            while let Some((&entry, after)) = rest.split_first().filter(|(entry, _)| **entry & WRITE == 0) {
                // SAFETY: as above.
                let _ = unsafe { self.to_read(entry).read_volatile() };
                rest = after;
            }
        }
        Executed { writes, ticks: tsc::now().wrapping_sub(begin) }
    }

    /// Executes the plan with `round`'s stamps and records what each write took: a stall is a write's (reads would only dilute it).
    #[inline(never)]
    #[must_use]
    pub fn observed(self, plan: &Plan, round: u64, histogram: &mut Histogram) -> Executed {
        self.paced(plan, round, histogram, || true)
    }

    /// Executes the plan as [`Self::observed`] does, each access when `due` says so: it waits, and says whether to go on.
    #[inline(never)]
    #[must_use]
    pub fn paced(self, plan: &Plan, round: u64, histogram: &mut Histogram, mut due: impl FnMut() -> bool) -> Executed {
        self.check(plan);
        let stamps = stamps_of(round);
        let mut writes = 0;
        let begin = tsc::now();
        for &entry in plan.entries() {
            if !due() {
                break;
            }
            if entry & WRITE == 0 {
                // SAFETY: as in `timed`.
                let _ = unsafe { self.to_read(entry).read_volatile() };
                continue;
            }
            let before = tsc::now();
            // SAFETY: as in `timed`.
            unsafe { self.to_write(entry).write_volatile(stamps.wrapping_add(u64::from(entry))) };
            histogram.record(tsc::now().wrapping_sub(before));
            writes += 1;
        }
        Executed { writes, ticks: tsc::now().wrapping_sub(begin) }
    }

    /// Writes `round`'s stamp to each of `pages`. Panics if they are not all mapped.
    #[inline(never)]
    #[must_use]
    pub fn populate(self, pages: Range<u64>, round: u64) -> Executed {
        assert!(pages.end <= self.pages, "page {} is not mapped", pages.end);
        let writes = pages.end.saturating_sub(pages.start);
        let begin = tsc::now();
        for page in pages {
            // SAFETY: the page is mapped, and nothing else of this program is there.
            unsafe {
                self.base.byte_add((page * PAGE_SIZE) as usize).write_volatile(Pattern::stamp(round, page));
            }
        }
        Executed { writes, ticks: tsc::now().wrapping_sub(begin) }
    }
}

/// What an entry with [`WRITE`] lacks to be the stamp of its page: `Pattern::stamp(round, 0)` less the bit.
fn stamps_of(round: u64) -> u64 {
    Pattern::stamp(round, 0).wrapping_sub(u64::from(WRITE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use umbra_shared::pattern::Kind;

    /// As much memory as the pages need, with the word at the start of each page.
    struct Pages(Vec<u64>);

    impl Pages {
        const WORDS: usize = 512;

        fn new(pages: u64) -> Self {
            Self(vec![0; usize::try_from(pages).unwrap() * Self::WORDS])
        }

        fn tracked(&mut self) -> Tracked {
            Tracked { base: self.0.as_mut_ptr(), pages: (self.0.len() / Self::WORDS) as u64 }
        }

        fn words(&self) -> Vec<u64> {
            assert!(self.0.iter().enumerate().all(|(index, &word)| index % Self::WORDS == 0 || word == 0));
            self.0.iter().copied().step_by(Self::WORDS).collect()
        }
    }

    fn truth(pattern: &Pattern, round: u64) -> Vec<u64> {
        let mut words = vec![0; usize::try_from(pattern.pages).unwrap()];
        for access in (0..pattern.accesses()).map(|index| pattern.access(round, index)).filter(|access| access.write) {
            words[usize::try_from(access.page).unwrap()] = Pattern::stamp(round, access.page);
        }
        words
    }

    fn patterns() -> impl Strategy<Value = Pattern> {
        let kinds = prop_oneof![
            Just(Kind::Empty),
            Just(Kind::Sequential),
            Just(Kind::Random),
            Just(Kind::Stride(7)),
            Just(Kind::Same(2)),
            Just(Kind::Clusters(5)),
            Just(Kind::HotSpot { pages: 10, share: 90 }),
        ];
        (kinds, any::<u64>(), 1_u64..200, 0_u64..101, 1_u64..3).prop_map(
            |(kind, seed, pages, write_percent, accesses_per_page)| Pattern {
                kind,
                seed,
                pages,
                write_percent,
                accesses_per_page,
            },
        )
    }

    proptest! {
        #[test]
        fn both_loops_leave_what_the_pattern_says(pattern in patterns(), round in 0_u64..1000, vcpus in 1_u64..5) {
            let (mut timed, mut observed) = (Pages::new(pattern.pages), Pages::new(pattern.pages));
            let mut histogram = Histogram::default();
            let mut writes = 0;
            for vcpu in 0..vcpus {
                let mut buffer = vec![0; usize::try_from(pattern.accesses()).unwrap()];
                let mut plan = Plan::new(&mut buffer);
                plan.fill(&pattern, round, pattern.share(vcpu, vcpus));
                let executed = timed.tracked().timed(&plan, round);
                writes += executed.writes;
                prop_assert_eq!(observed.tracked().observed(&plan, round, &mut histogram).writes, executed.writes);
            }
            prop_assert_eq!(writes, pattern.writes());
            prop_assert_eq!(histogram.count, pattern.writes());
            prop_assert_eq!(timed.words(), truth(&pattern, round));
            prop_assert_eq!(observed.words(), truth(&pattern, round));
        }
    }

    #[test]
    fn populate_writes_its_share_and_no_more() {
        let mut pages = Pages::new(10);
        assert_eq!(pages.tracked().populate(3..7, 5).writes, 4);
        let expected: Vec<u64> =
            (0..10).map(|page| if (3..7).contains(&page) { Pattern::stamp(5, page) } else { 0 }).collect();
        assert_eq!(pages.words(), expected);
    }

    #[test]
    #[should_panic(expected = "the plan is for 4 pages, 2 are mapped")]
    fn a_plan_for_more_pages_is_refused() {
        let pattern = Pattern { kind: Kind::Sequential, seed: 1, pages: 4, write_percent: 100, accesses_per_page: 1 };
        let mut buffer = [0; 4];
        let mut plan = Plan::new(&mut buffer);
        plan.fill(&pattern, 0, 0..4);
        let _ = Pages::new(2).tracked().timed(&plan, 0);
    }
}
