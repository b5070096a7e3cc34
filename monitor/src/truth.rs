//! The truth: which pages the guest wrote, from the pattern alone, and how a tracker's report compares with it.

use crate::pages::PageSet;
use crate::report::record::Pages;
use umbra_shared::pattern::Pattern;

/// What one round does to the pages.
#[derive(Debug)]
pub struct Round {
    /// Pages written at least once.
    pub written: PageSet,
    /// Pages read at least once.
    pub read: PageSet,
    /// Accesses that write.
    pub writes: u64,
}

impl Round {
    /// Evaluates round `round` of `pattern`.
    #[must_use]
    pub fn of(pattern: &Pattern, round: u64) -> Self {
        let mut result = Self { written: PageSet::new(pattern.pages), read: PageSet::new(pattern.pages), writes: 0 };
        for index in 0..pattern.accesses() {
            let access = pattern.access(round, index);
            if access.write {
                result.written.insert(access.page);
                result.writes += 1;
            } else {
                result.read.insert(access.page);
            }
        }
        result
    }
}

/// What every page must hold: the round that wrote it last.
#[derive(Debug)]
pub struct Contents {
    last_round: Vec<u64>,
}

impl Contents {
    /// After populating: every page holds the stamp of round 0.
    #[must_use]
    pub fn populated(pages: u64) -> Self {
        Self { last_round: vec![0; usize::try_from(pages).unwrap_or(usize::MAX)] }
    }

    /// Takes a round's writes in.
    pub fn write(&mut self, round: u64, written: &PageSet) {
        for page in written.iter() {
            if let Some(last) = usize::try_from(page).ok().and_then(|page| self.last_round.get_mut(page)) {
                *last = round;
            }
        }
    }

    /// The word that `page` must begin with; `None` beyond the last page.
    #[must_use]
    pub fn stamp(&self, page: u64) -> Option<u64> {
        let last = self.last_round.get(usize::try_from(page).ok()?)?;
        Some(Pattern::stamp(*last, page))
    }

    /// Pages whose first word, as `word` reads it, is not what they must hold.
    pub fn wrong<'a>(&'a self, word: impl Fn(u64) -> Option<u64> + 'a) -> impl Iterator<Item = u64> + 'a {
        (0..self.last_round.len() as u64).filter(move |&page| word(page) != self.stamp(page))
    }
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_shared::pattern::Kind;

    fn pattern(write_percent: u64) -> Pattern {
        Pattern { kind: Kind::Random, seed: 3, pages: 200, write_percent, accesses_per_page: 1 }
    }

    #[test]
    fn a_quarter_is_a_quarter() {
        let round = Round::of(&pattern(25), 1);
        assert_eq!((round.writes, round.written.count(), round.read.count()), (50, 50, 150));
    }

    #[test]
    fn a_lost_page_and_an_extra_one_are_seen() {
        let round = Round::of(&pattern(25), 1);
        let none = PageSet::new(200);
        assert_eq!(Verdict::of(&round.written, &round.written, &none).pages.missed, 0);
        let mut reported = round.written.clone();
        let lost = reported.iter().next().unwrap();
        reported.remove(lost);
        let extra = (0..200).find(|&page| !round.written.contains(page)).unwrap();
        reported.insert(extra);
        let verdict = Verdict::of(&round.written, &reported, &none);
        assert_eq!((verdict.pages.missed, verdict.pages.extra), (1, 1));
        assert!(verdict.missed.contains(lost) && verdict.extra.contains(extra));
        let mut explained = PageSet::new(200);
        explained.insert(extra);
        let verdict = Verdict::of(&round.written, &reported, &explained);
        assert_eq!((verdict.pages.extra, verdict.pages.explained), (0, 1));
    }

    #[test]
    fn contents_follow_the_last_write() {
        let mut contents = Contents::populated(200);
        let round = Round::of(&pattern(25), 7);
        contents.write(7, &round.written);
        let page = round.written.iter().next().unwrap();
        assert_eq!(contents.stamp(page), Some(Pattern::stamp(7, page)));
        let wrong: Vec<_> = contents
            .wrong(|p| {
                Some(Pattern::stamp(if p == page { 6 } else { contents.last_round[usize::try_from(p).unwrap()] }, p))
            })
            .collect();
        assert_eq!(wrong, [page]);
    }
}
