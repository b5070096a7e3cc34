//! The head of a list of entry references: 8 bytes, an array of which is a reverse map.

use crate::spte::SpteRef;

/// In the second half of a head: the rest is a descriptor, and not an entry.
pub const LIST: u32 = 1 << 31;

/// The head of a list. The default is the empty list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Head(u64);

impl Head {
    /// `first`, and the rest: an entry, a descriptor with [`LIST`], or nothing.
    pub const fn new(first: u32, rest: u32) -> Self {
        Self(first as u64 | (rest as u64) << 32)
    }

    /// The entry that stands in the head; 0 for none.
    pub const fn first(self) -> u32 {
        (self.0 & 0xffff_ffff) as u32
    }

    /// What comes after it.
    pub const fn rest(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Whether nothing is listed.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// A list of one.
    #[must_use]
    pub const fn one(entry: SpteRef) -> Self {
        Self::new(entry.0, 0)
    }

    /// The entry that has been listed longest (until removals move others).
    #[must_use]
    pub const fn oldest(self) -> Option<SpteRef> {
        if self.is_empty() { None } else { Some(SpteRef(self.first())) }
    }

    /// Whether there is more than stands in the head.
    #[inline]
    #[must_use]
    pub const fn has_chain(self) -> bool {
        self.rest() & LIST != 0
    }

    /// Makes `heads` lists of one, of consecutive entries from `first`.
    pub fn fill_straight(heads: &mut [Self], first: SpteRef) {
        for (entry, head) in (Self::one(first).0..).zip(heads) {
            *head = Self(entry);
        }
    }

    /// Whether all of `heads` are empty.
    #[must_use]
    pub fn are_empty(heads: &[Self]) -> bool {
        heads.iter().fold(0, |all, head| all | head.0) == 0
    }

    /// Whether `heads` are lists of one, whose entries are consecutive from that of `first`.
    #[must_use]
    pub fn are_straight(heads: &[Self], first: Self) -> bool {
        let (mut differs, mut expected) = (0, first.0);
        for head in heads {
            differs |= head.0 ^ expected;
            expected += 1;
        }
        differs == 0
    }
}
