//! The allocator's books: which bytes of a region are free. The region itself is not touched, so callers say what they free.

/// Bytes of the region from `start` on, `length` of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    start: usize,
    length: usize,
}

/// Sizes and starts of everything that is handed out are multiples of this.
pub const GRAIN: usize = 16;

/// Free spans, in order and never adjoining, `SPANS` at most. First fit.
pub struct Heap<const SPANS: usize> {
    free: [Span; SPANS],
    count: usize,
}

impl<const SPANS: usize> Heap<SPANS> {
    /// A region of `length` bytes, all of them free.
    #[must_use]
    pub const fn new(length: usize) -> Self {
        let mut free = [Span { start: 0, length: 0 }; SPANS];
        free[0].length = length;
        Self { free, count: 1 }
    }

    /// Takes `size` bytes (rounded up to [`GRAIN`]) whose offset is a multiple of `align`, a power of two of at most a page; the region
    /// is aligned to pages. Returns the offset, or `None` if there is no such span or the books have no line left for it.
    pub fn take(&mut self, size: usize, align: usize) -> Option<usize> {
        if !align.is_power_of_two() || align > 4096 {
            return None;
        }
        let size = size.max(1).checked_next_multiple_of(GRAIN)?;
        let (index, start) = self.free[..self.count].iter().enumerate().find_map(|(index, span)| {
            let start = span.start.next_multiple_of(align.max(GRAIN));
            (start.checked_add(size)? <= span.start + span.length).then_some((index, start))
        })?;
        let span = self.free[index];
        let before = Span { start: span.start, length: start - span.start };
        let after = Span { start: start + size, length: span.start + span.length - start - size };
        match (before.length, after.length) {
            (0, 0) => self.remove(index),
            (0, _) => self.free[index] = after,
            (_, 0) => self.free[index] = before,
            _ => {
                if self.count == SPANS {
                    return None;
                }
                self.free[index] = after;
                self.insert(index, before);
            }
        }
        Some(start)
    }

    /// Frees what [`Self::take`] gave for this `size`. Returns `false`, and frees nothing, if part of it is free already, if it is none
    /// of the region's, or if the books have no line left (then it is lost).
    pub fn give(&mut self, start: usize, size: usize) -> bool {
        let Some(size) = size.max(1).checked_next_multiple_of(GRAIN) else { return false };
        let Some(end) = start.checked_add(size) else { return false };
        let index = self.free[..self.count].partition_point(|span| span.start < start);
        let before = index.checked_sub(1).map(|before| self.free[before]);
        let after = self.free[..self.count].get(index).copied();
        if before.is_some_and(|before| before.start + before.length > start)
            || after.is_some_and(|after| after.start < end)
        {
            return false;
        }
        let joins_before = before.is_some_and(|before| before.start + before.length == start);
        let joins_after = after.is_some_and(|after| after.start == end);
        match (joins_before, joins_after) {
            (true, true) => {
                self.free[index - 1].length += size + self.free[index].length;
                self.remove(index);
            }
            (true, false) => self.free[index - 1].length += size,
            (false, true) => self.free[index] = Span { start, length: size + self.free[index].length },
            (false, false) => {
                if self.count == SPANS {
                    return false;
                }
                self.insert(index, Span { start, length: size });
            }
        }
        true
    }

    fn insert(&mut self, index: usize, span: Span) {
        self.free.copy_within(index..self.count, index + 1);
        self.free[index] = span;
        self.count += 1;
    }

    fn remove(&mut self, index: usize) {
        self.free.copy_within(index + 1..self.count, index);
        self.count -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LENGTH: usize = 1 << 16;

    proptest! {
        #[test]
        fn nothing_overlaps_and_everything_comes_back(steps in prop::collection::vec((1_usize..5000, 0_u32..13, any::<u8>()), 1..200)) {
            let mut heap = Heap::<256>::new(LENGTH);
            let mut live: Vec<(usize, usize)> = Vec::new();
            for (size, align, choice) in steps {
                if choice < 100 && !live.is_empty() {
                    let (start, size) = live.swap_remove(usize::from(choice) % live.len());
                    prop_assert!(heap.give(start, size));
                } else if let Some(start) = heap.take(size, 1 << align) {
                    prop_assert_eq!(start % (1 << align), 0);
                    prop_assert!(start + size <= LENGTH);
                    prop_assert!(live.iter().all(|&(other, length)| start + size <= other || other + length <= start));
                    live.push((start, size));
                }
            }
            for (start, size) in live {
                prop_assert!(heap.give(start, size));
            }
            prop_assert_eq!(&heap.free[..heap.count], &[Span { start: 0, length: LENGTH }]);
        }
    }

    #[test]
    fn full_books_refuse_and_stay_right() {
        let mut heap = Heap::<2>::new(4096);
        let starts = [0; 4].map(|_| heap.take(16, 16).unwrap());
        assert!(heap.give(starts[0], 16));
        assert!(!heap.give(starts[2], 16), "a third span");
        assert!(heap.give(starts[1], 16), "adjoins the first");
        assert_eq!(heap.take(32, 16), Some(0));
    }

    #[test]
    fn what_is_free_cannot_be_freed() {
        let mut heap = Heap::<8>::new(4096);
        let start = heap.take(100, 16).unwrap();
        assert!(heap.give(start, 100));
        assert!(!heap.give(start, 100));
        assert_eq!(heap.take(4097, 16), None);
        assert_eq!(heap.take(16, 8192), None);
        assert_eq!(heap.take(4096, 4096), Some(0));
        assert_eq!(heap.take(1, 1), None);
    }
}
