//! A malicious L1: what it stores into its table and its control page, and what it rings, from a seed.
//!
//! Cases come in episodes of [`CASES`]. Before each, L1 builds its table and its control page anew, so that an episode is played again by its own seed
//! alone, whatever came before it. A case of a table stores words that no hypervisor would, and may forget to say so; then L2 reads and writes the
//! pages concerned. One of a control page stores words there and rings, some times.
//!
//! L1 may kill itself by that: its table may let L2 write EPT12, or L1's own image and stacks. What may have come to that the monitor has to tell, and
//! it goes on with another L1. But L2 does not begin at an instruction that is there and not meant for it, which would tell nothing of the monitor.

use crate::board::{Board, MAX_REGIONS, Words};
use crate::control::ControlPage;
use crate::edits::Random;
use crate::layout::{IMAGE_START, TRACKED_GPA, VCPU_AREA_BYTES, vcpu_area};
use crate::paging::ADDRESS_MASK;
use crate::probe::Probe;
use crate::{Level, PAGE_SIZE};
use core::mem::offset_of;

/// Cases of an episode.
pub const CASES: u64 = 64;
/// Probes of a case, at most.
pub const MAX_PROBES: usize = 48;
/// Stores of a case, at most.
const MAX_STORES: usize = 6;
const ENTRIES: u64 = 512;
/// Pages of L1's image that are worth an attack.
const IMAGE_PAGES: u64 = 128;
/// Words of a control page that L1 writes, all but the last of them: see [`Case::control`].
const CONTROL_WORDS: u64 = offset_of!(ControlPage, intercept) as u64 / 8;
/// The words of L2's state, and the one of them that says where it begins.
const STATE: core::ops::Range<u64> = {
    let first = offset_of!(ControlPage, state);
    first as u64 / 8..(first + size_of::<crate::control::State>()) as u64 / 8
};
const RIP: u64 = STATE.start + offset_of!(crate::control::State, rip) as u64 / 8;
/// The word that names EPT12.
const ROOT: u64 = offset_of!(ControlPage, root) as u64 / 8;

/// Where what L1 attacks with lies, in its physical addresses.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// EPT12's root, the first of its tables.
    pub root: u64,
    /// Its tables, one after the other.
    pub table_pages: u64,
    directory: u64,
    tables: [u64; MAX_REGIONS],
    regions: u64,
    tracked_pages: u64,
}

impl Place {
    /// The place of a table that is as L1 built it.
    pub fn of<W: Words>(board: &Board<W>, root: u64, table_pages: u64) -> Self {
        let (directory, tables) = board.places();
        Self { root, table_pages, directory, tables, regions: board.regions(), tracked_pages: board.pages() }
    }

    /// Where L1 built the entry for L2's page.
    #[must_use]
    pub fn leaf(&self, page: u64) -> u64 {
        self.table(page / ENTRIES) + page % ENTRIES * 8
    }

    fn table(&self, region: u64) -> u64 {
        usize::try_from(region).ok().and_then(|region| self.tables.get(region).copied()).unwrap_or(0)
    }

    /// A word that might be an entry; `own` is the table that it is stored into.
    fn word(&self, random: &mut Random, own: u64) -> u64 {
        let rights = [7, 7, 7, 5, 5, 1, 3, 2, 4, 6, 0][random.index(11)];
        let leaf = 6 << 3 | rights;
        let pool = self.root + random.below(self.table_pages) * PAGE_SIZE;
        let page = TRACKED_GPA + random.below(self.tracked_pages) * PAGE_SIZE;
        let region = TRACKED_GPA + random.below(self.tracked_pages / ENTRIES) * ENTRIES * PAGE_SIZE;
        match random.below(32) {
            0 => match random.below(8) {
                // L1's own memory: a page of the image, of the first vCPU's reports and stacks, or of all of it; or 2 MiB.
                0 => (IMAGE_START + random.below(IMAGE_PAGES) * PAGE_SIZE) | leaf,
                1 => (vcpu_area(0) + random.below(VCPU_AREA_BYTES / PAGE_SIZE) * PAGE_SIZE) | leaf,
                2 => (random.below(self.root / PAGE_SIZE) * PAGE_SIZE) | leaf,
                3 => (random.below(self.root.div_ceil(Level::M2.bytes())) * Level::M2.bytes()) | leaf | 0x80,
                _ => random.next() << 1,
            },
            1 => own | 7,
            2..5 => pool | 7,
            5 => self.table(random.below(self.regions)) | rights,
            6 => page | 7,
            7 => pool | leaf,
            8..11 => region | leaf | 0x80,
            11 => page | leaf | 0x80,
            12 => (page | leaf) ^ 1 << (3 + random.below(9)),
            // Behind the last page, between the slots, and where no address can be.
            13 => (TRACKED_GPA + (self.tracked_pages + random.below(3)) * PAGE_SIZE) | leaf,
            14 => (TRACKED_GPA >> 1) | leaf | random.below(2) << 7,
            15 => (1 << (40 + random.below(12)) | page & ADDRESS_MASK) | leaf,
            16..19 => 0,
            _ => page | leaf,
        }
    }

    /// Where a word goes, and the table that it is in.
    fn target(&self, random: &mut Random) -> Target {
        let region = random.below(self.regions);
        match random.below(256) {
            0 => Target::Other(self.root + random.below(self.table_pages) * PAGE_SIZE, random.below(ENTRIES)),
            // The tables above, and those of L2's own code.
            1 => Target::Other(self.root, 0),
            2 => Target::Other(self.root + PAGE_SIZE, [0, 4][random.index(2)]),
            3 => Target::Other(self.root + 2 * PAGE_SIZE, random.below(8)),
            4..50 => Target::Directory(region),
            _ => Target::Leaf(region, if random.below(2) == 0 { random.below(6) * 93 } else { random.below(ENTRIES) }),
        }
    }
}

#[derive(Clone, Copy)]
enum Target {
    Leaf(u64, u64),
    Directory(u64),
    Other(u64, u64),
}

/// A word and where it goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Store {
    /// L1's physical address.
    pub address: u64,
    /// The word.
    pub value: u64,
}

/// What L1 does to its control page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Control {
    words: [(u64, u64); 4],
    count: usize,
    /// Times that it then rings for L2 to run.
    pub rings: u64,
}

impl Control {
    /// The words: number in the page, and value.
    #[must_use]
    pub fn words(&self) -> &[(u64, u64)] {
        &self.words[..self.count]
    }

    /// Whether L2 may then find its code, its stack or its tables elsewhere, and do anything. (Where it begins at an address that is none, it does nothing.)
    #[must_use]
    pub fn misleads(&self) -> bool {
        self.words().iter().any(|(word, _)| *word == ROOT || STATE.contains(word) && *word != RIP)
    }

    fn draw(random: &mut Random, place: &Place) -> Self {
        let mut control = Self { words: [(0, 0); 4], count: 1 + random.index(4), rings: 1 + random.below(3) };
        for (word, value) in control.words.iter_mut().take(control.count) {
            *word = random.below(CONTROL_WORDS);
            let nowhere = [u64::MAX, 1 << 63, 1 << 47, 0x4000_0000_0000];
            *value = match random.below(8) {
                _ if *word == RIP => nowhere[random.index(4)],
                0 => random.next() << 1,
                1 => u64::MAX,
                2 => nowhere[random.index(4)],
                3 => place.root + random.below(place.table_pages) * PAGE_SIZE,
                4 => TRACKED_GPA + random.below(place.tracked_pages) * PAGE_SIZE + random.below(2),
                5 => 1 << random.below(64),
                _ => random.below(5),
            };
        }
        control
    }
}

/// A case.
#[derive(Clone, Debug)]
pub struct Case {
    stores: [Store; MAX_STORES],
    store_count: usize,
    /// Times that L1 says that its table changed; 0 if it forgets to.
    pub invalidations: u64,
    /// What it does to its control page, in a case that is about that.
    pub control: Option<Control>,
    probes: [(Probe, u64); MAX_PROBES],
    probe_count: usize,
}

impl Case {
    /// The stores.
    #[must_use]
    pub fn stores(&self) -> &[Store] {
        &self.stores[..self.store_count]
    }

    /// What L2 does then, and what it writes if it writes.
    #[must_use]
    pub fn probes(&self) -> &[(Probe, u64)] {
        &self.probes[..self.probe_count]
    }

    fn push(&mut self, page: u64, word: u64) {
        for write in [false, true] {
            if let Some(probe) = self.probes.get_mut(self.probe_count) {
                *probe = (Probe { page, write }, word);
                self.probe_count += 1;
            }
        }
    }

    /// Case `number` of the episode that `seed` is.
    #[must_use]
    pub fn draw(seed: u64, number: u64, place: &Place) -> Self {
        let mut random = Random::of(seed, number);
        let mut case = Self {
            stores: [Store::default(); MAX_STORES],
            store_count: 0,
            invalidations: 0,
            control: None,
            probes: [(Probe::default(), 0); MAX_PROBES],
            probe_count: 0,
        };
        if random.below(10) == 0 {
            case.control = Some(Control::draw(&mut random, place));
            return case;
        }
        case.invalidations = [0, 1, 1, 1, 1, 1, 2, 9][random.index(8)];
        case.store_count = 1 + random.index(MAX_STORES);
        for index in 0..case.store_count {
            let target = place.target(&mut random);
            let (table, entry) = match target {
                Target::Leaf(region, entry) => (place.table(region), entry),
                Target::Directory(region) => (place.directory, region),
                Target::Other(table, entry) => (table, entry),
            };
            let value = place.word(&mut random, table);
            if let Some(store) = case.stores.get_mut(index) {
                *store = Store { address: table + entry * 8, value };
            }
            case.concern(target, &mut random, place);
        }
        let other = random.below(place.regions * ENTRIES);
        case.push(other, place.word(&mut random, place.root));
        case
    }

    /// L2 looks at what a store concerns: the entry's page in every region, since the table may serve several; a region's first page and last, and one
    /// between.
    fn concern(&mut self, target: Target, random: &mut Random, place: &Place) {
        let word = place.word(random, place.root);
        match target {
            Target::Leaf(region, entry) => {
                let other = random.below(place.regions);
                self.push(region * ENTRIES + entry, word);
                self.push(other * ENTRIES + entry, word);
            }
            Target::Directory(region) => {
                let between = random.below(ENTRIES);
                for entry in [0, between, ENTRIES - 1] {
                    self.push(region * ENTRIES + entry, word);
                }
            }
            Target::Other(..) => {
                let page = random.below(place.regions * ENTRIES);
                self.push(page, word);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn place() -> Place {
        let mut tables = [0; MAX_REGIONS];
        (0..4).for_each(|region| tables[region] = 0x90_4000 + region as u64 * PAGE_SIZE);
        Place { root: 0x90_0000, table_pages: 8, directory: 0x90_3000, tables, regions: 4, tracked_pages: 1024 }
    }

    proptest! {
        #[test]
        fn stores_stay_in_the_table(seed: u64) {
            let place = place();
            for number in 0..CASES {
                let case = Case::draw(seed, number, &place);
                for &Store { address, .. } in case.stores() {
                    prop_assert!(address.is_multiple_of(8) && address.wrapping_sub(place.root) < place.table_pages * PAGE_SIZE);
                }
                prop_assert!(case.control.is_some() != (case.stores().len() + case.probes().len() > 0));
                for (word, value) in case.control.iter().flat_map(|control| control.words().to_vec()) {
                    prop_assert!(word < CONTROL_WORDS && (word != RIP || value >= 1 << 46));
                }
            }
        }
    }

    #[test]
    fn an_episode_has_cases_of_every_kind() {
        let cases: Vec<Case> = (0..4 * CASES).map(|number| Case::draw(7, number, &place())).collect();
        let count = |what: &dyn Fn(&Case) -> bool| cases.iter().filter(|case| what(case)).count();
        assert!(count(&|case| case.control.is_some()) > 10);
        assert!(count(&|case| case.control.is_none() && case.invalidations == 0) > 10);
        assert!(count(&|case| case.stores().iter().any(|store| store.address < 0x90_3000)) > 3);
        assert!(count(&|case| case.stores().iter().any(|store| store.address & !0xfff == 0x90_3000)) > 60);
        // L1's own memory, and a state of L2's that is nonsense.
        let own = |store: &Store| store.value & 7 == 7 && (1..0x90_0000).contains(&(store.value & ADDRESS_MASK));
        assert!(count(&|case| case.stores().iter().any(own)) > 1);
        let misled = |case: &Case| case.control.is_some_and(|control| control.misleads());
        assert!((5..count(&|case| case.control.is_some())).contains(&count(&misled)));
    }
}
