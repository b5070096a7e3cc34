//! What may be done to a page, and what a processor asks to do.

use std::fmt;

/// Rights on a page: read, write, execute. A value of its own, never mixed with entry bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Access(u8);

impl Access {
    /// No right.
    pub const NONE: Self = Self(0);
    /// Reads.
    pub const READ: Self = Self(1);
    /// Writes.
    pub const WRITE: Self = Self(2);
    /// Instruction fetches.
    pub const EXECUTE: Self = Self(4);
    /// All three.
    pub const ALL: Self = Self(7);

    /// The rights in the low three bits of `bits`, in EPT's order (SDM 3C table 29-6); other bits are dropped.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self((bits & 7) as u8)
    }

    /// The rights as EPT's bits 2:0.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0 as u64
    }

    /// Rights in both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Rights in either.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Rights in `self` that `other` does not have.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether every right in `needed` is here.
    #[must_use]
    pub const fn allows(self, needed: Self) -> bool {
        self.0 & needed.0 == needed.0
    }

    /// Whether no right is here.
    #[must_use]
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (right, letter) in [(Self::READ, 'r'), (Self::WRITE, 'w'), (Self::EXECUTE, 'x')] {
            write!(f, "{}", if self.allows(right) { letter } else { '-' })?;
        }
        Ok(())
    }
}

/// The kind of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A data read.
    Read,
    /// A data write.
    Write,
    /// An instruction fetch.
    Execute,
}

impl Kind {
    /// The right that such an access needs.
    #[must_use]
    pub const fn needs(self) -> Access {
        match self {
            Self::Read => Access::READ,
            Self::Write => Access::WRITE,
            Self::Execute => Access::EXECUTE,
        }
    }
}

/// One access of L2 to an L2 GPA, with what an exit has to say about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Read, write or fetch.
    pub kind: Kind,
    /// The processor reads L2's own page tables, rather than the address that they translate to.
    pub table_walk: bool,
    /// L2 used a linear address, so that exits have one.
    pub linear: bool,
}

impl Request {
    /// A data access or fetch through a linear address.
    #[must_use]
    pub const fn of(kind: Kind) -> Self {
        Self { kind, table_walk: false, linear: true }
    }

    /// A read.
    pub const READ: Self = Self::of(Kind::Read);
    /// A write.
    pub const WRITE: Self = Self::of(Kind::Write);
    /// An instruction fetch.
    pub const EXECUTE: Self = Self::of(Kind::Execute);
    /// Whether this is L2's own write, in every format.
    #[must_use]
    pub const fn is_write(self) -> bool {
        matches!(self, Self { kind: Kind::Write, table_walk: false, .. })
    }

    /// A read of L2's own page tables.
    pub const TABLE_WALK: Self = Self { kind: Kind::Read, table_walk: true, linear: true };
}
