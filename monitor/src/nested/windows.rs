//! The windows of an L2 in one VM, which make EPT02 effective (mapper.rs): each lies over reserved host addresses, into which L1's memory is mapped.
//!
//! The invariant is: a page of a window maps the page of L1's memory that [`Page`] names, writable if that says so, or nothing. It never maps more
//! than EPT02 allows; it may map less (an eviction), and the next fault there maps it again.

use super::gather::Queue;
use super::log::Log;
use super::memory::L1Pages;
use super::reserve::Reserved;
use super::slots::{Cut, Due, leaf_granule};
use super::source::Source;
use super::watch::Watch;
use super::window::{Counts, Page, Window};
use super::{FirstReads, Mechanism, Options};
use crate::hostmm::Hva;
use crate::hostmm::udmabuf::Udmabuf;
use crate::kvm::ring::RingSet;
use crate::kvm::{Error, vm};
use kvm_ioctls::VmFd;
use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use umbra_mmu::{Extent, Mapper, RootId};
use umbra_shared::{L2Gfn, control};

/// `KVM_CAP_PRE_FAULT_MEMORY` (include/uapi/linux/kvm.h).
const CAP_PRE_FAULT_MEMORY: u32 = 236;

/// Pages of a piece: 1 MiB. A change of one page inside a mapping that covers 2 MiB makes KVM drop all 2 MiB, huge or not (Linux splits a huge
/// entry that may be there, and tells KVM so: `split_huge_pmd_if_needed` in `mm/huge_memory.c`). So where pages are small, every other piece is set
/// apart from its neighbours, and no mapping covers 2 MiB.
pub(super) const PIECE: usize = 256;

/// All windows of one VM.
pub struct Windows {
    pub(super) vm: Arc<VmFd>,
    pub(super) memory: Arc<L1Pages>,
    /// Before the windows' addresses: its thread may look at them.
    pub(super) source: Box<dyn Source>,
    pub(super) all: Vec<Window>,
    /// The root that they are of; changes of others do not concern them.
    pub(super) root: Option<RootId>,
    /// No mapping is to cover 2 MiB.
    pub(super) pieces: bool,
    /// What KVM's log makes of pages that L2 reads first.
    pub(super) first_reads: FirstReads,
    /// Where each leaf of 2 MiB is logged or not by itself: 2 MiB of L1's memory that need not be logged, by number.
    pub unlogged: Option<BTreeSet<u64>>,
    /// What slots wait for.
    pub(super) due: Due,
    /// vCPUs that are in KVM. More of them enter with the shadow MMU's lock alone.
    in_kvm: Arc<AtomicUsize>,
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
    pub(super) tables: Range<u64>,
    /// Whether all of those are mapped.
    pub tables_mapped: bool,
    /// While L1 invalidates: the pages that this closed, as far as there is room.
    pub invalidated: Vec<L2Gfn>,
    /// What was mapped since it was last looked at, for KVM to fault in beforehand.
    pub fresh: Vec<(L2Gfn, u64)>,
    /// What went wrong first.
    pub(super) failed: Option<io::Error>,
    /// What was done.
    pub counts: Counts,
    pub(super) hand: usize,
}

impl Windows {
    /// No windows.
    #[must_use]
    pub fn new(
        vm: Arc<VmFd>,
        memory: Arc<L1Pages>,
        source: Box<dyn Source>,
        options: &Options,
        in_kvm: Arc<AtomicUsize>,
    ) -> Self {
        let cut = options.means.traps() && options.means.logs();
        Self {
            pieces: options.pieces,
            first_reads: options.first_reads,
            unlogged: cut.then(BTreeSet::new),
            due: Due::new(&vm, cut),
            in_kvm,
            queue: Queue::default(),
            // Pages of a udmabuf tell of no writes: they cannot be registered.
            udmabuf: Udmabuf::open().ok().filter(|_| options.means.mechanism != Mechanism::Pagemap),
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
            let (cut, next) = Cut::new(window.first, pages.len(), granule, number);
            number = next;
            let slots = cut.slots(pages.len());
            let window = Window { first: window.first, pages, cut, slots, tracked: false, place };
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
        if let Some(watch) = log.watch() {
            let first = self.memory.first_tracked();
            let runs = self.all.iter().flat_map(|window| window.runs_of(first).map(|run| window.stretch(&run)));
            { runs }.try_for_each(|stretch| watch.begin(stretch))?;
        }
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
        let log = self.log.take();
        if let Some(watch) = log.as_ref().and_then(Log::watch) {
            self.end_watch(watch)?;
        }
        Ok(log)
    }

    /// Pages are watched no longer; what can be huge is mapped anew.
    fn end_watch(&mut self, watch: &Watch) -> Result<(), Error> {
        let first = self.memory.first_tracked();
        for index in 0..self.all.len() {
            let runs: Vec<_> = self.all.get(index).into_iter().flat_map(|window| window.runs_of(first)).collect();
            for run in runs {
                let Some(window) = self.all.get(index) else { break };
                watch.end(window.stretch(&run))?;
                if !self.pieces {
                    self.renew(index, run)?;
                }
            }
        }
        Ok(())
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

    /// Whether L2 may be running on some vCPU. Who finds that it is not may rely on it as long as the shadow MMU's lock is held.
    pub(super) fn l2_runs(&self) -> bool {
        self.in_kvm.load(Ordering::Acquire) > 0
    }

    /// Whether what is mapped now must tell KVM's log a read from a write.
    pub(super) fn tells_apart(&self) -> bool {
        self.log.as_ref().is_some_and(Log::is_of_kvm) && self.first_reads == FirstReads::Exact
    }
}

/// `error`, so that [`Windows::with_room`] knows when there are too many mappings.
pub(super) fn call(error: &Error) -> io::Error {
    match error {
        Error::Call { source, .. } if source.raw_os_error() == Some(libc::ENOMEM) => {
            io::Error::from_raw_os_error(libc::ENOMEM)
        }
        other => io::Error::other(other.to_string()),
    }
}
