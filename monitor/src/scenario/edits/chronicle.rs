//! What L1's table said, epoch by epoch, and what an L2 that ran meanwhile may have got of it.
//!
//! An access that L1 is not told of goes by entries that a processor may have kept: each as it was at some moment from the last invalidation that
//! had returned before the access, up to the access (the first invariant of docs/mmu.md). One that L1 is told of was refused by the table as it
//! was while the access was under way (the second: what the table permits is never told). So old entries may still be used, but not be
//! complained of.

use super::mirror;
use crate::failure::Failure;
use crate::scenario::l1_cpu::format_of;
use std::collections::HashMap;
use umbra_mmu::guest::{Reflect, Reflection};
use umbra_mmu::{Access as Rights, Format, Kind, Request};
use umbra_shared::board::{Board, Entry, PAGES, Place, Words};
use umbra_shared::edits::Epoch;
use umbra_shared::nested::Nested;
use umbra_shared::probe::Probe;
use umbra_shared::race::Access;

/// Words that keep what they were: the epochs, ascending, and what each stored.
#[derive(Default)]
struct Kept {
    epoch: u64,
    words: HashMap<u64, Vec<(u64, u64)>>,
}

impl Words for Kept {
    fn read(&self, address: u64) -> u64 {
        self.words.get(&address).and_then(|stores| stores.last()).map_or(0, |(_, value)| *value)
    }

    fn write(&mut self, address: u64, value: u64) {
        self.words.entry(address).or_default().push((self.epoch, value));
    }
}

/// What may become of an access.
#[derive(Debug, PartialEq, Eq)]
pub struct May {
    /// L1's pages where it can be made.
    pub lead_to: Vec<u64>,
    /// What L1 can be told of it.
    pub be_told: Vec<u64>,
}

impl May {
    /// Whether it depended on who was faster, L2 or its L1.
    pub const fn differ(&self) -> bool {
        self.lead_to.len() + self.be_told.len() > 1
    }
}

/// The table's past.
pub struct Chronicle {
    board: Board<Kept>,
    format: Format,
    /// The epochs that made an invalidation due.
    due: Vec<u64>,
}

impl Chronicle {
    /// That of a table as L1 has filled it, before epoch 1.
    ///
    /// # Errors
    /// [`Failure::Input`] for what cannot be edited.
    pub fn new(nested: &Nested) -> Result<Self, Failure> {
        let mut words = Kept::default();
        mirror::lay(&mut words, nested);
        Ok(Self { board: mirror::board(words, nested)?, format: format_of(nested), due: Vec::new() })
    }

    /// Plays an epoch, which is later than all before.
    pub fn play(&mut self, seed: u64, number: u64) -> Epoch {
        self.board.words().epoch = number;
        let epoch = self.board.play(seed, number);
        if epoch.due {
            self.due.push(number);
        }
        epoch
    }

    /// Nobody asks any more for accesses that were made before `epoch` was over.
    pub fn forget(&mut self, epoch: u64) {
        let from = self.invalidated(epoch);
        self.due.retain(|due| *due >= from);
        for stores in self.board.words().words.values_mut() {
            let kept = stores.partition_point(|(epoch, _)| *epoch <= from).saturating_sub(1);
            stores.drain(..kept);
        }
    }

    /// The last epoch up to `epoch` after which everything kept was void.
    fn invalidated(&self, epoch: u64) -> u64 {
        let count = self.due.partition_point(|due| *due <= epoch);
        count.checked_sub(1).and_then(|last| self.due.get(last)).copied().unwrap_or(0)
    }

    /// What was at `place` at some moment from the end of epoch `from` up to the end of epoch `to`.
    fn between(&self, place: Place, (from, to): (u64, u64)) -> impl Iterator<Item = Entry> {
        let stores = self.board.as_words().words.get(&self.board.address(place)).map_or(&[][..], Vec::as_slice);
        let first = stores.partition_point(|(epoch, _)| *epoch <= from).saturating_sub(1);
        let before = if stores.is_empty() { Some(Entry::None) } else { None };
        let then = stores.iter().skip(first).take_while(move |(epoch, _)| *epoch <= to);
        before.into_iter().chain(then.map(move |(_, raw)| self.board.decode(place, *raw)))
    }

    /// Where a page's entries led between two epochs: L1's page and whether it could be written, or nothing; each once.
    fn walks(&self, page: u64, epochs: (u64, u64)) -> Vec<Option<(u64, bool)>> {
        let mut walks = Vec::new();
        let mut add = |walk| {
            if !walks.contains(&walk) {
                walks.push(walk);
            }
        };
        for entry in self.between(Place::Region(page / PAGES), epochs) {
            match entry {
                Entry::None => add(None),
                Entry::Page(first, writable) => add(Some((first + page % PAGES, writable))),
                Entry::Table(table, above) => {
                    for entry in self.between(Place::Page(table, page % PAGES), epochs) {
                        let Entry::Page(leaf, writable) = entry else {
                            add(None);
                            continue;
                        };
                        add(Some((leaf, above && writable)));
                    }
                }
            }
        }
        walks
    }

    /// What may become of that access.
    pub fn may(&self, access: &Access) -> May {
        let Probe { page, write } = access.probe();
        let mut may = May { lead_to: Vec::new(), be_told: Vec::new() };
        for (to, _) in self
            .walks(page, (self.invalidated(access.returned), access.begun))
            .into_iter()
            .flatten()
            .filter(|(_, writable)| *writable || !write)
        {
            if !may.lead_to.contains(&to) {
                may.lead_to.push(to);
            }
        }
        for walk in self.walks(page, (access.returned, access.begun)) {
            let told = match walk {
                Some((_, writable)) if writable || !write => continue,
                Some(_) => self.told(write, true),
                None => self.told(write, false),
            };
            if !may.be_told.contains(&told) {
                may.be_told.push(told);
            }
        }
        may
    }

    /// What L1 is told of a write to a page that is read-only, or of an access to one that is not present.
    fn told(&self, write: bool, present: bool) -> u64 {
        let request = Request::of(if write { Kind::Write } else { Kind::Read });
        let rights = if present { Rights::READ.or(Rights::EXECUTE) } else { Rights::NONE };
        let reflect = Reflect { format: self.format, request, rights };
        match if present { reflect.denied() } else { reflect.not_present() } {
            Reflection::EptViolation(bits) | Reflection::NestedPageFault(bits) => bits,
            Reflection::EptMisconfiguration => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::mirror::{Expected, Mirror};
    use super::*;
    use proptest::prelude::*;
    use umbra_mmu::guest::GuestCaps;
    use umbra_shared::Level;
    use umbra_shared::nested::{self, AliasKind, Flags, Map, Way};
    use umbra_shared::probe::Answer;

    fn nested(format: nested::Format) -> Nested {
        let map = Map::new(512, Level::K4, 4, AliasKind::Contiguous, 1).unwrap();
        let flags = if format == nested::Format::Ept { Flags::Unused } else { Flags::Clear };
        Nested { way: Way::Umbra, map, format, flags, fill_batch: 0, remaps: 0 }
    }

    fn may(chronicle: &Chronicle, page: u64, write: bool, epochs: (u64, u64)) -> May {
        chronicle.may(&Access::new(Probe { page, write }, epochs, Answer::default()))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(6))]

        /// Who stands still between two epochs gets what the walker says, and nothing else once an invalidation was made.
        #[test]
        fn without_a_race_it_is_what_the_walker_says(seed: u64, ept: bool) {
            let nested = nested(if ept { nested::Format::Ept } else { nested::Format::Npt });
            let mut chronicle = Chronicle::new(&nested).unwrap();
            let mirror = || Mirror::new(&nested, GuestCaps::default()).unwrap();
            let (mut reads, mut writes) = (mirror(), mirror());
            for number in 1..40 {
                let epoch = chronicle.play(seed, number);
                reads.play(seed, number);
                writes.play(seed, number);
                for &Probe { page, write } in epoch.probes() {
                    let may = may(&chronicle, page, write, (number, number));
                    let mirror = if write { &mut writes } else { &mut reads };
                    match mirror.probe(Probe { page, write }, 0).unwrap() {
                        Expected::Done(_) if write => prop_assert!(!may.lead_to.is_empty()),
                        Expected::Done(word) => prop_assert!(may.lead_to.iter().any(|page| Mirror::word(*page) == word)),
                        Expected::Told(bits) => prop_assert_eq!(&may.be_told, &[bits]),
                    }
                    prop_assert!(!epoch.due || !may.differ(), "{:?} after epoch {}", may, number);
                }
                if number % 7 == 0 {
                    chronicle.forget(number);
                }
            }
        }

        /// Who runs meanwhile gets the old, the new or something between.
        #[test]
        fn a_race_ends_with_the_old_or_the_new(seed: u64) {
            let nested = nested(nested::Format::Ept);
            let mut chronicle = Chronicle::new(&nested).unwrap();
            let mut differ = 0;
            for number in 1..40 {
                let epoch = chronicle.play(seed, number);
                for &Probe { page, write } in epoch.probes() {
                    let both = may(&chronicle, page, write, (number - 1, number));
                    for alone in [(number - 1, number - 1), (number, number)] {
                        let alone = may(&chronicle, page, write, alone);
                        prop_assert!(alone.lead_to.iter().all(|page| both.lead_to.contains(page)));
                        prop_assert!(alone.be_told.iter().all(|bits| both.be_told.contains(bits)));
                    }
                    differ += u64::from(both.differ());
                }
            }
            prop_assert!(differ > 40);
        }
    }
}
