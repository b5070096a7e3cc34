//! The reference: a naive MMU that walks EPT12 at every access, written from the manuals a second time.
//!
//! It shares no code with the shadow MMU's walkers. It also knows which entries had other values before, and since
//! when, so that it can say whether a translation *was* granted at a moment that still counts.

use std::collections::{BTreeMap, HashMap};

use umbra_shared::{Gfn, L2Gfn};

use crate::access::{Access, Kind, Request};
use crate::format::Format;
use crate::guest::{GuestCaps, Reflection};
use crate::memory::{L1Memory, Slots};
use crate::spte::Frame;
use crate::walker::PlainMemory;

/// One entry's place: frame and byte offset of the 8 bytes that hold it.
type Place = (u64, u64);

/// What EPT12 says about an access now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Permitted: the page of memory.
    Permitted(Frame),
    /// Not permitted: what L1 gets.
    Reflected(Reflection),
    /// Beyond the memory map.
    NoMemory(Gfn),
    /// A table that is; and what L1 gets from who takes that for an entry that is not present.
    NoTable(Gfn, Reflection),
}

/// Earlier values of table entries.
#[derive(Debug, Default)]
pub struct History {
    /// Now, in steps.
    pub now: u64,
    old: HashMap<Place, Vec<(u64, u64)>>,
}

impl History {
    /// Notes that the 8 bytes at `place` held `old` until now.
    pub fn note(&mut self, place: Place, old: u64) {
        self.old.entry(place).or_default().push((self.now, old));
    }

    /// Values that `place` held at some moment after `since`, besides its present one.
    pub fn values(&self, place: Place, since: u64) -> impl Iterator<Item = u64> + '_ {
        let all = self.old.get(&place).map(Vec::as_slice).unwrap_or_default();
        all.iter().filter(move |(until, _)| *until > since).map(|(_, value)| *value)
    }

    /// Forgets what ended at or before `oldest`.
    pub fn prune(&mut self, oldest: u64) {
        self.old.retain(|_, values| {
            values.retain(|(until, _)| *until > oldest);
            !values.is_empty()
        });
    }
}

/// A translation context: a root as L1 sees it.
#[derive(Clone, Debug)]
pub struct Context {
    /// The format.
    pub format: Format,
    /// The root table's address.
    pub table: u64,
    /// The last invalidation that applied.
    pub since: u64,
    /// Addresses that violated later than that.
    pub violated: BTreeMap<L2Gfn, u64>,
}

/// What one entry means, by the manuals.
enum Meaning {
    Nothing,
    Wrong,
    Down(Gfn, u64),
    Page(Gfn, u64),
}

/// The naive MMU over a memory, a map and L1's processor.
pub struct Reference<'a, M = PlainMemory> {
    /// L1's memory.
    pub memory: &'a M,
    /// L1's memory map.
    pub slots: &'a Slots,
    /// L1's processor.
    pub caps: GuestCaps,
    /// Earlier values.
    pub history: &'a History,
}

const R: u64 = 1;
const W: u64 = 2;
const X: u64 = 4;

impl<M: L1Memory> Reference<'_, M> {
    /// Levels of `format`'s tables, as the guest has them.
    fn levels(format: Format) -> u32 {
        match format {
            Format::Ept { five_levels, .. } | Format::Npt { five_levels, .. } => 4 + u32::from(five_levels),
            Format::Pae { .. } => 3,
            Format::Bits32 { .. } => 2,
        }
    }

    fn index_of(format: Format, level: u32, l2: L2Gfn) -> u64 {
        let address = l2.0 << 12;
        match format {
            Format::Bits32 { .. } => address >> (12 + 10 * (level - 1)) & 0x3ff,
            Format::Pae { .. } if level == 3 => address >> 30 & 3,
            _ => address >> (12 + 9 * (level - 1)) & 0x1ff,
        }
    }

    /// What `entry` at `level` (1 maps 4 KiB) means; the frame of a page is that of the 4 KiB page at `l2`.
    fn meaning(&self, format: Format, level: u32, entry: u64, l2: L2Gfn) -> Meaning {
        let too_wide = entry & 0x000f_ffff_ffff_f000 & !((1u64 << self.caps.address_bits) - 1) != 0;
        let base = Gfn((entry & 0x000f_ffff_ffff_f000) >> 12);
        let page = |bits: u32, address: Gfn| Gfn(address.0 | l2.0 & ((1 << bits) - 1));
        match format {
            Format::Ept { .. } => {
                let rights = entry & 7;
                if rights == 0 {
                    return Meaning::Nothing;
                }
                let strange = rights == W || rights == W | X || rights == X && !self.caps.execute_only;
                if strange || too_wide {
                    return Meaning::Wrong;
                }
                let is_page = level == 1 || entry & 0x80 != 0;
                if !is_page {
                    return if entry & 0x78 != 0 { Meaning::Wrong } else { Meaning::Down(base, rights) };
                }
                let kind = entry >> 3 & 7;
                let bits = 9 * (level - 1);
                let misplaced = base.0 & ((1 << bits) - 1) != 0;
                let unsupported = level > 3 || level == 3 && !self.caps.giant_pages;
                if unsupported || misplaced || kind == 2 || kind == 3 || kind == 7 {
                    return Meaning::Wrong;
                }
                Meaning::Page(page(bits, base), rights)
            }
            Format::Npt { nx, .. } | Format::Pae { nx } => {
                let legacy = matches!(format, Format::Pae { .. });
                if entry & 1 == 0 {
                    return Meaning::Nothing;
                }
                if legacy && level == 3 {
                    let reserved = entry & 0xfff0_0000_0000_01e6 != 0 || too_wide;
                    return if reserved { Meaning::Wrong } else { Meaning::Down(base, R | W | X) };
                }
                let rights =
                    if entry & 4 == 0 { 0 } else { R | entry & W | if nx && entry >> 63 == 1 { 0 } else { X } };
                let wrong = too_wide || !nx && entry >> 63 == 1 || legacy && entry & 0x7ff0_0000_0000_0000 != 0;
                if wrong {
                    return Meaning::Wrong;
                }
                if level == 1 || entry & 0x80 == 0 {
                    return if level == 1 { Meaning::Page(base, rights) } else { Meaning::Down(base, rights) };
                }
                let bits = 9 * (level - 1);
                let unsupported = level > 3 || level == 3 && !self.caps.giant_pages;
                let misplaced = base.0 & ((1 << bits) - 1) & !1 != 0;
                if unsupported || misplaced {
                    return Meaning::Wrong;
                }
                Meaning::Page(page(bits, Gfn(base.0 & !1)), rights)
            }
            Format::Bits32 { pse } => {
                if entry & 1 == 0 {
                    return Meaning::Nothing;
                }
                let rights = if entry & 4 == 0 { 0 } else { R | entry & W | X };
                let base = Gfn((entry & 0xffff_f000) >> 12);
                if level == 1 {
                    return Meaning::Page(base, rights);
                }
                if !pse || entry & 0x80 == 0 {
                    return Meaning::Down(base, rights);
                }
                let high = entry >> 13 & 0xff;
                if entry & 1 << 21 != 0 || (high << 32) >> self.caps.address_bits.min(40) != 0 {
                    return Meaning::Wrong;
                }
                Meaning::Page(page(10, Gfn(high << 20 | (entry & 0xffc0_0000) >> 12)), rights)
            }
        }
    }

    /// The 8 bytes that hold the entry, and how to take it out of them.
    fn place(&self, format: Format, level: u32, table: u64, l2: L2Gfn) -> Result<(Place, u32), Gfn> {
        let width = if matches!(format, Format::Bits32 { .. }) { 4 } else { 8 };
        let address = table + Self::index_of(format, level, l2) * width;
        let gfn = Gfn(address >> 12);
        let frame = self.slots.find(gfn).ok_or(gfn)?.frame;
        let shift = if width == 4 && address & 4 != 0 { 32 } else { 0 };
        Ok(((frame.0, address & 0xff8), shift))
    }

    fn entry(format: Format, word: u64, shift: u32) -> u64 {
        if matches!(format, Format::Bits32 { .. }) { word >> shift & 0xffff_ffff } else { word }
    }

    /// The right that `request` needs. Walks of L2's tables are writes under nested paging, and under EPT with A/D flags.
    #[must_use]
    pub fn needed(format: Format, request: Request) -> Access {
        let walks_write = !matches!(format, Format::Ept { accessed_dirty: false, .. });
        Access::from_bits(match request.kind {
            _ if request.table_walk && walks_write => W,
            Kind::Read => R,
            Kind::Write => W,
            Kind::Execute => X,
        })
    }

    /// What EPT12 in `context` says about `request` to `l2` now.
    #[must_use]
    pub fn verdict(&self, context: &Context, l2: L2Gfn, request: Request) -> Verdict {
        let format = context.format;
        let needed = Self::needed(format, request).bits();
        let levels = Self::levels(format);
        let width = match format {
            Format::Pae { .. } | Format::Bits32 { .. } => 20,
            _ => 9 * levels,
        };
        let mut rights = 7;
        if l2.0 >> width != 0 {
            return Verdict::Reflected(Self::exit(format, request, 0, 0));
        }
        let mut table = context.table;
        for level in (1..=levels).rev() {
            let (place, shift) = match self.place(format, level, table, l2) {
                Ok(found) => found,
                Err(gfn) => return Verdict::NoTable(gfn, Self::exit(format, request, rights, 0)),
            };
            let entry = Self::entry(format, self.memory.read(Frame(place.0), place.1), shift);
            match self.meaning(format, level, entry, l2) {
                Meaning::Nothing => return Verdict::Reflected(Self::exit(format, request, 0, 0)),
                Meaning::Wrong if format.is_ept() => return Verdict::Reflected(Reflection::EptMisconfiguration),
                Meaning::Wrong => return Verdict::Reflected(Self::exit(format, request, 0, 9)),
                Meaning::Down(gfn, more) => {
                    rights &= more;
                    table = gfn.address();
                }
                Meaning::Page(gfn, more) => {
                    rights &= more;
                    if rights & needed == 0 {
                        return Verdict::Reflected(Self::exit(format, request, rights, 1));
                    }
                    return match self.slots.find(gfn) {
                        Some(backing) if backing.writable || needed != W => Verdict::Permitted(backing.frame),
                        _ => Verdict::NoMemory(gfn),
                    };
                }
            }
        }
        Verdict::Reflected(Self::exit(format, request, 0, 0))
    }

    /// The exit for `request`; `code` is P | RSV for a nested page fault.
    fn exit(format: Format, Request { kind, table_walk, linear }: Request, rights: u64, code: u64) -> Reflection {
        if let Format::Ept { accessed_dirty, .. } = format {
            let access = match kind {
                _ if table_walk && accessed_dirty => 3,
                Kind::Read => 1,
                Kind::Write => 2,
                Kind::Execute => 4,
            };
            let address = match (linear, table_walk) {
                (false, _) => 0,
                (true, true) => 0x80,
                (true, false) => 0x180,
            };
            return Reflection::EptViolation(access | rights << 3 | address);
        }
        if table_walk {
            return Reflection::NestedPageFault(1 << 33 | 4 | 2 | code);
        }
        let nx = matches!(format, Format::Npt { nx: true, .. } | Format::Pae { nx: true });
        let access = match kind {
            Kind::Write => 2,
            Kind::Execute if nx => 16,
            _ => 0,
        };
        Reflection::NestedPageFault(1 << 32 | 4 | access | code)
    }

    /// Whether `right` on `frame` was granted for `l2` in `context` at moments that still count, each entry at its own.
    #[must_use]
    pub fn granted(&self, context: &Context, l2: L2Gfn, right: Access, frame: Frame) -> bool {
        self.granted_one(context, l2, right, &mut |found| found == frame)
    }

    /// The same for one of the frames that `fits` accepts, which is asked about each that was granted until then. True as well where there are too many
    /// histories to tell.
    #[must_use]
    pub fn granted_one(
        &self,
        context: &Context,
        l2: L2Gfn,
        right: Access,
        fits: &mut dyn FnMut(Frame) -> bool,
    ) -> bool {
        let violated = context.violated.get(&l2).copied().unwrap_or(0);
        let since = context.since.max(violated);
        let mut fuel = 4000;
        self.granted_below(context, since, Self::levels(context.format), context.table, (l2, right, fits), &mut fuel)
    }

    fn granted_below(
        &self,
        context: &Context,
        since: u64,
        level: u32,
        table: u64,
        (l2, right, fits): (L2Gfn, Access, &mut dyn FnMut(Frame) -> bool),
        fuel: &mut u32,
    ) -> bool {
        if *fuel == 0 {
            return true; // Too many histories to tell: no claim.
        }
        *fuel -= 1;
        let format = context.format;
        let Ok((place, shift)) = self.place(format, level, table, l2) else { return false };
        let now = self.memory.read(Frame(place.0), place.1);
        let mut tried: Vec<u64> = Vec::new();
        for word in std::iter::once(now).chain(self.history.values(place, since)) {
            let entry = Self::entry(format, word, shift);
            if tried.contains(&entry) {
                continue;
            }
            tried.push(entry);
            let granted = match self.meaning(format, level, entry, l2) {
                Meaning::Nothing | Meaning::Wrong => false,
                Meaning::Down(gfn, rights) => {
                    level > 1
                        && rights & right.bits() == right.bits()
                        && self.granted_below(context, since, level - 1, gfn.address(), (l2, right, fits), fuel)
                }
                Meaning::Page(gfn, rights) => {
                    let backing = self.slots.find(gfn);
                    rights & right.bits() == right.bits()
                        && backing
                            .is_some_and(|found| (found.writable || !right.allows(Access::WRITE)) && fits(found.frame))
                }
            };
            if granted {
                return true;
            }
        }
        false
    }

    /// Whether the A/D flags along `l2`'s walk are as an access (and a write) must leave them. `None` when some entry
    /// had other values lately, so that a stale translation may have served the access.
    #[must_use]
    pub fn flags_set(&self, context: &Context, l2: L2Gfn, write: bool) -> Option<bool> {
        let format = context.format;
        let (accessed, dirty) = match format {
            Format::Ept { accessed_dirty: false, .. } => return Some(true),
            Format::Ept { .. } => (1 << 8, 1 << 9),
            _ => (1 << 5, 1 << 6),
        };
        let since = context.since.max(context.violated.get(&l2).copied().unwrap_or(0));
        let mut table = context.table;
        for level in (1..=Self::levels(format)).rev() {
            let (place, shift) = self.place(format, level, table, l2).ok()?;
            let writable = self.slots.slots().iter().all(|slot| !slot.read_only);
            let entry = Self::entry(format, self.memory.read(Frame(place.0), place.1), shift);
            for old in self.history.values(place, since) {
                let old = Self::entry(format, old, shift);
                let more = old & !(accessed | dirty) != entry & !(accessed | dirty) || old & !entry != 0;
                if more {
                    return None;
                }
            }
            let pointer = matches!(format, Format::Pae { .. }) && level == 3;
            match self.meaning(format, level, entry, l2) {
                Meaning::Nothing | Meaning::Wrong => return None,
                Meaning::Down(gfn, _) => {
                    if writable && !pointer && entry & accessed == 0 {
                        return Some(false);
                    }
                    table = gfn.address();
                }
                Meaning::Page(..) => {
                    let wanted = accessed | if write { dirty } else { 0 };
                    return Some(!writable || entry & wanted == wanted);
                }
            }
        }
        None
    }
}
