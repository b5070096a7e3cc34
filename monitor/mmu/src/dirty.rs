//! Sets of pages: a bitmap over L1's memory, and a sparse one over L2's address space.

use umbra_shared::L2Gfn;

use crate::ptelist::narrow;
use crate::spte::Frame;

/// A set of pages of L1's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    /// An empty set with room for `frames` pages.
    #[must_use]
    pub fn new(frames: u64) -> Self {
        Self { words: vec![0; usize::try_from(frames.div_ceil(64)).unwrap_or(usize::MAX)] }
    }

    /// Adds `frame`; beyond the set's room nothing happens.
    #[inline]
    pub fn insert(&mut self, frame: Frame) {
        if let Some(word) = self.word_mut(frame) {
            *word |= 1 << (frame.0 & 63);
        }
    }

    /// Removes `frame`.
    #[inline]
    pub fn remove(&mut self, frame: Frame) {
        if let Some(word) = self.word_mut(frame) {
            *word &= !(1 << (frame.0 & 63));
        }
    }

    /// Adds those of the 64 pages around `frame` that `word` has a bit for.
    #[inline]
    pub fn insert_word(&mut self, frame: Frame, word: u64) {
        if let Some(pages) = self.word_mut(frame) {
            *pages |= word;
        }
    }

    /// Removes those of the 64 pages around `frame` that `word` has a bit for.
    #[inline]
    pub fn remove_word(&mut self, frame: Frame, word: u64) {
        if let Some(pages) = self.word_mut(frame) {
            *pages &= !word;
        }
    }

    fn word_mut(&mut self, frame: Frame) -> Option<&mut u64> {
        self.words.get_mut(usize::try_from(frame.0 >> 6).unwrap_or(usize::MAX))
    }

    /// Whether `frame` is in the set.
    #[inline]
    #[must_use]
    pub fn contains(&self, frame: Frame) -> bool {
        self.word(frame) >> (frame.0 & 63) & 1 != 0
    }

    /// The 64 pages around `frame`, as bits.
    #[inline]
    #[must_use]
    pub fn word(&self, frame: Frame) -> u64 {
        self.words.get(usize::try_from(frame.0 >> 6).unwrap_or(usize::MAX)).copied().unwrap_or(0)
    }

    /// How many of the 512 pages from `first` on, a multiple of 64, are in the set.
    #[must_use]
    pub fn count_region(&self, first: Frame) -> u32 {
        let start = usize::try_from(first.0 >> 6).unwrap_or(usize::MAX);
        let words = self.words.get(start..self.words.len().min(start.saturating_add(8))).unwrap_or_default();
        words.iter().filter(|word| **word != 0).map(|word| word.count_ones()).sum()
    }

    /// Adds `count` pages from `start`; what is beyond the room is left out.
    pub fn insert_range(&mut self, start: Frame, count: u64) {
        let end = start.0.saturating_add(count).min(self.words.len() as u64 * 64);
        let mut at = start.0;
        while at < end {
            if at.is_multiple_of(64) && end - at >= 64 {
                if let Some(word) = self.word_mut(Frame(at)) {
                    *word = u64::MAX;
                }
                at += 64;
            } else {
                self.insert(Frame(at));
                at += 1;
            }
        }
    }

    /// Whether `count` pages from `start` are all in the set.
    #[must_use]
    pub fn contains_range(&self, start: Frame, count: u64) -> bool {
        let mut at = start.0;
        let end = start.0.saturating_add(count);
        while at < end {
            if at.is_multiple_of(64) && end - at >= 64 {
                if self.word(Frame(at)) != u64::MAX {
                    return false;
                }
                at += 64;
            } else {
                if !self.contains(Frame(at)) {
                    return false;
                }
                at += 1;
            }
        }
        true
    }

    /// Adds everything in `other`.
    pub fn union(&mut self, other: &Self) {
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }

    /// Adds everything in `self` to `reported`, and makes `copy` a copy of it, in the room that there is. Returns how many pages that are.
    pub fn report(&self, reported: &mut Self, copy: &mut Self) -> u64 {
        let mut count = 0;
        copy.words.iter_mut().skip(self.words.len()).for_each(|word| *word = 0);
        for ((&word, reported), copy) in self.words.iter().zip(&mut reported.words).zip(&mut copy.words) {
            *copy = word;
            // Most words have none, and to count costs.
            if word != 0 {
                *reported |= word;
                count += u64::from(word.count_ones());
            }
        }
        count
    }

    /// Pages in the set.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether the set is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// The pages in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Frame> + '_ {
        self.words
            .iter()
            .enumerate()
            .flat_map(|(index, &word)| bits(word).map(move |bit| Frame(index as u64 * 64 + bit)))
    }

    /// Pages that the set has room for.
    #[must_use]
    pub fn room(&self) -> u64 {
        self.words.len() as u64 * 64
    }

    /// Heap bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.words.capacity() as u64 * 8
    }
}

/// The set bits of `word`, lowest first.
pub fn bits(word: u64) -> impl Iterator<Item = u64> {
    let mut rest = word;
    std::iter::from_fn(move || {
        let bit = (rest != 0).then(|| u64::from(rest.trailing_zeros()))?;
        rest &= rest - 1;
        Some(bit)
    })
}

#[derive(Clone, Copy, Debug)]
struct Region {
    number: u64,
    dirty: [u64; 8],
    reported: [u64; 8],
}

/// A set of L2 frames, in regions of 512. What was reported stays until it is cleared.
#[derive(Debug, Default)]
pub struct L2Set {
    regions: Vec<Region>,
    slots: Vec<u32>,
    limit: u32,
    overflowed: bool,
    overflow_reported: bool,
}

impl L2Set {
    /// An empty set of at most `limit` regions.
    #[must_use]
    pub fn new(limit: u32) -> Self {
        Self { limit, ..Self::default() }
    }

    /// More regions were written than the set may name: its report stands for "all of L2".
    #[must_use]
    pub const fn overflowed(&self) -> bool {
        self.overflowed || self.overflow_reported
    }

    /// The next report will say "all of L2": there is nothing to add.
    #[must_use]
    pub const fn is_all(&self) -> bool {
        self.overflowed
    }

    /// Makes the report stand for "all of L2".
    pub const fn overflow(&mut self) {
        self.overflowed = true;
    }

    /// The region numbered `number`, by its index; or the free slot where it belongs.
    fn probe(&self, number: u64) -> Result<usize, usize> {
        let mask = self.slots.len().max(1) - 1;
        let mut at = usize::try_from(number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33).unwrap_or(0) & mask;
        while let Some(&slot @ 1..) = self.slots.get(at) {
            let index = slot as usize - 1;
            if self.regions.get(index).is_some_and(|region| region.number == number) {
                return Ok(index);
            }
            at = (at + 1) & mask;
        }
        Err(at)
    }

    /// Adds `gfn`.
    pub fn insert(&mut self, gfn: L2Gfn) {
        let number = gfn.0 >> 9;
        if (self.regions.len() + 1) * 2 > self.slots.len() {
            self.slots = vec![0; (self.slots.len() * 2).max(32)];
            self.index();
        }
        let index = match self.probe(number) {
            Ok(index) => index,
            Err(_) if self.regions.len() >= self.limit as usize => {
                self.overflowed = true;
                return;
            }
            Err(slot) => {
                if self.regions.len() == self.regions.capacity() {
                    self.regions.reserve_exact((self.regions.len() / 4).max(8));
                }
                self.regions.push(Region { number, dirty: [0; 8], reported: [0; 8] });
                if let Some(slot) = self.slots.get_mut(slot) {
                    *slot = narrow(self.regions.len());
                }
                self.regions.len() - 1
            }
        };
        let (word, bit) = ((gfn.0 >> 6 & 7) as usize, 1 << (gfn.0 & 63));
        if let Some(region) = self.regions.get_mut(index)
            && let Some((dirty, reported)) = region.dirty.get_mut(word).zip(region.reported.get_mut(word))
        {
            *dirty |= bit;
            // What is written again is news: a clear of what was reported before leaves it.
            *reported &= !bit;
        }
    }

    /// Fills the slots, which are all free and more than the regions.
    fn index(&mut self) {
        for index in 0..self.regions.len() {
            let number = self.regions.get(index).map_or(0, |region| region.number);
            if let Err(slot) = self.probe(number)
                && let Some(slot) = self.slots.get_mut(slot)
            {
                *slot = narrow(index) + 1;
            }
        }
    }

    /// What is in the set, in order; from now on it counts as reported.
    pub fn report(&mut self) -> Vec<L2Gfn> {
        let mut frames: Vec<L2Gfn> = Vec::new();
        self.overflow_reported |= std::mem::take(&mut self.overflowed);
        for region in &mut self.regions {
            for (index, word) in (0u64..).zip(region.dirty) {
                frames.extend(bits(word).map(|bit| L2Gfn(region.number << 9 | index << 6 | bit)));
            }
            region.reported = region.dirty;
        }
        frames.sort_unstable();
        frames
    }

    /// Removes everything that was reported.
    pub fn clear_all(&mut self) {
        self.overflow_reported = false;
        for region in &mut self.regions {
            for (dirty, reported) in region.dirty.iter_mut().zip(&mut region.reported) {
                *dirty &= !*reported;
                *reported = 0;
            }
        }
        self.regions.retain(|region| region.dirty != [0; 8]);
        self.slots.fill(0);
        self.index();
    }

    /// Heap bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (self.regions.capacity() * size_of::<Region>() + self.slots.capacity() * 4) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_sets_count_and_iterate() {
        let mut set = PageSet::new(1000);
        set.insert_range(Frame(60), 200);
        set.remove(Frame(100));
        assert!(set.contains(Frame(60)) && !set.contains(Frame(59)) && !set.contains(Frame(260)));
        assert!(set.contains_range(Frame(101), 159) && !set.contains_range(Frame(99), 3));
        assert_eq!(set.len(), 199);
        assert_eq!(set.iter().count(), 199);
        set.insert(Frame(1 << 30));
        assert_eq!(set.len(), 199, "beyond the room");
    }

    #[test]
    fn l2_sets_keep_what_was_not_reported() {
        let mut set = L2Set::new(100);
        for gfn in 0..90 {
            set.insert(L2Gfn(gfn * 512 + 3));
        }
        assert_eq!(set.report().len(), 90);
        set.insert(L2Gfn(8));
        set.insert(L2Gfn(3));
        set.clear_all();
        assert_eq!(set.report(), vec![L2Gfn(3), L2Gfn(8)], "written after the report");
        for gfn in 0..200 {
            set.insert(L2Gfn(gfn * 512));
        }
        assert!(set.overflowed());
    }
}
