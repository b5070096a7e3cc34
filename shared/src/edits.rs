//! Random edits of L1's table, and the accesses of L2 by which they are seen: from a seed, so that whoever plays the same epochs on the same
//! table makes the same edits. The firmware plays them on EPT12 in L1's memory, the monitor on a copy of its own.
//!
//! An *epoch* is some edits, one invalidation if one of them made it due, and then probes: reads and writes of L2 at the pages that the edits
//! concern. The state is the table itself. L2's first [`MAX_REGIONS`](crate::board::MAX_REGIONS) regions of 2 MiB each have a leaf table of their own, whether it is in use or not:
//!
//! ```text
//! directory of L2_BASE's GiB        leaf tables
//!   region 0  ------------------>   table 0      512 pages, each one of L1's, writable or not, or none
//!   region 1  --------------\
//!   region 2  (2 MiB leaf)   \-->   table 3      another region's table: all of its pages are aliases
//!   region 3  ------------------>   table 3
//! ```

use crate::board::{Board, Entry, PAGES, Place, Words};
use crate::pattern::mix;
use crate::probe::{MAX_PROBES, Probe};

/// Edits of an epoch, at most.
pub const MAX_EDITS: usize = 8;
/// Pages of a region that are looked at when all of it is concerned: its first, its last, and some between.
const SAMPLE: u64 = 4;

/// An edit. Pages and regions are L2's but for `to`, which is L1's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Edit {
    Remap { page: u64, to: u64, writable: bool },
    Unmap { page: u64 },
    Protect { page: u64 },
    Alias { page: u64, like: u64 },
    Split { region: u64 },
    Merge { region: u64, to: u64, writable: bool },
    Close { region: u64 },
    ProtectRegion { region: u64 },
    Share { region: u64, with: u64 },
}

impl Edit {
    /// What it is about.
    const fn concern(self) -> Concern {
        match self {
            Self::Remap { page, .. } | Self::Unmap { page } | Self::Protect { page } | Self::Alias { page, .. } => {
                Concern::Page(page)
            }
            Self::Split { region }
            | Self::Merge { region, .. }
            | Self::Close { region }
            | Self::ProtectRegion { region }
            | Self::Share { region, .. } => Concern::Region(region),
        }
    }
}

/// What of L2's memory an edit is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Concern {
    /// A page.
    Page(u64),
    /// All pages of a region.
    Region(u64),
}

/// An epoch that was played.
#[derive(Clone, Debug)]
pub struct Epoch {
    /// Edits that were made.
    pub edits: u64,
    /// L1 has to say that entries changed.
    pub due: bool,
    probes: [Probe; MAX_PROBES],
    count: usize,
}

impl Epoch {
    /// What L2 does then.
    #[must_use]
    pub fn probes(&self) -> &[Probe] {
        &self.probes[..self.count]
    }

    fn push(&mut self, page: u64) {
        for write in [false, true] {
            if let Some(probe) = self.probes.get_mut(self.count) {
                *probe = Probe { page, write };
                self.count += 1;
            }
        }
    }
}

/// A sequence of numbers.
pub(crate) struct Random(u64);

impl Random {
    /// Sequence `number` of those of `seed`.
    pub(crate) const fn of(seed: u64, number: u64) -> Self {
        Self(mix(seed ^ mix(number)))
    }

    /// The next number, of 63 bits.
    pub(crate) const fn next(&mut self) -> u64 {
        self.0 = mix(self.0);
        self.0 >> 1
    }

    /// One below `limit`, which is not 0.
    pub(crate) const fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// The same for a small limit.
    #[allow(clippy::cast_possible_truncation)] // Below `limit`.
    pub(crate) const fn index(&mut self, limit: usize) -> usize {
        self.below(limit as u64) as usize
    }
}

impl<W: Words> Board<W> {
    fn choose(&self, random: &mut Random) -> Edit {
        let region = random.below(self.regions());
        // Half of the edits meet at a few pages.
        let index = if random.below(2) == 0 { random.below(8) * 67 } else { random.below(PAGES) };
        let page = region * PAGES + index;
        let (to, leaf) = (random.below(self.pages()), random.below(self.pages() / PAGES) * PAGES);
        let (other, writable) = (random.below(self.regions() * PAGES), random.below(4) != 0);
        if self.table_of(region).is_none() {
            return match (random.below(6), self.get(Place::Region(region))) {
                (0, _) => Edit::Share { region, with: other / PAGES },
                (1, _) => Edit::ProtectRegion { region },
                (2, _) => Edit::Merge { region, to: leaf, writable },
                (3, Entry::Page(..)) => Edit::Close { region },
                _ => Edit::Split { region },
            };
        }
        match random.below(100) {
            0..30 => Edit::Remap { page, to, writable },
            30..45 => Edit::Unmap { page },
            45..62 => Edit::Protect { page },
            62..80 => Edit::Alias { page, like: other },
            80..88 => Edit::Merge { region, to: leaf, writable },
            88..92 => Edit::Close { region },
            92..96 => Edit::ProtectRegion { region },
            _ => Edit::Share { region, with: other / PAGES },
        }
    }

    /// Makes it. Says whether an invalidation is due.
    fn apply(&mut self, edit: Edit) -> bool {
        let place = |board: &Self, page: u64| {
            let region = page / PAGES;
            Place::Page(board.table_of(region).unwrap_or(region), page % PAGES)
        };
        match edit {
            Edit::Remap { page, to, writable } => self.set(place(self, page), Entry::Page(to, writable)),
            Edit::Unmap { page } => self.set(place(self, page), Entry::None),
            Edit::Protect { page } => self.protect(place(self, page)),
            Edit::Alias { page, like } => {
                let entry = self.leads_to(like).map_or(Entry::None, |to| Entry::Page(to, true));
                self.set(place(self, page), entry)
            }
            Edit::Split { region } => self.split(region),
            Edit::Merge { region, to, writable } => self.set(Place::Region(region), Entry::Page(to, writable)),
            Edit::Close { region } => self.set(Place::Region(region), Entry::None),
            Edit::ProtectRegion { region } => self.protect(Place::Region(region)),
            Edit::Share { region, with } => self.set(Place::Region(region), Entry::Table(with, true)),
        }
    }

    fn protect(&mut self, place: Place) -> bool {
        let entry = match self.get(place) {
            Entry::None => Entry::None,
            Entry::Page(page, writable) => Entry::Page(page, !writable),
            Entry::Table(table, writable) => Entry::Table(table, !writable),
        };
        self.set(place, entry)
    }

    /// A huge leaf becomes a table that grants the same. Where there is none the region's own table serves again, as it was left.
    fn split(&mut self, region: u64) -> bool {
        let mut due = false;
        if let Entry::Page(first, writable) = self.get(Place::Region(region)) {
            for index in 0..PAGES {
                // Another region may be using the table.
                due |= self.set(Place::Page(region, index), Entry::Page(first + index, writable));
            }
        }
        self.set(Place::Region(region), Entry::Table(region, true)) || due
    }

    /// Probes the pages that an edit concerns, those included that see the same table by another region.
    fn probe(&self, concern: Concern, epoch: &mut Epoch, random: &mut Random) {
        match concern {
            Concern::Page(page) => {
                let table = self.table_of(page / PAGES);
                for region in 0..self.regions() {
                    let same = region == page / PAGES || table.is_some() && self.table_of(region) == table;
                    if same {
                        epoch.push(region * PAGES + page % PAGES);
                    }
                }
            }
            Concern::Region(region) => {
                let first = region * PAGES;
                epoch.push(first);
                (0..SAMPLE).for_each(|_| epoch.push(first + random.below(PAGES)));
                epoch.push(first + PAGES - 1);
            }
        }
    }

    /// Plays epoch `number`.
    pub fn play(&mut self, seed: u64, number: u64) -> Epoch {
        self.play_telling(seed, number, |_| ())
    }

    /// The same, and before each edit tells what it is about.
    pub fn play_telling(&mut self, seed: u64, number: u64, mut tell: impl FnMut(Concern)) -> Epoch {
        let mut random = Random::of(seed, number);
        let mut epoch = Epoch { edits: 0, due: false, probes: [Probe::default(); MAX_PROBES], count: 0 };
        let mut edits = [None; MAX_EDITS];
        for edit in &mut edits {
            // Four or five on the average.
            if epoch.edits > 0 && random.below(6) == 0 {
                break;
            }
            epoch.edits += 1;
            let chosen = self.choose(&mut random);
            tell(chosen.concern());
            epoch.due |= self.apply(chosen);
            *edit = Some(chosen);
        }
        for edit in edits.into_iter().flatten() {
            self.probe(edit.concern(), &mut epoch, &mut random);
        }
        // What nobody edited is as it was.
        (0..2).for_each(|_| epoch.push(random.below(self.regions() * PAGES)));
        epoch
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gfn::PAGE_SIZE;
    use crate::nested::Format;
    use crate::paging::long;
    use proptest::prelude::*;
    use std::collections::HashMap;

    /// Words by address; the rest is zeroes.
    #[derive(Clone, Default)]
    struct Memory(HashMap<u64, u64>);

    impl Words for Memory {
        fn read(&self, address: u64) -> u64 {
            self.0.get(&address).copied().unwrap_or(0)
        }

        fn write(&mut self, address: u64, value: u64) {
            assert!(address.is_multiple_of(8));
            self.0.insert(address, value);
        }
    }

    /// A board whose tables lie from `base` on, every page of L2's mapped to one of L1's.
    fn board(base: u64, format: Format, l1_pages: u64, l2_pages: u64) -> Board<Memory> {
        let table = long::PRESENT | long::WRITE | long::USER;
        let mut memory = Memory::default();
        memory.write(base, (base + 0x1000) | table);
        memory.write(base + 0x1000 + 4 * 8, (base + 0x2000) | table);
        for region in 0..l2_pages / PAGES {
            memory.write(base + 0x2000 + region * 8, (base + 0x3000 + region * PAGE_SIZE) | table);
        }
        let mut board = Board::find(memory, base, format, l1_pages, l2_pages).unwrap();
        for page in 0..board.regions() * PAGES {
            board.set(Place::Page(page / PAGES, page % PAGES), Entry::Page(page % l1_pages, true));
        }
        board
    }

    /// What L2 sees at a page.
    fn seen(board: &Board<Memory>, page: u64) -> Option<(u64, bool)> {
        let (region, index) = (page / PAGES, page % PAGES);
        match board.get(Place::Region(region)) {
            Entry::None => None,
            Entry::Page(first, writable) => Some((first + index, writable)),
            Entry::Table(table, above) => match board.get(Place::Page(table, index)) {
                Entry::Page(page, writable) => Some((page, writable && above)),
                _ => None,
            },
        }
    }

    fn all(board: &Board<Memory>) -> Vec<Option<(u64, bool)>> {
        (0..board.regions() * PAGES).map(|page| seen(board, page)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(6))]

        #[test]
        fn the_same_epochs_make_the_same_table_anywhere(seed: u64) {
            let mut one = board(0x1_0000, Format::Ept, 1024, 2048);
            let mut other = board(0x70_0000, Format::Npt, 1024, 2048);
            for number in 0..24 {
                let (played, again) = (one.play(seed, number), other.play(seed, number));
                prop_assert_eq!((played.edits, played.due, played.probes()), (again.edits, again.due, again.probes()));
                prop_assert_eq!(all(&one), all(&other));
            }
        }

        #[test]
        fn what_is_taken_away_is_due_and_probed(seed: u64) {
            let mut board = board(0x1_0000, Format::Ept, 1024, 8192);
            let mut hits = 0;
            for number in 0..24 {
                let before = all(&board);
                let epoch = board.play(seed, number);
                let after = all(&board);
                for (was, is) in before.iter().zip(&after) {
                    let less = was.is_some_and(|(page, writable)| {
                        is.is_none_or(|(now, still)| now != page || writable && !still)
                    });
                    prop_assert!(epoch.due || !less);
                }
                prop_assert!(epoch.probes().len() <= MAX_PROBES && (1..=MAX_EDITS as u64).contains(&epoch.edits));
                hits += epoch.probes().iter().filter(|probe| before[usize::try_from(probe.page).unwrap()] != after[usize::try_from(probe.page).unwrap()]).count();
            }
            prop_assert!(hits > 40, "{} probes at pages that changed", hits);
        }
    }

    #[test]
    fn edits_of_every_kind_are_made() {
        let mut closed = board(0x1_0000, Format::Npt, 1024, 4096);
        let mut random = Random(7);
        closed.set(Place::Region(1), Entry::None);
        closed.set(Place::Region(2), Entry::Page(512, true));
        let mut kinds = [0_u32; 9];
        for _ in 0..2000 {
            let edit = closed.choose(&mut random);
            kinds[match edit {
                Edit::Remap { .. } => 0,
                Edit::Unmap { .. } => 1,
                Edit::Protect { .. } => 2,
                Edit::Alias { .. } => 3,
                Edit::Split { .. } => 4,
                Edit::Merge { .. } => 5,
                Edit::Close { .. } => 6,
                Edit::ProtectRegion { .. } => 7,
                Edit::Share { .. } => 8,
            }] += 1;
        }
        assert!(kinds.iter().all(|&count| count > 20), "{kinds:?}");
    }

    #[test]
    fn a_table_that_is_not_whole_is_no_board() {
        let find = |l1, l2| Board::find(Memory::default(), 0x1000, Format::Ept, l1, l2).is_none();
        assert!(find(512, 512) && find(100, 512) && find(512, 100) && find(0, 512));
        let whole = board(0x1_0000, Format::Ept, 512, 1024);
        assert!(Board::find(whole.as_words().clone(), 0x1_0000, Format::Pae, 512, 1024).is_none());
    }
}
