//! The walk of EPT12, and the A/D bits that it sets.

use umbra_shared::paging::{ADDRESS_MASK, ept, long};
use umbra_shared::{Gfn, L2Gfn, Level};

use super::reflect::{Reflect, Reflection};
use super::{Decoded, GuestCaps, GuestEntry, decode};
use crate::access::{Access, Request};
use crate::format::Format;
use crate::memory::{Exchange, L1Memory, Slots};
use crate::role::{Role, below};
use crate::spte::Frame;

/// One entry that a walk used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// The page that the entry is in.
    pub frame: Frame,
    /// Where in that page, in bytes.
    pub offset: u64,
    /// The entry as it was read.
    pub raw: u64,
    /// The guest may write that page.
    pub writable: bool,
    /// The table that the entry leads to.
    pub next: Gfn,
    /// Rights that are left after it.
    pub access: Access,
    /// There is such an entry: the synthetic root of 32-bit tables has none.
    pub real: bool,
}

/// A step for each level, 4 KiB first.
#[derive(Clone, Copy, Debug)]
pub struct Steps([Step; 5]);

impl Steps {
    /// The step at `level`.
    #[inline]
    #[must_use]
    pub const fn at(&self, level: Level) -> &Step {
        let [k4, m2, g1, t512, p256] = &self.0;
        match level {
            Level::K4 => k4,
            Level::M2 => m2,
            Level::G1 => g1,
            Level::T512 => t512,
            Level::P256 => p256,
        }
    }

    /// The step at `level`, to change it.
    #[inline]
    pub const fn at_mut(&mut self, level: Level) -> &mut Step {
        let [k4, m2, g1, t512, p256] = &mut self.0;
        match level {
            Level::K4 => k4,
            Level::M2 => m2,
            Level::G1 => g1,
            Level::T512 => t512,
            Level::P256 => p256,
        }
    }
}

/// A walk that reached a page which permits the access.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    /// Entries by level. Levels below the leaf are unused.
    pub steps: Steps,
    /// The level of the shadow leaf that the guest's leaf allows.
    pub level: Level,
    /// The first frame of that leaf.
    pub gfn: Gfn,
    /// Rights along the whole walk.
    pub access: Access,
    /// The leaf's dirty flag was set, or is not in use.
    pub dirty: bool,
    /// The accessed flags of all its entries were set, or are not in use.
    pub accessed: bool,
}

impl Walk {
    /// A walk that has not begun.
    #[must_use]
    pub const fn new() -> Self {
        const NONE: Step = Step {
            frame: Frame(0),
            offset: 0,
            raw: 0,
            next: Gfn(0),
            access: Access::NONE,
            writable: false,
            real: false,
        };
        Self {
            steps: Steps([NONE; 5]),
            level: Level::K4,
            gfn: Gfn(0),
            access: Access::NONE,
            dirty: false,
            accessed: true,
        }
    }
}

impl Default for Walk {
    fn default() -> Self {
        Self::new()
    }
}

/// Bits that tell ordinary entries of EPT and long mode from everything else: all rights, nothing reserved. What fits
/// needs no further checks.
struct Plain {
    reserved: u64,
    link: (u64, u64),
    leaf: (u64, u64),
    accessed: u64,
    dirty: u64,
}

impl Plain {
    const fn new(format: Format, caps: GuestCaps) -> Self {
        let reserved = caps.reserved_address();
        if let Format::Ept { accessed_dirty, .. } = format {
            return Self {
                reserved,
                link: (ept::RIGHTS | 0xf << ept::MEMORY_TYPE_SHIFT | ept::LARGE, ept::RIGHTS),
                leaf: (ept::RIGHTS | 7 << ept::MEMORY_TYPE_SHIFT, ept::RIGHTS | ept::WRITE_BACK),
                accessed: if accessed_dirty { ept::ACCESSED } else { 0 },
                dirty: if accessed_dirty { ept::DIRTY } else { 0 },
            };
        }
        let rights = long::PRESENT | long::WRITE | long::USER;
        let mask = rights | long::NO_EXECUTE;
        Self {
            reserved,
            link: (mask | long::LARGE, rights),
            leaf: (mask, rights),
            accessed: long::ACCESSED,
            dirty: long::DIRTY,
        }
    }
}

/// A leaf's flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flags {
    /// The accessed flag, or no such flags in use.
    pub accessed: bool,
    /// The dirty flag, or no such flags in use.
    pub dirty: bool,
}

/// The flags of `entry` if it is an ordinary 4 KiB leaf of EPT or long mode, which grants everything.
#[inline]
#[must_use]
pub const fn plain_leaf(format: Format, caps: GuestCaps, entry: GuestEntry) -> Option<Flags> {
    if matches!(format, Format::Pae { .. } | Format::Bits32 { .. }) {
        return None;
    }
    let plain = Plain::new(format, caps);
    if entry.0 & (plain.leaf.0 | plain.reserved) != plain.leaf.1 {
        return None;
    }
    let accessed = entry.0 & plain.accessed == plain.accessed;
    Some(Flags { accessed, dirty: entry.0 & plain.dirty == plain.dirty })
}

/// Follows ordinary entries of EPT and long mode as far as they go; `walk.level` says how far. `true`: to the page.
fn walk_plain(
    walk: &mut Walk,
    memory: &dyn L1Memory,
    slots: &Slots,
    plain: &Plain,
    table: &mut Gfn,
    l2: L2Gfn,
) -> bool {
    let mut shift = 9 * (walk.level as u32 - 1);
    loop {
        let Some(backing) = slots.find(*table) else { return false };
        let offset = (l2.0 >> shift & 511) * 8;
        let raw = memory.read(backing.frame, offset);
        let (mask, value) = if shift == 0 { plain.leaf } else { plain.link };
        if raw & (mask | plain.reserved) != value {
            return false;
        }
        let next = Gfn((raw & ADDRESS_MASK) >> 12);
        *walk.steps.at_mut(walk.level) = Step {
            frame: backing.frame,
            offset,
            raw,
            writable: backing.writable,
            next,
            access: Access::ALL,
            real: true,
        };
        walk.accessed &= raw & plain.accessed == plain.accessed;
        if shift == 0 {
            walk.gfn = next;
            walk.access = Access::ALL;
            walk.dirty = raw & plain.dirty == plain.dirty;
            return true;
        }
        *table = next;
        walk.level = below(walk.level);
        shift -= 9;
    }
}

/// How a walk ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// At a page.
    AtPage,
    /// EPT12 does not permit it.
    Reflect(Reflection),
    /// A table lies in guest frames that no slot covers.
    NoTable(Gfn),
}

/// Where entry `index` of a shadow page of `role` over the table at `gfn` comes from: byte offset in the table, and its
/// width. `None` for the synthetic root of 32-bit tables.
///
/// 4-byte entries (seed 002): a guest directory of 1,024 x 4 MiB has four shadow directories, so the quadrant consumes
/// address bits 31:30, and two shadow entries share one guest entry; a guest table of 1,024 pages has two shadow tables.
#[must_use]
#[inline]
pub const fn entry_place(role: Role, index: usize) -> Option<(u64, u64)> {
    let index = index as u64;
    if role.is_plain() {
        return Some((index * 8, 8));
    }
    let quadrant = role.quadrant() as u64;
    match (role.format(), role.level()) {
        (Format::Bits32 { .. }, Level::K4) => Some(((quadrant & 1) * 2048 + index * 4, 4)),
        (Format::Bits32 { .. }, Level::M2) => Some((quadrant * 1024 + (index / 2) * 4, 4)),
        (Format::Bits32 { .. }, _) => None,
        (Format::Pae { .. }, Level::G1) => Some((role.table_offset() + (index & 3) * 8, 8)),
        _ => Some((index * 8, 8)),
    }
}

/// Where the entry for `l2` is in a guest table of `level`: byte offset and width. `None` where the format has no such
/// level.
#[must_use]
#[inline]
pub const fn place(format: Format, level: Level, l2: L2Gfn) -> Option<(u64, u64)> {
    match (format, level) {
        (Format::Bits32 { .. }, Level::K4) => Some(((l2.0 & 1023) * 4, 4)),
        (Format::Bits32 { .. }, Level::M2) => Some(((l2.0 >> 10 & 1023) * 4, 4)),
        (Format::Bits32 { .. }, _) => None,
        (Format::Pae { .. }, Level::G1) => Some(((l2.0 >> 18 & 3) * 8, 8)),
        _ => Some((Format::shadow_index(level, l2) as u64 * 8, 8)),
    }
}

/// The quadrant of the child that entry `index` of a page of `role` leads to.
#[must_use]
#[inline]
pub const fn child_quadrant(role: Role, index: usize) -> u8 {
    if !role.has_4_byte_gpte() {
        return 0;
    }
    match (role.format(), role.level()) {
        (Format::Bits32 { .. }, Level::G1) => (index as u64 & 3) as u8,
        (Format::Bits32 { .. }, Level::M2) => (index as u64 & 1) as u8,
        _ => 0,
    }
}

/// Reads the entry of `width` bytes at `offset`.
#[inline]
pub fn read_entry(memory: &dyn L1Memory, frame: Frame, offset: u64, width: u64) -> GuestEntry {
    let word = memory.read(frame, offset & !7);
    if width == 8 {
        return GuestEntry(word);
    }
    GuestEntry(word >> ((offset & 4) * 8) & 0xffff_ffff)
}

/// Walks EPT12 for `request` to `l2`. `root` is the root's role and `table` its frame.
///
/// Nothing is written: see [`set_accessed_dirty`].
/// `walk` is new, or will be as if it were.
pub fn walk(
    walk: &mut Walk,
    memory: &dyn L1Memory,
    slots: &Slots,
    caps: GuestCaps,
    (root, table): (Role, Gfn),
    l2: L2Gfn,
    request: Request,
) -> Ended {
    let format = root.format();
    let mut reflect = Reflect { format, request, rights: Access::ALL };
    if l2.0 >= format.frames() {
        reflect.rights = Access::NONE;
        return Ended::Reflect(reflect.not_present());
    }
    walk.level = root.level();
    walk.accessed = true;
    let mut table = table;
    if root.is_plain() && walk_plain(walk, memory, slots, &Plain::new(format, caps), &mut table, l2) {
        return Ended::AtPage;
    }
    let mut table_offset = root.table_offset();
    loop {
        let level = walk.level;
        let step = walk.steps.at_mut(level);
        if let Some((offset, width)) = place(format, level, l2) {
            let offset = offset + table_offset;
            table_offset = 0;
            let Some(backing) = slots.find(table) else { return Ended::NoTable(table) };
            let entry = read_entry(memory, backing.frame, offset, width);
            *step =
                Step { frame: backing.frame, offset, raw: entry.0, writable: backing.writable, real: true, ..*step };
            match decode(format, caps, level, entry) {
                Decoded::NotPresent => {
                    reflect.rights = Access::NONE;
                    return Ended::Reflect(reflect.not_present());
                }
                Decoded::Reserved => return Ended::Reflect(reflect.reserved()),
                Decoded::Table { gfn, access, accessed } => {
                    walk.accessed &= accessed;
                    reflect.rights = reflect.rights.and(access);
                    table = gfn;
                }
                Decoded::Leaf { gfn, access, accessed, dirty } => {
                    walk.accessed &= accessed;
                    reflect.rights = reflect.rights.and(access);
                    if !reflect.rights.allows(format.needed(request)) {
                        return Ended::Reflect(reflect.denied());
                    }
                    walk.gfn = shadow_leaf(format, level, gfn, l2);
                    walk.access = reflect.rights;
                    walk.dirty = dirty;
                    return Ended::AtPage;
                }
            }
        }
        step.next = table;
        step.access = reflect.rights;
        walk.level = below(level);
    }
}

/// The frame where a shadow leaf of `level` at `l2` begins: a 4 MiB page is two shadow leaves.
#[must_use]
pub const fn shadow_leaf(format: Format, level: Level, gfn: Gfn, l2: L2Gfn) -> Gfn {
    match (format, level) {
        (Format::Bits32 { .. }, Level::M2) => Gfn(gfn.0 | l2.0 & 512),
        _ => gfn,
    }
}

/// Sets the accessed flags along `walk`, and the leaf's dirty flag when the access is a write (SDM 3C 29.3.5, APM
/// 5.4.2). Calls `touched` with each page that was written. Flags in memory that L1 cannot write are left alone.
///
/// Returns `false` when an entry changed since it was read: walk again.
pub fn set_accessed_dirty(
    memory: &mut dyn L1Memory,
    format: Format,
    walk: &mut Walk,
    write: bool,
    mut touched: impl FnMut(Frame),
) -> bool {
    if !format.has_accessed_dirty() || walk.accessed && (walk.dirty || !write) {
        return true;
    }
    let (accessed, dirty) = if format.is_ept() { (ept::ACCESSED, ept::DIRTY) } else { (long::ACCESSED, long::DIRTY) };
    let leaf = walk.level;
    let top = format.root_level();
    for (number, step) in (1u8..).zip(&mut walk.steps.0) {
        if number < leaf.number() || number > top.number() || !step.real {
            continue;
        }
        if matches!(format, Format::Pae { .. }) && number == Level::G1.number() {
            continue; // Pointer-table entries have no flags.
        }
        let wanted = accessed | if write && number == leaf.number() { dirty } else { 0 };
        if step.raw & wanted == wanted || !step.writable {
            continue;
        }
        let wide = !format.has_4_byte_gpte();
        let (old, new) = if wide {
            (step.raw, step.raw | wanted)
        } else {
            let shift = (step.offset & 4) * 8;
            let other = memory.read(step.frame, step.offset & !7) & !(0xffff_ffff << shift);
            (other | step.raw << shift, other | (step.raw | wanted) << shift)
        };
        if memory.exchange(step.frame, step.offset & !7, old, new) == Exchange::Changed {
            return false;
        }
        step.raw |= wanted;
        touched(step.frame);
    }
    if write {
        walk.dirty = true;
    }
    true
}
