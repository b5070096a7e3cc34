//! What Linux itself says and does about the monitor's memory, outside KVM: userfaultfd, pagemap, mincore, udmabuf.
//!
//! Everything here acts on this process's own memory by address and length. A stretch that is not mapped, or not mapped for what is asked,
//! is refused by the kernel; nothing here reads or writes the memory's bytes.

mod ioctls;
pub mod pagemap;
pub mod residency;
pub mod udmabuf;
pub mod userfault;

use crate::kvm::Error;
use std::fmt;
use umbra_shared::{Level, PAGE_SIZE};

/// A host virtual address in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hva(pub u64);

impl Hva {
    /// The address `pages` pages further on, wrapping at 2^64.
    #[must_use]
    pub const fn plus(self, pages: u64) -> Self {
        Self(self.0.wrapping_add(pages.wrapping_mul(PAGE_SIZE)))
    }
}

impl fmt::Display for Hva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Pages of this process, one behind the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// The first page's address, a multiple of 4096.
    pub start: Hva,
    /// 4 KiB pages.
    pub pages: u64,
}

impl Stretch {
    /// Bytes, wrapping at 2^64.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.pages.wrapping_mul(PAGE_SIZE)
    }

    /// The first address behind it.
    #[must_use]
    pub const fn end(self) -> Hva {
        self.start.plus(self.pages)
    }

    /// The number of the page that `address` is in; `None` outside.
    #[must_use]
    pub fn page(self, address: Hva) -> Option<u64> {
        let page = address.0.checked_sub(self.start.0)? / PAGE_SIZE;
        (page < self.pages).then_some(page)
    }

    /// The part from page `first` on, `pages` long, cut at this stretch's end.
    #[must_use]
    pub fn part(self, first: u64, pages: u64) -> Self {
        let first = first.min(self.pages);
        Self { start: self.start.plus(first), pages: pages.min(self.pages - first) }
    }

    /// The pages of `level` that touch pages `first` to `first + pages`, cut at this stretch's end. The stretch begins at a boundary of `level`.
    #[must_use]
    pub fn part_of(self, level: Level, first: u64, pages: u64) -> Self {
        let begin = first - first % level.frames();
        let end = first.saturating_add(pages).checked_next_multiple_of(level.frames()).unwrap_or(u64::MAX);
        self.part(begin, end - begin)
    }
}

/// A capability that is not there.
pub(crate) fn missing(capability: &'static str, consequence: &str) -> Error {
    Error::Capability { capability, consequence: consequence.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_stay_inside() {
        let stretch = Stretch { start: Hva(0x20_0000), pages: 700 };
        assert_eq!(stretch.end(), Hva(0x20_0000 + 700 * 4096));
        assert_eq!(stretch.page(Hva(0x20_1fff)), Some(1));
        assert_eq!(stretch.page(stretch.end()), None);
        assert_eq!(stretch.page(Hva(0x1f_ffff)), None);
        assert_eq!(stretch.part(690, 20), Stretch { start: stretch.start.plus(690), pages: 10 });
        assert_eq!(stretch.part(800, 20).pages, 0);
        assert_eq!(stretch.part_of(Level::K4, 5, 2), stretch.part(5, 2));
        assert_eq!(stretch.part_of(Level::M2, 5, 1), stretch.part(0, 512));
        assert_eq!(stretch.part_of(Level::M2, 511, 2), stretch.part(0, 700));
        assert_eq!(stretch.start.to_string(), "0x200000");
    }
}
