//! A set of tracked pages.

/// A bitmap over the tracked pages, numbered from 0 over all slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// The empty set over `pages` pages. Its memory is touched here, so that filling it later allocates nothing.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        let mut set = Self { words: vec![0; words(pages)], pages };
        set.fill();
        set.clear();
        set
    }

    /// Pages that the set could hold.
    #[must_use]
    pub const fn capacity(&self) -> u64 {
        self.pages
    }

    /// Puts `page` in. Returns false, and changes nothing, if it is beyond the last page.
    pub fn insert(&mut self, page: u64) -> bool {
        if page >= self.pages {
            return false;
        }
        self.words[index(page)] |= 1 << (page % 64);
        true
    }

    /// Takes `page` out.
    pub fn remove(&mut self, page: u64) {
        if page < self.pages {
            self.words[index(page)] &= !(1 << (page % 64));
        }
    }

    /// Whether `page` is in.
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        page < self.pages && self.words[index(page)] >> (page % 64) & 1 == 1
    }

    /// Takes all out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Puts all in.
    pub fn fill(&mut self) {
        self.words.fill(u64::MAX);
        if !self.pages.is_multiple_of(64)
            && let Some(last) = self.words.last_mut()
        {
            *last = (1 << (self.pages % 64)) - 1;
        }
    }

    /// How many are in.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The pages that are in, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u64> {
        self.words.iter().enumerate().flat_map(|(index, &word)| {
            let mut rest = word;
            std::iter::from_fn(move || {
                let bit = (rest != 0).then(|| u64::from(rest.trailing_zeros()))?;
                rest &= rest - 1;
                Some(index as u64 * 64 + bit)
            })
        })
    }

    /// The set as bits, page 0 in the lowest.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Adds the `pages` pages from `first` on whose bits are set in a slot's `bitmap`. Bits and pages beyond either end are ignored.
    pub fn add_slot(&mut self, first: u64, pages: u64, bitmap: &[u64]) {
        let whole_words = if first.is_multiple_of(64) { index(pages).min(bitmap.len()) } else { 0 };
        let start = index(first);
        for (mine, theirs) in self.words.iter_mut().skip(start).zip(&bitmap[..whole_words]) {
            *mine |= theirs;
        }
        for offset in whole_words as u64 * 64..pages {
            if bitmap.get(index(offset)).is_some_and(|word| word >> (offset % 64) & 1 == 1) {
                self.insert(first + offset);
            }
        }
    }

    /// Adds all of `other`.
    pub fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
    }

    /// The pages that are here and not in `other`.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        let words = self.words.iter().zip(&other.words).map(|(mine, theirs)| mine & !theirs).collect();
        Self { words, pages: self.pages }
    }
}

#[allow(clippy::cast_possible_truncation)] // usize has 64 bits on the one target there is.
const fn index(page: u64) -> usize {
    (page / 64) as usize
}

const fn words(pages: u64) -> usize {
    index(pages.next_multiple_of(64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn it_is_a_set(pages in 1_u64..300, inserts in prop::collection::vec(0_u64..320, 0..100)) {
            let mut set = PageSet::new(pages);
            let mut model = BTreeSet::new();
            for page in inserts {
                prop_assert_eq!(set.insert(page), page < pages);
                if page < pages {
                    model.insert(page);
                }
            }
            prop_assert_eq!(set.count(), model.len() as u64);
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            let mut all = PageSet::new(pages);
            all.fill();
            prop_assert_eq!(all.count(), pages);
            prop_assert_eq!(all.without(&set).count(), pages - model.len() as u64);
        }

        #[test]
        fn slots_land_where_they_belong(first in 0_u64..200, pages in 1_u64..200, bits in prop::collection::vec(any::<u64>(), 4)) {
            let mut set = PageSet::new(300);
            set.add_slot(first, pages, &bits);
            for page in 0..300_u64 {
                let offset = page.checked_sub(first).filter(|&offset| offset < pages);
                let expected = offset.is_some_and(|offset| bits[index(offset)] >> (offset % 64) & 1 == 1);
                prop_assert_eq!(set.contains(page), expected, "page {}", page);
            }
        }
    }
}
