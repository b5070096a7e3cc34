//! The role of a shadow page: with its guest frame, what makes it *this* page.

use umbra_shared::Level;

use crate::access::Access;
use crate::format::Format;

const DIRECT: u64 = 1 << 3;
const ACCESS_SHIFT: u32 = 4;
const QUADRANT_SHIFT: u32 = 7;
const FORMAT_SHIFT: u32 = 9;
const FLAG_A: u64 = 1 << 11;
const FLAG_B: u64 = 1 << 12;
const SMM: u64 = 1 << 13;
const GUEST_MODE: u64 = 1 << 14;
const MODE_SHIFT: u32 = 16;
const OFFSET_SHIFT: u32 = 24;

/// The level below `level`; of the lowest, itself.
#[must_use]
pub const fn below(level: Level) -> Level {
    level_of((level as u32).saturating_sub(1))
}

/// The level numbered `number`; what is no level counts as the lowest.
#[inline]
#[must_use]
pub const fn level_of(number: u32) -> Level {
    match Level::from_number((number & 7) as u8) {
        Some(level) => level,
        None => Level::K4,
    }
}

/// Bits of L2's paging mode that do not change EPT02, but that a role has, as in KVM: CR0.WP, CR4.SMEP and their kin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ModeBits(pub u8);

/// What a caller says about the root that it loads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RootRole {
    /// The format of EPT12.
    pub format: Format,
    /// L2 is in system management mode: another address space.
    pub smm: bool,
    /// The root serves a nested guest.
    pub guest_mode: bool,
    /// L2's paging mode.
    pub mode: ModeBits,
}

impl RootRole {
    /// The role of an ordinary L2 over EPT12 of `format`.
    #[must_use]
    pub const fn new(format: Format) -> Self {
        Self { format, smm: false, guest_mode: true, mode: ModeBits(0) }
    }
}

/// KVM's `kvm_mmu_page_role`, in 64 bits: level, direct, access, quadrant, format, address space, mode, table offset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Role(u64);

impl Role {
    /// The role of a root. `offset` is where a PAE pointer table begins in its page, in units of 32 bytes (0..128).
    #[must_use]
    pub const fn root(root: RootRole, offset: u8) -> Self {
        let (kind, a, b) = match root.format {
            Format::Ept { five_levels, accessed_dirty } => (0, five_levels, accessed_dirty),
            Format::Npt { five_levels, nx } => (1, five_levels, nx),
            Format::Pae { nx } => (2, false, nx),
            Format::Bits32 { pse } => (3, false, pse),
        };
        Self(
            root.format.root_level() as u64
                | Access::ALL.bits() << ACCESS_SHIFT
                | kind << FORMAT_SHIFT
                | if a { FLAG_A } else { 0 }
                | if b { FLAG_B } else { 0 }
                | if root.smm { SMM } else { 0 }
                | if root.guest_mode { GUEST_MODE } else { 0 }
                | (root.mode.0 as u64) << MODE_SHIFT
                | (offset as u64 & 0x7f) << OFFSET_SHIFT,
        )
    }

    /// The role of a child one level down. Quadrant and direct are as given, the table offset is gone.
    #[must_use]
    pub const fn child(self, direct: bool, access: Access, quadrant: u8) -> Self {
        let kept = self.0 & !(7 | DIRECT | 7 << ACCESS_SHIFT | 3 << QUADRANT_SHIFT | 0x7f << OFFSET_SHIFT);
        let level = (self.0 & 7).saturating_sub(1);
        Self(
            kept | level
                | if direct { DIRECT } else { 0 }
                | access.bits() << ACCESS_SHIFT
                | (quadrant as u64 & 3) << QUADRANT_SHIFT,
        )
    }

    /// The level of the page's entries.
    #[must_use]
    pub const fn level(self) -> Level {
        level_of((self.0 & 7) as u32)
    }

    /// The page shadows no guest table: it splits a larger guest leaf.
    #[must_use]
    pub const fn direct(self) -> bool {
        self.0 & DIRECT != 0
    }

    /// The rights that all guest entries above this page leave.
    #[must_use]
    pub const fn access(self) -> Access {
        Access::from_bits(self.0 >> ACCESS_SHIFT)
    }

    /// Which part of a guest table of 4-byte entries this page shadows.
    #[must_use]
    pub const fn quadrant(self) -> u8 {
        (self.0 >> QUADRANT_SHIFT & 3) as u8
    }

    /// Where a PAE pointer table begins in its page, in bytes.
    #[must_use]
    pub const fn table_offset(self) -> u64 {
        (self.0 >> OFFSET_SHIFT & 0x7f) * 32
    }

    /// The format of the guest's tables.
    #[must_use]
    pub const fn format(self) -> Format {
        let (a, b) = (self.0 & FLAG_A != 0, self.0 & FLAG_B != 0);
        match self.0 >> FORMAT_SHIFT & 3 {
            0 => Format::Ept { five_levels: a, accessed_dirty: b },
            1 => Format::Npt { five_levels: a, nx: b },
            2 => Format::Pae { nx: b },
            _ => Format::Bits32 { pse: b },
        }
    }

    /// Whether the guest's entries are 4 bytes wide.
    #[must_use]
    pub const fn has_4_byte_gpte(self) -> bool {
        self.0 >> FORMAT_SHIFT & 3 == 3
    }

    /// Whether the guest's tables have 8-byte entries and no root of another shape: EPT or long mode.
    #[must_use]
    pub const fn is_plain(self) -> bool {
        self.0 >> FORMAT_SHIFT & 3 < 2
    }

    /// All bits, for hashing and for logs.
    #[must_use]
    pub const fn word(self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_keep_what_they_are_given() {
        for format in [
            Format::EPT,
            Format::Ept { five_levels: true, accessed_dirty: false },
            Format::Npt { five_levels: false, nx: true },
            Format::Pae { nx: true },
            Format::Bits32 { pse: true },
            Format::Bits32 { pse: false },
        ] {
            let root = Role::root(RootRole { smm: true, mode: ModeBits(0xa5), ..RootRole::new(format) }, 3);
            assert_eq!((root.format(), root.level(), root.table_offset()), (format, format.root_level(), 96));
            let child = root.child(true, Access::READ, 2);
            assert_eq!((child.format(), child.access(), child.quadrant()), (format, Access::READ, 2));
            assert_eq!(child.level().number() + 1, root.level().number());
            assert!(child.direct() && !root.direct() && child.table_offset() == 0);
            assert_ne!(child, Role::root(RootRole::new(format), 3).child(true, Access::READ, 2), "SMM and mode matter");
        }
    }
}
