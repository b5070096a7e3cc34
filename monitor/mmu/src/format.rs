//! The formats that EPT12 can have, and their geometry.

use std::fmt;

use umbra_shared::{L2Gfn, Level};

use crate::access::{Access, Request};

/// A format of EPT12 together with what its walk depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// Extended page tables (SDM 3C 29.3.2).
    Ept {
        /// Five levels instead of four (EPTP bits 5:3).
        five_levels: bool,
        /// Accessed and dirty flags are in use (EPTP bit 6).
        accessed_dirty: bool,
    },
    /// Nested paging over long-mode tables (APM 15.25).
    Npt {
        /// Five levels instead of four (L1's CR4.LA57).
        five_levels: bool,
        /// L1's EFER.NXE.
        nx: bool,
    },
    /// Nested paging over PAE tables: L1 is a 32-bit hypervisor with CR4.PAE.
    Pae {
        /// L1's EFER.NXE.
        nx: bool,
    },
    /// Nested paging over 32-bit tables of 4-byte entries.
    Bits32 {
        /// L1's CR4.PSE: a directory entry may map 4 MiB.
        pse: bool,
    },
}

/// As a user names it.
impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ept { five_levels: false, .. } => "ept",
            Self::Ept { five_levels: true, .. } => "ept of 5 levels",
            Self::Npt { five_levels: false, .. } => "npt",
            Self::Npt { five_levels: true, .. } => "npt of 5 levels",
            Self::Pae { .. } => "pae",
            Self::Bits32 { .. } => "32bit",
        })
    }
}

impl Format {
    /// Four-level EPT with A/D flags: what most hypervisors use.
    pub const EPT: Self = Self::Ept { five_levels: false, accessed_dirty: true };

    /// The level of the shadow root. PAE and 32-bit tables have a root of four entries at the 1 GiB level.
    #[must_use]
    pub const fn root_level(self) -> Level {
        match self {
            Self::Ept { five_levels: true, .. } | Self::Npt { five_levels: true, .. } => Level::P256,
            Self::Ept { .. } | Self::Npt { .. } => Level::T512,
            Self::Pae { .. } | Self::Bits32 { .. } => Level::G1,
        }
    }

    /// L2 frames that the format can name: beyond lies nothing but faults.
    #[must_use]
    pub const fn frames(self) -> u64 {
        match self {
            Self::Pae { .. } | Self::Bits32 { .. } => 1 << 20,
            _ => 1 << (9 * self.root_level() as u32),
        }
    }

    /// Whether entries are 4 bytes wide, so that one guest table has two or four shadow pages.
    #[must_use]
    pub const fn has_4_byte_gpte(self) -> bool {
        matches!(self, Self::Bits32 { .. })
    }

    /// Whether this is EPT, so that faults are reflected as EPT violations and misconfigurations.
    #[must_use]
    pub const fn is_ept(self) -> bool {
        matches!(self, Self::Ept { .. })
    }

    /// Whether the guest's entries have accessed and dirty flags in use.
    #[must_use]
    pub const fn has_accessed_dirty(self) -> bool {
        !matches!(self, Self::Ept { accessed_dirty: false, .. })
    }

    /// The largest leaf that an entry of this format can be.
    #[must_use]
    pub const fn max_leaf(self) -> Level {
        match self {
            Self::Ept { .. } | Self::Npt { .. } => Level::G1,
            Self::Pae { .. } | Self::Bits32 { pse: true } => Level::M2,
            Self::Bits32 { pse: false } => Level::K4,
        }
    }

    /// The right that `request` needs. Walks of L2's own tables count as writes under NPT (APM 15.25.5) and under EPT
    /// with A/D flags (SDM 3C 29.3.3.2).
    #[must_use]
    pub const fn needed(self, request: Request) -> Access {
        if request.table_walk && self.has_accessed_dirty() { Access::WRITE } else { request.kind.needs() }
    }

    /// The index of `gfn` in a shadow page of `level`.
    #[must_use]
    pub const fn shadow_index(level: Level, gfn: L2Gfn) -> usize {
        ((gfn.0 >> (9 * (level as u32 - 1))) & 511) as usize
    }
}
