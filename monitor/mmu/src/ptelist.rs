//! Lists of entry references: the reverse map of a frame and the parents of a shadow page are the same thing.
//!
//! A [`Head`] is 8 bytes: one reference inline, and what comes after it. A single further reference stands in the head
//! too (that is what keeps a page with two aliases at 24 bytes, entries included); only more than that, or heads that
//! are configured with one inline entry as KVM's, take *descriptors* of a size that is an option. A descriptor is an
//! array of 32-bit words: the next descriptor, how many references the chain from here holds, then references. All but
//! the first descriptor of a chain are full.

use crate::config::{CacheSize, NoMemory};
use crate::head::{Head, LIST};
use crate::spte::SpteRef;

const NEXT: usize = 0;
const COUNT: usize = 1;
const FIRST: usize = 2;

/// A place in a list, for walking it without borrowing the lists.
#[derive(Clone, Copy, Debug)]
pub struct Cursor {
    first: u32,
    rest: u32,
    slot: usize,
}

/// A count of things in memory as 32 bits: none of them reaches 2^32.
pub(crate) fn narrow(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Allocations that may still be made, so that tests can let them fail. `u32::MAX` is no limit.
#[derive(Clone, Copy, Debug)]
pub struct Allowance(pub u32);

impl Allowance {
    /// Takes one, unless none is left.
    pub fn take(&mut self) -> Result<(), NoMemory> {
        match self.0 {
            u32::MAX => Ok(()),
            0 => Err(NoMemory),
            _ => {
                self.0 -= 1;
                Ok(())
            }
        }
    }
}

/// All descriptors, and the cache of them that splits draw from.
#[derive(Debug)]
pub struct PteLists {
    words: Vec<u32>,
    stride: usize,
    per_desc: u32,
    inline_two: bool,
    free: u32,
    live: u32,
    cache: Vec<u32>,
    /// Allocation limit for tests.
    pub allowance: Allowance,
}

impl PteLists {
    /// Lists with descriptors of `desc_bytes` (16 to 256, a multiple of 4), one or two references inline.
    #[must_use]
    pub fn new(desc_bytes: u32, inline_two: bool) -> Self {
        let stride = (desc_bytes as usize / 4).clamp(4, 64);
        Self {
            words: Vec::new(),
            stride,
            per_desc: narrow(stride - FIRST),
            inline_two,
            free: 0,
            live: 0,
            cache: Vec::new(),
            allowance: Allowance(u32::MAX),
        }
    }

    fn word(&self, desc: u32, slot: usize) -> u32 {
        self.words.get(desc as usize * self.stride + slot).copied().unwrap_or(0)
    }

    fn set(&mut self, desc: u32, slot: usize, value: u32) {
        if let Some(word) = self.words.get_mut(desc as usize * self.stride + slot) {
            *word = value;
        }
    }

    /// References that one descriptor holds.
    const fn per_desc(&self) -> u32 {
        self.per_desc
    }

    /// Heap bytes: descriptors in use, free or cached.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (self.words.capacity() * 4 + self.cache.capacity() * 4) as u64
    }

    /// Descriptors in the split cache, and what they take in bytes.
    #[must_use]
    pub fn cached(&self) -> (u32, u64) {
        let count = self.cache.len();
        (narrow(count), (count * self.stride * 4) as u64)
    }

    /// Descriptors that lists use now.
    #[cfg(test)]
    #[must_use]
    pub const fn live(&self) -> u32 {
        self.live
    }

    fn alloc_raw(&mut self) -> Result<u32, NoMemory> {
        self.allowance.take()?;
        if self.free == 0 {
            self.grow(0)?;
        }
        let desc = self.free;
        self.free = self.word(desc, NEXT);
        Ok(desc)
    }

    /// Makes room for `count` more descriptors, or as many as keep the slack small.
    fn grow(&mut self, count: usize) -> Result<(), NoMemory> {
        let have = self.words.len() / self.stride;
        // Descriptor 0 is never used. Growth by an eighth.
        let first = have.max(1);
        let target = first + (have / 8).max(32).max(count);
        let more = target * self.stride - self.words.len();
        self.words.try_reserve_exact(more).map_err(|_| NoMemory)?;
        self.words.resize(target * self.stride, 0);
        for desc in (first..target).rev() {
            let desc = narrow(desc);
            self.set(desc, NEXT, self.free);
            self.free = desc;
        }
        Ok(())
    }

    fn alloc(&mut self, for_split: bool) -> Result<u32, NoMemory> {
        let cached = if for_split { self.cache.pop() } else { None };
        let desc = match cached {
            Some(desc) => desc,
            None => self.alloc_raw()?,
        };
        self.live += 1;
        self.set(desc, NEXT, 0);
        self.set(desc, COUNT, 0);
        Ok(desc)
    }

    fn release(&mut self, desc: u32) {
        self.set(desc, NEXT, self.free);
        self.free = desc;
        self.live = self.live.saturating_sub(1);
        if self.live == 0 && self.cache.is_empty() {
            self.words = Vec::new();
            self.free = 0;
        }
    }

    /// Fills the split cache to its capacity if it holds less than its minimum. Returns whether it did.
    pub fn top_up(&mut self, size: CacheSize) -> Result<bool, NoMemory> {
        if self.cache.len() >= size.min as usize {
            return Ok(false);
        }
        let target = size.capacity as usize;
        if self.cache.capacity() < target {
            self.cache.try_reserve_exact(target - self.cache.len()).map_err(|_| NoMemory)?;
        }
        if self.free == 0 {
            self.grow(target - self.cache.len())?;
        }
        while self.cache.len() < target {
            let desc = self.alloc_raw()?;
            self.cache.push(desc);
        }
        Ok(true)
    }

    /// Empties the split cache.
    pub fn drop_cache(&mut self) {
        for desc in std::mem::take(&mut self.cache) {
            self.live += 1;
            self.release(desc);
        }
    }

    /// Lists `entry`. `for_split` allows descriptors of the split cache.
    ///
    /// # Errors
    /// No memory; the list is as before.
    #[inline]
    pub fn add(&mut self, head: &mut Head, entry: SpteRef, for_split: bool) -> Result<(), NoMemory> {
        let rest = head.rest();
        if head.is_empty() {
            *head = Head::one(entry);
            return Ok(());
        }
        if rest == 0 && self.inline_two {
            *head = Head::new(head.first(), entry.0);
            return Ok(());
        }
        if rest & LIST != 0 {
            let desc = rest & !LIST;
            let count = self.word(desc, COUNT);
            let filled = self.filled(count);
            if filled < self.per_desc() {
                self.set(desc, FIRST + filled as usize, entry.0);
                self.set(desc, COUNT, count + 1);
                return Ok(());
            }
            let new = self.alloc(for_split)?;
            self.set(new, NEXT, desc);
            self.set(new, COUNT, count + 1);
            self.set(new, FIRST, entry.0);
            *head = Head::new(head.first(), new | LIST);
            return Ok(());
        }
        let new = self.alloc(for_split)?;
        let mut count = 0;
        for reference in [rest, entry.0] {
            if reference != 0 {
                self.set(new, FIRST + count as usize, reference);
                count += 1;
            }
        }
        self.set(new, COUNT, count);
        *head = Head::new(head.first(), new | LIST);
        Ok(())
    }

    /// References in the first descriptor of a chain of `count`.
    const fn filled(&self, count: u32) -> u32 {
        (count - 1) % self.per_desc() + 1
    }

    /// Takes the newest reference off the chain behind `head`, which must be a chain.
    fn pop_chain(&mut self, head: &mut Head) -> u32 {
        let desc = head.rest() & !LIST;
        let count = self.word(desc, COUNT);
        let filled = self.filled(count);
        let entry = self.word(desc, FIRST + filled as usize - 1);
        if filled > 1 {
            self.set(desc, COUNT, count - 1);
        } else {
            let next = self.word(desc, NEXT);
            let rest = if next == 0 { 0 } else { next | LIST };
            self.release(desc);
            *head = Head::new(head.first(), rest);
        }
        if self.inline_two && head.rest() & LIST != 0 {
            let desc = head.rest() & !LIST;
            if self.word(desc, COUNT) == 1 {
                let last = self.word(desc, FIRST);
                self.release(desc);
                *head = Head::new(head.first(), last);
            }
        }
        entry
    }

    /// Removes `entry`; `false` if it is not listed.
    #[inline]
    pub fn remove(&mut self, head: &mut Head, entry: SpteRef) -> bool {
        let rest = head.rest();
        if rest & LIST == 0 {
            if head.first() == entry.0 && !head.is_empty() {
                *head = Head::new(rest, 0);
                return true;
            }
            if rest == entry.0 && rest != 0 {
                *head = Head::new(head.first(), 0);
                return true;
            }
            return false;
        }
        if head.first() == entry.0 {
            let newest = self.pop_chain(head);
            *head = Head::new(newest, head.rest());
            return true;
        }
        let mut desc = rest & !LIST;
        let mut filled = self.filled(self.word(desc, COUNT));
        while desc != 0 {
            for slot in FIRST..FIRST + filled as usize {
                if self.word(desc, slot) == entry.0 {
                    // The newest takes the place of the removed one, so that only the first descriptor has room.
                    let first = rest & !LIST;
                    let newest_slot = FIRST + self.filled(self.word(first, COUNT)) as usize - 1;
                    let newest = self.word(first, newest_slot);
                    self.set(desc, slot, newest);
                    self.set(first, newest_slot, entry.0);
                    self.pop_chain(head);
                    return true;
                }
            }
            desc = self.word(desc, NEXT);
            filled = self.per_desc();
        }
        false
    }

    /// How many references are listed.
    #[must_use]
    #[inline]
    pub fn count(&self, head: Head) -> u32 {
        match head.rest() {
            _ if head.is_empty() => 0,
            0 => 1,
            rest if rest & LIST == 0 => 2,
            rest => 1 + self.word(rest & !LIST, COUNT),
        }
    }

    /// A cursor before the first reference.
    #[must_use]
    pub const fn walk(head: Head) -> Cursor {
        Cursor { first: head.first(), rest: head.rest(), slot: 0 }
    }

    /// The references of a list that stand in descriptors, as they lie together there. With the entry that the head holds,
    /// [`Head::oldest`], that is the whole of a list that has a chain.
    #[inline]
    pub fn chain(&self, head: Head) -> impl Iterator<Item = &[u32]> {
        let mut desc = if head.has_chain() { head.rest() & !LIST } else { 0 };
        let mut filled = if desc == 0 { 0 } else { self.filled(self.word(desc, COUNT)) as usize };
        std::iter::from_fn(move || {
            let words = if desc == 0 { None } else { self.words.get(desc as usize * self.stride..) };
            let [next, _, references @ ..] = words? else { return None };
            desc = *next;
            let references = references.get(..filled);
            filled = self.stride - FIRST;
            references
        })
    }

    /// The next reference. The list must not have changed since the cursor was made.
    #[inline]
    pub fn next(&self, cursor: &mut Cursor) -> Option<SpteRef> {
        if cursor.first != 0 {
            let entry = cursor.first;
            cursor.first = 0;
            return Some(SpteRef(entry));
        }
        if cursor.rest & LIST == 0 {
            let entry = cursor.rest;
            cursor.rest = 0;
            return if entry == 0 { None } else { Some(SpteRef(entry)) };
        }
        let desc = cursor.rest & !LIST;
        if cursor.slot == 0 {
            cursor.slot = self.filled(self.word(desc, COUNT)) as usize;
        }
        cursor.slot -= 1;
        let entry = self.word(desc, FIRST + cursor.slot);
        if cursor.slot == 0 {
            let next = self.word(desc, NEXT);
            cursor.rest = if next == 0 { 0 } else { next | LIST };
        }
        Some(SpteRef(entry))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_agree_with_a_set_through_random_changes() {
        for (desc_bytes, inline_two) in [(16, true), (32, true), (128, false), (16, false)] {
            let mut lists = PteLists::new(desc_bytes, inline_two);
            let (mut head, mut set) = (Head::default(), std::collections::BTreeSet::new());
            let mut state = 12345u32;
            for _ in 0..20_000 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let entry = SpteRef(512 + (state >> 8) % 48);
                if set.contains(&entry) {
                    assert!(lists.remove(&mut head, entry));
                    set.remove(&entry);
                } else {
                    assert!(!lists.remove(&mut head, entry));
                    lists.add(&mut head, entry, false).unwrap();
                    set.insert(entry);
                }
                let mut cursor = PteLists::walk(head);
                let mut seen: Vec<_> = std::iter::from_fn(|| lists.next(&mut cursor)).collect();
                assert_eq!(seen.len(), lists.count(head) as usize);
                seen.sort_unstable();
                assert!(seen.iter().eq(&set), "{seen:?} {set:?}");
            }
            for entry in set {
                assert!(lists.remove(&mut head, entry));
            }
            assert!(head.is_empty() && lists.live() == 0 && lists.bytes() == 0);
        }
    }

    #[test]
    fn a_cache_refills_to_capacity_only_below_its_minimum() {
        let mut lists = PteLists::new(16, true);
        let size = CacheSize { min: 3, capacity: 8 };
        assert_eq!(lists.top_up(size), Ok(true));
        assert_eq!(lists.cached(), (8, 8 * 16));
        assert_eq!(lists.top_up(size), Ok(false));
        let mut head = Head::default();
        for entry in 0..18 {
            lists.add(&mut head, SpteRef(512 + entry), true).unwrap();
        }
        assert_eq!(lists.cached().0, 0);
        lists.allowance = Allowance(0);
        assert_eq!(lists.add(&mut head, SpteRef(600), true), Ok(()), "room in the first descriptor");
        assert_eq!(lists.add(&mut head, SpteRef(601), true), Err(NoMemory));
        assert_eq!(lists.count(head), 19);
    }
}
