//! The mapper: what the shadow MMU says of EPT02, said by mmap, mprotect and the fault source.

use super::log::Log;
use super::source::{Mapped, Tables};
use super::window::{Page, Window};
use super::windows::{PIECE, Windows, call};
use crate::kvm::Error;
use std::io;
use std::ops::Range;
use umbra_mmu::{Access, Extent, Flush, Frame, Mapper, RootId};
use umbra_shared::{L2Gfn, Level};

/// Pages that an eviction closes at a time.
const EVICTED: usize = 16384;

impl Windows {
    /// Maps pages `pages` of window `index` to `frame` and those after it.
    pub(super) fn map_run(
        &mut self,
        index: usize,
        pages: Range<usize>,
        frame: Frame,
        writable: bool,
    ) -> io::Result<()> {
        let (told_apart, raced) = (self.tells_apart(), self.l2_runs());
        let left = self.pre_faults && self.log.is_none();
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
                (true, _) => Tables::ToldApart { raced },
                (false, true) if part.small || !writable || !memory.is_resident() => Tables::Left,
                (false, _) => Tables::Filled,
            };
            let (stretch, is_tracked) = (window.stretch(&(at..end)), first >= memory.first_tracked());
            match self.log.as_ref().and_then(Log::watch).filter(|_| is_tracked) {
                None => source.map(stretch, part, Mapped { writable, alone, tables })?,
                Some(watch) => {
                    // Nobody may write before a write is told.
                    source.map(stretch, part, Mapped { writable: false, alone, tables: Tables::Left })?;
                    watch.begin(stretch).map_err(|error| call(&error))?;
                    if writable {
                        source.protect(stretch, true)?;
                    }
                }
            }
            let tracked = if is_tracked { end - at } else { 0 };
            self.counts.mapped(end - at, tracked);
            Page::fill(window.pages.get_mut(at..end).unwrap_or_default(), first, writable);
            at = end;
        }
        Ok(())
    }

    /// Closes the mapped pages of `pages` in window `index`. Marks that KVM's log still holds for them stay with what they mapped.
    fn close_run(&mut self, index: usize, pages: Range<usize>) -> io::Result<()> {
        let Some(window) = self.all.get_mut(index) else { return Ok(()) };
        if let Some(log) = self.log.as_mut().filter(|log| log.watch().is_some()) {
            for run in window.runs_in(self.memory.first_tracked(), pages.clone()) {
                self.source.protect(window.stretch(&run), false)?;
                log.closing(window, &run).map_err(|error| call(&error))?;
            }
        }
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

    /// Closes some pages, each time others. False if nothing is mapped any more. L2's own page tables are the last to go: there are hosts where a
    /// vCPU that is without them ends.
    fn evict(&mut self) -> io::Result<bool> {
        let chunks = self.evictable();
        for _ in 0..chunks.len() {
            self.hand = (self.hand + 1) % chunks.len();
            let Some((index, pages)) = chunks.get(self.hand).cloned() else { break };
            let mapped = self.mapped_in(index, &pages);
            if mapped == 0 {
                continue;
            }
            if let Err(error) = self.close_run(index, pages) {
                // A piece of a mapping cannot be closed when there is no room for one more: then the whole window.
                if error.raw_os_error() != Some(libc::ENOMEM) {
                    return Err(error);
                }
                if !self.tables_in(index).is_empty() {
                    continue;
                }
                self.close_window(index)?;
            }
            self.counts.evicted_pages += mapped;
            return Ok(true);
        }
        for index in 0..self.all.len() {
            let mapped = self.close_window(index)?;
            if mapped > 0 {
                self.counts.evicted_pages += mapped;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Pages that can be closed together, each with its window: all but those of L2's own page tables.
    fn evictable(&self) -> Vec<(usize, Range<usize>)> {
        let mut chunks = Vec::new();
        for (index, window) in self.all.iter().enumerate() {
            let (count, tables) = (window.pages.len(), self.tables_in(index));
            for part in [0..tables.start, tables.end..count] {
                let starts = part.clone().step_by(EVICTED);
                chunks.extend(starts.map(|start| (index, start..part.end.min(start + EVICTED))));
            }
        }
        chunks
    }

    /// The pages of window `index` that are L2's own page tables.
    fn tables_in(&self, index: usize) -> Range<usize> {
        let Some(window) = self.all.get(index) else { return 0..0 };
        let place = |gfn: u64| {
            let page = usize::try_from(gfn.saturating_sub(window.first.0)).unwrap_or(usize::MAX);
            page.min(window.pages.len())
        };
        place(self.tables.start)..place(self.tables.end)
    }

    /// Pages of `pages` in window `index` that are mapped.
    fn mapped_in(&self, index: usize, pages: &Range<usize>) -> u64 {
        let pages = self.all.get(index).and_then(|window| window.pages.get(pages.clone())).unwrap_or_default();
        pages.iter().filter(|page| **page != Page::CLOSED).count() as u64
    }

    /// Closes a window. Says how many pages were mapped.
    fn close_window(&mut self, index: usize) -> io::Result<u64> {
        let whole = 0..self.all.get(index).map_or(0, |window| window.pages.len());
        let mapped = self.mapped_in(index, &whole);
        if mapped > 0 {
            self.close_run(index, whole)?;
        }
        Ok(mapped)
    }

    /// The window that holds all of `extent`, and the pages there, if nothing is mapped in them: the usual case of a `map`, told at once.
    fn untouched(&self, extent: Extent) -> Option<(usize, Range<usize>)> {
        let whole = |window: &Window| window.clip(extent).len() as u64 == extent.frames;
        let index = self.all.iter().position(whole)?;
        let window = self.all.get(index)?;
        let pages = window.clip(extent);
        Page::are_closed(window.pages.get(pages.clone())?).then_some((index, pages))
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
        if writable {
            self.log_before_writes(index, &run)?;
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
