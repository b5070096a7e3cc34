//! Builds EPT12 in L1's memory, in any format: what a guest hypervisor does. For models, tests and benchmarks.

use umbra_shared::paging::{ept, legacy, long};
use umbra_shared::{Gfn, L2Gfn, Level};

use crate::access::Access;
use crate::format::Format;
pub use crate::guest::place;
use crate::memory::L1Memory;
use crate::role::below;
use crate::spte::Frame;
use crate::walker::PlainMemory;

/// The entry of `format` that leads to the table at `gfn`, with all rights and the accessed flag set.
#[must_use]
pub const fn table_entry(format: Format, level: Level, gfn: Gfn) -> u64 {
    match (format, level) {
        (Format::Ept { .. }, _) => gfn.address() | ept::RIGHTS | ept::ACCESSED,
        (Format::Pae { .. }, Level::G1) => gfn.address() | long::PRESENT,
        _ => gfn.address() | long::PRESENT | long::WRITE | long::USER | long::ACCESSED,
    }
}

/// The entry of `format` that maps a page of `level` at `gfn` with `access`. `used` sets the accessed flag and, where
/// writes are allowed, the dirty flag.
#[must_use]
pub const fn leaf_entry(format: Format, level: Level, gfn: Gfn, access: Access, used: bool) -> u64 {
    let large = level as u8 > 1;
    let writes = access.allows(Access::WRITE);
    if format.is_ept() {
        return gfn.address()
            | access.bits()
            | ept::WRITE_BACK
            | if large { ept::LARGE } else { 0 }
            | if used { ept::ACCESSED } else { 0 }
            | if used && writes { ept::DIRTY } else { 0 };
    }
    let nx = matches!(format, Format::Npt { nx: true, .. } | Format::Pae { nx: true });
    let address = match format {
        // PSE-36: address bits 39:32 go to bits 20:13.
        Format::Bits32 { .. } if large => {
            let bytes = gfn.address();
            bytes & legacy::LARGE_ADDRESS_MASK as u64 | (bytes >> 32 & 0xff) << legacy::LARGE_HIGH_SHIFT
        }
        _ => gfn.address(),
    };
    address
        | long::PRESENT
        | long::USER
        | if writes { long::WRITE } else { 0 }
        | if large { long::LARGE } else { 0 }
        | if nx && !access.allows(Access::EXECUTE) { long::NO_EXECUTE } else { 0 }
        | if used { long::ACCESSED } else { 0 }
        | if used && writes { long::DIRTY } else { 0 }
}

/// L2 frames that one guest entry of `level` covers.
#[must_use]
pub const fn span(format: Format, level: Level) -> u64 {
    match (format, level) {
        (Format::Bits32 { .. }, Level::M2) => 1024,
        _ => level.frames(),
    }
}

/// A guest's tables. Frames and guest frames agree where the tables lie.
#[derive(Debug)]
pub struct Tables {
    /// The format.
    pub format: Format,
    /// The root table.
    pub root: Gfn,
    next: u64,
    end: u64,
}

impl Tables {
    /// An empty root at frame `first`; tables may use the frames up to `end`.
    #[must_use]
    pub const fn new(format: Format, first: u64, end: u64) -> Self {
        Self { format, root: Gfn(first), next: first + 1, end }
    }

    /// The address that the root is loaded by.
    #[must_use]
    pub const fn address(&self) -> u64 {
        self.root.address()
    }

    /// Frames that tables took so far.
    #[must_use]
    pub const fn used(&self) -> u64 {
        self.next - self.root.0
    }

    /// The next frame for a table; the last one again and again when there is no more room.
    pub fn allocate(&mut self) -> Gfn {
        let gfn = Gfn(self.next);
        if self.next + 1 < self.end {
            self.next += 1;
        }
        gfn
    }

    /// Reads a guest entry.
    #[must_use]
    pub fn read(memory: &PlainMemory, table: Gfn, (offset, width): (u64, u64)) -> u64 {
        let word = memory.read(Frame(table.0), offset & !7);
        if width == 8 { word } else { word >> ((offset & 4) * 8) & 0xffff_ffff }
    }

    /// Writes a guest entry.
    pub fn write(memory: &mut PlainMemory, table: Gfn, (offset, width): (u64, u64), entry: u64) {
        let frame = Frame(table.0);
        let value = if width == 8 {
            entry
        } else {
            let shift = (offset & 4) * 8;
            memory.read(frame, offset & !7) & !(0xffff_ffff << shift) | (entry & 0xffff_ffff) << shift
        };
        memory.write(frame, offset & !7, value);
    }

    /// The guest table of `level` on the way to `l2`; made if it is missing. A leaf in the way is replaced.
    pub fn table(&mut self, memory: &mut PlainMemory, l2: L2Gfn, level: Level) -> Gfn {
        let mut table = self.root;
        let mut at = self.format.root_level();
        while at > level {
            if let Some(place) = place(self.format, at, l2) {
                let entry = Self::read(memory, table, place);
                let present = if self.format.is_ept() { ept::RIGHTS } else { long::PRESENT };
                let leaf = at <= self.format.max_leaf() && entry & long::LARGE != 0;
                table = if entry & present != 0 && !leaf {
                    Gfn((entry & umbra_shared::paging::ADDRESS_MASK) >> 12)
                } else {
                    let new = self.allocate();
                    Self::write(memory, table, place, table_entry(self.format, at, new));
                    new
                };
            }
            at = below(at);
        }
        table
    }

    /// Maps the page of `level` at `l2` to `gfn`.
    pub fn map(&mut self, memory: &mut PlainMemory, l2: L2Gfn, gfn: Gfn, level: Level, access: Access, used: bool) {
        let table = self.table(memory, l2, level);
        if let Some(place) = place(self.format, level, l2) {
            Self::write(memory, table, place, leaf_entry(self.format, level, gfn, access, used));
        }
    }

    /// Lets the table of `level` that covers `l2` be `table`: two ranges then share it.
    pub fn share(&mut self, memory: &mut PlainMemory, l2: L2Gfn, level: Level, table: Gfn) {
        let Some(above) = Level::from_number(level.number() + 1) else { return };
        let parent = self.table(memory, l2, above);
        if let Some(place) = place(self.format, above, l2) {
            Self::write(memory, parent, place, table_entry(self.format, above, table));
        }
    }
}
