//! EPT12 as the guest wrote it: entries that nothing vouches for, and the walk that checks them.
//!
//! A [`GuestEntry`] is what the guest claims. Only [`decode`] turns it into a [`Decoded`] that the MMU acts upon.

mod ept;
mod legacy;
mod long;
mod reflect;
mod walk;

pub use reflect::{Reflect, Reflection};
pub use walk::{
    Ended, Step, Walk, child_quadrant, entry_place, place, plain_leaf, read_entry, set_accessed_dirty, shadow_leaf,
    walk,
};

use umbra_shared::{Gfn, Level};

use crate::access::Access;
use crate::format::Format;

/// A table entry as read from L1's memory: unchecked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestEntry(pub u64);

/// What L1 believes its processor can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestCaps {
    /// Physical address bits (CPUID leaf 80000008H), 32 to 52; address bits above are reserved.
    pub address_bits: u8,
    /// EPT entries may be execute-only (`IA32_VMX_EPT_VPID_CAP` bit 0).
    pub execute_only: bool,
    /// EPT and long-mode tables may map 1 GiB (`IA32_VMX_EPT_VPID_CAP` bit 17, CPUID `Page1GB`).
    pub giant_pages: bool,
}

impl Default for GuestCaps {
    fn default() -> Self {
        Self { address_bits: 46, execute_only: true, giant_pages: true }
    }
}

impl GuestCaps {
    /// Bits of an entry's address field that no address can have.
    const fn reserved_address(self) -> u64 {
        umbra_shared::paging::ADDRESS_MASK & !((1 << self.address_bits) - 1)
    }
}

/// A checked entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// Nothing is mapped.
    NotPresent,
    /// A reserved bit or combination: an EPT misconfiguration, or a fault with RSV.
    Reserved,
    /// A table one level down.
    Table {
        /// The frame of the table.
        gfn: Gfn,
        /// Rights of everything below.
        access: Access,
        /// The accessed flag, or no such flags in use.
        accessed: bool,
    },
    /// A page.
    Leaf {
        /// Its first frame, aligned to its size.
        gfn: Gfn,
        /// Its rights.
        access: Access,
        /// The accessed flag, or no such flags in use.
        accessed: bool,
        /// The dirty flag, or no such flags in use.
        dirty: bool,
    },
}

/// Checks `entry`, found at `level` in a table of `format`. A 4 MiB page's frame is that of its first half.
#[must_use]
#[inline]
pub fn decode(format: Format, caps: GuestCaps, level: Level, entry: GuestEntry) -> Decoded {
    match format {
        Format::Ept { accessed_dirty, .. } => ept::decode(caps, accessed_dirty, level, entry.0),
        Format::Npt { nx, .. } => long::decode(caps, nx, level, entry.0),
        Format::Pae { nx } if level == Level::G1 => long::decode_pae_pointer(caps, nx, entry.0),
        Format::Pae { nx } => long::decode_pae(caps, nx, level, entry.0),
        Format::Bits32 { pse } => legacy::decode(caps, pse, level, entry.0),
    }
}
