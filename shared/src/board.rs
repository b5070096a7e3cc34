//! The part of L1's table that is edited at random ([`crate::edits`]) or attacked ([`crate::hostile`]): a directory and leaf tables, whose entries are
//! read and stored in no format and encoded as EPT's or NPT's.

use crate::gfn::{Level, PAGE_SIZE};
use crate::layout::TRACKED_GPA;
use crate::nested::{Format, L2_BASE};
use crate::paging::{ADDRESS_MASK, ENTRIES, ept, long};

/// Regions that are edited, at most.
pub const MAX_REGIONS: usize = 8;
/// Pages of a region.
pub const PAGES: u64 = ENTRIES as u64;

/// Memory that holds a table, by L1's physical addresses.
pub trait Words {
    /// The word at `address`, a multiple of 8.
    fn read(&self, address: u64) -> u64;
    /// Stores it.
    fn write(&mut self, address: u64, value: u64);
}

/// An entry of the table, in no format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Not present.
    None,
    /// A leaf: L1's tracked page, the first one of a region's, and whether L2 may write.
    Page(u64, bool),
    /// The leaf table of that region, and whether L2 may write below.
    Table(u64, bool),
}

/// An entry's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The directory's entry for a region.
    Region(u64),
    /// Entry `.1` of region `.0`'s own table.
    Page(u64, u64),
}

/// The part of L1's table that is edited.
#[derive(Debug)]
pub struct Board<W> {
    words: W,
    format: Format,
    /// Physical address of the directory.
    directory: u64,
    /// Physical addresses of the regions' own tables.
    tables: [u64; MAX_REGIONS],
    regions: u64,
    /// L1's tracked pages, a multiple of 512.
    pages: u64,
}

impl<W: Words> Board<W> {
    /// The board in the table with its root at `root`, where every region of L2's `l2_pages` pages has a leaf table. `None` if one has none, if
    /// pages make no whole regions, or the format has 4-byte entries or three levels.
    pub fn find(words: W, root: u64, format: Format, l1_pages: u64, l2_pages: u64) -> Option<Self> {
        let whole = l1_pages.is_multiple_of(PAGES) && l2_pages.is_multiple_of(PAGES);
        if !whole || l1_pages == 0 || !matches!(format, Format::Ept | Format::Npt) {
            return None;
        }
        let below = |table: u64, level: Level| {
            let entry = words.read(table + (L2_BASE.address() >> level.shift()) % PAGES * 8);
            (entry & ADDRESS_MASK != 0).then_some(entry & ADDRESS_MASK)
        };
        let directory = below(below(root, Level::T512)?, Level::G1)?;
        let regions = (l2_pages / PAGES).min(MAX_REGIONS as u64);
        let mut tables = [0; MAX_REGIONS];
        for (region, table) in (0..regions).zip(&mut tables) {
            let entry = words.read(directory + region * 8);
            if entry & ADDRESS_MASK == 0 || entry & ept::LARGE != 0 {
                return None;
            }
            *table = entry & ADDRESS_MASK;
        }
        Some(Self { words, format, directory, tables, regions, pages: l1_pages })
    }

    /// The words.
    pub const fn words(&mut self) -> &mut W {
        &mut self.words
    }

    /// The words, to look at.
    pub const fn as_words(&self) -> &W {
        &self.words
    }

    /// Physical addresses of the directory, and of the regions' own tables.
    #[must_use]
    pub const fn places(&self) -> (u64, [u64; MAX_REGIONS]) {
        (self.directory, self.tables)
    }

    /// L1's tracked pages.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Regions that are edited.
    #[must_use]
    pub const fn regions(&self) -> u64 {
        self.regions
    }

    /// The physical address of a region's own table.
    fn table(&self, region: u64) -> u64 {
        usize::try_from(region).ok().and_then(|region| self.tables.get(region).copied()).unwrap_or(0)
    }

    /// The physical address of an entry.
    #[must_use]
    pub fn address(&self, place: Place) -> u64 {
        match place {
            Place::Region(region) => self.directory + region * 8,
            Place::Page(region, index) => self.table(region) + index * 8,
        }
    }

    /// The entry there.
    pub(crate) fn get(&self, place: Place) -> Entry {
        self.decode(place, self.words.read(self.address(place)))
    }

    /// What the word `raw` says at `place`.
    #[must_use]
    pub fn decode(&self, place: Place, raw: u64) -> Entry {
        let (present, write) = match self.format {
            Format::Ept => (ept::RIGHTS, ept::WRITE),
            _ => (long::PRESENT, long::WRITE),
        };
        let (writable, address) = (raw & write != 0, raw & ADDRESS_MASK);
        if raw & present == 0 {
            return Entry::None;
        }
        if matches!(place, Place::Region(_)) && raw & ept::LARGE == 0 {
            let region = self.tables.iter().position(|&table| table == address).unwrap_or(0);
            return Entry::Table(region as u64, writable);
        }
        Entry::Page(address.wrapping_sub(TRACKED_GPA) / PAGE_SIZE, writable)
    }

    /// Stores an entry. Says whether translations by what was there are void now: it was present, and it led elsewhere or granted more.
    pub(crate) fn set(&mut self, place: Place, entry: Entry) -> bool {
        let old = self.get(place);
        let raw = match self.format {
            Format::Ept => encode_ept(entry, place),
            _ => encode_npt(entry, place),
        };
        let raw = match entry {
            Entry::None => 0,
            Entry::Page(page, _) => raw | (TRACKED_GPA + page * PAGE_SIZE),
            Entry::Table(region, _) => raw | self.table(region),
        };
        let address = self.address(place);
        self.words.write(address, raw);
        match (old, entry) {
            (Entry::None, _) => false,
            (Entry::Page(old, was), Entry::Page(new, is)) | (Entry::Table(old, was), Entry::Table(new, is)) => {
                old != new || was && !is
            }
            _ => true,
        }
    }

    /// The table that serves a region, if one does.
    pub(crate) fn table_of(&self, region: u64) -> Option<u64> {
        match self.get(Place::Region(region)) {
            Entry::Table(table, _) => Some(table),
            _ => None,
        }
    }

    /// L1's page that L2's page is.
    pub(crate) fn leads_to(&self, page: u64) -> Option<u64> {
        let (region, index) = (page / PAGES, page % PAGES);
        match self.get(Place::Region(region)) {
            Entry::None => None,
            Entry::Page(first, _) => Some(first + index),
            Entry::Table(table, _) => match self.get(Place::Page(table, index)) {
                Entry::Page(page, _) => Some(page),
                _ => None,
            },
        }
    }
}

/// Bits of an entry but for its address. Execution is always granted: a right that a shadow in userspace cannot enforce.
fn encode_ept(entry: Entry, place: Place) -> u64 {
    let rights = |writable: bool| ept::READ | ept::EXECUTE | if writable { ept::WRITE } else { 0 };
    match entry {
        Entry::None => 0,
        Entry::Table(_, writable) => rights(writable),
        Entry::Page(_, writable) => rights(writable) | ept::WRITE_BACK | large(place),
    }
}

fn encode_npt(entry: Entry, place: Place) -> u64 {
    let rights = |writable: bool| long::PRESENT | long::USER | if writable { long::WRITE } else { 0 };
    match entry {
        Entry::None => 0,
        Entry::Table(_, writable) => rights(writable),
        Entry::Page(_, writable) => rights(writable) | large(place),
    }
}

/// Bit 7 in both formats.
const fn large(place: Place) -> u64 {
    if matches!(place, Place::Region(_)) { ept::LARGE } else { 0 }
}
