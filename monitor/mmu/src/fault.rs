//! `fault`: from an access that EPT02 did not allow to a mapping, a reflection, or a request for memory.

use umbra_shared::{Gfn, L2Gfn, Level};

use crate::access::{Access, Request};
use crate::arena::Header;
use crate::config::{MmuError, NoMemory, Split};
use crate::defects::Defect;
use crate::format::Format;
use crate::guest::{self, Decoded, Ended, Reflection, Walk};
use crate::memory::{Env, Extent};
use crate::mmu::Mmu;
use crate::outbox::extent;
use crate::role::{Role, below};
use crate::roots::RootId;
use crate::spte::{Frame, Spte, SpteRef};
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
const PAGES_A_FAULT: u32 = 8;
const WALKS: usize = 4;

/// What a slow fault found out.
struct Target<'a> {
    walk: &'a Walk,
    l2: L2Gfn,
    /// Rights of a leaf or direct page: the walk's, without writes while the guest's dirty flag is clear or the slot
    /// is read-only.
    rights: Access,
    /// The page of memory behind `l2`.
    frame: Frame,
    /// The L1 frame behind `l2`.
    gfn: Gfn,
    write: bool,
}

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
    fn resolve_below(
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
    fn trap_any(&mut self, env: &mut Env<'_>, leaf: &Leaf) -> Result<Trapped, NoMemory> {
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
        let (track, stats) = (&mut self.track, &mut self.stats);
        guest::set_accessed_dirty(env.memory, format, walk, write, |frame| {
            stats.guest_flags += 1;
            if let Some(track) = track {
                track.dirty.insert(frame);
            }
        })
    }

    /// The size of the leaf that guest, memory and tracking allow.
    fn leaf_level(&self, target: &Target<'_>) -> Level {
        let limit = target.walk.level.min(self.config.max_level);
        if limit == Level::K4 {
            return limit;
        }
        let mut level = self.slots.max_level(target.gfn, limit, self.defect(Defect::CollapseAcrossSlot));
        if let Some(track) = &self.track
            && target.write
        {
            while level > Level::K4 {
                let base = base_frame(target, level);
                if track.strategy.traps_huge(track, level) || track.strategy.admit(track, base, level, false) {
                    break;
                }
                level = below(level);
            }
        }
        level
    }

    /// Brings EPT02 into accord with `target`'s walk, down to a leaf.
    fn map(&mut self, env: &mut Env<'_>, root: RootId, page: u32, target: &Target<'_>) -> Result<Outcome, NoMemory> {
        let goal = self.leaf_level(target);
        if self.defect(Defect::FaultMapsNothing) && target.l2.0 & 15 == 5 {
            return Ok(Outcome::Mapped { level: goal });
        }
        let mut page = page;
        loop {
            let role = self.arena.header(page).role;
            let level = role.level();
            let index = Format::shadow_index(level, target.l2);
            let at = SpteRef::new(page, index);
            if level > target.walk.level {
                let spte = self.arena.spte(at);
                let step = target.walk.steps.at(level);
                let child = self.arena.header(spte.child());
                let fits = !spte.ends_walk()
                    && child.gfn == step.next
                    && child.role == role.child(false, step.access, guest::child_quadrant(role, index));
                if fits {
                    page = spte.child();
                    continue;
                }
            } else if level <= goal && !self.has_split_child(at, role, target) {
                let leaf = (target.l2, target.rights, base_frame(target, level), target.write);
                return self.map_leaf(env, root, at, level, leaf);
            }
            page = self.child_for(env, at, role, target)?;
        }
    }

    /// Whether `at` already has the table that splits the target's leaf. Faults fill it, rather than replace it by a
    /// leaf: that is what `collapse` is for.
    fn has_split_child(&self, at: SpteRef, role: Role, target: &Target<'_>) -> bool {
        let (spte, level) = (self.arena.spte(at), role.level());
        if !spte.present() || spte.is_leaf(level) {
            return false;
        }
        let child = self.arena.header(spte.child());
        (child.gfn, child.role) == self.child_identity(at, role, target)
    }

    /// The identity of the child at `at`: the guest's next table, or a part of the guest's leaf.
    fn child_identity(&self, at: SpteRef, role: Role, target: &Target<'_>) -> (Gfn, Role) {
        let level = role.level();
        if level > target.walk.level {
            let step = target.walk.steps.at(level);
            let mut quadrant = guest::child_quadrant(role, at.index());
            if level == Level::M2 && self.defect(Defect::WrongQuadrantTable)
                || level == Level::G1 && self.defect(Defect::WrongQuadrantDirectory)
            {
                quadrant = 0;
            }
            (step.next, role.child(false, step.access, quadrant))
        } else {
            (target.gfn.align_down(level), role.child(true, self.split_rights(target.rights), 0))
        }
    }

    pub(crate) fn split_rights(&self, rights: Access) -> Access {
        if self.defect(Defect::AccessWidenedAtSplit) { rights.or(Access::READ).or(Access::EXECUTE) } else { rights }
    }

    fn child_for(&mut self, env: &mut Env<'_>, at: SpteRef, role: Role, target: &Target<'_>) -> Result<u32, NoMemory> {
        let level = role.level();
        let (gfn, child_role) = self.child_identity(at, role, target);
        let spte = self.arena.spte(at);
        if spte.is_leaf(level) {
            let same = child_role.direct()
                && spte.frame() == base_frame(target, level)
                && spte.access().or(Access::WRITE) == target.rights.or(Access::WRITE)
                && spte.mmu_writable() == target.rights.allows(Access::WRITE);
            if same && self.config.split != Split::Lazy && self.split_leaf(env, at, level, gfn).is_ok() {
                return Ok(self.arena.spte(at).child());
            }
            self.stats.split_by_zap += 1;
            self.drop_spte(env, at);
        } else if spte.present() {
            let child = self.arena.header(spte.child());
            if child.gfn == gfn && child.role == child_role {
                return Ok(spte.child());
            }
            self.drop_spte(env, at);
        }
        self.link_child(env, at, gfn, child_role)
    }

    /// Finds or makes the page (gfn, role) and links it at `at`. A page that exists may lag behind EPT12, which its
    /// other users may but this path must not see: it is synchronised.
    fn link_child(&mut self, env: &mut Env<'_>, at: SpteRef, gfn: Gfn, role: Role) -> Result<u32, NoMemory> {
        if let Some(child) = self.arena.find(gfn, role) {
            if !self.defect(Defect::LinkedUnsynced) {
                self.sync_below(env, child);
            }
            self.link(env, at, child)?;
            return Ok(child);
        }
        let child = self.alloc_page(gfn, role, false)?;
        if let Err(error) = self.link(env, at, child) {
            self.arena.release(child);
            return Err(error);
        }
        Ok(child)
    }

    fn map_leaf(
        &mut self,
        env: &mut Env<'_>,
        root: RootId,
        at: SpteRef,
        level: Level,
        (l2, permitted, frame, write): (L2Gfn, Access, Frame, bool),
    ) -> Result<Outcome, NoMemory> {
        let old = self.arena.spte(at);
        let mmu_writable = permitted.allows(Access::WRITE);
        let mut rights = permitted;
        if old.is_leaf(level) && old.frame() == frame {
            // Rights change in place; what tracking had opened or closed stays so.
            if self.track.is_some() && !old.writable() && !self.admits(frame, level, at) {
                rights = rights.without(Access::WRITE);
            }
            let mut new = Spte::leaf(frame, level, rights, mmu_writable);
            if old.dirty() {
                new = new.with_dirty();
            }
            self.arena.set(at, new);
            if !old.access().without(rights).is_none() {
                self.announce(env, at, Some(rights));
            }
        } else {
            if old.present() {
                self.drop_spte(env, at);
            }
            if self.track.is_some() && !self.admits(frame, level, at) {
                rights = rights.without(Access::WRITE);
            }
            self.add_leaf(env, at, level, Spte::leaf(frame, level, rights, mmu_writable))?;
        }
        let leaf = Leaf { at, level, l2, root };
        if write && !self.arena.spte(at).writable() && self.trap_any(env, &leaf)? == Trapped::Split {
            return Ok(Outcome::Retry);
        }
        if level == Level::K4 && self.config.extent > 1 {
            self.map_window(env, &leaf);
        } else {
            self.post_map(env, &leaf, self.arena.spte(at));
        }
        Ok(Outcome::Mapped { level })
    }

    /// Whether tracking lets a leaf be mapped open, outside a trap.
    pub(crate) fn admits(&self, frame: Frame, level: Level, at: SpteRef) -> bool {
        let Some(track) = &self.track else { return true };
        let touched = self.arena.header(at.page()).touched >> (at.index() >> 6) & 1 != 0;
        track.strategy.admit(track, frame, level, touched)
    }

    /// Maps the neighbours of a small leaf that are present, allowed and in use, and posts the window's extents.
    fn map_window(&mut self, env: &mut Env<'_>, leaf: &Leaf) {
        let window = self.config.extent as usize;
        let first = leaf.at.index() & !(window - 1);
        let page = leaf.at.page();
        let (root, base) = leaf.path();
        let base = base - (leaf.at.index() - first) as u64;
        for index in first..first + window {
            let at = SpteRef::new(page, index);
            if at != leaf.at && (self.arena.spte(at).present() || !self.map_neighbour(env, at)) {
                continue;
            }
            let spte = self.arena.spte(at);
            let extent: Extent = extent(root, base + (index - first) as u64, 1);
            self.out.map(env.mapper, &mut self.stats, extent, (spte.frame(), Level::K4, spte.access()));
        }
    }

    /// Maps what EPT12 has at `at` if that needs no change of EPT12: its accessed flag must be set, and writes wait for
    /// its dirty flag.
    fn map_neighbour(&mut self, env: &mut Env<'_>, at: SpteRef) -> bool {
        let header = *self.arena.header(at.page());
        let role = header.role;
        let (gfn, access) = if role.direct() {
            (header.gfn.plus(at.index() as u64), role.access())
        } else {
            let Some((offset, width)) = guest::entry_place(role, at.index()) else { return false };
            let Some(table) = self.slots.find(header.gfn) else { return false };
            let entry = guest::read_entry(env.memory, table.frame, offset, width);
            let ignore = self.defect(Defect::PrefetchIgnoresAccessed);
            match guest::decode(role.format(), self.config.caps, Level::K4, entry) {
                Decoded::Leaf { gfn, access, accessed, dirty } if accessed || ignore => {
                    (gfn, role.access().and(if dirty { access } else { access.without(Access::WRITE) }))
                }
                _ => return false,
            }
        };
        let Some(backing) = self.slots.find(gfn) else { return false };
        let permitted = if backing.writable { access } else { access.without(Access::WRITE) };
        let open = permitted.allows(Access::WRITE) && self.admits(backing.frame, Level::K4, at);
        let rights = if open { permitted } else { permitted.without(Access::WRITE) };
        if rights.is_none() {
            return false;
        }
        let leaf = Spte::leaf(backing.frame, Level::K4, rights, permitted.allows(Access::WRITE));
        self.add_leaf(env, at, Level::K4, leaf).is_ok()
    }
}

/// The first frame of the leaf of `level` around the target. Memory is contiguous there: see `Slots::max_level`.
const fn base_frame(target: &Target<'_>, level: Level) -> Frame {
    Frame(target.frame.0.wrapping_sub(target.l2.0 & (level.frames() - 1)))
}
