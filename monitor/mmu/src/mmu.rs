//! The shadow MMU: its state, and loading and dropping roots. What it does with them is in the modules beside.

use umbra_shared::{Gfn, L2Gfn, Level};

use crate::arena::Arena;
use crate::config::{Config, MmuError, RootPolicy};
use crate::defects::{Defect, Defects};
use crate::format::Format;
use crate::memory::{Env, Slot, Slots};
use crate::outbox::{Outbox, extent};
use crate::ptelist::{Allowance, PteLists};
use crate::rmap::Rmaps;
use crate::role::{ModeBits, Role, RootRole, level_of};
use crate::roots::{RootId, Roots};
use crate::spte::{Spte, SpteRef};
use crate::stats::{Memory, Stats};
use crate::track::{Tracking, twin};

/// A shadow MMU for one L2 guest (all its vCPUs and address spaces).
///
/// Every operation leaves the MMU consistent, also when it returns an error, and posts what changed to the mapper
/// before it returns.
#[derive(Debug)]
pub struct Mmu {
    pub(crate) config: Config,
    pub(crate) defects: Defects,
    pub(crate) arena: Arena,
    pub(crate) lists: PteLists,
    pub(crate) rmaps: Rmaps,
    pub(crate) roots: Roots,
    pub(crate) slots: Slots,
    pub(crate) out: Outbox,
    pub(crate) stats: Stats,
    pub(crate) track: Option<Box<Tracking>>,
    /// Memory for copies of huge leaves that none is in, and how much of that is kept.
    pub(crate) spare: Vec<twin::Room>,
    pub(crate) prepared_twins: usize,
    pub(crate) stamp: u32,
    pub(crate) visit: u32,
    pub(crate) hand: u32,
    hints: [Hint; HINTS],
}

/// Lowest pages that walks of EPT02 found lately, as a processor's paging-structure cache has them.
const HINTS: usize = 16;
const HINT_MASK: u64 = 15;

/// The lowest shadow page for 512 L2 frames of a root, while no link is removed.
#[derive(Clone, Copy, Debug)]
struct Hint {
    region: u64,
    root: RootId,
    page: u32,
}

impl Hint {
    /// Reaches nothing: there is no such region.
    const NONE: Self = Self { region: u64::MAX, root: RootId::FIRST, page: 0 };

    /// Where the hint for `region` is.
    #[inline]
    const fn place(region: u64) -> usize {
        (region & HINT_MASK) as usize
    }
}

/// Where a walk of EPT02 ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub at: SpteRef,
    pub level: Level,
    pub spte: Spte,
}

impl Mmu {
    /// An MMU without roots over L1's memory as `slots` map it.
    ///
    /// # Errors
    /// A configuration or memory map that makes no sense, with the reason.
    pub fn new(config: Config, slots: &[Slot]) -> Result<Self, MmuError> {
        config.check()?;
        Ok(Self {
            defects: Defects::default(),
            arena: Arena::new(config.seed),
            lists: PteLists::new(config.caches.desc_bytes, config.caches.inline_two),
            rmaps: Rmaps::new(config.memory_frames, config.longest_list),
            roots: Roots::default(),
            slots: Slots::new(slots, config.memory_frames).map_err(MmuError::BadSlots)?,
            out: Outbox::new(),
            stats: Stats::default(),
            track: None,
            spare: Vec::new(),
            prepared_twins: 0,
            stamp: 0,
            visit: 0,
            hand: 0,
            hints: [Hint::NONE; HINTS],
            config,
        })
    }

    /// Switches seeded defects on. Without the feature `defects` this changes nothing.
    pub fn set_defects(&mut self, defects: Defects) {
        self.defects = defects;
    }

    #[inline]
    pub(crate) fn defect(&self, defect: Defect) -> bool {
        self.defects.has(defect)
    }

    /// Lets only `count` more allocations of each kind succeed; `u32::MAX` for no limit. For tests of what happens then.
    pub fn limit_allocations(&mut self, count: u32) {
        self.arena.allowance = Allowance(count);
        self.lists.allowance = Allowance(count);
        self.rmaps.allowance = Allowance(count);
    }

    /// The configuration.
    #[must_use]
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// L1's memory map.
    #[must_use]
    pub const fn slots(&self) -> &Slots {
        &self.slots
    }

    /// Counts of events so far.
    #[must_use]
    pub const fn stats(&self) -> Stats {
        self.stats
    }

    /// Shadow pages in use.
    #[must_use]
    pub const fn shadow_pages(&self) -> u32 {
        self.arena.in_use()
    }

    /// Roots in being, loaded or kept.
    #[must_use]
    pub fn root_count(&self) -> usize {
        self.roots.iter().count()
    }

    /// Whether tracking is on.
    #[must_use]
    pub const fn tracking(&self) -> bool {
        self.track.is_some()
    }

    /// Heap bytes in use, to the byte.
    #[must_use]
    pub fn memory_in_use(&self) -> Memory {
        Memory {
            table_bytes: self.arena.bytes(),
            rmap_bytes: self.rmaps.bytes() + self.lists.bytes(),
            cache_bytes: self.arena.cached().1 + self.lists.cached().1,
            track_bytes: self.track.as_ref().map_or(0, |track| track.bytes() + size_of::<Tracking>() as u64)
                + (self.spare.capacity() * size_of::<twin::Room>()) as u64
                + self.spare.iter().map(twin::room_bytes).sum::<u64>(),
            other_bytes: self.roots.bytes() + self.slots.bytes() + self.out.bytes(),
        }
    }

    /// Bytes that the MMU takes at most, whatever the guest does: `quota` shadow pages with their entries, reverse maps
    /// of all of L1's memory, and a list entry for every leaf and link at its worst descriptor use. Twins, bitmaps and
    /// the split caches come on top as configured.
    #[must_use]
    pub fn memory_bound(&self) -> u64 {
        let pages = u64::from(self.config.quota());
        let caches = self.config.caches;
        let per_page = 4096 + 256 + 512 * u64::from(caches.desc_bytes) * 5 / 4;
        let rmaps = self.config.memory_frames * 9 + 65536;
        let held_back = u64::from(caches.pages.capacity) * 4200
            + u64::from(caches.descs.capacity) * (u64::from(caches.desc_bytes) + 4) * 2;
        let l2 = u64::from(self.config.max_l2_regions) * 200;
        let twins = u64::from(self.config.max_twins) * (512 * 4096 + 192);
        pages * per_page + rmaps + held_back + l2 + twins + self.config.memory_frames / 2 + (1 << 20)
    }

    /// Loads the root that translates through `table` (an L1 GPA, without EPTP or CR3 flags) in `role`. A root that
    /// exists is used again; if an invalidation applied to it meanwhile, it is synchronised first.
    ///
    /// # Errors
    /// [`MmuError::BadTable`] for an address that the format cannot have; no memory.
    pub fn load_root(&mut self, env: &mut Env<'_>, role: RootRole, table: u64) -> Result<RootId, MmuError> {
        let alignment = if matches!(role.format, Format::Pae { .. }) { 32 } else { 4096 };
        let width = if matches!(role.format, Format::Pae { .. } | Format::Bits32 { .. }) {
            32
        } else {
            self.config.caps.address_bits
        };
        if !table.is_multiple_of(alignment) || table >> width != 0 {
            return Err(MmuError::BadTable(table));
        }
        let mode = if self.config.roots == RootPolicy::AddressSpace { ModeBits(0) } else { role.mode };
        let mut role = RootRole { mode, ..role };
        if self.defect(Defect::RoleNotTold) {
            role = RootRole { mode: ModeBits(0), smm: false, ..role };
        }
        let offset = ((table & 0xfff) >> 5) as u8;
        let (gfn, page_role) = (Gfn::containing(table), Role::root(role, offset));
        let mut found = self.arena.find(gfn, page_role).map(|page| self.arena.header(page).root());
        if self.defect(Defect::StaleRole) && found.is_none() {
            let same_kind = |format: Format| {
                format.is_ept() == role.format.is_ept() && format.root_level() == role.format.root_level()
            };
            let stale = self.roots.iter().find(|root| root.table == table && same_kind(root.role.format));
            found = stale.map(|root| root.id.index());
        }
        let index = match found {
            Some(index) => {
                self.stats.roots_reused += 1;
                index
            }
            None => self.new_root(env, role, table, page_role)?,
        };
        let (root, pending) = self.roots.load(index).ok_or(MmuError::StaleRoot)?;
        if pending {
            self.sync_root(env, index);
            self.finish(env);
        }
        Ok(root)
    }

    fn new_root(&mut self, env: &mut Env<'_>, role: RootRole, table: u64, page_role: Role) -> Result<u32, MmuError> {
        let room = self.make_pages_available(env, 1);
        self.finish(env);
        room?;
        let page = self.alloc_page(Gfn::containing(table), page_role, false)?;
        let Some(id) = self.roots.add(page, role, table) else {
            self.arena.release(page);
            return Err(MmuError::NoMemory);
        };
        self.arena.header_mut(page).set_root(id.index());
        Ok(id.index())
    }

    /// Ends one use of `root`. What becomes of it when nobody uses it any more is the root policy's.
    ///
    /// # Errors
    /// The root is stale or was not loaded.
    pub fn drop_root(&mut self, env: &mut Env<'_>, root: RootId) -> Result<(), MmuError> {
        if self.roots.get(root)?.count == 0 {
            return Err(MmuError::StaleRoot);
        }
        if self.defect(Defect::CountLeak) {
            return Ok(());
        }
        let left = self.roots.unload(root.index()).unwrap_or(0);
        let drops = matches!(self.config.roots, RootPolicy::Drop | RootPolicy::AddressSpace);
        if left == 0 && (drops || self.defect(Defect::KeptRootZapped)) {
            self.zap_root(env, root.index());
            self.finish(env);
        }
        Ok(())
    }

    /// Times that `root` is loaded now.
    ///
    /// # Errors
    /// It is stale.
    pub fn load_count(&self, root: RootId) -> Result<u32, MmuError> {
        self.roots.get(root).map(|root| root.count)
    }

    pub(crate) fn zap_root(&mut self, env: &mut Env<'_>, index: u32) {
        let Some(root) = self.roots.at(index).copied() else { return };
        self.drain_log();
        self.save_dirty_below(root.page);
        let whole = extent(root.id, 0, root.role.format.frames());
        self.out.unmap(env.mapper, &mut self.stats, whole);
        if !self.defect(Defect::RootZapUnflushed) {
            self.out.flush(whole);
        }
        self.stats.roots_zapped += 1;
        self.free_page(env, root.page);
        self.roots.remove(index);
    }

    /// Walks EPT02 from `page` down to a leaf or to where nothing is present.
    #[inline]
    pub(crate) fn lookup(&self, page: u32, l2: L2Gfn) -> Found {
        let mut page = page;
        let mut shift = 9 * (self.arena.header(page).role.level() as u32 - 1);
        loop {
            let index = (l2.0 >> shift & 511) as usize;
            let spte = self.arena.spte(SpteRef::new(page, index));
            if shift == 0 || spte.ends_walk() {
                return Found { at: SpteRef::new(page, index), level: level_of(shift / 9 + 1), spte };
            }
            page = spte.child();
            shift -= 9;
        }
    }

    /// The lowest shadow page for `l2` under `root`, if a hint reaches it.
    #[inline]
    fn hint(&self, root: RootId, l2: L2Gfn) -> Option<u32> {
        let region = l2.0 >> 9;
        let hint = self.hints.get(Hint::place(region))?;
        (hint.region == region && hint.root == root).then_some(hint.page)
    }

    /// The small leaf at `l2` under `root`, if a hint reaches it.
    #[inline]
    pub(crate) fn hinted_leaf(&self, root: RootId, l2: L2Gfn) -> Option<(SpteRef, Spte)> {
        let (page, index) = (self.hint(root, l2)?, (l2.0 & 511) as usize);
        Some((SpteRef::new(page, index), self.arena.table(page).get(index).copied()?))
    }

    /// [`Self::lookup`] under `root`, by the hints where they reach.
    #[inline]
    pub(crate) fn lookup_hinted(&mut self, root: RootId, page: u32, l2: L2Gfn) -> Found {
        if let Some((at, spte)) = self.hinted_leaf(root, l2) {
            return Found { at, level: Level::K4, spte };
        }
        let found = self.lookup(page, l2);
        if found.level == Level::K4 {
            let region = l2.0 >> 9;
            if let Some(hint) = self.hints.get_mut(Hint::place(region)) {
                *hint = Hint { region, root, page: found.at.page() };
            }
        }
        found
    }

    /// Voids all hints: a link is about to go.
    pub(crate) fn forget_hints(&mut self) {
        if !self.defect(Defect::HintOutlivesLink) {
            self.hints = [Hint::NONE; HINTS];
        }
    }

    #[inline]
    pub(crate) fn finish(&mut self, env: &mut Env<'_>) {
        let forget = self.defect(Defect::ForgottenFlush);
        self.out.finish(env.mapper, &mut self.stats, forget);
    }
}
