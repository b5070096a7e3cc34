//! The two sides of the MMU: L1's memory below, and whoever makes EPT02 effective above.

use umbra_shared::{Gfn, L2Gfn, Level};

use crate::access::Access;
use crate::config::NoMemory;
use crate::role::below;
use crate::roots::RootId;
use crate::spte::Frame;

/// What became of a compare-and-exchange on L1's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exchange {
    /// The new value is in place.
    Done,
    /// The memory held something else; nothing was written.
    Changed,
}

/// L1's memory by page index. The MMU asks only for frames that a slot covers.
///
/// Everything read through this is a claim of the guest's: it may change between two reads.
pub trait L1Memory {
    /// The little-endian 8 bytes at `offset` (a multiple of 8, below 4096) of `frame`; 0 beyond the end.
    fn read(&self, frame: Frame, offset: u64) -> u64;

    /// The 64 words from `offset` (a multiple of 512, below 4096) of `frame` on: as many [`L1Memory::read`]s.
    fn read_block(&self, frame: Frame, offset: u64, words: &mut [u64; 64]) {
        for (word, at) in words.iter_mut().zip((offset..).step_by(8)) {
            *word = self.read(frame, at);
        }
    }

    /// Replaces the 8 bytes at `offset` if they are still `old`. Out of range counts as [`Exchange::Done`].
    fn exchange(&mut self, frame: Frame, offset: u64, old: u64, new: u64) -> Exchange;

    /// Copies a page; `false`, with the buffer untouched, when the page is all zeroes and needs no copy.
    fn copy_page(&self, frame: Frame, page: &mut [u64; 512]) -> bool;

    /// Copies the 512 pages from `first` on to `pages`, in order and without those that are all zeroes and need no copy.
    /// The result has a bit for each page that was copied. What `pages` holds before is of no interest but its room.
    ///
    /// # Errors
    /// No memory for the copy.
    fn copy_leaf(&self, first: Frame, pages: &mut Vec<[u64; 512]>) -> Result<[u64; 8], NoMemory> {
        pages.clear();
        pages.try_reserve_exact(512).map_err(|_| NoMemory)?;
        let (mut copied, mut buffer) = ([0; 8], [0; 512]);
        for (word, block) in copied.iter_mut().zip((0..).step_by(64)) {
            for bit in 0..64 {
                if self.copy_page(first.plus(block + bit), &mut buffer) {
                    pages.push(buffer);
                    *word |= 1 << bit;
                }
            }
        }
        Ok(copied)
    }

    /// A bit for each of the 512 pages from `first` on that differs from its copy, as [`L1Memory::copy_leaf`] made it.
    fn changed_since(&self, first: Frame, copied: &[u64; 8], pages: &[[u64; 512]]) -> [u64; 8] {
        let (mut pages, mut buffer) = (pages.iter(), [0; 512]);
        let mut changed = [0; 8];
        for ((word, copied), block) in changed.iter_mut().zip(copied).zip((0..).step_by(64)) {
            for bit in 0..64 {
                let was = if copied >> bit & 1 != 0 { pages.next() } else { None };
                let now = self.copy_page(first.plus(block + bit), &mut buffer).then_some(&buffer);
                let differs = match (was, now) {
                    (None, None) => false,
                    (Some(was), Some(now)) => was != now,
                    (Some(only), None) | (None, Some(only)) => only.iter().any(|&word| word != 0),
                };
                *word |= u64::from(differs) << bit;
            }
        }
        changed
    }
}

/// A range of L2 frames under a root.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// The root that translates them.
    pub root: RootId,
    /// The first frame.
    pub start: L2Gfn,
    /// How many.
    pub frames: u64,
}

/// How much of the translation caches a flush empties.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// Everything.
    All,
    /// What was translated under one range.
    Extent(Extent),
}

/// Where results leave to, in extents. Calls come in order; none fails: a mapper that could not follow keeps less
/// mapped than EPT02 allows, and the next fault repeats the `map`.
pub trait Mapper {
    /// `extent` may now reach `frame` and the frames after it, with `access`. `level` is the size of the leaves.
    fn map(&mut self, extent: Extent, frame: Frame, level: Level, access: Access);
    /// What is mapped in `extent` has `access` from now on, more or less than before. Holes in it stay holes.
    fn protect(&mut self, extent: Extent, access: Access);
    /// [`Mapper::protect`] for ranges of `frames` frames each, apart from each other: the aliases of one page.
    fn protect_all(&mut self, root: RootId, starts: &[L2Gfn], frames: u64, access: Access) {
        for start in starts {
            self.protect(Extent { root, start: *start, frames }, access);
        }
    }
    /// Nothing in `extent` may be reached.
    fn unmap(&mut self, extent: Extent);
    /// Writes to the 2 MiB of memory at `first` are to be logged, page by page, from now on, or need not be: for
    /// strategies that leave leaves open to a log beside the MMU. All its leaves are closed when the log ends.
    fn log_writes(&mut self, _first: Frame, _on: bool) {}
    /// Translations that were cached are void. Comes last, before the operation returns.
    fn flush(&mut self, flush: Flush);
}

/// A mapper that drops everything: for a processor that walks EPT02 itself and has no TLB.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoMapper;

impl Mapper for NoMapper {
    fn map(&mut self, _: Extent, _: Frame, _: Level, _: Access) {}
    fn protect(&mut self, _: Extent, _: Access) {}
    fn unmap(&mut self, _: Extent) {}
    fn flush(&mut self, _: Flush) {}
}

/// Both sides, for the length of one operation.
pub struct Env<'a> {
    /// L1's memory.
    pub memory: &'a mut dyn L1Memory,
    /// Who makes changes effective.
    pub mapper: &'a mut dyn Mapper,
}

/// A range of guest frames backed by L1's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// First guest frame.
    pub base: Gfn,
    /// How many.
    pub frames: u64,
    /// The page of L1's memory behind `base`.
    pub first: Frame,
    /// Writes go to the monitor.
    pub read_only: bool,
    /// The largest leaf that the backing allows.
    pub max_level: Level,
}

impl Slot {
    /// `frames` writable frames from 0, backed one to one, with leaves up to 1 GiB.
    #[must_use]
    pub const fn identity(frames: u64) -> Self {
        Self { base: Gfn(0), frames, first: Frame(0), read_only: false, max_level: Level::G1 }
    }

    fn end(&self) -> u64 {
        self.base.0.saturating_add(self.frames)
    }

    fn holds(&self, gfn: Gfn) -> bool {
        gfn.0.wrapping_sub(self.base.0) < self.frames
    }

    /// The page behind `gfn`, which must be in the slot.
    fn frame(&self, gfn: Gfn) -> Frame {
        self.first.plus(gfn.0.wrapping_sub(self.base.0))
    }
}

/// L1's memory map.
#[derive(Clone, Debug, Default)]
pub struct Slots {
    slots: Vec<Slot>,
}

/// Where a guest frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The page of L1's memory.
    pub frame: Frame,
    /// Whether L1 may write it.
    pub writable: bool,
}

impl Slots {
    /// The map of `slots`, in order of their base, `memory_frames` being the size of L1's memory.
    ///
    /// # Errors
    /// Names the slot that is empty, overlaps the one before it, or reaches beyond L1's memory.
    pub fn new(slots: &[Slot], memory_frames: u64) -> Result<Self, String> {
        let mut end = 0;
        for slot in slots {
            let last = slot.first.0.checked_add(slot.frames);
            if slot.frames == 0 || slot.base.0 < end || last.is_none_or(|last| last > memory_frames) {
                return Err(format!(
                    "slot at {} with {:#x} frames from page {:#x} is empty, overlaps or leaves memory of {memory_frames:#x} pages",
                    slot.base, slot.frames, slot.first.0
                ));
            }
            end = slot.end();
        }
        Ok(Self { slots: slots.to_vec() })
    }

    /// The slots in order.
    #[must_use]
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Bytes that the map takes on the heap.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (self.slots.capacity() * size_of::<Slot>()) as u64
    }

    #[inline]
    fn slot(&self, gfn: Gfn) -> Option<&Slot> {
        self.slots.iter().find(|slot| slot.holds(gfn))
    }

    /// Where `gfn` is, or `None` when no slot covers it.
    #[must_use]
    #[inline]
    pub fn find(&self, gfn: Gfn) -> Option<Backing> {
        self.slot(gfn).map(|slot| Backing { frame: slot.frame(gfn), writable: !slot.read_only })
    }

    /// Frames from `gfn` to the end of its slot, behind which consecutive pages are; 0 when no slot covers it.
    #[must_use]
    pub fn straight(&self, gfn: Gfn) -> u64 {
        self.slot(gfn).map_or(0, |slot| slot.end() - gfn.0)
    }

    /// A guest frame that `frame` backs: of the first slot that has it.
    #[must_use]
    pub fn gfn_of(&self, frame: Frame) -> Option<Gfn> {
        let slot = self.slots.iter().find(|slot| frame.0.wrapping_sub(slot.first.0) < slot.frames)?;
        Some(slot.base.plus(frame.0.wrapping_sub(slot.first.0)))
    }

    /// The largest leaf up to `limit` that memory allows around `gfn`: inside one slot, guest frame and page equally
    /// aligned, and the backing willing. `across_end` is a seeded defect.
    #[must_use]
    pub fn max_level(&self, gfn: Gfn, limit: Level, across_end: bool) -> Level {
        let Some(slot) = self.slot(gfn) else { return Level::K4 };
        let mut level = limit.min(slot.max_level).min(Level::G1);
        while level > Level::K4 {
            let start = gfn.align_down(level);
            let inside = start.0 >= slot.base.0 && (start.0 + level.frames() <= slot.end() || across_end);
            let aligned = (slot.base.0 ^ slot.first.0) & (level.frames() - 1) == 0;
            if inside && aligned {
                break;
            }
            level = below(level);
        }
        level
    }

    /// Guest frames whose backing differs between the two maps, as ranges in order.
    #[must_use]
    pub fn changed(&self, new: &Self) -> Vec<(Gfn, u64)> {
        let mut edges: Vec<u64> =
            self.slots.iter().chain(&new.slots).flat_map(|slot| [slot.base.0, slot.end()]).collect();
        edges.sort_unstable();
        edges.dedup();
        let view = |slots: &Self, gfn| slots.slot(gfn).map(|slot| (slot.frame(gfn), slot.read_only, slot.max_level));
        let pairs = edges.iter().zip(edges.iter().skip(1));
        pairs
            .filter(|&(&start, _)| view(self, Gfn(start)) != view(new, Gfn(start)))
            .map(|(&start, &end)| (Gfn(start), end - start))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_stay_inside_slots_and_alignment() {
        let slot = Slot { base: Gfn(512), frames: 1000, first: Frame(0), ..Slot::identity(0) };
        let slots = Slots::new(&[slot], 4096).unwrap();
        assert_eq!(slots.find(Gfn(513)), Some(Backing { frame: Frame(1), writable: true }));
        assert_eq!(slots.find(Gfn(511)), None);
        assert_eq!(slots.max_level(Gfn(600), Level::G1, false), Level::M2);
        assert_eq!(slots.max_level(Gfn(1100), Level::G1, false), Level::K4, "the slot ends inside the second 2M");
        let shifted = Slots::new(&[Slot { first: Frame(1), ..slot }], 4096).unwrap();
        assert_eq!(shifted.max_level(Gfn(600), Level::G1, false), Level::K4, "page and frame are not aligned alike");
        assert_eq!(slots.changed(&shifted), vec![(Gfn(512), 1000)]);
        assert_eq!(slots.changed(&slots), vec![]);
        assert!(Slots::new(&[Slot { frames: 5000, ..slot }], 4096).unwrap_err().contains("leaves memory"));
    }
}
