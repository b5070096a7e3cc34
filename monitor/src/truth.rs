//! The truth: which pages the guest wrote, from the pattern alone, and how a tracker's report compares with it.

use crate::pages::PageSet;
use crate::report::record::Pages;
use umbra_shared::nested::Map;
use umbra_shared::pattern::{Access, Pattern};

/// Pages that a round touches, numbered as L1's or as L2's. Without an L2 the numbers are the same.
#[derive(Debug)]
pub struct Touched {
    /// Pages written at least once.
    pub written: PageSet,
    /// Pages read at least once.
    pub read: PageSet,
}

impl Touched {
    /// No page of `pages`.
    #[must_use]
    pub fn none(pages: u64) -> Self {
        Self { written: PageSet::new(pages), read: PageSet::new(pages) }
    }
}

/// Which tracked page each of the pattern's is: a map, and what L1 exchanged since.
#[derive(Clone, Debug)]
pub struct Translation {
    map: Map,
    /// All of them, once L1 has exchanged some.
    edited: Option<Vec<u32>>,
}

impl Translation {
    /// By `map`, as long as L1 exchanges nothing.
    #[must_use]
    pub const fn new(map: Map) -> Self {
        Self { map, edited: None }
    }

    /// The tracked page that the pattern's page `page` is now.
    #[must_use]
    pub fn l1_page(&self, page: u64) -> u64 {
        let edited = self.edited.as_ref().and_then(|pages| pages.get(usize::try_from(page).ok()?));
        edited.map_or_else(|| self.map.l1_page(page), |&page| page.into())
    }

    /// Tracked pages.
    #[must_use]
    pub const fn l1_pages(&self) -> u64 {
        self.map.l1_pages()
    }

    /// The pattern's pages.
    #[must_use]
    pub const fn l2_pages(&self) -> u64 {
        self.map.l2_pages()
    }

    /// L1 made its `remaps` exchanges of round `round`.
    pub fn exchange(&mut self, round: u64, remaps: u64) {
        let map = self.map;
        // There are at most 2^31 pages of a pattern, and not more tracked ones.
        let number = |page| u32::try_from(map.l1_page(page)).unwrap_or(u32::MAX);
        let pages = self.edited.get_or_insert_with(|| (0..map.l2_pages()).map(number).collect());
        for index in 0..remaps {
            let (one, other) = map.exchanged(round, index);
            for offset in 0..map.leaf().frames() {
                let at = |page: u64| usize::try_from(page + offset).unwrap_or(usize::MAX);
                if at(one).max(at(other)) < pages.len() {
                    pages.swap(at(one), at(other));
                }
            }
        }
    }
}

/// What one round does to the pages.
#[derive(Debug)]
pub struct Round {
    /// By tracked page.
    pub l1: Touched,
    /// By the pattern's page.
    pub l2: Touched,
    /// Accesses that write.
    pub writes: u64,
    /// The last write to each tracked page: the pattern's page by which it was made.
    last: Vec<Option<u64>>,
}

impl Round {
    /// Evaluates round `round` of `pattern`, whose pages `map` makes tracked pages.
    #[must_use]
    pub fn of(pattern: &Pattern, map: &Translation, round: u64) -> Self {
        Self::from_accesses(map, (0..pattern.accesses()).map(|index| pattern.access(round, index)))
    }

    /// Populating: every page is written once, in ascending order.
    #[must_use]
    pub fn populating(map: &Translation) -> Self {
        Self::from_accesses(map, (0..map.l2_pages()).map(|page| Access { page, write: true }))
    }

    fn from_accesses(map: &Translation, accesses: impl Iterator<Item = Access>) -> Self {
        let mut result = Self {
            l1: Touched::none(map.l1_pages()),
            l2: Touched::none(map.l2_pages()),
            writes: 0,
            last: vec![None; usize::try_from(map.l1_pages()).unwrap_or(usize::MAX)],
        };
        for Access { page, write } in accesses {
            let l1_page = map.l1_page(page);
            if write {
                result.l1.written.insert(l1_page);
                result.l2.written.insert(page);
                result.writes += 1;
                if let Some(last) = usize::try_from(l1_page).ok().and_then(|index| result.last.get_mut(index)) {
                    *last = Some(page);
                }
            } else {
                result.l1.read.insert(l1_page);
                result.l2.read.insert(page);
            }
        }
        result
    }
}

/// What every tracked page must hold: the stamp of the write that was its last.
#[derive(Debug)]
pub struct Contents {
    words: Vec<u64>,
    /// Aliases that several vCPUs write in one round: which of them is the last is open, so any of the round's is right.
    open: Option<Map>,
}

impl Contents {
    /// Memory that nobody has written: zeroes. `vcpus` share the pages that `map` has.
    #[must_use]
    pub fn zeroes(map: &Map, vcpus: usize) -> Self {
        let open = (vcpus > 1 && map.aliases() > 1).then_some(*map);
        Self { words: vec![0; usize::try_from(map.l1_pages()).unwrap_or(usize::MAX)], open }
    }

    /// Takes a round's writes in.
    pub fn write(&mut self, round: u64, touched: &Round) {
        for (word, last) in self.words.iter_mut().zip(&touched.last) {
            if let Some(page) = last {
                *word = Pattern::stamp(round, *page);
            }
        }
    }

    /// Pages that the round's writes leave as they are.
    #[must_use]
    pub fn unchanged(&self, round: u64, touched: &Round) -> PageSet {
        let mut unchanged = PageSet::new(self.words.len() as u64);
        for ((page, word), last) in (0..).zip(&self.words).zip(&touched.last) {
            if last.is_some_and(|last| *word == Pattern::stamp(round, last)) {
                unchanged.insert(page);
            }
        }
        unchanged
    }

    /// Whether `page` may begin with `word`. Nothing is right beyond the last page.
    #[must_use]
    pub fn holds(&self, page: u64, word: Option<u64>) -> bool {
        let expected = usize::try_from(page).ok().and_then(|page| self.words.get(page).copied());
        let (Some(expected), Some(word)) = (expected, word) else { return false };
        // A stamp has the round in its upper half and the pattern's page in the lower.
        let alias = |map: &Map| {
            let other = word & u64::from(u32::MAX);
            word >> 32 == expected >> 32 && other < map.l2_pages() && map.l1_page(other) == page
        };
        word == expected || self.open.as_ref().is_some_and(alias)
    }

    /// Pages whose first word, as `word` reads it, is not what they must hold.
    pub fn wrong<'a>(&'a self, word: impl Fn(u64) -> Option<u64> + 'a) -> impl Iterator<Item = u64> + 'a {
        (0..self.words.len() as u64).filter(move |&page| !self.holds(page, word(page)))
    }
}

/// The pages of L2 that `map` makes one of `l1`.
#[must_use]
pub fn l2_of(map: &Translation, l1: &PageSet) -> PageSet {
    let mut l2 = PageSet::new(map.l2_pages());
    for page in (0..map.l2_pages()).filter(|&page| l1.contains(map.l1_page(page))) {
        l2.insert(page);
    }
    l2
}

/// The tracked pages that `map` makes of `l2`.
#[must_use]
pub fn l1_of(map: &Translation, l2: &PageSet) -> PageSet {
    let mut l1 = PageSet::new(map.l1_pages());
    for page in l2.iter() {
        l1.insert(map.l1_page(page));
    }
    l1
}

/// A report held against the truth.
#[derive(Debug)]
pub struct Verdict {
    /// The numbers.
    pub pages: Pages,
    /// Written and not reported.
    pub missed: PageSet,
    /// Reported, not written, not explained.
    pub extra: PageSet,
}

impl Verdict {
    /// Compares. `explained` are pages that may be reported without having been written.
    #[must_use]
    pub fn of(written: &PageSet, reported: &PageSet, explained: &PageSet) -> Self {
        let missed = written.without(reported);
        let beyond = reported.without(written);
        let extra = beyond.without(explained);
        let pages = Pages {
            written: written.count(),
            reported: reported.count(),
            missed: missed.count(),
            extra: extra.count(),
            explained: beyond.count() - extra.count(),
            unchanged: 0,
        };
        Self { pages, missed, extra }
    }

    /// The same for a tracker that compares bytes: it need not report pages of which `unchanged` says that their writes left them as they were.
    #[must_use]
    pub fn comparing(mut self, unchanged: &PageSet) -> Self {
        let missed = self.missed.without(unchanged);
        self.pages.unchanged = self.missed.count() - missed.count();
        self.pages.missed = missed.count();
        Self { missed, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_shared::Level;
    use umbra_shared::nested::AliasKind;
    use umbra_shared::pattern::Kind;

    fn pattern(pages: u64, write_percent: u64) -> Pattern {
        Pattern { kind: Kind::Random, seed: 3, pages, write_percent, accesses_per_page: 1 }
    }

    fn plain(write_percent: u64) -> Round {
        Round::of(&pattern(200, write_percent), &Translation::new(Map::identity(200)), 1)
    }

    fn aliased() -> Map {
        Map::new(200, Level::K4, 3, AliasKind::Scattered, 1).unwrap()
    }

    #[test]
    fn a_quarter_is_a_quarter() {
        let round = plain(25);
        assert_eq!((round.writes, round.l1.written.count(), round.l1.read.count()), (50, 50, 150));
        assert_eq!(round.l1.written, round.l2.written);
    }

    #[test]
    fn a_lost_page_and_an_extra_one_are_seen() {
        let written = plain(25).l1.written;
        let none = PageSet::new(200);
        assert_eq!(Verdict::of(&written, &written, &none).pages.missed, 0);
        let mut reported = written.clone();
        let lost = reported.iter().next().unwrap();
        reported.remove(lost);
        let extra = (0..200).find(|&page| !written.contains(page)).unwrap();
        reported.insert(extra);
        let verdict = Verdict::of(&written, &reported, &none);
        assert_eq!((verdict.pages.missed, verdict.pages.extra), (1, 1));
        assert!(verdict.missed.contains(lost) && verdict.extra.contains(extra));
        let mut explained = PageSet::new(200);
        explained.insert(extra);
        let verdict = Verdict::of(&written, &reported, &explained);
        assert_eq!((verdict.pages.extra, verdict.pages.explained), (0, 1));
    }

    #[test]
    fn only_what_was_written_over_with_the_same_bytes_may_go_unseen() {
        let now = Translation::new(Map::identity(200));
        let round = Round::of(&pattern(200, 25), &now, 1);
        let mut contents = Contents::zeroes(&Map::identity(200), 1);
        assert_eq!(contents.unchanged(1, &round).count(), 0);
        contents.write(1, &round);
        let unchanged = contents.unchanged(1, &round);
        assert_eq!(unchanged, round.l1.written);
        assert_eq!(contents.unchanged(2, &round).count(), 0);
        let none = PageSet::new(200);
        let pages = Verdict::of(&round.l1.written, &none, &none).comparing(&unchanged).pages;
        assert_eq!((pages.written, pages.unchanged, pages.missed), (50, 50, 0));
        // Reported all the same: by a tracker that happens to see it.
        let pages = Verdict::of(&round.l1.written, &round.l1.written, &none).comparing(&unchanged).pages;
        assert_eq!((pages.unchanged, pages.missed, pages.extra), (0, 0, 0));
        let pages = Verdict::of(&round.l1.written, &none, &none).comparing(&none).pages;
        assert_eq!((pages.unchanged, pages.missed), (0, 50));
    }

    #[test]
    fn aliases_are_one_page_of_l1() {
        let now = Translation::new(aliased());
        let round = Round::of(&pattern(600, 25), &now, 2);
        assert_eq!((round.writes, round.l2.written.count()), (150, 150));
        assert!(round.l1.written.count() < 150, "no two aliases were written");
        assert_eq!(l1_of(&now, &round.l2.written), round.l1.written);
        let all = l2_of(&now, &round.l1.written);
        assert_eq!(all.count(), 3 * round.l1.written.count());
        assert_eq!(round.l2.written.without(&all).count(), 0);
    }

    #[test]
    fn exchanged_leaves_change_places_and_all_pages_stay() {
        let mut now = Translation::new(aliased());
        let before: Vec<u64> = (0..600).map(|page| now.l1_page(page)).collect();
        now.exchange(3, 1);
        let (one, other) = aliased().exchanged(3, 0);
        let after: Vec<u64> = (0..600).map(|page| now.l1_page(page)).collect();
        let mut expected = before.clone();
        expected.swap(usize::try_from(one).unwrap(), usize::try_from(other).unwrap());
        assert_ne!(one, other);
        assert_eq!(after, expected);
        now.exchange(3, 1);
        assert_eq!((0..600).map(|page| now.l1_page(page)).collect::<Vec<_>>(), before);
    }

    #[test]
    fn contents_follow_the_last_write() {
        let map = aliased();
        let pattern = pattern(600, 25);
        let mut memory = vec![0; 200];
        let mut contents = Contents::zeroes(&map, 1);
        assert_eq!(contents.wrong(|page| memory.get(usize::try_from(page).unwrap()).copied()).count(), 0);
        contents.write(0, &Round::populating(&Translation::new(map)));
        for page in 0..600 {
            memory[usize::try_from(map.l1_page(page)).unwrap()] = Pattern::stamp(0, page);
        }
        for number in 1..4 {
            contents.write(number, &Round::of(&pattern, &Translation::new(map), number));
            for access in (0..600).map(|index| pattern.access(number, index)).filter(|access| access.write) {
                memory[usize::try_from(map.l1_page(access.page)).unwrap()] = Pattern::stamp(number, access.page);
            }
        }
        let wrong = |memory: &[u64]| {
            contents.wrong(|page| memory.get(usize::try_from(page).unwrap()).copied()).collect::<Vec<_>>()
        };
        assert_eq!(wrong(&memory), [0_u64; 0]);
        memory[7] ^= 1 << 32;
        assert_eq!(wrong(&memory), [7]);
        assert!(!contents.holds(200, Some(0)) && !contents.holds(0, None));
    }

    #[test]
    fn vcpus_that_share_an_alias_leave_its_last_writer_open() {
        let map = Map::new(4, Level::K4, 2, AliasKind::Contiguous, 1).unwrap();
        let mut contents = Contents::zeroes(&map, 2);
        contents.write(0, &Round::populating(&Translation::new(map)));
        assert!(contents.holds(1, Some(Pattern::stamp(0, 1))) && contents.holds(1, Some(Pattern::stamp(0, 5))));
        assert!(!contents.holds(1, Some(Pattern::stamp(0, 2))) && !contents.holds(1, Some(Pattern::stamp(1, 5))));
        assert!(!contents.holds(1, Some(Pattern::stamp(0, 9))));
    }
}
