//! The mapper: EPT02 made effective. Each window is a memory slot of L2's VM over reserved host addresses, into which L1's memory is mapped.
//!
//! The invariant is: a page of a window maps the page of L1's memory that [`Page`] names, writable if that says so, or nothing. It never maps more
//! than EPT02 allows; it may map less (an eviction), and the next fault there maps it again.

use super::gather::Queue;
use super::log::Log;
use super::memory::L1Pages;
use super::reserve::Reserved;
use super::slots::{Slot, leaf_granule};
use super::source::{Mapped, Source, Tables};
use super::{FirstReads, Options};
use crate::hostmm::udmabuf::Udmabuf;
use crate::hostmm::{Hva, Stretch};
use crate::kvm::ring::RingSet;
use crate::kvm::{Error, vm};
use kvm_ioctls::VmFd;
use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use umbra_mmu::{Access, Extent, Flush, Frame, Mapper, RootId};
use umbra_shared::{L2Gfn, Level, control};

/// `KVM_CAP_PRE_FAULT_MEMORY` (include/uapi/linux/kvm.h).
const CAP_PRE_FAULT_MEMORY: u32 = 236;

/// Pages of a piece: 1 MiB. A change of one page inside a mapping that covers 2 MiB makes KVM drop all 2 MiB, huge or not (Linux splits a huge
/// entry that may be there, and tells KVM so: `split_huge_pmd_if_needed` in `mm/huge_memory.c`). So where pages are small, every other piece is set
/// apart from its neighbours, and no mapping covers 2 MiB.
pub(super) const PIECE: usize = 256;

/// Pages that an eviction closes at a time.
const EVICTED: usize = 16384;

/// What a page of a window maps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Page(u32);

impl Page {
    const WRITABLE: u32 = 1 << 31;
    /// Mapped through a udmabuf: [`Queue`].
    const GATHERED: u32 = 1 << 30;
    const FRAME: u32 = !(Self::WRITABLE | Self::GATHERED);
    /// Nothing.
    pub const CLOSED: Self = Self(0);

    /// `frame`, which is below 2^30 - 1: 4 TiB.
    fn new(frame: Frame, writable: bool) -> Self {
        let number = u32::try_from(frame.0 + 1).unwrap_or(0) & Self::FRAME;
        Self(if writable { number | Self::WRITABLE } else { number })
    }

    /// Pages that map `first` and the frames after it.
    fn fill(pages: &mut [Self], first: Frame, writable: bool) {
        for (number, page) in (Self::new(first, writable).0..).zip(pages) {
            *page = Self(number);
        }
    }

    /// What maps the memory `pages` behind this one's as this does its own.
    pub(super) const fn plus(self, pages: u32) -> Self {
        Self(self.0.wrapping_add(pages))
    }

    /// The page of L1's memory.
    #[must_use]
    pub fn frame(self) -> Option<Frame> {
        (self.0 & Self::FRAME).checked_sub(1).map(|frame| Frame(frame.into()))
    }

    /// `frame`, writable and gathered.
    pub(super) fn new_gathered(frame: Frame) -> Self {
        Self(Self::new(frame, true).0 | Self::GATHERED)
    }

    /// Whether a udmabuf stands between it and the memory's own file.
    #[must_use]
    pub const fn gathered(self) -> bool {
        self.0 & Self::GATHERED != 0
    }

    /// Whether L2 may write it.
    #[must_use]
    pub const fn writable(self) -> bool {
        self.0 & Self::WRITABLE != 0
    }
}

/// A window.
#[derive(Debug)]
pub struct Window {
    /// Its first frame.
    pub first: L2Gfn,
    /// What each page maps.
    pub pages: Vec<Page>,
    /// KVM's slots, one behind the other, with numbers that are so too.
    pub(super) slots: Vec<Slot>,
    /// Whether it has ever mapped tracked memory.
    tracked: bool,
    place: Reserved,
}

impl Window {
    /// Where it lies in this process.
    #[must_use]
    pub const fn place(&self) -> Stretch {
        self.place.stretch()
    }

    pub(super) fn stretch(&self, pages: &Range<usize>) -> Stretch {
        self.place.stretch().part(pages.start as u64, pages.len() as u64)
    }

    /// The number of page `at`, counted from a boundary of 2 MiB.
    #[allow(clippy::cast_possible_truncation)] // Below 512.
    const fn piece(&self, at: usize) -> usize {
        at + (self.first.0 % Level::M2.frames()) as usize
    }

    /// Its pages in `extent`.
    fn clip(&self, extent: Extent) -> Range<usize> {
        let count = self.pages.len() as u64;
        let start = extent.start.0.saturating_sub(self.first.0).min(count);
        let end = extent.start.0.saturating_add(extent.frames).saturating_sub(self.first.0).min(count);
        #[allow(clippy::cast_possible_truncation)] // Both are at most the length of a Vec.
        (start as usize..end as usize)
    }
}

/// What the mapper did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Calls that mapped.
    pub maps: u64,
    /// Pages that they mapped.
    pub mapped_pages: u64,
    /// Those among them that a udmabuf gathered.
    pub gathered_pages: u64,
    /// Calls that changed rights.
    pub protects: u64,
    /// Calls that closed pages.
    pub closes: u64,
    /// Pages that were closed because the process had too many mappings.
    pub evicted_pages: u64,
    /// Tracked ones among the mapped pages.
    pub tracked_pages: u64,
}

impl Counts {
    /// Both.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            maps: self.maps + other.maps,
            mapped_pages: self.mapped_pages + other.mapped_pages,
            gathered_pages: self.gathered_pages + other.gathered_pages,
            protects: self.protects + other.protects,
            closes: self.closes + other.closes,
            evicted_pages: self.evicted_pages + other.evicted_pages,
            tracked_pages: self.tracked_pages + other.tracked_pages,
        }
    }
}

/// All windows of one VM.
pub struct Windows {
    pub(super) vm: Arc<VmFd>,
    pub(super) memory: Arc<L1Pages>,
    /// Before the windows' addresses: its thread may look at them.
    pub(super) source: Box<dyn Source>,
    pub(super) all: Vec<Window>,
    /// The root that they are of; changes of others do not concern them.
    root: Option<RootId>,
    /// No mapping is to cover 2 MiB.
    pieces: bool,
    /// What KVM's log makes of pages that L2 reads first.
    first_reads: FirstReads,
    /// Where each leaf of 2 MiB is a slot, so that it is logged or not by itself: 2 MiB of L1's memory that need not be logged, by number.
    pub unlogged: Option<BTreeSet<u64>>,
    /// What is to be mapped, and is not yet.
    pub(super) queue: Queue,
    /// Maps scattered leaves together; `None` where the host has none.
    pub(super) udmabuf: Option<Udmabuf>,
    /// Whether KVM can be told to map beforehand what is [`Self::fresh`].
    pub(super) pre_faults: bool,
    /// KVM's log of L2's VM.
    pub log: Option<Log>,
    /// Its dirty rings, where the log is made of them.
    pub rings: Option<RingSet>,
    /// L2's own page tables: frames that are mapped before L2 runs, and whether all of them are.
    tables: Range<u64>,
    /// Whether all of those are mapped.
    pub tables_mapped: bool,
    /// While L1 invalidates: the pages that this closed, as far as there is room.
    pub invalidated: Vec<L2Gfn>,
    /// What was mapped since it was last looked at, for KVM to fault in beforehand.
    pub fresh: Vec<(L2Gfn, u64)>,
    /// What went wrong first.
    failed: Option<io::Error>,
    /// What was done.
    pub counts: Counts,
    hand: usize,
}

impl Windows {
    /// No windows.
    #[must_use]
    pub fn new(vm: Arc<VmFd>, memory: Arc<L1Pages>, source: Box<dyn Source>, options: &Options) -> Self {
        Self {
            pieces: options.pieces,
            first_reads: options.first_reads,
            unlogged: (options.means.traps() && options.means.logs()).then(BTreeSet::new),
            queue: Queue::default(),
            udmabuf: Udmabuf::open().ok(),
            pre_faults: vm::offered(&vm, CAP_PRE_FAULT_MEMORY) > 0,
            vm,
            memory,
            source,
            all: Vec::new(),
            root: None,
            log: None,
            rings: None,
            tables: 0..0,
            tables_mapped: true,
            invalidated: Vec::new(),
            fresh: Vec::new(),
            failed: None,
            counts: Counts::default(),
            hand: 0,
        }
    }

    /// Makes the windows that L1 wants.
    ///
    /// # Errors
    /// The system's, and [`Error::Memory`].
    pub fn create(&mut self, wanted: &[control::Window], tables: control::Window) -> Result<(), Error> {
        let granule = if self.unlogged.is_some() { leaf_granule(wanted) } else { u64::MAX };
        let mut number = 0;
        for window in wanted {
            let place = Reserved::new(window.frames, window.first.0)?;
            self.source.adopt(place.stretch())?;
            let mut pages = vec![Page::CLOSED; usize::try_from(window.frames).unwrap_or(usize::MAX)];
            // The host gives it memory here, not at L2's first touch.
            pages.iter_mut().step_by(1024).for_each(|page| *std::hint::black_box(page) = Page::CLOSED);
            let slots = Slot::of_window(window.first, pages.len(), granule, number);
            number = slots.last().map_or(number, Slot::next);
            let window = Window { first: window.first, pages, slots, tracked: false, place };
            for slot in &window.slots {
                // SAFETY: the addresses are the window's as long as it lives, and whatever is mapped there is L1's memory.
                unsafe { self.vm.set_user_memory_region(window.region(slot, 0)) }
                    .map_err(vm::failed("KVM_SET_USER_MEMORY_REGION"))?;
            }
            self.all.push(window);
        }
        self.tables = tables.first.0..tables.first.0.saturating_add(tables.frames);
        self.tables_mapped = self.tables.is_empty();
        Ok(())
    }

    /// The windows.
    #[must_use]
    pub fn windows(&self) -> &[Window] {
        &self.all
    }

    /// The fault source.
    #[must_use]
    pub fn source(&self) -> &dyn Source {
        &*self.source
    }

    /// L2's own page tables.
    #[must_use]
    pub fn tables(&self) -> Range<u64> {
        self.tables.clone()
    }

    /// What a frame of L2 maps; `None` outside of all windows.
    #[must_use]
    pub fn page(&self, gfn: L2Gfn) -> Option<Page> {
        self.all.iter().find_map(|window| {
            let page = usize::try_from(gfn.0.checked_sub(window.first.0)?).ok()?;
            window.pages.get(page).copied()
        })
    }

    /// The frame of L2 at an address of a window.
    #[must_use]
    pub fn gfn_at(&self, at: Hva) -> Option<L2Gfn> {
        self.all.iter().find_map(|window| Some(window.first.plus(window.place.stretch().page(at)?)))
    }

    /// Where L2's frame lies in this process; `None` outside of all windows.
    #[must_use]
    pub fn hva_of(&self, gfn: L2Gfn) -> Option<Hva> {
        self.all.iter().find_map(|window| {
            let page = gfn.0.checked_sub(window.first.0).filter(|page| *page < window.pages.len() as u64)?;
            Some(window.place.stretch().start.plus(page))
        })
    }

    /// The VM.
    #[must_use]
    pub const fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// The root that they are of.
    #[must_use]
    pub const fn root(&self) -> Option<RootId> {
        self.root
    }

    /// They are `root`'s from now on. What another one mapped is gone already.
    pub const fn serve(&mut self, root: RootId) {
        self.root = Some(root);
    }

    /// Closes everything. Whether anything was mapped.
    pub fn close_all(&mut self) -> bool {
        let mapped = self.all.iter().any(|window| window.pages.iter().any(|page| *page != Page::CLOSED));
        if let Some(root) = self.root {
            self.unmap(Extent { root, start: L2Gfn(0), frames: u64::MAX });
        }
        mapped
    }

    /// What [`Self::create`] was asked for.
    #[must_use]
    pub fn wanted(&self) -> (Vec<control::Window>, control::Window) {
        let window = |first: u64, frames: u64| control::Window { first: L2Gfn(first), frames };
        let all = self.all.iter().map(|it| window(it.first.0, it.pages.len() as u64)).collect();
        (all, window(self.tables.start, self.tables.end - self.tables.start))
    }

    /// Pages of tracked memory that are mapped now.
    #[must_use]
    pub fn tracked_now(&self) -> u64 {
        let first = self.memory.first_tracked();
        let pages = self.all.iter().flat_map(|window| &window.pages);
        pages.filter(|page| page.frame().is_some_and(|frame| frame >= first)).count() as u64
    }

    /// Maps what was posted and not mapped yet. Gives what went wrong first since this was last asked.
    pub fn settle(&mut self) -> Option<io::Error> {
        self.map_queue();
        self.failed.take()
    }

    /// Begins to log the windows that map tracked memory; others join when they do.
    ///
    /// # Errors
    /// The system's.
    pub fn start_log(&mut self, log: Log) -> Result<(), Error> {
        self.log = Some(log);
        for index in 0..self.all.len() {
            if self.all.get(index).is_some_and(|window| window.tracked) {
                self.set_logged(index, true)?;
            }
        }
        Ok(())
    }

    /// Ends it.
    ///
    /// # Errors
    /// The system's.
    pub fn stop_log(&mut self) -> Result<Option<Log>, Error> {
        (0..self.all.len()).try_for_each(|index| self.set_logged(index, false))?;
        Ok(self.log.take())
    }

    /// Fetches the log: bits become pages of L1's memory by what is mapped, or was when the page was closed.
    ///
    /// # Errors
    /// The system's.
    pub fn harvest_log(&mut self) -> Result<(), Error> {
        self.log.as_mut().map_or(Ok(()), |log| log.harvest(&self.vm, &self.all, self.rings.as_mut()))
    }

    /// Clears what was fetched.
    ///
    /// # Errors
    /// The system's.
    pub fn clear_log(&mut self) -> Result<(), Error> {
        self.log.as_mut().map_or(Ok(()), |log| log.clear(&self.vm, &self.all, self.rings.as_ref()))
    }

    /// A ring is full: what the rings hold is fetched, and they are emptied.
    ///
    /// # Errors
    /// The system's.
    pub fn empty_rings(&mut self) -> Result<(), Error> {
        let (Some(log), Some(rings)) = (&mut self.log, &mut self.rings) else { return Ok(()) };
        log.ring_exits += 1;
        log.fetch(&self.vm, &self.all, Some(rings))?;
        rings.reset()
    }

    pub(super) fn fail(&mut self, failed: io::Error) {
        self.failed.get_or_insert(failed);
    }

    /// Whether what is mapped now must tell KVM's log a read from a write.
    pub(super) fn tells_apart(&self) -> bool {
        self.log.is_some() && self.first_reads == FirstReads::Exact
    }

    /// Maps pages `pages` of window `index` to `frame` and those after it.
    pub(super) fn map_run(
        &mut self,
        index: usize,
        pages: Range<usize>,
        frame: Frame,
        writable: bool,
    ) -> io::Result<()> {
        let (told_apart, left) = (self.tells_apart(), self.pre_faults && self.log.is_none());
        let (source, memory) = (&*self.source, &*self.memory);
        let Some(window) = self.all.get_mut(index) else { return Ok(()) };
        let mut at = pages.start;
        while at < pages.end {
            let first = frame.plus((at - pages.start) as u64);
            let Some(part) = memory.in_file(first) else { return Err(io::ErrorKind::NotFound.into()) };
            let mut end = pages.end.min(at.saturating_add(usize::try_from(part.pages).unwrap_or(usize::MAX)));
            let slot = window.slots.get(window.slots_of(&(at..end)).start);
            end = slot.map_or(end, |slot| end.min(slot.pages.end));
            let logged = self.log.is_some() && (self.unlogged.is_none() || slot.is_some_and(|slot| slot.logged));
            let piece = window.piece(at);
            if self.pieces {
                end = end.min(at + PIECE - piece % PIECE);
            }
            let alone = self.pieces && piece / PIECE % 2 == 1;
            let tables = match (told_apart && logged, left) {
                (true, _) => Tables::ToldApart,
                (false, true) if writable && !part.small && memory.is_resident() => Tables::Written,
                (false, true) => Tables::Left,
                (false, false) => Tables::Filled,
            };
            source.map(window.stretch(&(at..end)), part, Mapped { writable, alone, tables })?;
            self.counts.maps += 1;
            self.counts.mapped_pages += (end - at) as u64;
            if first >= memory.first_tracked() {
                self.counts.tracked_pages += (end - at) as u64;
            }
            Page::fill(window.pages.get_mut(at..end).unwrap_or_default(), first, writable);
            at = end;
        }
        Ok(())
    }

    /// Closes the mapped pages of `pages` in window `index`. Marks that KVM's log still holds for them stay with what they mapped.
    fn close_run(&mut self, index: usize, pages: Range<usize>) -> io::Result<()> {
        let Some(window) = self.all.get_mut(index) else { return Ok(()) };
        self.source.close(window.stretch(&pages))?;
        self.counts.closes += 1;
        if let Some(log) = self.log.as_mut().filter(|_| window.logged()) {
            log.closed(index, pages.start, window.pages.get(pages.clone()).unwrap_or_default());
        }
        let first = window.first.0 + pages.start as u64;
        let room = self.invalidated.capacity() - self.invalidated.len();
        self.invalidated.extend((first..first + pages.len() as u64).take(room).map(L2Gfn));
        if self.tables.start < first + pages.len() as u64 && first < self.tables.end {
            self.tables_mapped = false;
        }
        window.pages.get_mut(pages).into_iter().flatten().for_each(|page| *page = Page::CLOSED);
        Ok(())
    }

    /// Does `work`. If the process has too many mappings, closes others and tries again.
    pub(super) fn with_room(&mut self, mut work: impl FnMut(&mut Self) -> io::Result<()>) -> io::Result<()> {
        loop {
            match work(self) {
                Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => {
                    if !self.evict()? {
                        return Err(error);
                    }
                }
                other => return other,
            }
        }
    }

    /// Closes some pages, each time others. False if nothing is mapped any more.
    fn evict(&mut self) -> io::Result<bool> {
        let chunks: Vec<(usize, Range<usize>)> = self
            .all
            .iter()
            .enumerate()
            .flat_map(|(index, window)| {
                let count = window.pages.len();
                (0..count).step_by(EVICTED).map(move |start| (index, start..count.min(start + EVICTED)))
            })
            .collect();
        for _ in 0..chunks.len() {
            self.hand = (self.hand + 1) % chunks.len();
            let Some((index, pages)) = chunks.get(self.hand).cloned() else { break };
            let Some(window) = self.all.get(index) else { break };
            let mapped =
                window.pages.get(pages.clone()).unwrap_or_default().iter().filter(|page| **page != Page::CLOSED);
            let mapped = mapped.count() as u64;
            if mapped == 0 {
                continue;
            }
            // A piece of a mapping cannot be closed when there is no room for one more: then the whole window.
            if let Err(error) = self.close_run(index, pages) {
                let whole = self.all.get(index).map_or(0, |window| window.pages.len());
                if error.raw_os_error() != Some(libc::ENOMEM) {
                    return Err(error);
                }
                self.close_run(index, 0..whole)?;
            }
            self.counts.evicted_pages += mapped;
            return Ok(true);
        }
        Ok(false)
    }

    /// The window that holds all of `extent`, and the pages there, if nothing is mapped in them: the usual case of a `map`, told at once.
    fn untouched(&self, extent: Extent) -> Option<(usize, Range<usize>)> {
        let whole = |window: &Window| window.clip(extent).len() as u64 == extent.frames;
        let index = self.all.iter().position(whole)?;
        let window = self.all.get(index)?;
        let pages = window.clip(extent);
        let closed = window.pages.get(pages.clone())?.iter().fold(0, |all, page| all | page.0) == 0;
        closed.then_some((index, pages))
    }

    /// The window that holds all of `extent`, and the pages there, if all of them are mapped and their rights change: the usual case of a `protect`,
    /// told at once.
    fn mapped_otherwise(&self, extent: Extent, writable: bool) -> Option<(usize, Range<usize>)> {
        let index = self.all.iter().position(|window| window.clip(extent).len() as u64 == extent.frames)?;
        let window = self.all.get(index)?;
        let pages = window.clip(extent);
        let old = if writable { 0 } else { Page::WRITABLE };
        let other = |page: &Page| page.0 & Page::WRITABLE != old || *page == Page::CLOSED;
        let others = window.pages.get(pages.clone())?.iter().fold(false, |any, page| any | other(page));
        (!others).then_some((index, pages))
    }

    /// Runs of pages of `extent` for which `kind` says the same and something, each with its window.
    fn runs<T: PartialEq>(
        &self,
        extent: Extent,
        kind: impl Fn(Page, Frame) -> Option<T>,
        frame: Frame,
    ) -> Vec<(usize, Range<usize>, T)> {
        let mut runs: Vec<(usize, Range<usize>, T)> = Vec::new();
        for (index, window) in self.all.iter().enumerate() {
            let clipped = window.clip(extent);
            for at in clipped {
                let target = frame.plus((window.first.0 + at as u64).wrapping_sub(extent.start.0));
                let Some(kind) = window.pages.get(at).and_then(|page| kind(*page, target)) else { continue };
                match runs.last_mut() {
                    Some((last, run, of)) if *last == index && run.end == at && *of == kind => run.end = at + 1,
                    _ => runs.push((index, at..at + 1, kind)),
                }
            }
        }
        runs
    }

    fn try_map(&mut self, extent: Extent, frame: Frame, writable: bool) -> io::Result<()> {
        // What is queued does not stand in the windows yet.
        let end = self.all.get(self.queue.window).map(|window| window.first.plus(self.queue.end() as u64));
        if end != Some(extent.start) {
            self.map_queue();
        }
        let kind = |page: Page, target: Frame| match page {
            _ if page.frame() == Some(target) && page.writable() == writable => None,
            _ if page.frame() == Some(target) => Some(true),
            _ => Some(false),
        };
        if let Some((index, run)) = self.untouched(extent) {
            return self.enqueue(index, &run, frame, writable).map_err(|error| call(&error));
        }
        for (index, run, mapped) in self.runs(extent, kind, frame) {
            if mapped {
                self.map_queue();
                self.protect_run(index, run, writable)?;
                continue;
            }
            let Some(window) = self.all.get(index) else { continue };
            let start = window.first.plus(run.start as u64);
            let first = frame.plus(start.0.wrapping_sub(extent.start.0));
            self.enqueue(index, &run, first, writable).map_err(|error| call(&error))?;
        }
        Ok(())
    }

    /// Queues closed pages `run` of window `index`, which are to map `frame` and those after it.
    fn enqueue(&mut self, index: usize, run: &Range<usize>, frame: Frame, writable: bool) -> Result<(), Error> {
        let tracked = frame.plus(run.len() as u64) > self.memory.first_tracked();
        if tracked && self.all.get(index).is_some_and(|window| !window.tracked) {
            self.begin_tracked(index)?;
        }
        if let Some(log) = &mut self.log {
            // What was closed here was written by another page's name.
            log.remapping(&self.vm, &self.all, self.rings.as_mut(), (index, run))?;
        }
        self.log_run(index, run, frame)?;
        if !self.queue.continues(index, run.start, writable) {
            self.map_queue();
            self.queue.begin(index, run.start, writable);
        }
        self.queue.push(frame, run.len());
        Ok(())
    }

    /// Window `index` is about to map tracked memory for the first time.
    fn begin_tracked(&mut self, index: usize) -> Result<(), Error> {
        if let Some(window) = self.all.get_mut(index) {
            window.tracked = true;
        }
        if self.log.is_some() { self.set_logged(index, true) } else { Ok(()) }
    }

    fn protect_run(&mut self, index: usize, run: Range<usize>, writable: bool) -> io::Result<()> {
        let pages = self.all.get(index).and_then(|window| window.pages.get(run.clone())).unwrap_or_default();
        if !writable && pages.iter().any(|page| page.gathered()) {
            // Closed, rather than mapped again by themselves: who reads one asks for it.
            return self.with_room(|windows| windows.close_run(index, run.clone()));
        }
        self.with_room(|windows| {
            let Some(window) = windows.all.get_mut(index) else { return Ok(()) };
            let pages = window.pages.get(run.clone()).unwrap_or_default();
            if pages.contains(&Page::CLOSED) {
                // An eviction, on the way here: what is closed is opened by its next fault.
                return Ok(());
            }
            windows.source.protect(window.stretch(&run), writable)?;
            windows.counts.protects += 1;
            for page in window.pages.get_mut(run.clone()).into_iter().flatten() {
                *page = Page(if writable { page.0 | Page::WRITABLE } else { page.0 & !Page::WRITABLE });
            }
            Ok(())
        })
    }

    fn concerns(&self, root: RootId) -> bool {
        self.root == Some(root)
    }

    /// Whether a mapping can grant just that: KVM looks at the right to write alone, so reading and execution go together.
    #[must_use]
    pub fn can_grant(access: Access) -> bool {
        access.allows(Access::READ.or(Access::EXECUTE))
    }
}

pub(super) fn call(error: &Error) -> io::Error {
    io::Error::other(error.to_string())
}

impl Mapper for Windows {
    fn map(&mut self, extent: Extent, frame: Frame, _: Level, access: Access) {
        if !self.concerns(extent.root) {
            return;
        }
        if !Self::can_grant(access) {
            // L1 hears of it if L2 touches it.
            return self.unmap(extent);
        }
        if let Err(failed) = self.try_map(extent, frame, access.allows(Access::WRITE)) {
            self.fail(failed);
        }
    }

    fn protect(&mut self, extent: Extent, access: Access) {
        if !self.concerns(extent.root) {
            return;
        }
        if !Self::can_grant(access) {
            return self.unmap(extent);
        }
        self.map_queue();
        let writable = access.allows(Access::WRITE);
        let kind = |page: Page, _| (page != Page::CLOSED && page.writable() != writable).then_some(());
        let runs = match self.mapped_otherwise(extent, writable) {
            Some((index, pages)) => vec![(index, pages, ())],
            None => self.runs(extent, kind, Frame(0)),
        };
        for (index, run, ()) in runs {
            if let Err(failed) = self.protect_run(index, run, writable) {
                self.fail(failed);
            }
        }
    }

    fn unmap(&mut self, extent: Extent) {
        if !self.concerns(extent.root) {
            return;
        }
        self.map_queue();
        for (index, run, ()) in self.runs(extent, |page, _| (page != Page::CLOSED).then_some(()), Frame(0)) {
            if let Err(error) = self.with_room(|windows| windows.close_run(index, run.clone())) {
                self.fail(error);
            }
        }
    }

    fn log_writes(&mut self, first: Frame, on: bool) {
        self.log_region(first, on);
    }

    fn flush(&mut self, _: Flush) {
        // Each call above has made KVM forget the pages before it returned, by its MMU notifier.
    }
}
