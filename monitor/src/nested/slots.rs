//! KVM's slots: a window is one, or its leaves of 2 MiB are, where each of them is logged or not by itself.

use super::log::Log;
use super::window::{Page, Window};
use super::windows::{Windows, call};
use crate::kvm::{Error, vm};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use std::ops::Range;
use umbra_mmu::Frame;
use umbra_shared::{L2Gfn, Level, control};

/// A slot of KVM's: a window, or a part of one.
#[derive(Debug)]
pub(super) struct Slot {
    number: u32,
    pub pages: Range<usize>,
    /// Whether KVM logs it.
    pub logged: bool,
}

/// KVM has 32,764 slots at most (`KVM_USER_MEM_SLOTS`); this is what leaves of all windows together may take.
const LEAF_SLOTS: u64 = 16384;

/// Pages of a slot, where each leaf of 2 MiB is to be one: more of them together where there would be too many.
pub(super) fn leaf_granule(windows: &[control::Window]) -> u64 {
    let pages: u64 = windows.iter().map(|window| window.frames).fold(0, u64::saturating_add);
    let mut granule = Level::M2.frames();
    while pages / granule > LEAF_SLOTS {
        granule *= 2;
    }
    granule
}

/// The parts of a window of `count` pages from `first` on, cut where frames are multiples of `granule`.
fn parts(first: L2Gfn, count: usize, granule: u64) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0_usize;
    std::iter::from_fn(move || {
        let left = granule - (first.0 + start as u64) % granule;
        let end = start.saturating_add(usize::try_from(left).unwrap_or(usize::MAX)).min(count);
        let part = (start < count).then_some(start..end);
        start = end;
        part
    })
}

impl Slot {
    /// The slots of a window of `count` pages from `first` on, numbered from `number`, each of at most `granule` pages.
    pub(super) fn of_window(first: L2Gfn, count: usize, granule: u64, number: u32) -> Vec<Self> {
        parts(first, count, granule)
            .zip(number..)
            .map(|(pages, number)| Self { number, pages, logged: false })
            .collect()
    }

    /// The number of the next one.
    pub(super) const fn next(&self) -> u32 {
        self.number + 1
    }
}

impl Window {
    /// The number of its first slot.
    #[must_use]
    pub fn first_slot(&self) -> u32 {
        self.slots.first().map_or(0, |slot| slot.number)
    }

    /// Whether KVM logs any of it.
    #[must_use]
    pub fn logged(&self) -> bool {
        self.slots.iter().any(|slot| slot.logged)
    }

    /// Its page that is page `offset` of KVM's slot `number`; `None` for another window's.
    #[must_use]
    pub fn page_of(&self, number: u32, offset: u64) -> Option<usize> {
        let slot = self.slots.get(usize::try_from(number.checked_sub(self.first_slot())?).ok()?)?;
        let page = slot.pages.start.checked_add(usize::try_from(offset).ok()?)?;
        slot.pages.contains(&page).then_some(page)
    }

    /// Its slots that hold any of `pages`, by index.
    pub(super) fn slots_of(&self, pages: &Range<usize>) -> Range<usize> {
        let first = self.slots.partition_point(|slot| slot.pages.end <= pages.start);
        let end = self.slots.partition_point(|slot| slot.pages.start < pages.end);
        first..end.max(first)
    }

    pub(super) fn region(&self, slot: &Slot, flags: u32) -> kvm_userspace_memory_region {
        let place = self.stretch(&slot.pages);
        kvm_userspace_memory_region {
            slot: slot.number,
            flags,
            guest_phys_addr: self.first.plus(slot.pages.start as u64).address(),
            memory_size: place.bytes(),
            userspace_addr: place.start.0,
        }
    }
}

impl Windows {
    /// Switches KVM's log of a window on or off.
    pub(super) fn set_logged(&mut self, index: usize, on: bool) -> Result<(), Error> {
        let slots = self.all.get(index).map_or(0, |window| window.slots.len());
        (0..slots).try_for_each(|slot| self.set_slot_logged(index, slot, on))
    }

    /// Switches KVM's log of a slot on or off.
    fn set_slot_logged(&mut self, index: usize, slot: usize, on: bool) -> Result<(), Error> {
        let Some(window) = self.all.get_mut(index) else { return Ok(()) };
        let on = on && self.log.as_ref().is_some_and(Log::is_of_kvm);
        let Some(at) = window.slots.get(slot).filter(|slot| slot.logged != on) else { return Ok(()) };
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        // SAFETY: the same addresses as when it was made.
        unsafe { self.vm.set_user_memory_region(window.region(at, flags)) }
            .map_err(vm::failed("KVM_SET_USER_MEMORY_REGION"))?;
        if let Some(slot) = window.slots.get_mut(slot) {
            slot.logged = on;
        }
        Ok(())
    }

    /// Whether what a slot maps has to be logged.
    fn must_log(&self, index: usize, slot: usize) -> bool {
        let Some(window) = self.all.get(index) else { return false };
        let Some(slot) = window.slots.get(slot) else { return false };
        let mapped = window.pages.get(slot.pages.clone()).unwrap_or_default().iter().filter_map(|page| page.frame());
        mapped.into_iter().any(|frame| self.is_logged(frame))
    }

    fn is_logged(&self, frame: Frame) -> bool {
        frame >= self.memory.first_tracked()
            && !self.unlogged.as_ref().is_some_and(|unlogged| unlogged.contains(&(frame.0 >> 9)))
    }

    /// Logs a slot from now on, or no longer, and maps what it maps anew: told apart while it is logged, by huge pages while it is not.
    fn switch_slot(&mut self, index: usize, slot: usize, on: bool) -> Result<(), Error> {
        self.set_slot_logged(index, slot, on)?;
        let Some(pages) = self.all.get(index).and_then(|window| Some(window.slots.get(slot)?.pages.clone())) else {
            return Ok(());
        };
        self.renew(index, pages)
    }

    /// Maps anew what pages `pages` of window `index` map.
    pub(super) fn renew(&mut self, index: usize, pages: Range<usize>) -> Result<(), Error> {
        let mut at = pages.start;
        while at < pages.end {
            let Some(rest) = self.all.get(index).and_then(|window| window.pages.get(at..pages.end)) else { break };
            let first = rest.first().copied().unwrap_or_default();
            let next = |(page, offset): (&Page, u32)| *page == first.plus(offset);
            let alike = rest.iter().zip(0..).take_while(|&pair| next(pair)).count().max(1);
            let run = at..at + alike;
            if let Some(frame) = first.frame().filter(|_| !first.gathered()) {
                self.with_room(|windows| windows.map_run(index, run.clone(), frame, first.writable()))
                    .map_err(|error| Error::call("mapping a leaf of L2 anew", error))?;
            }
            at += alike;
        }
        Ok(())
    }

    /// Pages `run` of window `index` are about to map `frame` and those after it: their slots are logged where they must be.
    pub(super) fn log_run(&mut self, index: usize, run: &Range<usize>, frame: Frame) -> Result<(), Error> {
        if self.log.is_none() || self.unlogged.is_none() || run.is_empty() {
            return Ok(());
        }
        let last = run.len() as u64 - 1;
        let must = (0..last).step_by(512).chain([last]).any(|page| self.is_logged(frame.plus(page)));
        let slots = self.all.get(index).map_or(0..0, |window| window.slots_of(run));
        for slot in slots.filter(|_| must) {
            if !self.is_slot_logged(index, slot) {
                self.switch_slot(index, slot, true)?;
            }
        }
        Ok(())
    }

    fn is_slot_logged(&self, index: usize, slot: usize) -> bool {
        self.all.get(index).and_then(|window| window.slots.get(slot)).is_some_and(|slot| slot.logged)
    }

    /// See [`umbra_mmu::Mapper::log_writes`].
    pub(super) fn log_region(&mut self, first: Frame, on: bool) {
        let region = first.0 >> 9;
        let Some(unlogged) = &mut self.unlogged else { return };
        let changed = if on { unlogged.remove(&region) } else { unlogged.insert(region) };
        if !changed {
            return;
        }
        for index in 0..self.all.len() {
            let Some(window) = self.all.get(index) else { continue };
            let maps = |page: &Page| page.frame().is_some_and(|frame| frame.0 >> 9 == region);
            let concerned =
                |slot: &Slot| window.pages.get(slot.pages.clone()).is_some_and(|pages| pages.iter().any(maps));
            let slots: Vec<usize> =
                window.slots.iter().enumerate().filter(|(_, slot)| concerned(slot)).map(|(number, _)| number).collect();
            for slot in slots {
                let want = self.must_log(index, slot);
                if want != self.is_slot_logged(index, slot)
                    && let Err(error) = self.switch_slot(index, slot, want)
                {
                    self.fail(call(&error));
                }
            }
        }
    }
}
