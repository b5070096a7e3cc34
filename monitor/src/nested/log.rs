//! KVM's log of L2's VM, or what pages tell in its place, translated to pages of L1's memory.
//!
//! The log names frames of L2. Which page of L1's memory such a frame is may change while the log still holds its bit, so the order at a remap is:
//! close the page, fetch the log, give the bits of closed pages to what they mapped, and map anew only then. Closed pages are kept here with what
//! they mapped, so that one fetch serves all remaps since the last one.

use super::slots::Slot;
use super::watch::Watch;
use super::window::{Page, Window};
use crate::hostmm::Stretch;
use crate::kvm::Error;
use crate::kvm::log::{SlotBitmap, WHOLE_SLOT};
use crate::kvm::ring::RingSet;
use crate::pages::PageSet;
use kvm_ioctls::VmFd;
use std::collections::BTreeMap;
use std::ops::Range;
use umbra_mmu::Frame;

/// How bits are cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clearing {
    /// `KVM_GET_DIRTY_LOG` does it.
    ByGet,
    /// `KVM_CLEAR_DIRTY_LOG` does it.
    Manual,
    /// There are none: a page is an entry of a ring, until that is harvested.
    Ring,
    /// There are none, and KVM logs nothing: a page tells of writes itself, until it is protected again.
    Protection,
}

/// The log.
#[derive(Debug)]
pub struct Log {
    clearing: Clearing,
    watch: Option<Watch>,
    /// By slot, where KVM has them.
    bitmaps: BTreeMap<u32, SlotBitmap>,
    /// What closed pages mapped, by window and page, until their bits were fetched.
    closed: BTreeMap<(usize, usize), Frame>,
    /// Pages of L1's memory that were written since the last harvest, by index from `first` on.
    dirty: PageSet,
    /// What the last harvest found.
    found: PageSet,
    first: Frame,
    /// Fetches that remaps made necessary.
    pub transfers: u64,
    /// Exits because a ring was full.
    pub ring_exits: u64,
    /// For tests of the checks: what closed pages mapped is forgotten, and so is what was written there.
    pub forgetful: bool,
}

impl Log {
    /// A log over `windows`, of `frames` pages of memory from `first` on.
    ///
    /// # Errors
    /// [`Error::Capability`] for what this host lacks; else the system's.
    pub fn new(windows: &[Window], clearing: Clearing, first: Frame, frames: u64) -> Result<Self, Error> {
        let pages = frames.saturating_sub(first.0);
        let watched = windows.iter().map(|window| window.pages.len() as u64).sum();
        let mut log = Self {
            clearing,
            watch: (clearing == Clearing::Protection).then(|| Watch::open(watched)).transpose()?,
            bitmaps: BTreeMap::new(),
            closed: BTreeMap::new(),
            dirty: PageSet::new(pages),
            found: PageSet::new(pages),
            first,
            transfers: 0,
            ring_exits: 0,
            forgetful: false,
        };
        windows.iter().flat_map(|window| &window.slots).for_each(|slot| log.begin_slot(slot));
        Ok(log)
    }

    /// KVM has a slot more. Its log is empty.
    pub(super) fn begin_slot(&mut self, slot: &Slot) {
        if matches!(self.clearing, Clearing::ByGet | Clearing::Manual) {
            self.bitmaps.insert(slot.number, SlotBitmap::new(slot.number, slot.pages.len() as u64));
        }
    }

    /// KVM is about to forget `slot` of `window`, in which nobody can write any more: what it holds since the last harvest is kept.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn end_slot(&mut self, vm: &VmFd, window: (usize, &Window), slot: &Slot) -> Result<(), Error> {
        let Some(mut bitmap) = self.bitmaps.remove(&slot.number).filter(|_| slot.logged) else { return Ok(()) };
        // Without a clear in between KVM still has what the last harvest has found.
        let known = if self.clearing == Clearing::Manual { bitmap.words().to_vec() } else { Vec::new() };
        bitmap.get(vm)?;
        self.mark_bits(window, slot, bitmap.words().iter().zip(known.into_iter().chain(std::iter::repeat(0))));
        Ok(())
    }

    /// Whether it is KVM's, which logs slots.
    #[must_use]
    pub fn is_of_kvm(&self) -> bool {
        self.clearing != Clearing::Protection
    }

    /// Who watches pages, where they tell of writes themselves.
    #[must_use]
    pub const fn watch(&self) -> Option<&Watch> {
        self.watch.as_ref()
    }

    /// Marks the memory that pages of `window` map, which were written.
    fn mark(dirty: &mut PageSet, first: Frame, window: &Window, written: Stretch) {
        let Some(start) = window.place().page(written.start) else { return };
        let pages = usize::try_from(start).ok().and_then(|start| window.pages.get(start..)).unwrap_or_default();
        let pages = pages.iter().take(usize::try_from(written.pages).unwrap_or(usize::MAX));
        for frame in pages.filter_map(|page| page.frame()) {
            dirty.insert(frame.0.wrapping_sub(first.0));
        }
    }

    /// Pages `run` of `window`, which nobody can write any more, are about to be closed: what they tell is kept.
    ///
    /// # Errors
    /// The system's.
    pub fn closing(&mut self, window: &Window, run: &Range<usize>) -> Result<(), Error> {
        let Self { watch, dirty, first, .. } = self;
        let Some(watch) = watch else { return Ok(()) };
        watch.close(window.stretch(run), |written| Self::mark(dirty, *first, window, written))
    }

    /// Pages from `start` on of window `index` were closed; this is what they mapped.
    pub fn closed(&mut self, index: usize, start: usize, pages: &[Page]) {
        for (offset, page) in pages.iter().enumerate().filter(|_| !self.forgetful) {
            if let Some(frame) = page.frame() {
                self.closed.insert((index, start + offset), frame);
            }
        }
    }

    /// Pages `run` of window `index` are about to map something. If one of them mapped something else, all that the log holds is fetched.
    ///
    /// # Errors
    /// The system's.
    pub fn remapping(
        &mut self,
        vm: &VmFd,
        windows: &[Window],
        rings: Option<&mut RingSet>,
        (index, run): (usize, &Range<usize>),
    ) -> Result<(), Error> {
        if self.closed.range((index, run.start)..(index, run.end)).next().is_none() {
            return Ok(());
        }
        self.transfers += 1;
        self.fetch(vm, windows, rings)?;
        if self.clearing != Clearing::Manual {
            self.closed.clear();
            return Ok(());
        }
        // The bits of closed pages must not be taken for what is mapped there next.
        for (index, window) in windows.iter().enumerate() {
            for slot in &window.slots {
                let Some(bitmap) = self.bitmaps.get_mut(&slot.number).filter(|_| slot.logged) else { continue };
                let closed = self.closed.range((index, slot.pages.start)..(index, slot.pages.end));
                let pages: Vec<u64> = closed.map(|((_, page), _)| (page - slot.pages.start) as u64).collect();
                bitmap.clear_pages(vm, &pages)?;
            }
        }
        self.closed.clear();
        Ok(())
    }

    /// Fetches KVM's bits, or its rings' entries, and marks the pages that they are.
    ///
    /// # Errors
    /// The system's.
    pub fn fetch(&mut self, vm: &VmFd, windows: &[Window], rings: Option<&mut RingSet>) -> Result<(), Error> {
        let Self { watch, dirty, first, .. } = self;
        if let Some(watch) = watch {
            let window_of = |at: Stretch| windows.iter().find(|window| window.place().page(at.start).is_some());
            return watch.harvest(
                windows.iter().flat_map(|window| window.runs_of(*first).map(|run| window.stretch(&run))),
                |written| window_of(written).into_iter().for_each(|window| Self::mark(dirty, *first, window, written)),
            );
        }
        if let Some(rings) = rings {
            let Self { closed, dirty, first, .. } = self;
            rings.harvest(|slot, offset| {
                let place = |(index, window): (usize, &Window)| Some((index, window.page_of(slot, offset)?));
                let Some((index, page)) = windows.iter().enumerate().find_map(place) else { return };
                let now = windows.get(index).and_then(|window| window.pages.get(page)).and_then(|page| page.frame());
                if let Some(frame) = now.or_else(|| closed.get(&(index, page)).copied()) {
                    dirty.insert(frame.0.wrapping_sub(first.0));
                }
            });
            return Ok(());
        }
        for (index, window) in windows.iter().enumerate() {
            for slot in window.slots.iter().filter(|slot| slot.logged) {
                let Some(mut bitmap) = self.bitmaps.remove(&slot.number) else { continue };
                let got = bitmap.get(vm);
                self.mark_bits((index, window), slot, bitmap.words().iter().zip(std::iter::repeat(0)));
                self.bitmaps.insert(slot.number, bitmap);
                got?;
            }
        }
        Ok(())
    }

    /// Marks what the pages of a slot map, or mapped, that have a bit in `words`: in the first of each pair, and not in the second.
    fn mark_bits<'a>(
        &mut self,
        (index, window): (usize, &Window),
        slot: &Slot,
        words: impl Iterator<Item = (&'a u64, u64)>,
    ) {
        for (start, (&bits, known)) in (slot.pages.start..).step_by(64).zip(words) {
            let mut rest = bits & !known;
            while rest != 0 {
                let page = start + rest.trailing_zeros() as usize;
                rest &= rest - 1;
                let now = window.pages.get(page).and_then(|page| page.frame());
                if let Some(frame) = now.or_else(|| self.closed.get(&(index, page)).copied()) {
                    self.dirty.insert(frame.0.wrapping_sub(self.first.0));
                }
            }
        }
    }

    /// Whether the log had a bit for a page of a window when it was fetched last.
    fn had(bitmaps: &BTreeMap<u32, SlotBitmap>, windows: &[Window], (index, page): (usize, usize)) -> bool {
        let slot = windows.get(index).and_then(|window| window.slots.get(window.slots_of(&(page..page + 1)).start));
        slot.is_some_and(|slot| {
            let bitmap = bitmaps.get(&slot.number).filter(|_| slot.pages.contains(&page));
            bitmap.is_some_and(|bitmap| bitmap.is_set((page - slot.pages.start) as u64))
        })
    }

    /// Fetches what was written since the last harvest.
    ///
    /// # Errors
    /// The system's.
    pub fn harvest(&mut self, vm: &VmFd, windows: &[Window], rings: Option<&mut RingSet>) -> Result<(), Error> {
        self.fetch(vm, windows, rings)?;
        std::mem::swap(&mut self.found, &mut self.dirty);
        self.dirty.clear();
        // A closed page is written no more: without a bit it is of no interest, and a GET that clears has taken the bit.
        let (bitmaps, manual) = (&self.bitmaps, self.clearing == Clearing::Manual);
        self.closed.retain(|&place, _| manual && Self::had(bitmaps, windows, place));
        Ok(())
    }

    /// Clears what the harvest fetched.
    ///
    /// # Errors
    /// The system's.
    pub fn clear(&mut self, vm: &VmFd, windows: &[Window], rings: Option<&RingSet>) -> Result<(), Error> {
        if let Some(rings) = rings {
            return rings.reset();
        }
        if let Some(watch) = &mut self.watch {
            return watch.clear();
        }
        if self.clearing == Clearing::Manual {
            for slot in windows.iter().flat_map(|window| &window.slots).filter(|slot| slot.logged) {
                if let Some(bitmap) = self.bitmaps.get(&slot.number).filter(|bitmap| !bitmap.is_empty()) {
                    bitmap.clear(vm, WHOLE_SLOT)?;
                }
            }
            // A page that was written and closed since the harvest still has its bit.
            let bitmaps = &self.bitmaps;
            self.closed.retain(|&place, _| !Self::had(bitmaps, windows, place));
            for slot in windows.iter().flat_map(|window| &window.slots).filter(|slot| slot.logged) {
                self.bitmaps.get_mut(&slot.number).into_iter().for_each(SlotBitmap::forget);
            }
        }
        Ok(())
    }

    /// The pages that the last harvest found, by index from the first tracked one on.
    #[must_use]
    pub const fn found(&self) -> &PageSet {
        &self.found
    }
}
