//! `fault`: from an access that EPT02 did not allow to a mapping, a reflection, or a request for memory.

use umbra_shared::{Gfn, L2Gfn, Level};

use crate::access::{Access, Request};
use crate::arena::Header;
use crate::config::{MmuError, NoMemory};
use crate::defects::Defect;
use crate::format::Format;
use crate::guest::{self, Decoded, Ended, Reflection, Walk};
use crate::map::Target;
use crate::memory::Env;
use crate::mmu::Mmu;
use crate::outbox::extent;
use crate::roots::RootId;
use crate::spte::{Spte, SpteRef};
use crate::track::{Leaf, Trapped};

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// EPT02 allows the access now: resume L2.
    Mapped {
        /// The size of the leaf.
        level: Level,
    },
    /// EPT12 does not permit it: L1 gets this exit.
    Reflected(Reflection),
    /// L1's memory map has nothing writable (or nothing at all) there: a matter for the monitor.
    WantsMemory {
        /// The L1 frame: of the page, or of a table on the way.
        gfn: Gfn,
        /// The access was a write.
        write: bool,
    },
    /// L1 keeps changing the entries that were walked: resume L2 and see.
    Retry,
}

/// Pages that a fault may need: a walk, and a 1 GiB leaf split twice.
pub(crate) const PAGES_A_FAULT: u32 = 8;
const WALKS: usize = 4;

impl Mmu {
    /// Handles L2's access to `l2_gpa` under `root`, which EPT02 or a stale translation did not allow.
    ///
    /// A/D flags of EPT12 are set when the access is permitted and lies in memory, also if memory for tables then runs
    /// out. The architecture allows an accessed flag for an access that is tried again (SDM 3C 29.3.5).
    ///
    /// # Errors
    /// A stale root, or no memory: nothing was mapped then.
    pub fn fault(
        &mut self,
        env: &mut Env<'_>,
        root: RootId,
        l2_gpa: u64,
        request: Request,
    ) -> Result<Outcome, MmuError> {
        self.stats.faults += 1;
        let l2 = L2Gfn::containing(l2_gpa);
        // A page that hints reach is found at once; everything else, and what this does not settle, the long way.
        match self.hinted_leaf(root, l2) {
            Some((at, spte)) if spte.is_closed() && request.is_write() => {
                self.fault_closed(env, root, l2, at);
                Ok(Outcome::Mapped { level: Level::K4 })
            }
            Some((at, spte)) if !spte.present() && !request.table_walk => {
                self.fault_absent(env, (root, at), l2, request)
            }
            _ => self.fault_slowly(env, root, l2, request),
        }
    }

    /// A write hit a small leaf that is only closed.
    fn fault_closed(&mut self, env: &mut Env<'_>, root: RootId, l2: L2Gfn, at: SpteRef) {
        self.stats.wp_faults += 1;
        self.trap(env, &Leaf { at, level: Level::K4, l2, root });
        self.finish(env);
    }

    // What is out of line here is so that the short path above it saves no registers for it.

    /// An entry of a known lowest page is not present.
    #[inline(never)]
    fn fault_absent(
        &mut self,
        env: &mut Env<'_>,
        (root, at): (RootId, SpteRef),
        l2: L2Gfn,
        request: Request,
    ) -> Result<Outcome, MmuError> {
        let outcome = self.resolve_below(env, root, at, l2, request.kind.needs());
        // Also when it failed: what was pushed out on the way is posted.
        self.finish(env);
        match outcome? {
            Some(outcome) => Ok(outcome),
            None => self.fault_slowly(env, root, l2, request),
        }
    }

    #[inline(never)]
    fn fault_slowly(
        &mut self,
        env: &mut Env<'_>,
        root: RootId,
        l2: L2Gfn,
        request: Request,
    ) -> Result<Outcome, MmuError> {
        let (page, frames) = self.roots.get(root).map(|root| (root.page, root.frames))?;
        let outcome = self.resolve(env, root, (page, frames), l2, request);
        self.finish(env);
        Ok(outcome?)
    }

    #[inline]
    fn resolve(
        &mut self,
        env: &mut Env<'_>,
        root: RootId,
        (page, frames): (u32, u64),
        l2: L2Gfn,
        request: Request,
    ) -> Result<Outcome, NoMemory> {
        let needed = self.arena.header(page).role.format().needed(request);
        if l2.0 < frames {
            let found = self.lookup_hinted(root, page, l2);
            let spte = found.spte;
            if spte.is_leaf(found.level) {
                let leaf = Leaf { at: found.at, level: found.level, l2, root };
                if spte.access().allows(needed) {
                    self.stats.spurious += 1;
                    self.post_map(env, &leaf, spte);
                    return Ok(Outcome::Mapped { level: found.level });
                }
                if needed == Access::WRITE && spte.mmu_writable() {
                    self.stats.wp_faults += 1;
                    if self.trap_any(env, &leaf)? == Trapped::Opened {
                        return Ok(Outcome::Mapped { level: found.level });
                    }
                }
            }
            if !spte.present()
                && found.level == Level::K4
                && let Some(outcome) = self.resolve_below(env, root, found.at, l2, needed)?
            {
                return Ok(outcome);
            }
        }
        self.resolve_by_walk(env, root, page, l2, request)
    }

    /// Resolves a fault from the lowest shadow page alone, as a processor does that has the upper entries cached: the
    /// entries above count as they were when they were linked or last synchronised, the lowest is read now. `None` when
    /// that does not permit the access; a walk from the top then decides.
    pub(crate) fn resolve_below(
        &mut self,
        env: &mut Env<'_>,
        root: RootId,
        at: SpteRef,
        l2: L2Gfn,
        needed: Access,
    ) -> Result<Option<Outcome>, NoMemory> {
        let Header { gfn: table, role, .. } = *self.arena.header(at.page());
        let write = needed == Access::WRITE;
        if role.direct() || self.defect(Defect::FaultMapsNothing) {
            return Ok(None);
        }
        let Some((offset, width)) = guest::entry_place(role, at.index()) else { return Ok(None) };
        let Some(tables) = self.slots.find(table) else { return Ok(None) };
        let entry = guest::read_entry(env.memory, tables.frame, offset, width);
        let format = role.format();
        let (gfn, access, accessed, dirty) = if let Some(flags) = guest::plain_leaf(format, self.config.caps, entry) {
            (Gfn(entry.0 >> 12 & 0xff_ffff_ffff), Access::ALL, flags.accessed, flags.dirty)
        } else {
            let decoded = guest::decode(format, self.config.caps, Level::K4, entry);
            let Decoded::Leaf { gfn, access, accessed, dirty } = decoded else { return Ok(None) };
            (gfn, access, accessed, dirty)
        };
        let Some(backing) = self.slots.find(gfn) else { return Ok(None) };
        let rights = role.access().and(access);
        // Flags that must be set, and what is not permitted, take the long way.
        if !rights.allows(needed) || !accessed || write && !(dirty && backing.writable) {
            return Ok(None);
        }
        let writable = backing.writable && (dirty || self.defect(Defect::DirtyFlagIgnored));
        let rights = if writable { rights } else { rights.without(Access::WRITE) };
        self.map_leaf(env, root, at, Level::K4, (l2, rights, backing.frame, write)).map(Some)
    }

    /// A write hit a leaf that is only closed.
    pub(crate) fn trap_any(&mut self, env: &mut Env<'_>, leaf: &Leaf) -> Result<Trapped, NoMemory> {
        if leaf.level > Level::K4
            && let Some(strategy) = self.track.as_ref().map(|track| track.strategy)
        {
            return strategy.trap_huge(self, env, leaf);
        }
        self.trap(env, leaf);
        Ok(Trapped::Opened)
    }

    /// [`Self::trap_any`] for a small leaf, or while tracking is off.
    #[inline]
    fn trap(&mut self, env: &mut Env<'_>, leaf: &Leaf) {
        match self.track.as_ref().map(|track| track.strategy) {
            Some(strategy) => strategy.trap(self, env, leaf),
            None => self.open(env, leaf.at, Some(leaf.path())),
        }
    }

    #[inline(never)]
    pub(crate) fn post_map(&mut self, env: &mut Env<'_>, leaf: &Leaf, spte: Spte) {
        let (root, start) = leaf.path();
        let extent = extent(root, start, leaf.level.frames());
        self.out.map_now(env.mapper, &mut self.stats, extent, (spte.frame(), leaf.level, spte.access()));
    }

    #[inline(never)]
    fn resolve_by_walk(
        &mut self,
        env: &mut Env<'_>,
        root: RootId,
        page: u32,
        l2: L2Gfn,
        request: Request,
    ) -> Result<Outcome, NoMemory> {
        let (role, table) = (self.arena.header(page).role, self.arena.header(page).gfn);
        let format = role.format();
        let write = format.needed(request) == Access::WRITE;
        let table_walk = request.table_walk && !self.defect(Defect::WalkTakenForAccess);
        let request = Request { table_walk, ..request };
        for _ in 0..WALKS {
            let mut walk = Walk::new();
            let caps = self.config.caps;
            match guest::walk(&mut walk, env.memory, &self.slots, caps, (role, table), l2, request) {
                Ended::AtPage => {}
                Ended::Reflect(reflection) => {
                    // The processor forgets what it had cached for an address that violates (SDM 3C 29.4.3.1).
                    if !self.defect(Defect::ReflectionKeepsLeaf) {
                        self.sync_path(env, page, l2);
                    }
                    self.stats.reflected += 1;
                    return Ok(Outcome::Reflected(reflection));
                }
                Ended::NoTable(gfn) => {
                    self.sync_path(env, page, l2);
                    self.stats.wants_memory += 1;
                    return Ok(Outcome::WantsMemory { gfn, write });
                }
            }
            let gfn = Gfn(walk.gfn.0 | l2.0 & (walk.level.frames() - 1));
            let backing = self.slots.find(gfn).filter(|backing| backing.writable || !write);
            let Some(backing) = backing else {
                self.sync_path(env, page, l2);
                self.stats.wants_memory += 1;
                return Ok(Outcome::WantsMemory { gfn, write });
            };
            if self.arena.in_use() + PAGES_A_FAULT > self.config.quota() {
                self.make_pages_available(env, PAGES_A_FAULT)?;
            }
            if !self.set_guest_flags(env, format, &mut walk, write) {
                continue;
            }
            let writable = backing.writable && (walk.dirty || self.defect(Defect::DirtyFlagIgnored));
            let rights = if writable { walk.access } else { walk.access.without(Access::WRITE) };
            let target = Target { walk: &walk, l2, rights, frame: backing.frame, gfn, write };
            return self.map(env, root, page, &target);
        }
        Ok(Outcome::Retry)
    }

    /// Sets A/D flags in EPT12. The monitor writes L1's memory here, so those pages are dirty too.
    fn set_guest_flags(&mut self, env: &mut Env<'_>, format: Format, walk: &mut Walk, write: bool) -> bool {
        let (track, stats, first_tracked) = (&mut self.track, &mut self.stats, self.config.first_tracked);
        guest::set_accessed_dirty(env.memory, format, walk, write, |frame| {
            stats.guest_flags += 1;
            if let Some(track) = track
                && frame >= first_tracked
            {
                track.dirty.insert(frame);
            }
        })
    }
}
