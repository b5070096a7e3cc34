//! The firmware's own long-mode tables, and the nested tables of its L2, built in a pool of pages by the `x86_64` crate's types.
//!
//! The system slot at its own addresses by 2 MiB leaves, the tracked slots one after the other from [`TRACKED_BASE`] by leaves of
//! 4 KiB or 2 MiB. Everything is writable, open to ring 3, and has A and D set, so that the CPU never writes to the tables.
//! Intel SDM 3A, 4.5 and tables 4-15 to 4-20; AMD APM 2, 5.3.

use core::fmt;
use umbra_shared::layout::{SYSTEM_LIMIT, Slot, TRACKED_BASE};
use umbra_shared::paging::ept;
use umbra_shared::{Level, PAGE_SIZE};
use x86_64::structures::paging::{PageTable, PageTableFlags};
use x86_64::{PhysAddr, VirtAddr};

/// How a format of 8-byte entries spells what a [`Pool`] says. Bit 7 makes a large leaf in all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Of an entry that leads to a table: everything is allowed.
    pub table: PageTableFlags,
    /// Of a leaf: everything is allowed.
    pub leaf: PageTableFlags,
    /// The accessed flag, of both.
    pub accessed: PageTableFlags,
    /// The dirty flag, of a leaf.
    pub dirty: PageTableFlags,
}

impl Format {
    /// Long mode, and so NPT, whose walk counts as a user's (APM 2, 15.25.5).
    pub const LONG: Self = {
        let all = PageTableFlags::PRESENT.union(PageTableFlags::WRITABLE).union(PageTableFlags::USER_ACCESSIBLE);
        Self { table: all, leaf: all, accessed: PageTableFlags::ACCESSED, dirty: PageTableFlags::DIRTY }
    };
    /// Intel's extended page tables, of write-back memory (SDM 3C, 29.3.2).
    pub const EPT: Self = Self {
        table: PageTableFlags::from_bits_retain(ept::RIGHTS),
        leaf: PageTableFlags::from_bits_retain(ept::RIGHTS | ept::WRITE_BACK),
        accessed: PageTableFlags::from_bits_retain(ept::ACCESSED),
        dirty: PageTableFlags::from_bits_retain(ept::DIRTY),
    };
}

/// Why tables could not be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The pool is too small; it has that many pages.
    PoolExhausted(usize),
    /// Leaves are 4 KiB, 2 MiB or 1 GiB.
    NoSuchLeaf(Level),
    /// A slot does not begin where a leaf can.
    Unaligned(Slot),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoolExhausted(pages) => write!(f, "{pages} pages are too few for the page tables"),
            Self::NoSuchLeaf(level) => {
                write!(f, "no leaves of level {}, only 1 (4 KiB), 2 (2 MiB) and 3 (1 GiB)", level.number())
            }
            Self::Unaligned(slot) => {
                write!(f, "the slot at frame {} (page {}) is not aligned to its leaves", slot.base, slot.first_page)
            }
        }
    }
}

/// Entries of a table.
pub const ENTRIES: usize = 512;

/// A table of a [`Pool`] that holds leaves.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    index: usize,
    level: Level,
}

/// Tables under construction. The invariant is: entry `PRESENT` without `HUGE_PAGE` above level 1 leads to a table of the pool.
pub struct Pool<'a> {
    tables: &'a mut [PageTable],
    base: u64,
    used: usize,
    format: Format,
    table_flags: PageTableFlags,
    leaf_flags: PageTableFlags,
}

impl<'a> Pool<'a> {
    /// One empty table, the root, in `tables`, which lie at the physical address `base`. A and D are set in every entry.
    ///
    /// # Errors
    /// [`Error::PoolExhausted`] if there is no room for it.
    pub fn new(tables: &'a mut [PageTable], base: u64, format: Format) -> Result<Self, Error> {
        let none = PageTableFlags::empty();
        let mut pool = Self { tables, base, used: 0, format, table_flags: none, leaf_flags: none };
        pool.clear()?;
        Ok(pool)
    }

    /// One empty table, the root, as at first.
    ///
    /// # Errors
    /// [`Error::PoolExhausted`] if there is no room for it.
    pub fn clear(&mut self) -> Result<(), Error> {
        self.used = 0;
        self.preset(true);
        self.take().map(|_| ())
    }

    /// From now on entries are made without A and D, or with both.
    pub fn preset(&mut self, accessed_dirty: bool) {
        let Format { table, leaf, accessed, dirty } = self.format;
        (self.table_flags, self.leaf_flags) =
            if accessed_dirty { (table | accessed, leaf | accessed | dirty) } else { (table, leaf) };
    }

    /// The physical address of the root.
    #[must_use]
    pub const fn root(&self) -> u64 {
        self.base
    }

    /// Tables in use.
    #[must_use]
    pub const fn used(&self) -> usize {
        self.used
    }

    /// Bytes from the root to the end of the last table in use.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.used as u64 * PAGE_SIZE
    }

    /// Takes an empty table out of the pool.
    fn take(&mut self) -> Result<usize, Error> {
        let index = self.used;
        self.tables.get_mut(index).ok_or(Error::PoolExhausted(index))?.zero();
        self.used += 1;
        Ok(index)
    }

    fn address_of(&self, table: usize) -> u64 {
        self.base + table as u64 * PAGE_SIZE
    }

    /// The table below entry `entry` of table `table`, a new one if there is none yet.
    fn below(&mut self, table: usize, entry: usize) -> Result<usize, Error> {
        let present = &self.tables[table][entry];
        if present.is_unused() {
            let new = self.take()?;
            let address = PhysAddr::new(self.address_of(new));
            self.tables[table][entry].set_addr(address, self.table_flags);
            Ok(new)
        } else {
            Ok(((present.addr().as_u64() - self.base) / PAGE_SIZE) as usize)
        }
    }

    /// The directory that `address` is in, made if it is not there yet.
    fn directory(&mut self, address: VirtAddr) -> Result<usize, Error> {
        let pointers = self.below(0, address.p4_index().into())?;
        self.below(pointers, address.p3_index().into())
    }

    /// The table that holds the leaf of `level` for `linear`, made if it is not there yet.
    ///
    /// # Errors
    /// [`Error::PoolExhausted`] and [`Error::NoSuchLeaf`].
    pub fn table_of(&mut self, linear: u64, level: Level) -> Result<Table, Error> {
        let address = VirtAddr::new(linear);
        let index = match level {
            Level::K4 => {
                let directory = self.directory(address)?;
                self.below(directory, address.p2_index().into())?
            }
            Level::M2 => self.directory(address)?,
            Level::G1 => self.below(0, address.p4_index().into())?,
            other => return Err(Error::NoSuchLeaf(other)),
        };
        Ok(Table { index, level })
    }

    /// Maps the leaf at `linear`, which `table` holds, to `physical`. Says whether it was not mapped before. Both are aligned to the leaf.
    pub fn set(&mut self, table: Table, linear: u64, physical: u64) -> bool {
        let huge = if table.level == Level::K4 { PageTableFlags::empty() } else { PageTableFlags::HUGE_PAGE };
        let entry = &mut self.tables[table.index][(linear >> table.level.shift()) as usize % ENTRIES];
        let new = entry.is_unused();
        if new || entry.addr().as_u64() != physical {
            entry.set_addr(PhysAddr::new(physical), self.leaf_flags.union(huge));
        }
        new
    }

    /// Where the leaf at `linear`, which `table` holds, leads to; `None` if it is not mapped.
    #[must_use]
    pub fn get(&self, table: Table, linear: u64) -> Option<u64> {
        let entry = &self.tables[table.index][(linear >> table.level.shift()) as usize % ENTRIES];
        (!entry.is_unused()).then(|| entry.addr().as_u64())
    }

    /// Maps the leaf of `level` at `linear` to `physical`; both are aligned to it. Says whether it was not mapped before.
    ///
    /// # Errors
    /// [`Error::PoolExhausted`] and [`Error::NoSuchLeaf`].
    pub fn map(&mut self, linear: u64, physical: u64, level: Level) -> Result<bool, Error> {
        let table = self.table_of(linear, level)?;
        Ok(self.set(table, linear, physical))
    }

    /// Lets the leaf table of `original` serve the 2 MiB around `linear` too; it is made if it is not there yet. Says whether it did not before.
    ///
    /// # Errors
    /// [`Error::PoolExhausted`].
    pub fn share(&mut self, linear: u64, original: u64) -> Result<bool, Error> {
        let (address, original) = (VirtAddr::new(linear), VirtAddr::new(original));
        let owner = self.directory(original)?;
        let shared = self.below(owner, original.p2_index().into())?;
        let shared = PhysAddr::new(self.address_of(shared));
        let directory = self.directory(address)?;
        let entry = &mut self.tables[directory][address.p2_index()];
        let new = entry.is_unused();
        if new {
            entry.set_addr(shared, self.table_flags);
        }
        Ok(new)
    }

    /// The first GiB at its own addresses by 2 MiB leaves: the system slot, and what the pattern never touches behind it.
    ///
    /// # Errors
    /// [`Error::PoolExhausted`].
    pub fn map_system(&mut self) -> Result<(), Error> {
        for address in (0..SYSTEM_LIMIT).step_by(Level::M2.bytes() as usize) {
            self.map(address, address, Level::M2)?;
        }
        Ok(())
    }
}

/// Builds all tables in `pool`, which lies at the physical address `base`, and returns that of the PML4.
///
/// A slot that is no multiple of the leaf ends inside its last one: the rest of that leaf leads into the gap behind the slot.
///
/// # Errors
/// Says what does not fit. The pool is then half filled.
pub fn build(pool: &mut [PageTable], base: u64, slots: impl Iterator<Item = Slot>, leaf: Level) -> Result<u64, Error> {
    let mut pool = Pool::new(pool, base, Format::LONG)?;
    pool.map_system()?;
    for slot in slots {
        let linear = TRACKED_BASE + slot.first_page * PAGE_SIZE;
        if !linear.is_multiple_of(leaf.bytes()) || slot.base.align_down(leaf) != slot.base {
            return Err(Error::Unaligned(slot));
        }
        for offset in (0..slot.pages * PAGE_SIZE).step_by(leaf.bytes() as usize) {
            pool.map(linear + offset, slot.base.address() + offset, leaf)?;
        }
    }
    Ok(pool.root())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use umbra_shared::{Gfn, layout};

    const BASE: u64 = 0x90_0000;

    fn pool(pages: u64, leaf: Level) -> Vec<PageTable> {
        let count = layout::table_bytes(pages, leaf) / PAGE_SIZE;
        (0..count).map(|_| PageTable::new()).collect()
    }

    /// What the CPU's walk of `linear` finds: the address, and the level of the leaf.
    fn walk(pool: &[PageTable], linear: u64) -> Option<(u64, u8)> {
        let mut table = 0;
        for level in (1..=4_u8).rev() {
            let shift = 12 + 9 * (u32::from(level) - 1);
            let entry = &pool[table][usize::try_from(linear >> shift & 511).unwrap()];
            let flags = entry.flags();
            if !flags.contains(Format::LONG.table | Format::LONG.accessed) {
                return None;
            }
            if level == 1 || flags.contains(PageTableFlags::HUGE_PAGE) {
                assert!(flags.contains(PageTableFlags::DIRTY));
                return Some((entry.addr().as_u64() + (linear & ((1 << shift) - 1)), level));
            }
            table = usize::try_from((entry.addr().as_u64() - BASE) / PAGE_SIZE).unwrap();
        }
        None
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn every_page_leads_to_its_slot(pages in 1_u64..8000, count in 1_usize..6, huge: bool) {
            let leaf = if huge { Level::M2 } else { Level::K4 };
            let Some(slots) = layout::slots(pages, count, leaf) else { return Ok(()) };
            let mut pool = pool(pages, leaf);
            prop_assert_eq!(build(&mut pool, BASE, slots.clone(), leaf), Ok(BASE));
            for slot in slots {
                for page in 0..slot.pages {
                    let linear = TRACKED_BASE + (slot.first_page + page) * PAGE_SIZE;
                    prop_assert_eq!(walk(&pool, linear), Some((slot.base.plus(page).address(), leaf.number())));
                }
            }
            let end = (pages * PAGE_SIZE).next_multiple_of(leaf.bytes());
            prop_assert_eq!(walk(&pool, TRACKED_BASE + end), None);
            prop_assert_eq!(walk(&pool, TRACKED_BASE - 1), None);
            for address in [0, layout::BOOT_PAGE, SYSTEM_LIMIT - 1] {
                prop_assert_eq!(walk(&pool, address), Some((address, 2)));
            }
            prop_assert_eq!(walk(&pool, SYSTEM_LIMIT), None);
        }
    }

    /// SDM 3C, tables 29-1 to 29-7: rights 2:0, memory type 5:3 (6 is write-back), A 8, D 9; a table's bits 6:3 are 0.
    #[test]
    fn extended_page_tables_are_laid_out_as_the_manual_says() {
        let mut tables = [const { PageTable::new() }; 4];
        let mut pool = Pool::new(&mut tables, BASE, Format::EPT).unwrap();
        pool.map(0x20_0000, 0x40_0000, Level::M2).unwrap();
        pool.preset(false);
        pool.map(0x5000, 0x1_2345_6000, Level::K4).unwrap();
        pool.map(5 << 30, 6 << 30, Level::G1).unwrap();
        let entry =
            |table: usize, index: usize| tables[table][index].addr().as_u64() | tables[table][index].flags().bits();
        assert_eq!(entry(0, 0), (BASE + 0x1000) | 0x107);
        assert_eq!(entry(2, 1), 0x40_0000 | 0x3b7);
        assert_eq!(entry(2, 0), (BASE + 0x3000) | 0x7);
        assert_eq!(entry(3, 5), 0x1_2345_6000 | 0x37);
        assert_eq!(entry(1, 5), 6 << 30 | 0xb7);
    }

    #[test]
    fn a_pool_that_was_used_is_used_again() {
        let slots = || layout::slots(1024, 1, Level::M2).unwrap();
        let mut pool = pool(1024, Level::K4);
        build(&mut pool, BASE, slots(), Level::K4).unwrap();
        build(&mut pool, BASE, slots(), Level::M2).unwrap();
        assert_eq!(walk(&pool, TRACKED_BASE), Some((layout::TRACKED_GPA, 2)));
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let slots = || layout::slots(1024, 1, Level::K4).unwrap();
        let short = pool(1024, Level::K4).len() - 1;
        let mut pool = pool(1024, Level::K4);
        assert_eq!(build(&mut pool[..short], BASE, slots(), Level::K4), Err(Error::PoolExhausted(short)));
        let no_such_leaf = Pool::new(&mut pool, BASE, Format::LONG).unwrap().map(0, 0, Level::T512);
        assert_eq!(no_such_leaf, Err(Error::NoSuchLeaf(Level::T512)));
        let slot = Slot { base: Gfn(1), pages: 512, first_page: 0 };
        assert_eq!(build(&mut pool, BASE, [slot].into_iter(), Level::M2), Err(Error::Unaligned(slot)));
    }
}
