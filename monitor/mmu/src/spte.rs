//! Shadow page-table entries: EPT's encoding (SDM 3C 29.3.2), with what the MMU remembers in ignored bits.

use umbra_shared::Level;
use umbra_shared::paging::{ADDRESS_MASK, ept};

use crate::access::Access;

/// A page of L1's memory by its index: the "host frame" of EPT02. Slots map guest frames to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frame(pub u64);

impl Frame {
    /// The frame `count` pages further on, wrapping.
    #[must_use]
    pub const fn plus(self, count: u64) -> Self {
        Self(self.0.wrapping_add(count))
    }
}

/// Bit 52 is ignored by hardware: writes are allowed but for tracking. KVM's `SPTE_MMU_WRITABLE`.
const MMU_WRITABLE: u64 = 1 << 52;

/// An entry of EPT02. Either nothing, a link to a child page (by arena index), or a leaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Spte(pub u64);

impl Spte {
    /// Not present.
    pub const NONE: Self = Self(0);
    /// The dirty flag, for scans over many entries at once.
    pub const DIRTY_BIT: u64 = ept::DIRTY;

    /// A link to the shadow page `page`. Rights are all on: a child's role has them.
    #[must_use]
    pub const fn link(page: u32) -> Self {
        Self((page as u64) << 12 | ept::RIGHTS | ept::ACCESSED)
    }

    /// A leaf. `mmu_writable` says that guest and slot permit writes; whether it can be written *now* is in `access`.
    #[must_use]
    pub const fn leaf(frame: Frame, level: Level, access: Access, mmu_writable: bool) -> Self {
        let large = if level as u8 > 1 { ept::LARGE } else { 0 };
        let soft = if mmu_writable { MMU_WRITABLE } else { 0 };
        Self((frame.0 << 12) & ADDRESS_MASK | access.bits() | ept::WRITE_BACK | ept::ACCESSED | large | soft)
    }

    /// Whether any right is on.
    #[must_use]
    pub const fn present(self) -> bool {
        self.0 & ept::RIGHTS != 0
    }

    /// Whether this maps a page, seen at `level`.
    #[must_use]
    pub const fn is_leaf(self, level: Level) -> bool {
        self.present() && (level as u8 == 1 || self.0 & ept::LARGE != 0)
    }

    /// Whether a walk that comes here above the lowest level ends: nothing is present, or a huge leaf is.
    #[inline]
    #[must_use]
    pub const fn ends_walk(self) -> bool {
        // A link has all rights and is not large.
        self.0 & (ept::RIGHTS | ept::LARGE) != ept::RIGHTS
    }

    /// Fills `entries` with leaves of consecutive frames from that of `first`, alike in all else.
    pub fn fill_straight(entries: &mut [Self], first: Self) {
        let mut next = first.0;
        for entry in entries {
            *entry = Self(next);
            next += 1 << 12;
        }
    }

    /// Whether all of `entries` are empty.
    #[must_use]
    pub fn are_empty(entries: &[Self]) -> bool {
        entries.iter().fold(0, |all, entry| all | entry.0) == 0
    }

    /// Whether `entries` are readable leaves of consecutive frames, the first of them `first`'s.
    #[must_use]
    pub fn are_straight(entries: &[Self], first: Self) -> bool {
        let (mut differs, mut readable, mut expected) = (0, u64::MAX, first.0 & ADDRESS_MASK);
        for entry in entries {
            differs |= entry.0 & ADDRESS_MASK ^ expected;
            readable &= entry.0;
            expected += 1 << 12;
        }
        differs == 0 && readable & ept::READ != 0
    }

    /// The child's arena index, for a link.
    #[must_use]
    pub const fn child(self) -> u32 {
        // Arena indices have 22 bits.
        (self.0 >> 12 & 0x3f_ffff) as u32
    }

    /// The first frame, for a leaf.
    #[must_use]
    pub const fn frame(self) -> Frame {
        Frame((self.0 & ADDRESS_MASK) >> 12)
    }

    /// The rights as hardware sees them.
    #[must_use]
    pub const fn access(self) -> Access {
        Access::from_bits(self.0)
    }

    /// Whether hardware lets writes through.
    #[must_use]
    pub const fn writable(self) -> bool {
        self.0 & ept::WRITE != 0
    }

    /// Whether guest and slot permit writes.
    #[must_use]
    pub const fn mmu_writable(self) -> bool {
        self.0 & MMU_WRITABLE != 0
    }

    /// Whether it is present, and writes are permitted but closed. No format permits writes without reads.
    #[inline]
    #[must_use]
    pub const fn is_closed(self) -> bool {
        self.0 & (MMU_WRITABLE | ept::WRITE | ept::READ) == MMU_WRITABLE | ept::READ
    }

    /// The dirty flag.
    #[must_use]
    pub const fn dirty(self) -> bool {
        self.0 & ept::DIRTY != 0
    }

    /// With the dirty flag set.
    #[must_use]
    pub const fn with_dirty(self) -> Self {
        Self(self.0 | ept::DIRTY)
    }

    /// With the dirty flag cleared.
    #[must_use]
    pub const fn clean(self) -> Self {
        Self(self.0 & !ept::DIRTY)
    }

    /// Open for writes.
    #[must_use]
    pub const fn opened(self) -> Self {
        Self(self.0 | ept::WRITE)
    }

    /// Closed for writes; the MMU still knows that they are permitted.
    #[must_use]
    pub const fn closed(self) -> Self {
        Self(self.0 & !ept::WRITE)
    }

    /// Cut down to `access`; what is lost is no longer permitted either.
    #[must_use]
    pub const fn cut(self, access: Access) -> Self {
        let soft = if access.allows(Access::WRITE) { 0 } else { MMU_WRITABLE };
        Self(self.0 & !(ept::RIGHTS & !access.bits()) & !soft)
    }
}

/// Where an entry is: arena index and index in the page, in 31 bits. 0 is no entry, since page 0 is never used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpteRef(pub u32);

impl SpteRef {
    /// Pages that references can name: 2^22, 16 GiB of tables.
    pub const MAX_PAGES: u32 = 1 << 22;

    /// Entry `index` (0..512) of `page`.
    #[must_use]
    pub const fn new(page: u32, index: usize) -> Self {
        Self(page << 9 | (index as u64 & 511) as u32)
    }

    /// The page's arena index.
    #[must_use]
    pub const fn page(self) -> u32 {
        self.0 >> 9
    }

    /// The index in the page.
    #[must_use]
    pub const fn index(self) -> usize {
        (self.0 & 511) as usize
    }
}
