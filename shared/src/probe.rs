//! Single accesses of L2, and what became of them: what L2 read, or what L1 was told.

use crate::gfn::PAGE_SIZE;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Probes of an epoch or a case, at most.
pub const MAX_PROBES: usize = 120;

/// An access of L2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Probe {
    /// L2's page.
    pub page: u64,
    /// It is written, else read.
    pub write: bool,
}

impl Probe {
    /// What probe `index` of an epoch writes: no two are the same, and no page begins with such a word.
    #[must_use]
    pub const fn stamp(epoch: u64, index: usize) -> u64 {
        1 << 63 | epoch << 8 | index as u64
    }
}

/// What became of a probe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Answer {
    /// What was read.
    pub value: u64,
    /// What L1 was told instead: the way's own code, or 0 where the access was made.
    pub code: u64,
    /// More about it.
    pub qualification: u64,
    /// L2's physical address.
    pub address: u64,
}

impl Answer {
    /// Its words, in order.
    #[must_use]
    pub const fn words(self) -> [u64; 4] {
        [self.value, self.code, self.qualification, self.address]
    }
}

/// What L1 reports of an epoch, or of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Answers {
    /// Probes that were made.
    pub count: u64,
    /// One for each of them.
    pub probes: [Answer; MAX_PROBES],
}

const _: () = assert!(size_of::<Answers>() as u64 <= PAGE_SIZE);
