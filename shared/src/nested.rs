//! L2: what the firmware as its hypervisor (L1) and the monitor agree on.
//!
//! L2 sees [`Map::l2_pages`] pages from [`L2_BASE`] on, and executes the pattern over them. [`Map::l1_page`] says which of L1's tracked
//! pages each of them is: L1 builds its nested page table (EPT12, in the format EPT or NPT) by that function, and the monitor evaluates the same
//! function for the truth by L1 page. Several L2 pages may be one L1 page: *aliases*.
//!
//! ```text
//! L2 linear                  L2 GPA                       L1 GPA                     host
//! 0 .. 1 GiB          -->    the same              -->    the system slot
//! TRACKED_BASE + i*4K -->    L2_BASE + i*4K        -->    tracked page l1_page(i)
//!            L2's own tables               EPT12                        memory slots
//! ```
//!
//! An L2 that is the same program needs no loader: it sees L1's system slot at the same addresses, its image, stacks and plans included.

use crate::gfn::{L2Gfn, Level, PAGE_SIZE};
use crate::layout::TRACKED_GPA;
use crate::pattern::{MAX_ACCESSES, mix, permute};
use core::fmt;
use core::str::FromStr;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Where L2's pages begin in L2's physical space.
pub const L2_BASE: L2Gfn = L2Gfn::containing(TRACKED_GPA);

/// Words of the boot page that a [`Nested`] takes.
pub const WORDS: usize = 10;

/// Who executes the pattern over L2's pages, and by whose means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Way {
    /// L1 itself: there is no L2, and L1's own page tables map what an L2 would see.
    Plain = 1,
    /// An L2 on AMD's SVM with nested paging.
    Svm = 2,
    /// An L2 on Intel's VMX with extended page tables.
    Vmx = 3,
    /// An L2 that the monitor runs on its own shadow MMU, by the interface of [`crate::control`].
    Umbra = 4,
}

impl Way {
    /// The way of that number, or `None`.
    #[must_use]
    pub const fn from_number(number: u64) -> Option<Self> {
        match number {
            1 => Some(Self::Plain),
            2 => Some(Self::Svm),
            3 => Some(Self::Vmx),
            4 => Some(Self::Umbra),
            _ => None,
        }
    }
}

/// The format of L1's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Format {
    /// Intel's extended page tables, four levels.
    Ept = 1,
    /// AMD's nested page tables, 64-bit, four levels.
    Npt = 2,
    /// The same, PAE.
    Pae = 3,
    /// The same, with 4-byte entries.
    ThirtyTwoBit = 4,
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ept, Self::Npt, Self::Pae, Self::ThirtyTwoBit];

    /// The name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ept => "ept",
            Self::Npt => "npt",
            Self::Pae => "pae",
            Self::ThirtyTwoBit => "32bit",
        }
    }

    /// The format of that number, or `None`.
    #[must_use]
    pub const fn from_number(number: u64) -> Option<Self> {
        match number {
            1 => Some(Self::Ept),
            2 => Some(Self::Npt),
            3 => Some(Self::Pae),
            4 => Some(Self::ThirtyTwoBit),
            _ => None,
        }
    }
}

/// A and D in the entries that L1 makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Flags {
    /// In use, and clear: whoever walks the table sets them.
    Clear = 0,
    /// In use, and set beforehand.
    Preset = 1,
    /// Not in use (EPTP bit 6 clear): EPT alone can do without.
    Unused = 2,
}

impl Flags {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Clear, Self::Preset, Self::Unused];

    /// The name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Clear => "clear",
            Self::Preset => "preset",
            Self::Unused => "unused",
        }
    }

    /// The value of that number, or `None`.
    #[must_use]
    pub const fn from_number(number: u64) -> Option<Self> {
        match number {
            0 => Some(Self::Clear),
            1 => Some(Self::Preset),
            2 => Some(Self::Unused),
            _ => None,
        }
    }
}

/// How the copies of L1's pages lie in L2's physical space: one after the other, each of them all of L1's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum AliasKind {
    /// Each copy in L1's order.
    Contiguous = 0,
    /// Each copy in an order of its own: its leaves are scattered over L1's memory.
    Scattered = 1,
    /// Each copy in L1's order, and all of them by the same leaf tables.
    SharedTables = 2,
}

impl AliasKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Contiguous, Self::Scattered, Self::SharedTables];

    /// The name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Contiguous => "contiguous",
            Self::Scattered => "scattered",
            Self::SharedTables => "shared-tables",
        }
    }
}

impl FromStr for AliasKind {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|kind| kind.name() == text).ok_or(())
    }
}

/// Which of L1's tracked pages an L2 page is. The invariant is that of [`Map::new`]; all fields are what it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Map {
    pages: u64,
    leaf: Level,
    aliases: u64,
    kind: AliasKind,
    seed: u64,
}

/// Why there is no such map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapError {
    /// Leaves are 4 KiB, 2 MiB or 1 GiB.
    Leaf(Level),
    /// Leaves of 1 GiB reach beyond L1's pages: a second copy has no place of its own behind them.
    Giant(u64),
    /// L1's pages are no whole number of leaves, or none at all.
    Pages(u64),
    /// Not 1 to 2^31 L2 pages.
    Aliases(u64),
    /// Copies share whole tables of 4 KiB leaves, 512 pages each.
    Shared(u64),
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leaf(leaf) => write!(f, "leaves of level {}, and there are 1 (4k), 2 (2m) and 3 (1g)", leaf.number()),
            Self::Giant(aliases) => {
                write!(f, "{aliases} copies, or one that is not in L1's order, by leaves of 1g (use 2m)")
            }
            Self::Pages(pages) => write!(f, "{pages} pages are no whole number of leaves"),
            Self::Aliases(aliases) => write!(f, "{aliases} copies; L2 can have 1 to {MAX_ACCESSES} pages"),
            Self::Shared(pages) => {
                write!(f, "{pages} pages fill no whole tables of 4k leaves (512 pages), which copies could share")
            }
        }
    }
}

impl Map {
    /// A map of `aliases` copies of L1's `pages` pages by leaves of `leaf`. The last leaf of 1 GiB may reach beyond them, into the gap behind L1's slot.
    ///
    /// # Errors
    /// Says what cannot be.
    pub const fn new(pages: u64, leaf: Level, aliases: u64, kind: AliasKind, seed: u64) -> Result<Self, MapError> {
        if !matches!(leaf, Level::K4 | Level::M2 | Level::G1) {
            return Err(MapError::Leaf(leaf));
        }
        let giant = matches!(leaf, Level::G1);
        if giant && (aliases != 1 || !matches!(kind, AliasKind::Contiguous)) {
            return Err(MapError::Giant(aliases));
        }
        if pages == 0 || (!giant && !pages.is_multiple_of(leaf.frames())) {
            return Err(MapError::Pages(pages));
        }
        if aliases == 0 || pages > MAX_ACCESSES / aliases {
            return Err(MapError::Aliases(aliases));
        }
        let whole_tables = matches!(leaf, Level::K4) && pages.is_multiple_of(Level::M2.frames());
        if matches!(kind, AliasKind::SharedTables) && !whole_tables {
            return Err(MapError::Shared(pages));
        }
        Ok(Self { pages, leaf, aliases, kind, seed })
    }

    /// Every page is itself: what is tracked where there is no L2.
    #[must_use]
    pub const fn identity(pages: u64) -> Self {
        Self { pages, leaf: Level::K4, aliases: 1, kind: AliasKind::Contiguous, seed: 0 }
    }

    /// L1's tracked pages.
    #[must_use]
    pub const fn l1_pages(&self) -> u64 {
        self.pages
    }

    /// L2's pages: those of all copies.
    #[must_use]
    pub const fn l2_pages(&self) -> u64 {
        self.pages * self.aliases
    }

    /// The leaf by which L1 maps them.
    #[must_use]
    pub const fn leaf(&self) -> Level {
        self.leaf
    }

    /// L2 pages for each L1 page.
    #[must_use]
    pub const fn aliases(&self) -> u64 {
        self.aliases
    }

    /// How the copies lie.
    #[must_use]
    pub const fn kind(&self) -> AliasKind {
        self.kind
    }

    /// The seed of everything random.
    #[must_use]
    pub const fn seed(&self) -> u64 {
        self.seed
    }

    /// The tracked page of L1 that L2's page `l2_page` is. Beyond L2's last page the copies go on.
    #[must_use]
    pub fn l1_page(&self, l2_page: u64) -> u64 {
        let (copy, page) = (l2_page / self.pages, l2_page % self.pages);
        match self.kind {
            AliasKind::Contiguous | AliasKind::SharedTables => page,
            AliasKind::Scattered => {
                let frames = self.leaf.frames();
                let key = mix(self.seed ^ mix(copy));
                permute(page / frames, self.pages / frames, key) * frames + page % frames
            }
        }
    }

    /// The page that L2 finds at `gfn`, `None` if it has none there.
    #[must_use]
    pub const fn l2_page(&self, gfn: L2Gfn) -> Option<u64> {
        let page = gfn.0.wrapping_sub(L2_BASE.0);
        if page < self.l2_pages() { Some(page) } else { None }
    }

    /// The first pages of the two leaves that L1 exchanges in round `round` as its edit number `index`. They may be the same.
    #[must_use]
    pub const fn exchanged(&self, round: u64, index: u64) -> (u64, u64) {
        let frames = self.leaf.frames();
        let leaves = self.l2_pages() / frames;
        let one = mix(self.seed ^ mix(round ^ mix(index)));
        (one % leaves * frames, mix(one) % leaves * frames)
    }

    /// The page of copy 0 whose leaf table serves `l2_page`: itself, unless the copies share tables.
    #[must_use]
    pub const fn table_owner(&self, l2_page: u64) -> u64 {
        match self.kind {
            AliasKind::SharedTables => l2_page % self.pages,
            AliasKind::Contiguous | AliasKind::Scattered => l2_page,
        }
    }
}

/// All that decides what L2 is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nested {
    /// Who executes the pattern.
    pub way: Way,
    /// What L2's pages are.
    pub map: Map,
    /// The format of L1's table.
    pub format: Format,
    /// A and D in the entries that L1 makes.
    pub flags: Flags,
    /// L2 pages whose entries L1 makes at a violation; 0 for all before L2 starts.
    pub fill_batch: u64,
    /// Pairs of leaves that L1 exchanges in each round, after L2 has written ([`Map::exchanged`]).
    pub remaps: u64,
}

impl Nested {
    /// As words for the boot page.
    #[must_use]
    pub const fn encode(&self) -> [u64; WORDS] {
        let Self { way, map, format, flags, fill_batch, remaps } = *self;
        let Map { pages, leaf, aliases, kind, seed } = map;
        [way as u64, pages, leaf as u64, aliases, kind as u64, seed, flags as u64, fill_batch, format as u64, remaps]
    }

    /// What such words mean: `Some(None)` is no L2 (all zeroes), `None` nothing at all.
    #[must_use]
    #[allow(clippy::option_option)] // Three answers.
    pub const fn decode(words: &[u64; WORDS]) -> Option<Option<Self>> {
        let &[way, pages, leaf, aliases, kind, seed, flags, fill_batch, format, remaps] = words;
        if way == 0 {
            return Some(None);
        }
        let (Some(way), Some(format), Some(flags)) =
            (Way::from_number(way), Format::from_number(format), Flags::from_number(flags))
        else {
            return None;
        };
        let leaf = match leaf {
            1 => Level::K4,
            2 => Level::M2,
            3 => Level::G1,
            _ => return None,
        };
        let kind = match kind {
            0 => AliasKind::Contiguous,
            1 => AliasKind::Scattered,
            2 => AliasKind::SharedTables,
            _ => return None,
        };
        match Map::new(pages, leaf, aliases, kind, seed) {
            Ok(map) => Some(Some(Self { way, map, format, flags, fill_batch, remaps })),
            Err(_) => None,
        }
    }

    /// Bytes of tables beside L1's own: L2's, by leaves of `guest_page`, and EPT12.
    #[must_use]
    pub const fn table_bytes(&self, guest_page: Level) -> u64 {
        match self.way {
            Way::Plain => 0,
            Way::Svm | Way::Vmx | Way::Umbra => {
                self.own_table_bytes(guest_page) + crate::layout::table_bytes(self.map.l2_pages(), self.map.leaf)
            }
        }
    }

    /// Bytes of L2's own tables, which come first.
    #[must_use]
    pub const fn own_table_bytes(&self, guest_page: Level) -> u64 {
        crate::layout::table_bytes(self.map.l2_pages(), guest_page)
    }
}

/// What L1 reports about its L2, one for each vCPU. The counts go on from boot to end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Report {
    /// Times that L2 was entered.
    pub entries: u64,
    /// Violations of L1's table that L1 handled.
    pub violations: u64,
    /// Entries for L2's pages that L1 made.
    pub filled: u64,
    /// Pages of L1's table, those for the system slot included.
    pub table_pages: u64,
    /// L1's physical address of its root, the first of them.
    pub table_root: u64,
    /// Where the last violation was: an L2 physical address.
    pub last_address: u64,
    /// What it was: SVM's exit code or VMX's basic exit reason.
    pub last_code: u64,
    /// More about it: EXITINFO1 or the exit qualification.
    pub last_qualification: u64,
    /// After [`crate::protocol::Command::Provoke`]: the entry that the case is about, when L1 was told or the access was done.
    pub probed_entry: u64,
}

const _: () = assert!(size_of::<Report>() as u64 <= PAGE_SIZE);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn maps() -> impl Strategy<Value = Map> {
        let kinds = prop::sample::select(AliasKind::ALL.to_vec());
        (1_u64..5, 1_u64..600, any::<bool>(), 1_u64..6, kinds, any::<u64>()).prop_map(
            |(tables, pages, huge, aliases, kind, seed)| {
                let whole = huge || kind == AliasKind::SharedTables;
                let leaf = if huge && kind != AliasKind::SharedTables { Level::M2 } else { Level::K4 };
                Map::new(if whole { tables * 512 } else { pages }, leaf, aliases, kind, seed).unwrap()
            },
        )
    }

    proptest! {
        #[test]
        fn each_copy_holds_every_l1_page_once(map in maps()) {
            let mut seen = vec![0; usize::try_from(map.l1_pages()).unwrap()];
            for page in 0..map.l2_pages() {
                seen[usize::try_from(map.l1_page(page)).unwrap()] += 1;
                if (page + 1).is_multiple_of(map.l1_pages()) {
                    let copies = (page + 1) / map.l1_pages();
                    prop_assert!(seen.iter().all(|&count| count == copies));
                }
            }
            prop_assert_eq!(seen.len() as u64 * map.aliases(), map.l2_pages());
        }

        #[test]
        fn a_leaf_is_contiguous_and_aligned(map in maps()) {
            let frames = map.leaf().frames();
            for first in (0..map.l2_pages()).step_by(usize::try_from(frames).unwrap()) {
                prop_assert!(map.l1_page(first).is_multiple_of(frames));
                for offset in 0..frames {
                    prop_assert_eq!(map.l1_page(first + offset), map.l1_page(first) + offset);
                }
            }
        }

        #[test]
        fn what_is_exchanged_are_leaves(map in maps(), round: u64, index: u64) {
            let (one, other) = map.exchanged(round, index);
            for page in [one, other] {
                prop_assert!(page < map.l2_pages() && page.is_multiple_of(map.leaf().frames()));
            }
            prop_assert_eq!(map.exchanged(round, index), (one, other));
        }

        #[test]
        fn l2_pages_and_frames_are_each_others_inverse(map in maps()) {
            for page in 0..map.l2_pages() {
                prop_assert_eq!(map.l2_page(L2_BASE.plus(page)), Some(page));
                prop_assert_eq!(map.l1_page(map.table_owner(page)), map.l1_page(page));
            }
            prop_assert_eq!(map.l2_page(L2_BASE.plus(map.l2_pages())), None);
            prop_assert_eq!(map.l2_page(L2Gfn(L2_BASE.0 - 1)), None);
        }

        #[test]
        fn options_survive_the_boot_page(map in maps(), which in 0_usize..48, fill_batch: u64) {
            let way = [Way::Plain, Way::Svm, Way::Vmx, Way::Umbra][which % 4];
            let (flags, format) = (Flags::ALL[which / 4 % 3], Format::ALL[which / 12]);
            let nested = Nested { way, map, format, flags, fill_batch, remaps: fill_batch / 3 };
            prop_assert_eq!(Nested::decode(&nested.encode()), Some(Some(nested)));
        }
    }

    #[test]
    fn leaves_of_1_gib_need_not_be_filled() {
        let map = Map::new(500, Level::G1, 1, AliasKind::Contiguous, 1).unwrap();
        let nested = Nested { way: Way::Vmx, map, format: Format::Ept, flags: Flags::Clear, fill_batch: 0, remaps: 0 };
        assert_eq!(Nested::decode(&nested.encode()), Some(Some(nested)));
        assert_eq!((map.l1_page(499), map.l2_pages()), (499, 500));
    }

    #[test]
    fn copies_are_scattered_apart() {
        let map = Map::new(1024, Level::K4, 2, AliasKind::Scattered, 1).unwrap();
        let copy = |copy: u64| (0..1024).map(|page| map.l1_page(copy * 1024 + page)).collect::<Vec<_>>();
        assert_ne!(copy(0), copy(1));
        let neighbours = copy(0).windows(2).filter(|pair| pair[1] == pair[0] + 1).count();
        assert!(neighbours < 10, "{neighbours} of 1023 pages follow their neighbour");
        let other_seed = Map::new(1024, Level::K4, 2, AliasKind::Scattered, 2).unwrap();
        assert_ne!(map.l1_page(0), other_seed.l1_page(0));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let refused = |pages, leaf, aliases, kind| Map::new(pages, leaf, aliases, kind, 0).unwrap_err();
        assert_eq!(refused(512, Level::T512, 1, AliasKind::Contiguous), MapError::Leaf(Level::T512));
        assert_eq!(refused(512, Level::G1, 2, AliasKind::Contiguous), MapError::Giant(2));
        assert_eq!(refused(512, Level::G1, 1, AliasKind::Scattered), MapError::Giant(1));
        assert_eq!(refused(0, Level::K4, 1, AliasKind::Contiguous), MapError::Pages(0));
        assert_eq!(refused(513, Level::M2, 1, AliasKind::Contiguous), MapError::Pages(513));
        assert_eq!(refused(512, Level::K4, 0, AliasKind::Contiguous), MapError::Aliases(0));
        assert_eq!(refused(512, Level::K4, 1 << 23, AliasKind::Contiguous), MapError::Aliases(1 << 23));
        assert_eq!(refused(100, Level::K4, 2, AliasKind::SharedTables), MapError::Shared(100));
        assert_eq!(refused(512, Level::M2, 2, AliasKind::SharedTables), MapError::Shared(512));
        assert_eq!(Nested::decode(&[0; WORDS]), Some(None));
        assert_eq!(Nested::decode(&[9, 512, 1, 1, 0, 0, 0, 0, 1, 0]), None);
        assert_eq!(Nested::decode(&[2, 512, 4, 1, 0, 0, 0, 0, 1, 0]), None);
        assert_eq!(Nested::decode(&[2, 512, 1, 0, 0, 0, 0, 0, 1, 0]), None);
        assert_eq!(Nested::decode(&[2, 512, 1, 1, 0, 0, 3, 0, 1, 0]), None);
        assert_eq!(Nested::decode(&[2, 512, 1, 1, 0, 0, 0, 0, 5, 0]), None);
    }
}
