//! What L1 does: builds its tables, changes entries, invalidates, loads and drops roots.

use std::collections::BTreeMap;

use umbra_shared::{Gfn, L2Gfn, Level};

use super::super::draw::{DATA, Rng, Setup, TABLES};
use super::{Loaded, PAGES, REGIONS, World, index};
use crate::access::Access;
use crate::config::{MmuError, RootPolicy};
use crate::format::Format;
use crate::memory::L1Memory;
use crate::reference::Context;
use crate::role::{ModeBits, RootRole, below};
use crate::roots::RootId;
use crate::spte::Frame;
use crate::sync::Invalidation;
use crate::tables::{Tables, leaf_entry, place, table_entry};
use crate::walker::PlainMemory;

impl World {
    /// L1 changes one entry on the way to an address, or any entry of any table.
    pub(super) fn edit(&mut self, a: u32, b: u32, c: u32) {
        let format = self.setup.formats[0];
        let l2 = self.l2(a, b);
        let mut rng = Rng(u64::from(c) << 32 | u64::from(a ^ b));
        let root = Gfn(rng.pick(&self.roots) >> 12);
        let mut table = root;
        let mut level = format.root_level();
        let stop = rng.pick(&[Level::K4, Level::K4, Level::K4, Level::M2, Level::M2, Level::G1, Level::T512]);
        while level > stop {
            if let Some(at) = place(format, level, l2) {
                let entry = Tables::read(&self.walker.memory, table, at);
                let next = (entry & umbra_shared::paging::ADDRESS_MASK) >> 12;
                let in_pool = (self.setup.tables..self.setup.tables + TABLES).contains(&next);
                if !in_pool || entry.trailing_zeros() >= 3 || entry & 0x80 != 0 {
                    break;
                }
                table = Gfn(next);
            }
            level = below(level);
        }
        let Some(at) = place(format, level, l2) else { return };
        let old = Tables::read(&self.walker.memory, table, at);
        let entry = self.new_entry(&mut rng, format, level, l2, old);
        Tables::write(&mut self.walker.memory, table, at, entry);
    }

    fn new_entry(&self, rng: &mut Rng, format: Format, level: Level, l2: L2Gfn, old: u64) -> u64 {
        let (accessed, dirty, rights) = if format.is_ept() { (1 << 8, 1 << 9, 7) } else { (1 << 5, 1 << 6, 6) };
        match rng.below(16) {
            0 => 0,
            1 => rng.draw(),
            2 => old ^ 1 << rng.below(64),
            3 => old & !accessed,
            4 => old & !dirty,
            5 => old & !(accessed | dirty),
            6 => old & !2,
            7 => old | rights | 1,
            8 if format.is_ept() => old & !7 | rng.pick(&[1, 3, 4, 5, 7]),
            8 => old ^ 1 << 63,
            9 if level > Level::K4 => table_entry(format, level, Gfn(self.setup.tables + rng.below(TABLES))),
            _ => {
                let block = rng.below(9) * 512;
                let access = rng.pick(&[Access::ALL, Access::ALL, Access::READ, Access::READ.or(Access::WRITE)]);
                let used = !rng.once_in(3);
                match level {
                    Level::K4 => {
                        let page = if rng.once_in(2) { l2.0 & 511 } else { rng.pick(&PAGES) };
                        leaf_entry(format, level, Gfn(block | page), access, used)
                    }
                    Level::M2 if format.max_leaf() >= level => {
                        let large = if format.has_4_byte_gpte() { block & !1023 } else { block };
                        leaf_entry(format, level, Gfn(large), access, used)
                    }
                    Level::G1 if format.max_leaf() >= level => {
                        leaf_entry(format, level, Gfn(rng.below(2) << 18), access, used)
                    }
                    _ => old,
                }
            }
        }
    }

    pub(super) fn invalidate(&mut self, a: u32) {
        let now = self.history.now;
        let picked = self.loaded.get(index(a >> 3, self.loaded.len())).map(|loaded| (loaded.id, loaded.context));
        let what = match (a % 8, picked) {
            (0 | 1, _) | (_, None) => Invalidation::All,
            (2 | 3, _) => Invalidation::Table(self.roots[index(a >> 3, self.roots.len())]),
            (4, Some((id, _))) => Invalidation::Root(id),
            (5, Some((id, _))) => Invalidation::Invlpga(id),
            (6, _) => Invalidation::Invvpid,
            (_, _) => Invalidation::L2Cr3,
        };
        for (number, (_, context)) in self.contexts.iter_mut().enumerate() {
            let applies = match what {
                Invalidation::All => true,
                Invalidation::Table(table) => context.table == table,
                Invalidation::Root(_) | Invalidation::Invlpga(_) => picked.is_some_and(|(_, at)| at == number),
                Invalidation::Invvpid | Invalidation::L2Cr3 => false,
            };
            if applies {
                context.since = now;
                context.violated.clear();
            }
        }
        self.mmu.invalidate(&mut self.walker.env(), what);
        let oldest = self.contexts.iter().map(|(_, context)| context.since).min().unwrap_or(now);
        self.history.prune(oldest);
    }

    pub(super) fn load(&mut self, a: u32, b: u32) -> Result<(), String> {
        if self.loaded.len() >= 4 {
            return Ok(());
        }
        let format = self.setup.formats[index(a >> 2, self.setup.formats.len())];
        let role = RootRole {
            format,
            smm: b.is_multiple_of(5),
            guest_mode: true,
            mode: ModeBits(u8::from(b.is_multiple_of(3))),
        };
        let table = self.roots[index(a, self.roots.len())];
        if b % 31 == 1 {
            let refused = self.mmu.load_root(&mut self.walker.env(), role, table | 8);
            return if refused == Err(MmuError::BadTable(table | 8)) { Ok(()) } else { Err(format!("{refused:?}")) };
        }
        self.load_as(role, table).map(|_| ())
    }

    /// L2 is in another role, in any that there is.
    pub(super) fn change_role(&mut self, a: u32, b: u32) -> Result<(), String> {
        if self.loaded.is_empty() {
            return self.load(a, b);
        }
        let at = index(a, self.loaded.len());
        let (role, context) = &self.contexts[self.loaded[at].context];
        let role = RootRole { smm: b.is_multiple_of(4), mode: ModeBits((b >> 4 & 3) as u8), ..*role };
        let table = context.table;
        if self.load_as(role, table)? { self.drop_at(at) } else { Ok(()) }
    }

    /// Loads the root of `table` in `role`. False: there is no memory, and need not be.
    fn load_as(&mut self, role: RootRole, table: u64) -> Result<bool, String> {
        let id = match self.mmu.load_root(&mut self.walker.env(), role, table) {
            Ok(id) => id,
            Err(MmuError::NoMemory) if self.starved => return Ok(false),
            Err(error) => return Err(error.to_string()),
        };
        self.loaded_as(id, role, table)?;
        Ok(true)
    }

    /// Root `id` was loaded for `table` in `role`.
    fn loaded_as(&mut self, id: RootId, role: RootRole, table: u64) -> Result<(), String> {
        let now = self.history.now;
        let known = self.contexts.iter().position(|(known, context)| *known == role && context.table == table);
        let context = known.unwrap_or_else(|| {
            let context = Context { format: role.format, table, since: now, violated: BTreeMap::new() };
            self.contexts.push((role, context));
            self.contexts.len() - 1
        });
        match self.loaded.iter_mut().find(|loaded| loaded.id == id) {
            Some(loaded) => {
                // Roles that a policy does not tell apart share a root. It must then be of the same table and format.
                let (served, held) = &self.contexts[loaded.context];
                if (held.format, held.table) != (role.format, table) {
                    return Err(format!("{id:?} serves two formats or tables"));
                }
                let by_mode = self.setup.config.roots != RootPolicy::AddressSpace;
                if served.smm != role.smm || by_mode && served.mode != role.mode {
                    return Err(format!("{id:?} serves {served:?} and {role:?}"));
                }
                loaded.count += 1;
                // What applies to one applies to all that the root serves.
                let since = held.since.min(self.contexts[context].1.since);
                let held = loaded.context;
                self.contexts[held].1.since = since;
            }
            None => self.loaded.push(Loaded { id, context, count: 1 }),
        }
        Ok(())
    }

    pub(super) fn drop_root(&mut self, a: u32) -> Result<(), String> {
        if self.loaded.is_empty() {
            return Ok(());
        }
        self.drop_at(index(a, self.loaded.len()))
    }

    fn drop_at(&mut self, at: usize) -> Result<(), String> {
        let id = self.loaded[at].id;
        self.mmu.drop_root(&mut self.walker.env(), id).map_err(|error| error.to_string())?;
        self.loaded[at].count -= 1;
        if self.loaded[at].count == 0 {
            self.loaded.swap_remove(at);
            let (policy, is_there) = (self.setup.config.roots, self.mmu.load_count(id).is_ok());
            match policy {
                RootPolicy::Keep if !is_there => return Err(format!("{id:?} is gone, and {policy:?} keeps it")),
                RootPolicy::Drop | RootPolicy::AddressSpace if is_there => {
                    return Err(format!("{id:?} is still there, and {policy:?} drops it"));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// L1's tables at the start. Returns the root tables' addresses.
pub(super) fn build(setup: &Setup, memory: &mut PlainMemory) -> Vec<u64> {
    let mut rng = Rng(setup.seed);
    let format = setup.formats[0];
    let mut tables = Tables::new(format, setup.tables, setup.tables + TABLES);
    let regions: Vec<u64> = REGIONS.into_iter().filter(|region| region << 9 < format.frames()).collect();
    let mut small = Vec::new();
    for (number, &region) in regions.iter().enumerate() {
        let l2 = L2Gfn(region << 9);
        let block = rng.below(5) * 512;
        let access = rng.pick(&[Access::ALL, Access::ALL, Access::ALL, Access::READ.or(Access::EXECUTE)]);
        match rng.below(6) {
            0 | 1 if format.max_leaf() >= Level::M2 => {
                let block = if format.has_4_byte_gpte() { block & !1023 } else { block };
                tables.map(memory, l2, Gfn(block), Level::M2, access, !rng.once_in(3));
            }
            2 if format.max_leaf() == Level::G1 && setup.giant && region.is_multiple_of(512) => {
                tables.map(memory, l2, Gfn(0), Level::G1, access, true);
            }
            3 if !small.is_empty() && !format.has_4_byte_gpte() => {
                let other = rng.pick(&small);
                tables.share(memory, l2, Level::K4, other);
            }
            4 if number > 5 => {}
            _ => {
                let straight = rng.once_in(2);
                for run in [0..24, 60..70, 96..132, 316..324, 506..512] {
                    for page in run {
                        let target = if straight { page } else { page * 37 % 512 };
                        let used = !rng.once_in(4);
                        tables.map(memory, l2.plus(page), Gfn(block + target), Level::K4, access, used);
                    }
                }
                small.push(tables.table(memory, l2, Level::K4));
            }
        }
    }
    // A second root that shares the first one's tables, with one entry of its own.
    let second = tables.allocate();
    for offset in (0..4096).step_by(8) {
        let value = memory.read(Frame(tables.root.0), offset);
        memory.write(Frame(second.0), offset, value);
    }
    vec![tables.address(), second.address()]
}

const _: () = assert!(DATA.is_multiple_of(512));
