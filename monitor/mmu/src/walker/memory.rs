//! L1's memory in software: sparse, so that a terabyte of it costs what was written.

use crate::memory::{Exchange, L1Memory};
use crate::ptelist::narrow;
use crate::spte::Frame;

/// Plain memory. Pages that were never written read as zeroes and take nothing.
#[derive(Debug, Default)]
pub struct PlainMemory {
    regions: Vec<Option<Box<[u32; 512]>>>,
    pages: Vec<Box<[u64; 512]>>,
    frames: u64,
    /// Frames from here on hold tables; what is written below may be dropped.
    content_from: u64,
    journal: Option<Vec<Written>>,
}

/// One store, as a journal has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// The page.
    pub frame: Frame,
    /// Where in it, in bytes.
    pub offset: u64,
    /// The 8 bytes that were there.
    pub old: u64,
    /// The MMU stored them, to set A/D flags.
    pub by_mmu: bool,
}

impl PlainMemory {
    /// Memory of `frames` pages. Stores of L2 to pages below `content_from` leave no content (but are counted and
    /// tracked as any other): for models so large that contents would not fit. 0 keeps everything.
    #[must_use]
    pub fn new(frames: u64, content_from: u64) -> Self {
        let regions = usize::try_from(frames.div_ceil(512)).unwrap_or(usize::MAX);
        Self { regions: vec![None; regions], pages: Vec::new(), frames, content_from, journal: None }
    }

    /// Pages in all.
    #[must_use]
    pub const fn frames(&self) -> u64 {
        self.frames
    }

    fn page(&self, frame: Frame) -> Option<&[u64; 512]> {
        let region = self.regions.get(usize::try_from(frame.0 >> 9).ok()?)?.as_ref()?;
        let index = *region.get((frame.0 & 511) as usize)?;
        self.pages.get((index as usize).wrapping_sub(1)).map(|page| &**page)
    }

    fn page_mut(&mut self, frame: Frame) -> Option<&mut [u64; 512]> {
        if frame.0 >= self.frames {
            return None;
        }
        let region = self.regions.get_mut(usize::try_from(frame.0 >> 9).ok()?)?;
        let region = region.get_or_insert_with(|| Box::new([0; 512]));
        let index = region.get_mut((frame.0 & 511) as usize)?;
        if *index == 0 {
            self.pages.push(Box::new([0; 512]));
            *index = narrow(self.pages.len());
        }
        self.pages.get_mut(*index as usize - 1).map(|page| &mut **page)
    }

    /// Stores 8 bytes, for L2.
    pub fn store(&mut self, frame: Frame, offset: u64, value: u64) {
        if frame.0 >= self.content_from {
            self.write(frame, offset, value);
        }
    }

    /// Keeps a journal of all stores from now on.
    pub fn keep_journal(&mut self) {
        self.journal = Some(Vec::new());
    }

    /// Takes what the journal has.
    pub fn take_journal(&mut self) -> Vec<Written> {
        self.journal.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Stores 8 bytes, for L1.
    pub fn write(&mut self, frame: Frame, offset: u64, value: u64) {
        self.put(frame, offset, value, false);
    }

    fn put(&mut self, frame: Frame, offset: u64, value: u64, by_mmu: bool) {
        let old = if self.journal.is_some() { self.read(frame, offset) } else { 0 };
        if let Some(journal) = &mut self.journal {
            journal.push(Written { frame, offset: offset & 0xff8, old, by_mmu });
        }
        if let Some(word) = self.page_mut(frame).and_then(|page| page.get_mut((offset >> 3 & 511) as usize)) {
            *word = value;
        }
    }

    /// Makes a page zeroes again.
    pub fn zero(&mut self, frame: Frame) {
        if self.page(frame).is_some()
            && let Some(page) = self.page_mut(frame)
        {
            page.fill(0);
        }
    }
}

impl L1Memory for PlainMemory {
    fn read(&self, frame: Frame, offset: u64) -> u64 {
        self.page(frame).and_then(|page| page.get((offset >> 3 & 511) as usize)).copied().unwrap_or(0)
    }

    fn exchange(&mut self, frame: Frame, offset: u64, old: u64, new: u64) -> Exchange {
        if self.read(frame, offset) != old {
            return Exchange::Changed;
        }
        self.put(frame, offset, new, true);
        Exchange::Done
    }

    fn copy_page(&self, frame: Frame, page: &mut [u64; 512]) -> bool {
        match self.page(frame) {
            Some(content) => {
                page.copy_from_slice(content);
                true
            }
            None => false,
        }
    }
}
