//! L1's memory as the shadow MMU sees it: the memory of all its slots, one after the other, by page index.

use crate::hostmm::Hva;
use crate::kvm::copies::{By, PageWords};
use crate::kvm::memory::HostMemory;
use crate::kvm::{Backing, Error, Vm};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use umbra_mmu::{Exchange, Frame, L1Memory, NoMemory, Slot};
use umbra_shared::{Gfn, Level, PAGE_SIZE};

/// Pages of a leaf of 2 MiB.
const LEAF: usize = 512;

/// A slot's memory.
#[derive(Debug)]
struct Part {
    base: Gfn,
    first: Frame,
    pages: u64,
    memory: Arc<HostMemory>,
}

/// L1's memory. The system slot comes first; each part begins at a multiple of 2 MiB, so that huge leaves fit.
#[derive(Debug)]
pub struct L1Pages {
    parts: Vec<Part>,
    /// Page indices, gaps included.
    frames: u64,
    /// Page index of the first tracked page.
    first_tracked: Frame,
    /// Whether the host was seen to have memory for all tracked pages.
    resident: AtomicBool,
}

/// Where a page of L1's memory lies in its file.
#[derive(Clone, Copy, Debug)]
pub struct InFile<'a> {
    /// The memfd.
    pub file: &'a OwnedFd,
    /// Bytes before the page.
    pub offset: u64,
    /// Pages from it to the end of the part.
    pub pages: u64,
    /// Whether all its pages are small ones.
    pub small: bool,
}

impl L1Pages {
    /// The memory of `vm`.
    #[must_use]
    pub fn of(vm: &Vm) -> Self {
        let system = vm.system_memory();
        let system = (Gfn(0), system.len() as u64 / PAGE_SIZE, system);
        let tracked = vm.slots().iter().map(|slot| (slot.place.base, slot.place.pages, &slot.memory));
        let (mut parts, mut next) = (Vec::new(), 0_u64);
        let mut first_tracked = Frame(0);
        for (base, pages, memory) in std::iter::once(system).chain(tracked) {
            if parts.len() == 1 {
                first_tracked = Frame(next);
            }
            parts.push(Part { base, first: Frame(next), pages, memory: Arc::clone(memory) });
            next = (next + pages).next_multiple_of(Level::M2.frames());
        }
        Self { parts, frames: next, first_tracked, resident: AtomicBool::new(false) }
    }

    /// The same, which an L2 in another VM is to map.
    ///
    /// # Errors
    /// [`Error::Memory`] if a part of it is private, so that nobody else can map it.
    pub fn shared(vm: &Vm) -> Result<Self, Error> {
        let pages = Self::of(vm);
        match pages.parts.iter().find(|part| part.memory.file().is_none()) {
            None => Ok(pages),
            Some(part) => Err(Error::Memory(format!(
                "--backing {}: it is private memory, which no other VM can map; umbra needs a memfd (anonymous, thp or shmem)",
                part.memory.backing()
            ))),
        }
    }

    /// Page indices, gaps included.
    #[must_use]
    pub const fn frames(&self) -> u64 {
        self.frames
    }

    /// Page index of the first tracked page; those before it are the system slot's.
    #[must_use]
    pub const fn first_tracked(&self) -> Frame {
        self.first_tracked
    }

    /// L1's memory map, for the shadow MMU.
    #[must_use]
    pub fn slots(&self) -> Vec<Slot> {
        let slot = |part: &Part| Slot {
            base: part.base,
            frames: part.pages,
            first: part.first,
            read_only: false,
            max_level: Level::G1,
        };
        self.parts.iter().map(slot).collect()
    }

    /// The number among the tracked pages of each page index from `first_tracked` on that is one, given by part: page index of the first, its
    /// number, and how many.
    pub fn tracked(&self) -> impl Iterator<Item = (Frame, u64, u64)> {
        let mut number = 0;
        self.parts.iter().skip(1).map(move |part| {
            let first = number;
            number += part.pages;
            (part.first, first, part.pages)
        })
    }

    /// The pages from `frame` on as a file has them; `None` where there is no memory.
    #[must_use]
    pub fn in_file(&self, frame: Frame) -> Option<InFile<'_>> {
        let (part, page) = self.part(frame)?;
        let small = part.memory.backing() == Backing::ShmemSmall;
        Some(InFile { file: part.memory.file()?, offset: page * PAGE_SIZE, pages: part.pages - page, small })
    }

    /// The word at L1 physical address `address`, a multiple of 8. `None` outside of memory.
    #[must_use]
    pub fn word(&self, address: u64) -> Option<&AtomicU64> {
        self.words(address, 1)?.first()
    }

    /// The `count` words from L1 physical address `address` on, a multiple of 8. `None` if they leave their page, and outside of memory.
    #[must_use]
    pub fn words(&self, address: u64, count: usize) -> Option<&[AtomicU64]> {
        let gfn = Gfn::containing(address);
        let part = self.parts.iter().find(|part| gfn.0.wrapping_sub(part.base.0) < part.pages)?;
        part.memory.words(gfn.0 - part.base.0, address % PAGE_SIZE, count)
    }

    /// The first word of the page at `frame`.
    #[must_use]
    pub fn first_word(&self, frame: Frame) -> Option<&AtomicU64> {
        let (part, page) = self.part(frame)?;
        part.memory.word(page, 0)
    }

    /// Whether the host was seen to have memory for all tracked pages.
    #[must_use]
    pub fn is_resident(&self) -> bool {
        self.resident.load(Ordering::Relaxed)
    }

    /// Looks whether the host has memory for all tracked pages: the files have no holes. Once it has, it is not asked again.
    pub fn look_for_holes(&self) {
        /// What `st_blocks` counts (`stat(2)`).
        const BLOCK: u64 = 512;
        let whole = |part: &Part| {
            let blocks =
                part.memory.file().and_then(|file| rustix::fs::fstat(file).ok()).map_or(0, |status| status.st_blocks);
            u64::try_from(blocks).unwrap_or(0) * BLOCK >= part.pages * PAGE_SIZE
        };
        if !self.is_resident() {
            self.resident.store(self.parts.iter().skip(1).all(whole), Ordering::Relaxed);
        }
    }

    /// Where the monitor itself has the page at `frame`.
    #[must_use]
    pub fn hva(&self, frame: Frame) -> Option<Hva> {
        let (part, page) = self.part(frame)?;
        Some(part.memory.hva().plus(page))
    }

    fn part(&self, frame: Frame) -> Option<(&Part, u64)> {
        let part = self.parts.iter().find(|part| frame.0.wrapping_sub(part.first.0) < part.pages)?;
        Some((part, frame.0 - part.first.0))
    }
}

/// L1's memory for the shadow MMU.
#[derive(Clone, Debug)]
pub struct View(pub Arc<L1Pages>);

impl L1Memory for View {
    fn read(&self, frame: Frame, offset: u64) -> u64 {
        let word = self.0.part(frame).and_then(|(part, page)| part.memory.word(page, offset));
        word.map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn read_block(&self, frame: Frame, offset: u64, words: &mut [u64; 64]) {
        let block = self.0.part(frame).and_then(|(part, page)| part.memory.words(page, offset, words.len()));
        match block {
            Some(block) => words.iter_mut().zip(block).for_each(|(word, from)| *word = from.load(Ordering::Acquire)),
            None => words.fill(0),
        }
    }

    fn exchange(&mut self, frame: Frame, offset: u64, old: u64, new: u64) -> Exchange {
        let word = self.0.part(frame).and_then(|(part, page)| part.memory.word(page, offset));
        match word.map(|word| word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed)) {
            Some(Err(_)) => Exchange::Changed,
            Some(Ok(_)) | None => Exchange::Done,
        }
    }

    fn copy_page(&self, frame: Frame, page: &mut [u64; 512]) -> bool {
        let Some((part, index)) = self.0.part(frame) else { return false };
        part.memory.copy_page(index, page)
    }

    fn copy_leaf(&self, first: Frame, pages: &mut Vec<PageWords>) -> Result<[u64; 8], NoMemory> {
        pages.try_reserve_exact(LEAF.saturating_sub(pages.len())).map_err(|_| NoMemory)?;
        pages.resize(LEAF, [0; 512]);
        let part = self.0.part(first);
        let copied = part.is_some_and(|(part, page)| part.memory.copy_pages(page, pages, By::here()));
        // A leaf lies in one slot. Else all of it differs from a copy that is none.
        Ok([if copied { u64::MAX } else { 0 }; 8])
    }

    fn changed_since(&self, first: Frame, copied: &[u64; 8], pages: &[PageWords]) -> [u64; 8] {
        let part = self.0.part(first).filter(|_| copied.iter().all(|word| *word == u64::MAX));
        part.and_then(|(part, page)| part.memory.changed_since(page, pages, By::here())).unwrap_or([u64::MAX; 8])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two parts with a gap between their page indices, each word its own number.
    fn view() -> View {
        let part = |base: u64, first: u64, pages: u64| {
            let memory = HostMemory::new(pages * PAGE_SIZE, Backing::Anonymous.shared()).unwrap();
            for page in 0..pages {
                for word in 0..512 {
                    memory.word(page, word * 8).unwrap().store((first + page) << 9 | word, Ordering::Relaxed);
                }
            }
            Part { base: Gfn(base), first: Frame(first), pages, memory: Arc::new(memory) }
        };
        let parts = vec![part(0, 0, 3), part(0x10_0000, 512, 2)];
        View(Arc::new(L1Pages { parts, frames: 1024, first_tracked: Frame(512), resident: AtomicBool::new(false) }))
    }

    #[test]
    fn a_block_is_its_words() {
        let view = view();
        for frame in [0, 2, 512, 513] {
            for offset in (0..PAGE_SIZE).step_by(512) {
                let mut block = [0; 64];
                view.read_block(Frame(frame), offset, &mut block);
                for (number, word) in (0..).zip(block) {
                    assert_eq!(word, view.read(Frame(frame), offset + number * 8), "{frame} {offset}");
                    assert_eq!(word, frame << 9 | (offset / 8 + number));
                }
            }
        }
    }

    #[test]
    fn where_there_is_no_memory_a_block_is_zeroes() {
        let view = view();
        // In the gap, behind the last part, and beyond a page's end.
        for (frame, offset) in [(3, 0), (511, 512), (514, 0), (u64::MAX, 0), (2, PAGE_SIZE - 256), (2, PAGE_SIZE)] {
            let mut block = [7; 64];
            view.read_block(Frame(frame), offset, &mut block);
            assert_eq!(block, [0; 64], "{frame} {offset}");
        }
    }
}
