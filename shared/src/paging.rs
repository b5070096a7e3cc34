//! Raw page-table entry formats: EPT, long mode (and so NPT), PAE and 32-bit.
//!
//! Constants alone: who reads an entry decides what a bit means for it. Sections are those of the Intel SDM, volume 3,
//! as of 2023 (in editions before, chapter 29 is 28), and of the AMD APM, volume 2, revision 3.40.

/// The paging mode in which a guest touches its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u64)]
pub enum Mode {
    /// Long mode: four levels of 8-byte entries.
    #[default]
    Long = 0,
    /// PAE: three levels of 8-byte entries.
    Pae = 1,
    /// 32-bit paging: two levels of 4-byte entries.
    Bits32 = 2,
}

impl Mode {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Long, Self::Pae, Self::Bits32];

    /// The mode of that number, or `None`.
    #[must_use]
    pub const fn from_number(number: u64) -> Option<Self> {
        match number {
            0 => Some(Self::Long),
            1 => Some(Self::Pae),
            2 => Some(Self::Bits32),
            _ => None,
        }
    }

    /// Its name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Long => "64bit",
            Self::Pae => "pae",
            Self::Bits32 => "32bit",
        }
    }
}

/// Bits 51:12, the frame in every 8-byte format (SDM 3A 4.5, table 4-15; APM 5.3.3).
pub const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;

/// Entries of a 4 KiB table of 8-byte entries.
pub const ENTRIES: usize = 512;
/// Entries of a 4 KiB table of 4-byte entries (SDM 3A 4.3).
pub const ENTRIES_32: usize = 1024;

/// Extended page tables: SDM 3C 29.3.2, tables 29-1 to 29-7.
pub mod ept {
    /// Bit 0: reads are allowed.
    pub const READ: u64 = 1 << 0;
    /// Bit 1: writes are allowed.
    pub const WRITE: u64 = 1 << 1;
    /// Bit 2: instruction fetches are allowed (with mode-based control off).
    pub const EXECUTE: u64 = 1 << 2;
    /// Bits 2:0; an entry is present when one of them is set.
    pub const RIGHTS: u64 = READ | WRITE | EXECUTE;
    /// Lowest bit of a leaf's memory type, bits 5:3.
    pub const MEMORY_TYPE_SHIFT: u32 = 3;
    /// Write-back, as a memory type in place.
    pub const WRITE_BACK: u64 = 6 << MEMORY_TYPE_SHIFT;
    /// Bit 6 of a leaf: ignore the guest's PAT.
    pub const IGNORE_PAT: u64 = 1 << 6;
    /// Bit 7 of a PDPTE or PDE: it maps a page.
    pub const LARGE: u64 = 1 << 7;
    /// Bit 8: accessed, where EPTP bit 6 is set (29.3.5).
    pub const ACCESSED: u64 = 1 << 8;
    /// Bit 9 of a leaf: dirty, where EPTP bit 6 is set (29.3.5).
    pub const DIRTY: u64 = 1 << 9;

    /// EPTP bits 5:3 hold the walk length less one (SDM 3C 25.6.11, table 25-9).
    pub const EPTP_WALK_SHIFT: u32 = 3;
    /// EPTP bit 6: accessed and dirty flags are in use.
    pub const EPTP_ACCESSED_DIRTY: u64 = 1 << 6;

    /// Exit qualification of an EPT violation: SDM 3C 28.2.1, table 28-7.
    pub mod qualification {
        /// Bit 0: the access was a read.
        pub const READ: u64 = 1 << 0;
        /// Bit 1: the access was a write.
        pub const WRITE: u64 = 1 << 1;
        /// Bit 2: the access was an instruction fetch.
        pub const FETCH: u64 = 1 << 2;
        /// Lowest of bits 5:3, the AND of bits 2:0 of every entry that the walk used.
        pub const RIGHTS_SHIFT: u32 = 3;
        /// Bit 7: the guest linear-address field is valid.
        pub const LINEAR_VALID: u64 = 1 << 7;
        /// Bit 8: the access was to the translation of that address, not to a paging-structure entry on the way.
        pub const LINEAR_FINAL: u64 = 1 << 8;
    }
}

/// 8-byte entries of long mode and PAE: SDM 3A 4.4 and 4.5; APM 5.2.3 and 5.3. NPT uses them as they are (APM 15.25).
pub mod long {
    /// Bit 0: present.
    pub const PRESENT: u64 = 1 << 0;
    /// Bit 1: writes are allowed.
    pub const WRITE: u64 = 1 << 1;
    /// Bit 2: user accesses are allowed; every nested access counts as one (APM 15.25.5).
    pub const USER: u64 = 1 << 2;
    /// Bit 5: accessed.
    pub const ACCESSED: u64 = 1 << 5;
    /// Bit 6 of a leaf: dirty.
    pub const DIRTY: u64 = 1 << 6;
    /// Bit 7 of a PDPTE or PDE: it maps a page.
    pub const LARGE: u64 = 1 << 7;
    /// Bit 63: no instruction fetch, where EFER.NXE is set; reserved where it is not.
    pub const NO_EXECUTE: u64 = 1 << 63;
    /// Bits of a PAE page-directory-pointer entry that must be 0: 2:1 and 8:5 (SDM 3A table 4-8; APM figure 5-10).
    pub const PAE_PDPTE_RESERVED: u64 = 0x1e6;
}

/// 4-byte entries: SDM 3A 4.3, tables 4-4 to 4-6; APM 5.2.1. Bits 0 to 7 are those of [`long`].
pub mod legacy {
    /// Bits 31:12, the frame of a table or a 4 KiB page.
    pub const ADDRESS_MASK: u32 = 0xffff_f000;
    /// Bits 31:22, the frame of a 4 MiB page below 4 GiB.
    pub const LARGE_ADDRESS_MASK: u32 = 0xffc0_0000;
    /// Lowest of bits 20:13, address bits 39:32 of a 4 MiB page (PSE-36).
    pub const LARGE_HIGH_SHIFT: u32 = 13;
    /// Bit 21 of a 4 MiB page's entry is reserved.
    pub const LARGE_RESERVED: u32 = 1 << 21;
}

/// EXITINFO1 of a nested page fault: APM 15.25.6 over the page-fault error code of 8.4.2.
pub mod npf {
    /// Bit 0: a permission or a reserved bit stopped the walk; clear when an entry was not present.
    pub const PRESENT: u64 = 1 << 0;
    /// Bit 1: the access was a write.
    pub const WRITE: u64 = 1 << 1;
    /// Bit 2: always set, nested accesses are user accesses.
    pub const USER: u64 = 1 << 2;
    /// Bit 3: a reserved bit was set in an entry.
    pub const RESERVED: u64 = 1 << 3;
    /// Bit 4: the access was an instruction fetch (with EFER.NXE).
    pub const FETCH: u64 = 1 << 4;
    /// Bit 32: while translating the guest's final address.
    pub const FINAL: u64 = 1 << 32;
    /// Bit 33: while walking the guest's own tables.
    pub const TABLE_WALK: u64 = 1 << 33;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_keep_rights_apart_from_addresses() {
        assert_eq!(ADDRESS_MASK & (ept::RIGHTS | ept::LARGE | ept::ACCESSED | ept::DIRTY), 0);
        assert_eq!(ADDRESS_MASK & long::NO_EXECUTE, 0);
        assert_eq!(ept::WRITE_BACK >> ept::MEMORY_TYPE_SHIFT, 6);
        assert_eq!(legacy::LARGE_ADDRESS_MASK & legacy::LARGE_RESERVED, 0);
        assert_eq!(long::PAE_PDPTE_RESERVED & (long::PRESENT | ADDRESS_MASK), 0);
    }
}
