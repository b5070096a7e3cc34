//! Accesses of L2 that EPT12 may not permit: a list that L1 provokes one by one on real tables, and that the monitor asks its own walker about.
//!
//! ```text
//! L2 linear PROBE_DATA                  --+
//!                                         +-->  L2 GPA PROBE + a  --EPT12-->  L1 GPA a: one page of L1's image
//! L2 linear PROBE_TABLE, whose table is --+     four entries, of which a case changes one
//! ```
//!
//! The four entries are for this alone. A case names one of them by its level and gives all of its bits but the address.

use crate::gfn::Level;
use crate::paging::ept::{ACCESSED, DIRTY, EXECUTE, LARGE, MEMORY_TYPE_SHIFT, READ, RIGHTS, WRITE, WRITE_BACK};

/// Where L2's physical addresses of the probe begin: the second entry of EPT12's root. `a` is below 1 GiB.
pub const PROBE: u64 = 1 << 39;
/// A linear address of L2's that leads to the page: the third entry of its PML4.
pub const PROBE_DATA: u64 = 2 << 39;
/// A linear address of L2's whose page table is the page: what L2 reads here is behind an entry in it.
pub const PROBE_TABLE: u64 = PROBE_DATA + (2 << 20) + 4096;
/// Where in the page data is read and written.
pub const DATA_OFFSET: u64 = 16;
/// Where in the page the entry for [`PROBE_TABLE`] is.
pub const ENTRY_OFFSET: u64 = 8;

/// What L2 does to the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Executes.
    Execute,
    /// Has the processor read an entry in it.
    Walk,
}

impl Access {
    /// The offset in the page that is touched.
    #[must_use]
    pub const fn offset(self) -> u64 {
        match self {
            Self::Read | Self::Write => DATA_OFFSET,
            Self::Execute => 0,
            Self::Walk => ENTRY_OFFSET,
        }
    }

    /// In a word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Execute => "execute",
            Self::Walk => "page walk",
        }
    }
}

/// One access under one table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// The level of the leaf. The levels above it have tables.
    pub leaf: Level,
    /// The entry that the case is about.
    pub at: Level,
    /// Its bits 11:0 and 63:52.
    pub bits: u64,
    /// Address bits that are set besides those of the address.
    pub address_bits: u64,
    /// Whether EPTP has accessed and dirty flags in use (bit 6).
    pub accessed_dirty: bool,
    /// What L2 does.
    pub access: Access,
}

impl Case {
    /// The entry at `level` that leads to `address`: the case's own, or one that permits everything.
    #[must_use]
    pub const fn entry(&self, level: Level, address: u64) -> u64 {
        if level as u8 == self.at as u8 {
            address | self.address_bits | self.bits
        } else {
            self.permissive(level, address)
        }
    }

    /// The entry at `level` as it is before and after the case.
    #[must_use]
    pub const fn permissive(&self, level: Level, address: u64) -> u64 {
        address | if level as u8 == self.leaf as u8 { leaf_bits(level, RIGHTS) } else { RIGHTS | ACCESSED }
    }
}

/// A leaf's bits: write-back, accessed and dirty.
const fn leaf_bits(level: Level, rights: u64) -> u64 {
    rights | WRITE_BACK | ACCESSED | DIRTY | if matches!(level, Level::K4) { 0 } else { LARGE }
}

const fn case(leaf: Level, at: Level, bits: u64, access: Access) -> Case {
    Case { leaf, at, bits, address_bits: 0, accessed_dirty: true, access }
}

const ALL: [Access; 4] = [Access::Read, Access::Write, Access::Execute, Access::Walk];
const LEVELS: [Level; 4] = [Level::K4, Level::M2, Level::G1, Level::T512];
/// Rights of an entry on the way to the leaf that are not misconfigured on any processor, all three left out.
const ABOVE: [u64; 4] = [0, READ, READ | WRITE, READ | EXECUTE];
/// A leaf's bits without either flag.
const UNTOUCHED: u64 = RIGHTS | WRITE_BACK;
/// Bits of a table's entry that are reserved (SDM 3C, tables 29-1, 29-3, 29-5): 6:3, of a root's entry also 7.
const RESERVED_OF_TABLES: [(Level, u64); 6] = [
    (Level::M2, 1 << 3),
    (Level::M2, 1 << 6),
    (Level::G1, 1 << 4),
    (Level::G1, 1 << 5),
    (Level::T512, 1 << 3),
    (Level::T512, LARGE),
];
const TYPES: [u64; 3] = [2, 3, 7];

const OF_SMALL_LEAVES: usize = 8 * 4 * 2;
const OF_LARGE_LEAVES: usize = 2 * 4 * 4;
const OF_TABLES: usize = 3 * 4 * 4;
const OF_FLAGS: usize = 3 * 4 + 4;
const OF_RESERVED: usize = RESERVED_OF_TABLES.len() * 2 + TYPES.len() * 2 + 5;

/// How many there are.
pub const COUNT: usize = OF_SMALL_LEAVES + OF_LARGE_LEAVES + OF_TABLES + OF_FLAGS + OF_RESERVED;

/// All of them.
pub const CASES: [Case; COUNT] = cases();

/// Fills the list; `at` is where the next case goes.
struct Filler {
    cases: [Case; COUNT],
    at: usize,
}

impl Filler {
    const fn push(&mut self, case: Case) {
        self.cases[self.at] = case;
        self.at += 1;
    }

    /// Each right and combination of rights on a 4 KiB leaf, each access, with and without flags in use.
    const fn small_leaves(&mut self) {
        let mut index = 0;
        while index < OF_SMALL_LEAVES {
            let rights = (index / 8) as u64;
            let case = case(Level::K4, Level::K4, leaf_bits(Level::K4, rights), ALL[index % 4]);
            self.push(Case { accessed_dirty: index % 8 < 4, ..case });
            index += 1;
        }
    }

    const fn large_leaves(&mut self) {
        let mut index = 0;
        while index < OF_LARGE_LEAVES {
            let level = LEVELS[1 + index / 16];
            self.push(case(level, level, leaf_bits(level, ABOVE[index / 4 % 4]), ALL[index % 4]));
            index += 1;
        }
    }

    const fn tables(&mut self) {
        let mut index = 0;
        while index < OF_TABLES {
            self.push(case(Level::K4, LEVELS[1 + index / 16], ABOVE[index / 4 % 4] | ACCESSED, ALL[index % 4]));
            index += 1;
        }
    }

    /// Flags that are clear: the access is permitted, and the entry shows it afterwards. The last four have no flags in use.
    const fn flags(&mut self) {
        let mut index = 0;
        while index < OF_FLAGS {
            let access = ALL[index % 4];
            let case = match index / 4 {
                0 | 3 => case(Level::K4, Level::K4, UNTOUCHED, access),
                1 => case(Level::M2, Level::M2, UNTOUCHED | LARGE, access),
                _ => case(Level::K4, Level::M2, RIGHTS, access),
            };
            self.push(Case { accessed_dirty: index < 12, ..case });
            index += 1;
        }
    }

    /// Misconfigurations other than by rights: reserved bits of tables, memory types, addresses.
    const fn reserved(&mut self) {
        let accesses = [Access::Read, Access::Walk];
        let mut index = 0;
        while index < RESERVED_OF_TABLES.len() * 2 {
            let (level, bit) = RESERVED_OF_TABLES[index / 2];
            self.push(case(Level::K4, level, RIGHTS | ACCESSED | bit, accesses[index % 2]));
            index += 1;
        }
        index = 0;
        while index < TYPES.len() * 2 {
            let level = LEVELS[index % 2];
            let large = if index % 2 == 1 { LARGE } else { 0 };
            let bits = RIGHTS | TYPES[index / 2] << MEMORY_TYPE_SHIFT | ACCESSED | DIRTY | large;
            self.push(case(level, level, bits, Access::Write));
            index += 1;
        }
        // Beyond every address width that is in use; and leaves that do not begin where they can.
        index = 0;
        while index < 3 {
            let level = LEVELS[[0, 1, 3][index]];
            let bits = if index == 0 { leaf_bits(level, RIGHTS) } else { RIGHTS | ACCESSED };
            self.push(Case { address_bits: 1 << 51, ..case(Level::K4, level, bits, Access::Execute) });
            index += 1;
        }
        let (huge, giant) = (leaf_bits(Level::M2, RIGHTS), leaf_bits(Level::G1, RIGHTS));
        self.push(Case { address_bits: 1 << 13, ..case(Level::M2, Level::M2, huge, Access::Read) });
        self.push(Case { address_bits: 1 << 29, ..case(Level::G1, Level::G1, giant, Access::Write) });
    }
}

const fn cases() -> [Case; COUNT] {
    let first = case(Level::K4, Level::K4, 0, Access::Read);
    let mut filler = Filler { cases: [first; COUNT], at: 0 };
    filler.small_leaves();
    filler.large_leaves();
    filler.tables();
    filler.flags();
    filler.reserved();
    assert!(filler.at == COUNT);
    filler.cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paging::ADDRESS_MASK;

    #[test]
    fn no_case_is_there_twice() {
        for (index, case) in CASES.iter().enumerate() {
            assert!(!CASES[..index].contains(case), "{case:?}");
            assert_eq!(case.bits & ADDRESS_MASK, 0, "{case:?}");
            assert_eq!(case.address_bits & !ADDRESS_MASK, 0, "{case:?}");
            assert!(case.at >= case.leaf, "{case:?}");
        }
    }

    #[test]
    fn one_entry_of_a_case_is_its_own() {
        for case in &CASES {
            for level in LEVELS.into_iter().filter(|level| *level >= case.leaf && *level != case.at) {
                assert_eq!(case.entry(level, 0x4000_0000), case.permissive(level, 0x4000_0000));
            }
            assert_eq!(case.entry(case.at, 0x4000_0000) & !ADDRESS_MASK, case.bits);
        }
    }
}
