//! What is mapped together: leaves that follow each other in L2, wherever they lie in L1's memory.

use super::memory::InFile;
use super::source::{Mapped, Tables};
use super::window::Page;
use super::windows::{PIECE, Windows};
use crate::hostmm::udmabuf::{Piece, Udmabuf};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use umbra_mmu::Frame;
use umbra_shared::PAGE_SIZE;

/// Pages of a window that are to be mapped, one behind the other: where each stretch of them lies in L1's memory. A leaf is posted by itself, but
/// costs less together with its neighbours: one mapping, and where the leaves are scattered, one udmabuf.
#[derive(Debug, Default)]
pub struct Queue {
    pub window: usize,
    start: usize,
    pages: usize,
    writable: bool,
    parts: Vec<(Frame, usize)>,
}

impl Queue {
    pub fn end(&self) -> usize {
        self.start + self.pages
    }

    /// Whether page `start` of window `index` is next.
    pub fn continues(&self, index: usize, start: usize, writable: bool) -> bool {
        self.pages > 0 && (self.window, self.end(), self.writable) == (index, start, writable)
    }

    /// Begins at page `start` of window `index`. Only when it is empty.
    pub fn begin(&mut self, index: usize, start: usize, writable: bool) {
        (self.window, self.start, self.writable) = (index, start, writable);
    }

    pub fn push(&mut self, frame: Frame, pages: usize) {
        self.pages += pages;
        match self.parts.last_mut() {
            Some((first, count)) if first.plus(*count as u64) == frame => *count += pages,
            _ => self.parts.push((frame, pages)),
        }
    }

    /// Whether a udmabuf is cheaper than a mapping for each part (6.12: 4.6 k a page beyond what a mapped page costs anyway, against 13 k a part).
    fn is_scattered(&self) -> bool {
        self.parts.len() >= 4 && self.pages < 3 * self.parts.len()
    }
}

/// What became of a queue that a udmabuf was to map.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Gathered {
    All,
    /// A page of it is none that can be.
    Not,
    /// The host refused.
    Refused,
}

impl Windows {
    /// Maps what is queued.
    pub(super) fn map_queue(&mut self) {
        let mut queue = std::mem::take(&mut self.queue);
        if queue.pages > 0 {
            if let Err(error) = self.map_parts(&queue) {
                self.fail(error);
            }
            if let Some(window) = self.all.get(queue.window).filter(|_| self.pre_faults) {
                self.fresh.push((window.first.plus(queue.start as u64), queue.pages as u64));
            }
        }
        // Its room stays.
        queue.parts.clear();
        self.queue = Queue { parts: queue.parts, ..Queue::default() };
    }

    fn map_parts(&mut self, queue: &Queue) -> io::Result<()> {
        if queue.is_scattered() && queue.writable && !self.tells_apart() && self.gather(queue)? {
            return Ok(());
        }
        let mut at = queue.start;
        for &(frame, pages) in &queue.parts {
            let run = at..at + pages;
            self.with_room(|windows| windows.map_run(queue.window, run.clone(), frame, queue.writable))?;
            at += pages;
        }
        Ok(())
    }

    /// Maps scattered pages through udmabufs, none of which covers 2 MiB. False if that cannot be: then nothing has changed that a mapping for each
    /// part does not replace.
    ///
    /// Read-only pages are not mapped so: KVM makes a write to one an exit for MMIO, where the fault sources need a failed `KVM_RUN`. And not where
    /// reads are to be told apart: [`Tables::ToldApart`] is not to be had.
    fn gather(&mut self, queue: &Queue) -> io::Result<bool> {
        let Some(mut udmabuf) = self.udmabuf.take() else { return Ok(false) };
        let gathered = self.gather_by(&mut udmabuf, queue);
        // A host that refuses it once is not asked again.
        if !matches!(gathered, Ok(Gathered::Refused)) {
            self.udmabuf = Some(udmabuf);
        }
        gathered.map(|gathered| gathered == Gathered::All)
    }

    fn gather_by(&mut self, udmabuf: &mut Udmabuf, queue: &Queue) -> io::Result<Gathered> {
        let memory = Arc::clone(&self.memory);
        let (mut at, mut frames) = (queue.start, Vec::with_capacity(queue.pages));
        frames.extend(queue.parts.iter().flat_map(|&(frame, pages)| (frame.0..frame.0 + pages as u64).map(Frame)));
        if !frames.iter().all(|&frame| memory.in_file(frame).is_some_and(|part| part.small)) {
            return Ok(Gathered::Not);
        }
        for frames in frames.chunks(PIECE) {
            let parts = frames.iter().filter_map(|&frame| memory.in_file(frame));
            let pieces = parts.map(|part| Piece { file: part.file.as_fd(), offset: part.offset, bytes: PAGE_SIZE });
            let Ok(file) = udmabuf.gather(pieces) else { return Ok(Gathered::Refused) };
            self.with_room(|windows| windows.map_gathered(queue.window, at, frames, &file))?;
            at += frames.len();
        }
        Ok(Gathered::All)
    }

    /// Maps `file`, which is `frames`, at page `at` of window `index`.
    fn map_gathered(&mut self, index: usize, at: usize, frames: &[Frame], file: &OwnedFd) -> io::Result<()> {
        let Some(window) = self.all.get_mut(index) else { return Ok(()) };
        let run = at..at + frames.len();
        let part = InFile { file, offset: 0, pages: frames.len() as u64, small: true };
        // Linux fills no page tables of such a mapping.
        let how = Mapped { writable: true, alone: false, tables: Tables::Left };
        self.source.map(window.stretch(&run), part, how)?;
        let first_tracked = self.memory.first_tracked();
        self.counts.mapped(frames.len(), frames.iter().filter(|&&frame| frame >= first_tracked).count());
        self.counts.gathered_pages += frames.len() as u64;
        for (page, &frame) in window.pages.get_mut(run).into_iter().flatten().zip(frames) {
            *page = Page::new_gathered(frame);
        }
        Ok(())
    }
}
