//! Edits of L1's table that race a running L2: no barrier stands between them.
//!
//! The first vCPU's L1 plays epochs of [`crate::edits`] and says what is due; meanwhile the L2s of the other vCPUs read and write the pages
//! concerned. Two counters are their clock, and each L2 keeps a [`Journal`]:
//!
//! ```text
//! L1     begun = n | stores of epoch n | invalidation, where due | returned = n
//! L2     e = returned | access | l = begun       the journal: the page, what became of it, e and l
//! ```
//!
//! The access was made after the invalidation of epoch `e` had returned and before the first store of epoch `l + 1`. So whoever has the epochs
//! knows what the table said meanwhile, and what a processor may have kept of it: each entry as it was at some moment from the last invalidation
//! that had returned on.
//!
//! A page's first word names it and is never written. The other words are written with [`stamp`]s, each another one, by turns: afterwards a page's
//! words show which writes landed in it.

use crate::board::PAGES;
use crate::edits::{Concern, Random};
use crate::gfn::PAGE_SIZE;
use crate::probe::{Answer, Probe};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Accesses that a journal has room for.
pub const ROOM: usize = 16384;
/// Edits whose pages L2 goes for.
pub const CONCERNS: usize = 8;
/// Words of a page that are written.
const WRITTEN: usize = crate::paging::ENTRIES - 1;

/// How L1 fails, for tests of the check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lapse {
    /// It does not.
    #[default]
    None,
    /// No invalidation is made.
    Lost,
    /// Each invalidation is made after it was said to have returned.
    Late,
}

/// A race that L1 is asked for, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// Its first epoch, below 2^32; no race has an epoch of another one's.
    pub first: u64,
    /// Epochs, at most 255: fewer if a journal is full before.
    pub epochs: u64,
    /// Between two epochs L1 waits until each L2 has made so many accesses, at most 63; half of that on the average, and sometimes none.
    pub gap: u64,
    /// Accesses after which an L2 lets others run, be it inside or left, at most 255; 0 where each vCPU has a CPU.
    pub burst: u64,
    /// An L2 spins so often between two accesses, at most 63; half of that on the average.
    pub spins: u64,
    /// What L1 does wrong.
    pub lapse: Lapse,
}

impl Order {
    /// As a command's argument.
    #[must_use]
    pub const fn word(self) -> u64 {
        (self.first & 0xffff_ffff)
            | (self.epochs & 0xff) << 32
            | (self.gap & 0x3f) << 40
            | (self.burst & 0xff) << 46
            | (self.spins & 0x3f) << 54
            | (self.lapse as u64) << 60
    }

    /// What such an argument says.
    #[must_use]
    pub const fn of(word: u64) -> Self {
        let lapse = match word >> 60 {
            1 => Lapse::Lost,
            2 => Lapse::Late,
            _ => Lapse::None,
        };
        Self {
            first: word & 0xffff_ffff,
            epochs: word >> 32 & 0xff,
            gap: word >> 40 & 0x3f,
            burst: word >> 46 & 0xff,
            spins: word >> 54 & 0x3f,
            lapse,
        }
    }

    /// Whether an L2 that has made `count` accesses lets others run.
    #[must_use]
    pub const fn rests_after(self, count: usize) -> bool {
        self.burst > 0 && (count as u64).is_multiple_of(self.burst)
    }

    /// Accesses that L1 waits for after epoch `number`.
    #[must_use]
    pub const fn gap_after(self, seed: u64, number: u64) -> u64 {
        Random::of(!seed, number).below(self.gap + 1)
    }
}

/// An access of L2, and what became of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Access {
    /// The page, times two; plus one if it was written.
    what: u64,
    /// The last epoch that L1 had done with before.
    pub returned: u64,
    /// The last epoch that L1 had begun afterwards.
    pub begun: u64,
    /// What was read or written, or what L1 was told instead.
    pub answer: Answer,
}

impl Access {
    /// One that was made between the end of the first and the end of the second of `epochs`.
    #[must_use]
    pub const fn new(probe: Probe, (returned, begun): (u64, u64), answer: Answer) -> Self {
        Self { what: Self::what(probe), returned, begun, answer }
    }

    /// The access, before it is made.
    #[must_use]
    pub const fn what(probe: Probe) -> u64 {
        probe.page << 1 | probe.write as u64
    }

    /// The access.
    #[must_use]
    pub const fn probe(&self) -> Probe {
        Probe { page: self.what >> 1, write: self.what & 1 == 1 }
    }
}

/// What one vCPU's L2 did in a race.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Journal {
    /// How much.
    pub count: u64,
    /// In order.
    pub accesses: [Access; ROOM],
}

/// Bytes from a journal to the next: whole pages.
pub const JOURNAL_BYTES: u64 = (size_of::<Journal>() as u64).next_multiple_of(PAGE_SIZE);

/// The physical address of vCPU `vcpu`'s journal, where the first one is at `journals`.
#[must_use]
pub const fn journal(journals: u64, vcpu: usize) -> u64 {
    journals + (vcpu as u64 - 1) * JOURNAL_BYTES
}

/// An access of one L2: entry `index` of vCPU `vcpu`'s journal in the race whose first epoch is `first`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// The race.
    pub first: u64,
    /// The vCPU.
    pub vcpu: usize,
    /// The entry.
    pub index: usize,
}

impl Turn {
    /// What it writes, if it writes: a word that nothing else ever is.
    #[must_use]
    pub const fn stamp(self) -> u64 {
        1 << 63 | (self.first & 0xffff_ffff) << 24 | (self.vcpu as u64 & 0xf) << 20 | (self.index as u64 & 0xf_ffff)
    }

    /// Whose stamp a word is; `None` if it is none.
    #[must_use]
    #[allow(clippy::cast_possible_truncation)] // Cut to 4 and 20 bits.
    pub const fn of(stamp: u64) -> Option<Self> {
        let (vcpu, index) = ((stamp >> 20 & 0xf) as usize, (stamp & 0xf_ffff) as usize);
        if stamp >> 56 == 0x80 { Some(Self { first: stamp >> 24 & 0xffff_ffff, vcpu, index }) } else { None }
    }

    /// The word of the page that it writes: not the first. L2s have words of their own as long as they can.
    #[must_use]
    pub const fn word(self) -> usize {
        1 + (self.index + self.vcpu * WRITTEN / 3) % WRITTEN
    }

    /// What it is, where `concern` says what the edits were about that L1 made last, of pages in `regions` regions; and how often L2 spins before, up to
    /// `spins`.
    #[must_use]
    pub fn draw(self, seed: u64, regions: u64, spins: u64, concern: impl Fn(usize) -> Concern) -> (Probe, u64) {
        let mut random = Random::of(seed ^ (self.vcpu as u64) << 56, self.first << 20 | self.index as u64);
        let (write, pause) = (random.below(2) == 0, random.below(spins + 1));
        let page = match (random.below(8), concern(random.index(CONCERNS))) {
            (0, _) => random.below(regions * PAGES),
            // Another region may be served by the same table.
            (1, Concern::Page(page)) => random.below(regions) * PAGES + page % PAGES,
            (_, Concern::Page(page)) => page,
            (_, Concern::Region(region)) => region * PAGES + random.below(PAGES),
        };
        (Probe { page, write }, pause)
    }
}

const _: () = assert!(ROOM <= 1 << 20);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_order_is_a_word(first in 0_u64..1 << 32, epochs in 0_u64..256, gap in 0_u64..64, burst in 0_u64..256, spins in 0_u64..64, lapse in 0..3) {
            let lapse = [Lapse::None, Lapse::Lost, Lapse::Late][usize::try_from(lapse).unwrap()];
            let order = Order { first, epochs, gap, burst, spins, lapse };
            prop_assert_eq!(Order::of(order.word()), order);
        }

        #[test]
        fn a_stamp_names_its_turn(first in 0_u64..1 << 32, vcpu in 1_usize..8, index in 0..ROOM) {
            let turn = Turn { first, vcpu, index };
            prop_assert_eq!(Turn::of(turn.stamp()), Some(turn));
            prop_assert!((1..512).contains(&turn.word()));
            prop_assert_eq!(Turn::of(turn.stamp() ^ 1 << 63), None);
        }

        #[test]
        fn most_accesses_go_where_edits_are(seed: u64, first in 0_u64..1 << 32) {
            let turn = |index| Turn { first, vcpu: 1, index };
            let draws: Vec<_> = (0..4000).map(|index| turn(index).draw(seed, 4, 10, |_| Concern::Page(700)).0).collect();
            let count = |wanted: &dyn Fn(&Probe) -> bool| draws.iter().filter(|probe| wanted(probe)).count();
            prop_assert!(draws.iter().all(|probe| probe.page < 4 * PAGES));
            prop_assert!(count(&|probe| probe.page == 700) > 2500);
            prop_assert!(count(&|probe| probe.page % PAGES == 700 % PAGES) < 3800);
            prop_assert!((1700..2300).contains(&count(&|probe| probe.write)));
        }
    }
}
