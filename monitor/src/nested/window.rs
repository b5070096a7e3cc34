//! A window of L2's memory, what each of its pages maps, and what a mapper did.

use super::reserve::Reserved;
use super::slots::{Cut, Slot};
use crate::hostmm::Stretch;
use std::ops::Range;
use umbra_mmu::{Extent, Frame};
use umbra_shared::{L2Gfn, Level};

/// What a page of a window maps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Page(pub(super) u32);

impl Page {
    pub(super) const WRITABLE: u32 = 1 << 31;
    /// Mapped through a udmabuf (gather.rs).
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
    pub(super) fn fill(pages: &mut [Self], first: Frame, writable: bool) {
        let first = Self::new(first, writable);
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2.
            return unsafe { fill_avx2(pages, first) };
        }
        fill(pages, first);
    }

    /// Whether all of `pages` are closed.
    pub(super) fn are_closed(pages: &[Self]) -> bool {
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2.
            return unsafe { are_closed_avx2(pages) };
        }
        are_closed(pages)
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

/// Pages that are looked at together. A huge leaf has 512, and a fault may map eight of those: the loops below are most of what the mapper itself takes
/// for that.
const LANES: u32 = 64;
const CHUNK: usize = LANES as usize;

// Always inlined: as they are called, so are they compiled.
#[allow(clippy::inline_always)]
#[inline(always)]
fn fill(pages: &mut [Page], first: Page) {
    let mut next = [Page::CLOSED; CHUNK];
    for (page, offset) in next.iter_mut().zip(0..) {
        *page = first.plus(offset);
    }
    let mut chunks = pages.chunks_exact_mut(CHUNK);
    for chunk in &mut chunks {
        chunk.copy_from_slice(&next);
        for page in &mut next {
            *page = page.plus(LANES);
        }
    }
    let rest = chunks.into_remainder();
    rest.iter_mut().zip(next).for_each(|(page, next)| *page = next);
}

#[allow(clippy::inline_always)]
#[inline(always)]
fn are_closed(pages: &[Page]) -> bool {
    let mut any = [0; CHUNK / 8];
    let chunks = pages.chunks_exact(CHUNK);
    let rest = chunks.remainder().iter().fold(0, |any, page| any | page.0);
    for chunk in chunks {
        for part in chunk.chunks_exact(CHUNK / 8) {
            for (any, page) in any.iter_mut().zip(part) {
                *any |= page.0;
            }
        }
    }
    any.iter().fold(rest, |all, any| all | any) == 0
}

#[target_feature(enable = "avx2")]
fn fill_avx2(pages: &mut [Page], first: Page) {
    fill(pages, first);
}

#[target_feature(enable = "avx2")]
fn are_closed_avx2(pages: &[Page]) -> bool {
    are_closed(pages)
}

/// A window.
#[derive(Debug)]
pub struct Window {
    /// Its first frame.
    pub first: L2Gfn,
    /// What each page maps.
    pub pages: Vec<Page>,
    /// How it can be cut into slots.
    pub(super) cut: Cut,
    /// KVM's slots, one behind the other.
    pub(super) slots: Vec<Slot>,
    /// Whether it has ever mapped tracked memory.
    pub(super) tracked: bool,
    pub(super) place: Reserved,
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

    /// Runs of its pages that map memory from `first` on.
    pub(super) fn runs_of(&self, first: Frame) -> impl Iterator<Item = Range<usize>> {
        self.runs_in(first, 0..self.pages.len())
    }

    /// Runs of `pages` that map memory from `first` on.
    pub(super) fn runs_in(&self, first: Frame, pages: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let maps =
            move |at: usize| self.pages.get(at).and_then(|page| page.frame()).is_some_and(|frame| frame >= first);
        let mut at = pages.start;
        std::iter::from_fn(move || {
            let start = (at..pages.end).find(|&at| maps(at))?;
            let end = (start..pages.end).find(|&at| !maps(at)).unwrap_or(pages.end);
            at = end;
            Some(start..end)
        })
    }

    /// The number of page `at`, counted from a boundary of 2 MiB.
    #[allow(clippy::cast_possible_truncation)] // Below 512.
    pub(super) const fn piece(&self, at: usize) -> usize {
        at + (self.first.0 % Level::M2.frames()) as usize
    }

    /// Its pages in `extent`.
    pub(super) fn clip(&self, extent: Extent) -> Range<usize> {
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
    /// One more call mapped so many pages, so many of them tracked ones.
    pub(super) const fn mapped(&mut self, pages: usize, tracked: usize) {
        self.maps += 1;
        self.mapped_pages += pages as u64;
        self.tracked_pages += tracked as u64;
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    /// As many pages as a fault may map, by none to two blocks more, each way to do it.
    #[test]
    fn pages_are_filled_and_told_from_closed_ones() {
        for count in (0..200).chain([4096, 4097]) {
            for fill in
                [fill, |pages: &mut [Page], first: Page| Page::fill(pages, first.frame().unwrap(), first.writable())]
            {
                let mut pages = vec![Page::CLOSED; count + 2];
                assert!(are_closed(&pages) && Page::are_closed(&pages));
                fill(&mut pages[1..=count], Page::new(Frame(7), true));
                for (at, page) in pages.iter().enumerate() {
                    let inside = (1..=count).contains(&at);
                    assert_eq!(page.frame(), inside.then(|| Frame(at as u64 + 6)), "{count} {at}");
                    assert_eq!(page.writable(), inside);
                }
            }
            for at in 0..count {
                let mut pages = vec![Page::CLOSED; count];
                pages[at] = Page::new(Frame(0), false);
                assert!(!are_closed(&pages) && !Page::are_closed(&pages), "{count} {at}");
            }
        }
    }
}
