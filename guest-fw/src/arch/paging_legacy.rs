//! Tables of the paging modes before long mode: PAE, three levels of 8-byte entries, and 32-bit paging, two levels of 4-byte entries.
//!
//! As long mode's (paging.rs): the first GiB at its own addresses by large leaves, the tracked slots one after the other from
//! [`LEGACY_BASE`], everything writable and with A and D set. Intel SDM 3A, 4.3 and 4.4, tables 4-4 to 4-11; AMD APM 2, 5.2.

use super::paging::Error;
use umbra_shared::layout::{LEGACY_BASE, LEGACY_LIMIT, SYSTEM_LIMIT, Slot};
use umbra_shared::paging::{Mode, long};
use umbra_shared::{Level, PAGE_SIZE};

/// Present, writable, accessed, dirty; open to ring 0 alone, which is where these modes are used.
const LEAF: u64 = long::PRESENT | long::WRITE | long::ACCESSED | long::DIRTY;
const TABLE: u64 = long::PRESENT | long::WRITE | long::ACCESSED;
/// Directories that PAE's four pointers lead to; the pointers' own page comes before them.
const DIRECTORIES: usize = 4;
/// Bytes that a 4-byte entry of a directory covers.
const MIB4: u64 = 4 << 20;

/// A page of tables: 1024 entries of 4 bytes, or 512 of 8 in pairs, the lower half first.
#[derive(Clone, Copy)]
#[repr(C, align(4096))]
pub struct Page([u32; 1024]);

impl Page {
    /// No entry present.
    pub const EMPTY: Self = Self([0; 1024]);

    fn set8(&mut self, index: u64, entry: u64) {
        let at = (index % 512) as usize * 2;
        [self.0[at], self.0[at + 1]] = [entry as u32, (entry >> 32) as u32];
    }

    fn set4(&mut self, index: u64, entry: u64) {
        self.0[(index % 1024) as usize] = entry as u32;
    }
}

/// Tables under construction.
struct Pool<'a> {
    pages: &'a mut [Page],
    base: u64,
    used: usize,
}

impl Pool<'_> {
    fn take(&mut self) -> Result<usize, Error> {
        let index = self.used;
        *self.pages.get_mut(index).ok_or(Error::PoolExhausted(index))? = Page::EMPTY;
        self.used += 1;
        Ok(index)
    }

    fn address(&self, page: usize) -> u64 {
        self.base + page as u64 * PAGE_SIZE
    }

    /// The table that entry `index` of `directory` leads to. Addresses ascend, so it is the last one or a new one.
    fn below(
        &mut self,
        last: &mut Option<(u64, usize)>,
        directory: usize,
        index: u64,
        set: fn(&mut Page, u64, u64),
    ) -> Result<usize, Error> {
        if let Some((_, table)) = last.filter(|(at, _)| *at == index) {
            return Ok(table);
        }
        let table = self.take()?;
        let entry = self.address(table) | TABLE;
        set(&mut self.pages[directory], index, entry);
        *last = Some((index, table));
        Ok(table)
    }
}

/// Builds the tables of `mode` in `pages`, which lie at the physical address `base` below 4 GiB, and returns what CR3 has to hold. Leaves are 4 KiB, with
/// PAE also 2 MiB.
///
/// # Errors
/// Says what does not fit.
pub fn build(
    pages: &mut [Page],
    base: u64,
    slots: impl Iterator<Item = Slot>,
    leaf: Level,
    mode: Mode,
) -> Result<u32, Error> {
    let mut pool = Pool { pages, base, used: 0 };
    let root = pool.take()?;
    match mode {
        Mode::Pae => pae(&mut pool, root, slots, leaf)?,
        Mode::Bits32 if leaf == Level::K4 => bits32(&mut pool, root, slots)?,
        Mode::Bits32 | Mode::Long => return Err(Error::NoSuchLeaf(leaf)),
    }
    Ok(base as u32)
}

/// The linear addresses of a slot's leaves, each with its physical one.
fn leaves(slot: Slot, size: u64) -> Result<impl Iterator<Item = (u64, u64)>, Error> {
    let (linear, physical) = (LEGACY_BASE + slot.first_page * PAGE_SIZE, slot.base.address());
    let bytes = slot.pages * PAGE_SIZE;
    let fits = linear + bytes <= LEGACY_LIMIT && physical + bytes <= LEGACY_LIMIT;
    if !fits || !linear.is_multiple_of(size) || !physical.is_multiple_of(size) {
        return Err(Error::Unaligned(slot));
    }
    Ok((0..bytes).step_by(size as usize).map(move |offset| (linear + offset, physical + offset)))
}

fn pae(pool: &mut Pool, root: usize, slots: impl Iterator<Item = Slot>, leaf: Level) -> Result<(), Error> {
    let mut directories = [0; DIRECTORIES];
    for (index, directory) in directories.iter_mut().enumerate() {
        *directory = pool.take()?;
        // Present is the only bit that such an entry may have here.
        let entry = pool.address(*directory) | long::PRESENT;
        pool.pages[root].set8(index as u64, entry);
    }
    for address in (0..SYSTEM_LIMIT).step_by(Level::M2.bytes() as usize) {
        pool.pages[directories[0]].set8(address >> 21, address | LEAF | long::LARGE);
    }
    let mut last = None;
    for slot in slots {
        for (linear, physical) in leaves(slot, leaf.bytes())? {
            let directory = directories[(linear >> 30) as usize % DIRECTORIES];
            if leaf == Level::M2 {
                pool.pages[directory].set8(linear >> 21, physical | LEAF | long::LARGE);
            } else {
                let table = pool.below(&mut last, directory, linear >> 21, Page::set8)?;
                pool.pages[table].set8(linear >> 12, physical | LEAF);
            }
        }
    }
    Ok(())
}

fn bits32(pool: &mut Pool, root: usize, slots: impl Iterator<Item = Slot>) -> Result<(), Error> {
    for address in (0..SYSTEM_LIMIT).step_by(MIB4 as usize) {
        pool.pages[root].set4(address >> 22, address | LEAF | long::LARGE);
    }
    let mut last = None;
    for slot in slots {
        for (linear, physical) in leaves(slot, PAGE_SIZE)? {
            let table = pool.below(&mut last, root, linear >> 22, Page::set4)?;
            pool.pages[table].set4(linear >> 12, physical | LEAF);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use umbra_shared::layout;

    const BASE: u64 = 0x90_0000;

    fn entry(pages: &[Page], table: usize, index: u64, bytes: u64) -> u64 {
        let words = &pages[table].0;
        if bytes == 4 {
            return words[usize::try_from(index).unwrap() % 1024].into();
        }
        let at = usize::try_from(index).unwrap() % 512 * 2;
        u64::from(words[at]) | u64::from(words[at + 1]) << 32
    }

    /// What the CPU's walk of `linear` finds: the address, and the bytes of the leaf.
    fn walk(pages: &[Page], linear: u64, mode: Mode) -> Option<(u64, u64)> {
        let below = |entry: u64| usize::try_from(((entry & !0xfff) - BASE) / PAGE_SIZE).unwrap();
        let (mut table, mut size) = (0, MIB4);
        let bytes = if mode == Mode::Pae { 8 } else { 4 };
        if mode == Mode::Pae {
            let pointer = entry(pages, 0, linear >> 30, 8);
            // SDM 3A, table 4-8: bits 2:1 and 8:5 are reserved.
            assert_eq!(pointer & long::PAE_PDPTE_RESERVED, 0);
            (table, size) = (below(pointer), Level::M2.bytes());
        }
        let upper = entry(pages, table, linear / size, bytes);
        if upper & long::PRESENT == 0 {
            return None;
        }
        if upper & long::LARGE != 0 {
            return Some((upper / size * size + linear % size, size));
        }
        let leaf = entry(pages, below(upper), linear >> 12, bytes);
        (leaf & LEAF == LEAF).then_some(((leaf & !0xfff) + linear % PAGE_SIZE, PAGE_SIZE))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn every_page_leads_to_its_slot(pages in 1_u64..8000, count in 1_usize..6, kind in 0_u8..3) {
            let (mode, leaf) =
                [(Mode::Pae, Level::K4), (Mode::Pae, Level::M2), (Mode::Bits32, Level::K4)][usize::from(kind)];
            let Some(slots) = layout::slots_at(LEGACY_BASE, pages, count, leaf) else { return Ok(()) };
            let room = layout::legacy_table_bytes(pages, leaf, mode) / PAGE_SIZE;
            let mut pool = vec![Page([0xffff_ffff; 1024]); usize::try_from(room).unwrap()];
            prop_assert_eq!(build(&mut pool, BASE, slots.clone(), leaf, mode), Ok(u32::try_from(BASE).unwrap()));
            for slot in slots {
                for page in 0..slot.pages {
                    let linear = LEGACY_BASE + (slot.first_page + page) * PAGE_SIZE;
                    prop_assert_eq!(walk(&pool, linear, mode), Some((slot.base.plus(page).address(), leaf.bytes())));
                }
            }
            let end = (pages * PAGE_SIZE).next_multiple_of(leaf.bytes());
            prop_assert_eq!(walk(&pool, LEGACY_BASE + end, mode), None);
            prop_assert_eq!(walk(&pool, SYSTEM_LIMIT - 1, mode).map(|(address, _)| address), Some(SYSTEM_LIMIT - 1));
        }
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let slots = |base| layout::slots_at(base, 1024, 1, Level::K4).unwrap();
        let room = usize::try_from(layout::legacy_table_bytes(1024, Level::K4, Mode::Bits32) / PAGE_SIZE).unwrap();
        let mut pool = vec![Page::EMPTY; room];
        let mut build = |pages: usize, base, leaf, mode| build(&mut pool[..pages], BASE, slots(base), leaf, mode);
        assert_eq!(build(room - 1, LEGACY_BASE, Level::K4, Mode::Bits32), Err(Error::PoolExhausted(room - 1)));
        assert_eq!(build(room, LEGACY_BASE, Level::M2, Mode::Bits32), Err(Error::NoSuchLeaf(Level::M2)));
        assert!(matches!(build(room, 4 << 30, Level::K4, Mode::Bits32), Err(Error::Unaligned(_))));
    }
}
