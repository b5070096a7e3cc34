//! KVM's log of L2's VM, translated to pages of L1's memory.
//!
//! The log names frames of L2. Which page of L1's memory such a frame is may change while the log still holds its bit, so the order at a remap is:
//! close the page, fetch the log, give the bits of closed pages to what they mapped, and map anew only then. Closed pages are kept here with what
//! they mapped, so that one fetch serves all remaps since the last one.

use super::window::{Page, Window};
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
}

/// The log.
#[derive(Debug)]
pub struct Log {
    clearing: Clearing,
    /// One for each window.
    bitmaps: Vec<SlotBitmap>,
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
    #[must_use]
    pub fn new(windows: &[Window], clearing: Clearing, first: Frame, frames: u64) -> Self {
        let pages = frames.saturating_sub(first.0);
        Self {
            clearing,
            bitmaps: windows
                .iter()
                .filter(|_| clearing != Clearing::Ring)
                .map(|window| SlotBitmap::new(window.first_slot(), window.pages.len() as u64))
                .collect(),
            closed: BTreeMap::new(),
            dirty: PageSet::new(pages),
            found: PageSet::new(pages),
            first,
            transfers: 0,
            ring_exits: 0,
            forgetful: false,
        }
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
        for (index, bitmap) in self.bitmaps.iter_mut().enumerate() {
            let pages: Vec<u64> =
                self.closed.range((index, 0)..(index + 1, 0)).map(|((_, page), _)| *page as u64).collect();
            bitmap.clear_pages(vm, &pages)?;
        }
        self.closed.clear();
        Ok(())
    }

    /// Fetches KVM's bits, or its rings' entries, and marks the pages that they are.
    ///
    /// # Errors
    /// The system's.
    pub fn fetch(&mut self, vm: &VmFd, windows: &[Window], rings: Option<&mut RingSet>) -> Result<(), Error> {
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
        for (index, (bitmap, window)) in self.bitmaps.iter_mut().zip(windows).enumerate() {
            if !window.logged() {
                continue;
            }
            bitmap.get(vm)?;
            for (word, &bits) in bitmap.words().iter().enumerate() {
                let mut rest = bits;
                while rest != 0 {
                    let page = word * 64 + rest.trailing_zeros() as usize;
                    rest &= rest - 1;
                    let now = window.pages.get(page).and_then(|page| page.frame());
                    let frame = now.or_else(|| self.closed.get(&(index, page)).copied());
                    if let Some(frame) = frame {
                        self.dirty.insert(frame.0.wrapping_sub(self.first.0));
                    }
                }
            }
        }
        Ok(())
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
        self.closed
            .retain(|&(index, page), _| manual && bitmaps.get(index).is_some_and(|bitmap| bitmap.is_set(page as u64)));
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
        if self.clearing == Clearing::Manual {
            for (bitmap, _) in self.bitmaps.iter().zip(windows).filter(|(_, window)| window.logged()) {
                bitmap.clear(vm, WHOLE_SLOT)?;
            }
            // A page that was written and closed since the harvest still has its bit.
            let bitmaps = &self.bitmaps;
            self.closed.retain(|&(index, page), _| bitmaps.get(index).is_none_or(|bitmap| !bitmap.is_set(page as u64)));
        }
        Ok(())
    }

    /// The pages that the last harvest found, by index from the first tracked one on.
    #[must_use]
    pub const fn found(&self) -> &PageSet {
        &self.found
    }
}
