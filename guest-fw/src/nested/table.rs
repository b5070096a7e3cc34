//! EPT12: L1's table from L2's physical addresses to its own, in the format of the CPU's extension: NPT or EPT.
//!
//! NPT has the format of the hypervisor's own long-mode tables (AMD APM 2, 15.25.3); both have four levels here. L1 maps the system slot at its
//! own addresses for good, with A and D set, and L2's pages as [`Map`](umbra_shared::nested::Map) says: all at once, or in batches when L2
//! runs into a violation.

use crate::arch::paging::{ENTRIES, Error, Format, Pool};
use core::fmt;
use umbra_shared::layout::{MAX_SLOTS, Slot, frame_of};
use umbra_shared::nested::{AliasKind, Flags, L2_BASE, Map, Nested};
use umbra_shared::{L2Gfn, Level};
use x86_64::structures::paging::PageTable;

/// Why a violation cannot be handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// L2 has no page there.
    Beyond(L2Gfn),
    /// The entry is there, and permits everything.
    Present(L2Gfn),
    /// There is no room for tables.
    Tables(Error),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Beyond(gfn) => write!(f, "L2 has no page at its frame {gfn}"),
            Self::Present(gfn) => write!(f, "L2's frame {gfn} is mapped, and faults all the same"),
            Self::Tables(error) => write!(f, "{error}"),
        }
    }
}

/// What filling came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Made {
    /// Entries for L2's pages.
    entries: u64,
    /// Tables of another copy's that serve one more.
    tables: u64,
}

/// The table under construction.
pub struct Table12<'a> {
    pool: Pool<'a>,
    /// A and D are set in the entries for L2's pages.
    preset: bool,
    map: Map,
    fill_batch: u64,
    slots: [Slot; MAX_SLOTS],
    slot_count: usize,
}

impl<'a> Table12<'a> {
    /// A table that holds the system slot and none of L2's pages, in `tables` at the physical address `base`. `slots` are L1's.
    ///
    /// # Errors
    /// [`Error::PoolExhausted`].
    pub fn new(
        tables: &'a mut [PageTable],
        base: u64,
        format: Format,
        nested: &Nested,
        slots: impl Iterator<Item = Slot>,
    ) -> Result<Self, Error> {
        let mut table = Self {
            pool: Pool::new(tables, base, format)?,
            preset: nested.flags == Flags::Preset,
            map: nested.map,
            fill_batch: nested.fill_batch,
            slots: [Slot::default(); MAX_SLOTS],
            slot_count: 0,
        };
        for (place, slot) in table.slots.iter_mut().zip(slots) {
            *place = slot;
            table.slot_count += 1;
        }
        table.clear()?;
        Ok(table)
    }

    /// Makes the table what it was at first: it holds the system slot and none of L2's pages.
    ///
    /// # Errors
    /// [`Error::PoolExhausted`].
    pub fn clear(&mut self) -> Result<(), Error> {
        self.pool.clear()?;
        self.pool.map_system()?;
        self.pool.preset(self.preset);
        Ok(())
    }

    /// The physical address of its root.
    #[must_use]
    pub const fn root(&self) -> u64 {
        self.pool.root()
    }

    /// Pages of it.
    #[must_use]
    pub const fn table_pages(&self) -> u64 {
        self.pool.used() as u64
    }

    /// Maps all of L2's pages. Returns how many entries it made.
    ///
    /// # Errors
    /// [`Refusal::Tables`].
    pub fn fill(&mut self) -> Result<u64, Refusal> {
        Ok(self.fill_pages(0, self.map.l2_pages())?.entries)
    }

    /// What L1 does when its table does not permit L2's access to `gfn`: maps the batch that holds it. Returns how many entries it made.
    ///
    /// # Errors
    /// The access is not L1's to permit, or the tables are full.
    pub fn violation(&mut self, gfn: L2Gfn) -> Result<u64, Refusal> {
        let page = self.map.l2_page(gfn).ok_or(Refusal::Beyond(gfn))?;
        let batch = self.fill_batch.max(1).next_multiple_of(self.map.leaf().frames());
        let first = page - page % batch;
        match self.fill_pages(first, (first + batch).min(self.map.l2_pages()))? {
            Made { entries: 0, tables: 0 } => Err(Refusal::Present(gfn)),
            made => Ok(made.entries),
        }
    }

    /// Exchanges where the leaves at L2's pages `one` and `other` lead to. Does nothing if one of them is not mapped.
    ///
    /// # Errors
    /// [`Refusal::Tables`].
    pub fn exchange(&mut self, one: u64, other: u64) -> Result<(), Refusal> {
        let leaf = self.map.leaf();
        let address = |page: u64| L2_BASE.plus(page).address();
        let mut table = |page| self.pool.table_of(address(page), leaf).map_err(Refusal::Tables);
        let tables = (table(one)?, table(other)?);
        let leads = (self.pool.get(tables.0, address(one)), self.pool.get(tables.1, address(other)));
        if let (Some(first), Some(second)) = leads {
            self.pool.set(tables.0, address(one), second);
            self.pool.set(tables.1, address(other), first);
        }
        Ok(())
    }

    /// Maps L2's pages `first..end`, table by table; `first` begins a leaf.
    fn fill_pages(&mut self, first: u64, end: u64) -> Result<Made, Refusal> {
        let pages_of_table = self.map.leaf().frames() * ENTRIES as u64;
        let (mut made, mut page) = (Made::default(), first);
        while page < end {
            let next = (page + 1).next_multiple_of(pages_of_table).min(end);
            let of_table = self.fill_table(page, next).map_err(Refusal::Tables)?;
            made.entries += of_table.entries;
            made.tables += of_table.tables;
            page = next;
        }
        Ok(made)
    }

    /// Maps L2's pages `first..end`, all of one table.
    fn fill_table(&mut self, first: u64, end: u64) -> Result<Made, Error> {
        let address = |page: u64| L2_BASE.plus(page).address();
        let leaf = self.map.leaf();
        let owner = self.map.table_owner(first);
        let table = self.pool.table_of(address(owner), leaf)?;
        let mut made = Made::default();
        for offset in (0..end - first).step_by(leaf.frames() as usize) {
            let slots = self.slots[..self.slot_count].iter().copied();
            // The map's pages are those of the slots (boot.rs), so there is a frame.
            let frame = frame_of(slots, self.map.l1_page(owner + offset)).unwrap_or_default();
            made.entries += u64::from(self.pool.set(table, address(owner + offset), frame.address()));
        }
        if self.map.kind() == AliasKind::SharedTables && owner != first {
            made.tables += u64::from(self.pool.share(address(first), address(owner))?);
        }
        Ok(made)
    }
}

/// How plain L1 sees the pages that an L2 would see: as many slots as it takes, in the order of L2's pages, each a leaf of `leaf` or a page.
pub fn as_slots(
    map: Map,
    slots: impl Iterator<Item = Slot> + Clone,
    leaf: Level,
) -> impl Iterator<Item = Slot> + Clone {
    let frames = leaf.frames();
    (0..map.l2_pages()).step_by(frames as usize).map(move |page| Slot {
        base: frame_of(slots.clone(), map.l1_page(page)).unwrap_or_default(),
        pages: frames.min(map.l2_pages() - page),
        first_page: page,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use umbra_shared::layout;
    use umbra_shared::nested::{self, Way};
    use x86_64::structures::paging::PageTableFlags;

    const BASE: u64 = 0x90_0000;

    fn nested(map: Map, preset: bool, fill_batch: u64) -> Nested {
        let flags = if preset { Flags::Preset } else { Flags::Clear };
        Nested { way: Way::Svm, map, format: nested::Format::Npt, flags, fill_batch, remaps: 0 }
    }

    fn tables(map: Map) -> Vec<PageTable> {
        let bytes = layout::table_bytes(map.l2_pages(), map.leaf());
        (0..bytes / 4096).map(|_| PageTable::new()).collect()
    }

    /// The nested walk of L2's frame `gfn`: the L1 address of the frame, the leaf's level and flags, and the page of the pool that held it.
    fn walk(pool: &[PageTable], format: Format, gfn: L2Gfn) -> Option<(u64, u8, PageTableFlags, usize)> {
        let mut table = 0;
        for level in (1..=4_u8).rev() {
            let shift = 12 + 9 * (u32::from(level) - 1);
            let entry = &pool[table][usize::try_from(gfn.address() >> shift & 511).unwrap()];
            let flags = entry.flags();
            if !flags.contains(format.table) {
                assert!(entry.is_unused());
                return None;
            }
            if level == 1 || flags.contains(PageTableFlags::HUGE_PAGE) {
                let within = gfn.address() & ((1 << shift) - 1);
                return Some((entry.addr().as_u64() + within, level, flags, table));
            }
            table = usize::try_from((entry.addr().as_u64() - BASE) / 4096).unwrap();
        }
        None
    }

    fn formats() -> impl Strategy<Value = Format> {
        prop::sample::select(vec![Format::LONG, Format::EPT])
    }

    fn cases() -> impl Strategy<Value = (Map, usize)> {
        let kinds = prop::sample::select(AliasKind::ALL.to_vec());
        (1_u64..4, any::<bool>(), 1_u64..4, kinds, any::<u64>(), 1_usize..3).prop_map(
            |(tables, huge, aliases, kind, seed, slots)| {
                let leaf = if huge && kind != AliasKind::SharedTables { Level::M2 } else { Level::K4 };
                let pages =
                    if leaf == Level::M2 || kind == AliasKind::SharedTables { tables * 512 } else { tables * 200 };
                (Map::new(pages, leaf, aliases, kind, seed).unwrap(), slots)
            },
        )
    }

    fn slots(map: &Map, count: usize) -> Option<impl Iterator<Item = Slot> + Clone> {
        layout::slots(map.l1_pages(), count, map.leaf())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn a_full_table_is_the_map((map, count) in cases(), format in formats(), preset: bool) {
            let Some(slots) = slots(&map, count) else { return Ok(()) };
            let mut pool = tables(map);
            let mut table12 = Table12::new(&mut pool, BASE, format, &nested(map, preset, 0), slots.clone()).unwrap();
            table12.fill().unwrap();
            prop_assert_eq!(table12.fill(), Ok(0));
            prop_assert_eq!(table12.root(), BASE);
            for page in 0..map.l2_pages() {
                let (address, level, flags, _) = walk(&pool, format, L2_BASE.plus(page)).unwrap();
                prop_assert_eq!(address, frame_of(slots.clone(), map.l1_page(page)).unwrap().address(), "page {}", page);
                prop_assert_eq!(level, map.leaf().number());
                prop_assert_eq!(flags.contains(format.accessed), preset);
                prop_assert_eq!(flags.contains(format.dirty), preset);
            }
            prop_assert!(walk(&pool, format, L2_BASE.plus(map.l2_pages().next_multiple_of(512))).is_none());
            for address in [0, layout::BOOT_PAGE, layout::SYSTEM_LIMIT - 4096] {
                let (to, level, flags, _) = walk(&pool, format, L2Gfn::containing(address)).unwrap();
                prop_assert_eq!((to, level), (address, 2));
                prop_assert!(flags.contains(format.leaf | format.accessed | format.dirty));
            }
        }

        #[test]
        fn violations_fill_their_batch_and_no_more((map, count) in cases(), format in formats(), batch in 1_u64..600, at: u64) {
            let Some(slots) = slots(&map, count) else { return Ok(()) };
            let mut pool = tables(map);
            let mut table12 = Table12::new(&mut pool, BASE, format, &nested(map, false, batch), slots).unwrap();
            let page = at % map.l2_pages();
            let made = table12.violation(L2_BASE.plus(page)).unwrap();
            let frames = map.leaf().frames();
            let batch = batch.next_multiple_of(frames);
            let first = page - page % batch;
            let pages = batch.min(map.l2_pages() - first);
            // Copies that share tables have one entry for all of them.
            let owners: BTreeSet<u64> = (first..first + pages).map(|page| map.table_owner(page)).collect();
            prop_assert_eq!(made, owners.len() as u64 / frames);
            prop_assert_eq!(table12.violation(L2_BASE.plus(page)), Err(Refusal::Present(L2_BASE.plus(page))));
            prop_assert_eq!(table12.violation(L2_BASE.plus(map.l2_pages())), Err(Refusal::Beyond(L2_BASE.plus(map.l2_pages()))));
            if map.kind() != AliasKind::SharedTables {
                for page in 0..map.l2_pages() {
                    prop_assert_eq!(walk(&pool, format, L2_BASE.plus(page)).is_some(), (first..first + pages).contains(&page));
                }
            }
        }

        #[test]
        fn exchanged_leaves_lead_to_each_others_pages((map, count) in cases(), format in formats(), round: u64) {
            let Some(slots) = slots(&map, count) else { return Ok(()) };
            if map.kind() == AliasKind::SharedTables {
                return Ok(());
            }
            let mut pool = tables(map);
            let mut table12 = Table12::new(&mut pool, BASE, format, &nested(map, false, 0), slots).unwrap();
            table12.fill().unwrap();
            let (one, other) = map.exchanged(round, 3);
            table12.exchange(one, other).unwrap();
            let leads = |page| walk(&pool, format, L2_BASE.plus(page)).unwrap().0;
            let slots = layout::slots(map.l1_pages(), count, map.leaf()).unwrap();
            let frame = |page| frame_of(slots.clone(), map.l1_page(page)).unwrap().address();
            prop_assert_eq!((leads(one), leads(other)), (frame(other), frame(one)));
        }

        #[test]
        fn plain_l1_sees_the_same_pages((map, count) in cases()) {
            let Some(slots) = slots(&map, count) else { return Ok(()) };
            for slot in as_slots(map, slots.clone(), map.leaf()) {
                for page in slot.first_page..slot.first_page + slot.pages {
                    let expected = frame_of(slots.clone(), map.l1_page(page)).unwrap();
                    prop_assert_eq!(slot.base.plus(page - slot.first_page), expected);
                }
            }
        }
    }

    #[test]
    fn a_leaf_of_1_gib_holds_all_pages() {
        let map = Map::new(1000, Level::G1, 1, AliasKind::Contiguous, 1).unwrap();
        let slots = layout::slots(1000, 1, Level::M2).unwrap();
        let mut pool = tables(map);
        let mut table12 = Table12::new(&mut pool, BASE, Format::EPT, &nested(map, true, 0), slots).unwrap();
        assert_eq!(table12.fill(), Ok(1));
        let (address, level, ..) = walk(&pool, Format::EPT, L2_BASE.plus(999)).unwrap();
        assert_eq!((address, level), (layout::TRACKED_GPA + 999 * 4096, 3));
    }

    #[test]
    fn copies_share_their_leaf_tables() {
        let format = Format::EPT;
        let map = |kind| Map::new(1024, Level::K4, 3, kind, 1).unwrap();
        let leaf_tables = |map: Map| {
            let mut pool = tables(map);
            let slots = slots(&map, 1).unwrap();
            let mut table12 = Table12::new(&mut pool, BASE, format, &nested(map, false, 0), slots).unwrap();
            table12.fill().unwrap();
            let used = table12.table_pages();
            let at = |page| walk(&pool, format, L2_BASE.plus(page)).unwrap().3;
            (used, (0..3).map(|copy| at(copy * 1024)).collect::<Vec<_>>())
        };
        let (used, places) = leaf_tables(map(AliasKind::SharedTables));
        assert!(places.iter().all(|place| *place == places[0]), "{places:?}");
        let (apart, places) = leaf_tables(map(AliasKind::Contiguous));
        assert_ne!(places[0], places[1]);
        assert_eq!(apart - used, 4);
    }

    #[test]
    fn a_pool_that_is_too_small_is_said() {
        let map = Map::new(1024, Level::K4, 1, AliasKind::Contiguous, 1).unwrap();
        let mut pool = tables(map);
        let short = pool.len() - 1;
        let slots = slots(&map, 1).unwrap();
        let mut table12 = Table12::new(&mut pool[..short], BASE, Format::LONG, &nested(map, false, 0), slots).unwrap();
        // One directory pointer table serves both the system slot and L2's pages, so the pool has a page to spare.
        assert_eq!(table12.fill(), Ok(1024));
        assert_eq!(table12.table_pages(), short as u64);
    }
}
