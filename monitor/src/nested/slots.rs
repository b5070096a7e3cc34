//! KVM's slots: a window is one. Where leaves of 2 MiB are logged or not each by itself, it is one for each 64 MiB, which is cut where leaves differ:
//! a call for each slot, and a fault that goes to another slot than the last one, cost too much where they do not.

use super::log::Log;
use super::window::{Page, Window};
use super::windows::{Windows, call};
use crate::kvm::{Error, vm};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use std::io;
use std::ops::Range;
use umbra_mmu::Frame;
use umbra_shared::{L2Gfn, Level, control};

/// A slot of KVM's: a window, or a part of one.
#[derive(Debug)]
pub(super) struct Slot {
    /// As KVM knows it: [`Cut::number`] of its first page.
    pub number: u32,
    pub pages: Range<usize>,
    /// Whether KVM logs it.
    pub logged: bool,
}

/// What the slots of all windows wait for.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Due {
    /// They may have to be cut, or to be logged no longer.
    settle: bool,
    /// Something that was not logged has to be, before it becomes writable.
    log: bool,
    /// Harvests since they waited for something.
    unchanged: u32,
    /// How often slots were cut or joined.
    pub cuts: u64,
    /// A slot that is deleted goes alone.
    alone: bool,
}

/// KVM has 32,764 slots at most (`KVM_USER_MEM_SLOTS`); this is what leaves of all windows together may take.
const LEAF_SLOTS: u64 = 16384;

/// Harvests without a change after which slots that were cut are joined.
const CALM: u32 = 8;

/// Leaves that a slot may hold where slots are cut: to cut one makes KVM forget all that it holds. 64 MiB.
const LEAVES: u64 = 32;

/// How a window can be cut into slots.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    /// The window's first frame.
    first: L2Gfn,
    /// Pages of a leaf: what no cut goes through. It begins where frames are multiples of that.
    leaf: u64,
    /// The number of the slot that begins with the window.
    base: u32,
}

impl Cut {
    /// Of a window of `count` pages from `first` on, and what its slots' numbers end before.
    pub fn new(first: L2Gfn, count: usize, leaf: u64, base: u32) -> (Self, u32) {
        let cut = Self { first, leaf, base };
        (cut, cut.number(count.saturating_sub(1)) + 1)
    }

    /// The number of a slot that begins at page `at`. A leaf has one, whatever the slot holds beside it, so that an entry of a ring names the same page
    /// before and after a cut.
    fn number(&self, at: usize) -> u32 {
        let leaf = (self.first.0 + at as u64) / self.leaf - self.first.0 / self.leaf;
        self.base + u32::try_from(leaf).unwrap_or(u32::MAX - self.base)
    }

    /// The first page of the slot of that number.
    fn page(&self, number: u32) -> Option<usize> {
        let leaf = self.first.0 / self.leaf + u64::from(number.checked_sub(self.base)?);
        usize::try_from(leaf.saturating_mul(self.leaf).saturating_sub(self.first.0)).ok()
    }

    /// `pages` cut where frames are multiples of `granule`.
    fn parts(self, pages: Range<usize>, granule: u64) -> impl Iterator<Item = Range<usize>> {
        let mut start = pages.start;
        std::iter::from_fn(move || {
            let left = granule - (self.first.0 + start as u64) % granule;
            let end = start.saturating_add(usize::try_from(left).unwrap_or(usize::MAX)).min(pages.end);
            let part = (start < pages.end).then_some(start..end);
            start = end;
            part
        })
    }

    /// The largest slots of `count` pages.
    pub fn slots(self, count: usize) -> Vec<Slot> {
        self.parts(0..count, self.leaf.saturating_mul(LEAVES)).map(|pages| self.slot(pages, false)).collect()
    }

    fn slot(&self, pages: Range<usize>, logged: bool) -> Slot {
        Slot { number: self.number(pages.start), pages, logged }
    }
}

/// Pages of a leaf, where each leaf of 2 MiB is to be logged or not by itself: more of them together where there would be too many.
pub(super) fn leaf_granule(windows: &[control::Window]) -> u64 {
    let pages: u64 = windows.iter().map(|window| window.frames).fold(0, u64::saturating_add);
    let mut granule = Level::M2.frames();
    while pages / granule > LEAF_SLOTS {
        granule *= 2;
    }
    granule
}

impl Window {
    /// Whether KVM logs any of it.
    #[must_use]
    pub fn logged(&self) -> bool {
        self.slots.iter().any(|slot| slot.logged)
    }

    /// Its page that is page `offset` of KVM's slot `number`, or was before that was cut; `None` for another window's.
    #[must_use]
    pub fn page_of(&self, number: u32, offset: u64) -> Option<usize> {
        let page = self.cut.page(number)?.checked_add(usize::try_from(offset).ok()?)?;
        (page < self.pages.len()).then_some(page)
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

    fn is_logged(&self, frame: Frame) -> bool {
        frame >= self.memory.first_tracked()
            && !self.unlogged.as_ref().is_some_and(|unlogged| unlogged.contains(&(frame.0 >> 9)))
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
        if (0..last).step_by(512).chain([last]).any(|page| self.is_logged(frame.plus(page))) {
            self.log_slots(index, run)?;
        }
        Ok(())
    }

    /// All slots that hold any of `run` in window `index` are logged from now on. The next harvest cuts them where that is too much.
    fn log_slots(&mut self, index: usize, run: &Range<usize>) -> Result<(), Error> {
        let slots = self.all.get(index).map_or(0..0, |window| window.slots_of(run));
        for slot in slots {
            let Some(slot) = self.all.get(index).and_then(|window| window.slots.get(slot)) else { break };
            if !slot.logged {
                let part = (slot.pages.clone(), true);
                self.replace_slots(index, &part.0.clone(), vec![part])?;
                self.due.settle = true;
            }
        }
        Ok(())
    }

    /// See [`umbra_mmu::Mapper::log_writes`]. Nothing that has to be logged becomes writable before it is; what has not is logged until the next
    /// harvest ends.
    pub(super) fn log_region(&mut self, first: Frame, on: bool) {
        let region = first.0 >> 9;
        let Some(unlogged) = &mut self.unlogged else { return };
        let changed = if on { unlogged.remove(&region) } else { unlogged.insert(region) };
        self.due.settle |= changed;
        self.due.log |= changed && on;
    }

    /// Pages `run` of window `index` are about to become writable.
    pub(super) fn log_before_writes(&mut self, index: usize, run: &Range<usize>) -> io::Result<()> {
        if !self.due.log || self.log.is_none() {
            return Ok(());
        }
        let pages = self.all.get(index).and_then(|window| window.pages.get(run.clone())).unwrap_or_default();
        if !pages.iter().filter_map(|page| page.frame()).any(|frame| self.is_logged(frame)) {
            return Ok(());
        }
        self.log_slots(index, run).map_err(|error| call(&error))
    }

    /// After a harvest: cuts slots where leaves differ in that they are to be logged, and joins those that were cut when nothing has changed for a
    /// while. While a vCPU is in KVM, which would miss a slot that is being replaced, this is put off.
    ///
    /// # Errors
    /// The system's.
    pub fn settle_slots(&mut self) -> Result<(), Error> {
        if self.log.is_none() || self.unlogged.is_none() {
            return Ok(());
        }
        self.due.unchanged = if self.due.settle { 0 } else { self.due.unchanged.saturating_add(1) };
        let join = self.due.unchanged == CALM;
        if !self.due.settle && !join {
            return Ok(());
        }
        for index in 0..self.all.len() {
            let Some(window) = self.all.get(index).filter(|window| window.tracked) else { continue };
            let whole: Vec<_> = window.cut.slots(window.pages.len()).into_iter().map(|slot| slot.pages).collect();
            let old: Vec<_> = window.slots.iter().map(|slot| slot.pages.clone()).collect();
            let is_cut = |pages: &Range<usize>| !old.contains(pages);
            let pieces: Vec<_> = if join { whole.into_iter().filter(is_cut).collect() } else { old };
            for pages in pieces {
                let parts = self.wanted_slots(index, &pages);
                if !join || parts.len() == 1 {
                    self.replace_slots(index, &pages, parts)?;
                }
            }
        }
        let put_off = self.l2_runs();
        self.due.settle = put_off;
        self.due.log &= put_off;
        Ok(())
    }

    /// `pages` of window `index`, cut where leaves that map something differ in that it is to be logged.
    fn wanted_slots(&self, index: usize, pages: &Range<usize>) -> Vec<(Range<usize>, bool)> {
        let Some(window) = self.all.get(index) else { return Vec::new() };
        let mut parts: Vec<(Range<usize>, Option<bool>)> = Vec::new();
        for leaf in window.cut.parts(pages.clone(), window.cut.leaf) {
            let frames = window.pages.get(leaf.clone()).unwrap_or_default().iter().filter_map(|page| page.frame());
            let wanted = frames.map(|frame| self.is_logged(frame)).reduce(|any, logged| any | logged);
            match parts.last_mut() {
                Some((part, of)) if of.is_none() || wanted.is_none() || *of == wanted => {
                    part.end = leaf.end;
                    *of = of.or(wanted);
                }
                _ => parts.push((leaf, wanted)),
            }
        }
        // What maps nothing is logged: what it will map may have to be.
        parts.into_iter().map(|(part, wanted)| (part, wanted.unwrap_or(true))).collect()
    }

    /// Makes `parts`, logged or not, the slots of `pages` of window `index`, and maps anew what these map: told apart while it is logged, by huge
    /// pages while it is not. What KVM has logged there is fetched, when nobody can write there any more.
    fn replace_slots(
        &mut self,
        index: usize,
        pages: &Range<usize>,
        parts: Vec<(Range<usize>, bool)>,
    ) -> Result<(), Error> {
        let Some(window) = self.all.get(index) else { return Ok(()) };
        let slots = window.slots_of(pages);
        let old = window.slots.get(slots.clone()).unwrap_or_default();
        if old.iter().map(|slot| (&slot.pages, slot.logged)).eq(parts.iter().map(|(pages, logged)| (pages, *logged))) {
            return Ok(());
        }
        let same = old.iter().map(|slot| &slot.pages).eq(parts.iter().map(|(pages, _)| pages));
        if !same && self.l2_runs() {
            return Ok(());
        }
        for run in window.runs_in(Frame(0), pages.clone()) {
            self.source.close(window.stretch(&run)).map_err(|error| Error::call("closing a slot of L2", error))?;
        }
        let new: Vec<_> = parts.into_iter().map(|(pages, logged)| window.cut.slot(pages, logged)).collect();
        if let Some(log) = &mut self.log {
            if let Some(rings) = self.rings.as_mut() {
                log.fetch(&self.vm, &self.all, Some(rings))?;
            }
            for slot in old {
                log.end_slot(&self.vm, (index, window), slot)?;
            }
            for slot in &new {
                log.begin_slot(slot);
            }
        }
        let gone = |slot: &Slot| kvm_userspace_memory_region { memory_size: 0, ..window.region(slot, 0) };
        let flags = |slot: &Slot| if slot.logged { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let gone = old.iter().filter(|_| !same).map(gone);
        for region in gone.chain(new.iter().map(|slot| window.region(slot, flags(slot)))) {
            // SAFETY: the window's addresses, as when it was made, or none.
            unsafe { self.vm.set_user_memory_region(region) }.map_err(vm::failed("KVM_SET_USER_MEMORY_REGION"))?;
        }
        self.due.cuts += u64::from(!same);
        if let Some(window) = self.all.get_mut(index) {
            window.slots.splice(slots, new);
        }
        if !same && !self.due.alone {
            self.renew_logged()?;
        }
        self.renew(index, pages.clone())
    }

    /// KVM has forgotten all that it had mapped, because a slot is gone. What L2 reads first now would count as written if it may be written at once.
    fn renew_logged(&mut self) -> Result<(), Error> {
        for index in 0..self.all.len() {
            let slots = self.all.get(index).into_iter().flat_map(|window| &window.slots);
            let logged: Vec<_> = slots.filter(|slot| slot.logged).map(|slot| slot.pages.clone()).collect();
            logged.into_iter().try_for_each(|pages| self.renew(index, pages))?;
        }
        Ok(())
    }
}

/// `KVM_CAP_DISABLE_QUIRKS2`, and the quirk that a slot which is deleted takes all that KVM has mapped with it (include/uapi/linux/kvm.h and
/// arch/x86/include/uapi/asm/kvm.h, Linux 6.12).
const CAP_DISABLE_QUIRKS2: u32 = 213;
const QUIRK_SLOT_ZAP_ALL: u64 = 1 << 7;

impl Due {
    /// For `vm`, in which slots will be deleted if `cut`.
    pub fn new(vm: &VmFd, cut: bool) -> Self {
        let offered = cut && vm::offered(vm, CAP_DISABLE_QUIRKS2) & QUIRK_SLOT_ZAP_ALL != 0;
        let disable = || vm::enable(vm, CAP_DISABLE_QUIRKS2, "KVM_CAP_DISABLE_QUIRKS2", QUIRK_SLOT_ZAP_ALL, "");
        Self { alone: offered && disable().is_ok(), ..Self::default() }
    }
}
