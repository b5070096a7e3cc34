//! One configuration: every strategy, split, collapse, root policy and cache is a value of it.

use std::fmt;

use umbra_shared::Level;

use crate::guest::GuestCaps;
use crate::spte::Frame;
use crate::track::Strategy;

/// Why an operation did not happen. The MMU is consistent afterwards and the operation may be tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MmuError {
    /// An allocation failed, or the quota leaves no room.
    NoMemory,
    /// The root was dropped, or never loaded.
    StaleRoot,
    /// A root table's address that the format cannot have.
    BadTable(u64),
    /// Tracking is on already.
    Tracking,
    /// Tracking is off.
    NotTracking,
    /// A memory map that contradicts itself; the text says how.
    BadSlots(String),
    /// A configuration that makes no sense; the text says why.
    BadConfig(String),
}

impl fmt::Display for MmuError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoMemory => write!(f, "no memory for shadow pages: raise the quota"),
            Self::StaleRoot => write!(f, "this root is not loaded any more: load it again"),
            Self::BadTable(address) => write!(f, "no root table can be at {address:#x}: wrong alignment or too wide"),
            Self::Tracking => write!(f, "tracking is on already: stop it first"),
            Self::NotTracking => write!(f, "tracking is off: start it first"),
            Self::BadSlots(why) | Self::BadConfig(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for MmuError {}

/// An allocation failed, or the quota leaves no room: what most of the MMU can fail with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoMemory;

impl From<NoMemory> for MmuError {
    fn from(_: NoMemory) -> Self {
        Self::NoMemory
    }
}

/// How a huge leaf becomes small ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Split {
    /// Zapped at the write; small leaves come back fault by fault.
    #[default]
    Lazy,
    /// Replaced by a full table at the write.
    Shatter,
    /// Replaced by full tables when tracking starts.
    Eager,
    /// Replaced by full tables when its range is cleared.
    EagerClear,
}

/// What becomes of split leaves when tracking stops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Collapse {
    /// They stay.
    #[default]
    None,
    /// Tables that could be one leaf are dropped, and faults bring the leaf back.
    Lazy,
    /// Tables are replaced by the leaf.
    InPlace,
}

/// What becomes of a root that nobody has loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RootPolicy {
    /// Zapped; and every role bit makes another root.
    Drop,
    /// Zapped; but paging-mode bits do not make another root.
    AddressSpace,
    /// Kept by an extra reference.
    #[default]
    Keep,
    /// Kept while all shadow pages together are at most so many; then the least recently used goes.
    Quota(u32),
}

/// When a split cache is filled, and how far. In objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheSize {
    /// Below so many it is topped up before a split.
    pub min: u32,
    /// A top-up fills it to so many.
    pub capacity: u32,
}

/// Split caches and descriptors (seed 002).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caches {
    /// Tables.
    pub pages: CacheSize,
    /// Descriptors of reverse maps.
    pub descs: CacheSize,
    /// Bytes of a descriptor, 16 to 256. KVM's is 128.
    pub desc_bytes: u32,
    /// The first alias needs no descriptor either. KVM's does.
    pub inline_two: bool,
}

impl Default for Caches {
    fn default() -> Self {
        Self {
            pages: CacheSize { min: 1, capacity: 40 },
            descs: CacheSize { min: 64, capacity: 104 },
            desc_bytes: 64,
            inline_two: true,
        }
    }
}

/// Copies that `twin` may hold: 128 MiB of them.
pub const DEFAULT_TWINS: u32 = 64;

/// Pages of 512 at which a copy costs what KVM's log does (docs/nesting.md).
pub const BREAK_EVEN: u32 = 180;

/// Everything about an MMU that does not change.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Pages of L1's memory.
    pub memory_frames: u64,
    /// What L1's processor can do.
    pub caps: GuestCaps,
    /// How a range is tracked.
    pub strategy: &'static dyn Strategy,
    /// The first page of L1's memory that is tracked; those before it are never closed and never reported.
    pub first_tracked: Frame,
    /// Also report by L2 frame.
    pub by_l2: bool,
    /// How huge leaves become small.
    pub split: Split,
    /// How they become huge again.
    pub collapse: Collapse,
    /// What becomes of unused roots.
    pub roots: RootPolicy,
    /// Split caches.
    pub caches: Caches,
    /// The largest leaf of EPT02.
    pub max_level: Level,
    /// Pages that one fault may map: an aligned window of so many, a power of two up to 512.
    pub extent: u32,
    /// Shadow pages at most, whatever the root policy. At least 16.
    pub max_pages: u32,
    /// Entries that one list may have: more aliases of a page, or parents of a table, push out the oldest. At least 2.
    pub longest_list: u32,
    /// 2 MiB regions that the report by L2 frame may name before it says "all".
    pub max_l2_regions: u32,
    /// Copies of huge leaves that `twin` may hold at once; further leaves are split.
    pub max_twins: u32,
    /// Pages of 512 from which on `twin+log` copies and compares a leaf rather than log its pages. At most 512.
    pub break_even: u32,
    /// Whoever makes EPT02 effective logs single pages through huge leaves too, where [`crate::Mapper::log_writes`] asks for it.
    pub logs_huge: bool,
    /// Seed of the hash.
    pub seed: u64,
}

impl Config {
    /// Defaults for `memory_frames` pages of L1 memory, tracked with `strategy`.
    #[must_use]
    pub fn new(memory_frames: u64, strategy: &'static dyn Strategy) -> Self {
        Self {
            memory_frames,
            caps: GuestCaps::default(),
            strategy,
            first_tracked: Frame(0),
            by_l2: false,
            split: Split::default(),
            collapse: Collapse::default(),
            roots: RootPolicy::default(),
            caches: Caches::default(),
            max_level: Level::G1,
            extent: 1,
            max_pages: 1 << 22,
            longest_list: 16384,
            max_l2_regions: 1 << 16,
            max_twins: DEFAULT_TWINS,
            break_even: BREAK_EVEN,
            logs_huge: false,
            seed: 0x5eed,
        }
    }

    /// Shadow pages that may be in use: the root policy's quota or the general limit.
    #[must_use]
    pub const fn quota(&self) -> u32 {
        match self.roots {
            RootPolicy::Quota(pages) if pages < self.max_pages => pages,
            _ => self.max_pages,
        }
    }

    /// Refuses what makes no sense, with the reason.
    ///
    /// # Errors
    /// [`MmuError::BadConfig`] names the option, its value and what would be right.
    pub fn check(&self) -> Result<(), MmuError> {
        let bad = |why: String| Err(MmuError::BadConfig(why));
        if self.memory_frames == 0 || self.memory_frames > 1 << 40 {
            return bad(format!("memory of {:#x} pages: give 1 to 2^40", self.memory_frames));
        }
        if self.quota() < 16 {
            return bad(format!("quota={} shadow pages: a single walk with its split needs 16", self.quota()));
        }
        if !self.extent.is_power_of_two() || self.extent > 512 {
            return bad(format!("an extent of {} pages: give a power of two up to 512", self.extent));
        }
        if self.longest_list < 2 {
            return bad("lists need room for two entries".into());
        }
        let Caches { pages, descs, desc_bytes, .. } = self.caches;
        if !(16..=256).contains(&desc_bytes) || desc_bytes % 4 != 0 {
            return bad(format!("descriptors of {desc_bytes} bytes: give a multiple of 4 from 16 to 256"));
        }
        for (name, size) in [("page", pages), ("descriptor", descs)] {
            if size.capacity < size.min || size.capacity > 1 << 20 {
                return bad(format!("{name} cache with capacity {} below its minimum {}", size.capacity, size.min));
            }
        }
        if !(32..=52).contains(&self.caps.address_bits) {
            return bad(format!("{} physical address bits: give 32 to 52", self.caps.address_bits));
        }
        self.strategy.check(self).map_err(MmuError::BadConfig)
    }
}
