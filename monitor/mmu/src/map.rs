//! Brings EPT02 into accord with a walk of EPT12: links, splits, leaves, and their neighbours.

use umbra_shared::{Gfn, L2Gfn, Level};

use crate::access::Access;
use crate::block::BLOCK;
use crate::config::{NoMemory, Split};
use crate::defects::Defect;
use crate::fault::Outcome;
use crate::format::Format;
use crate::guest::{self, Decoded, GuestEntry, Walk};
use crate::memory::{Env, Extent};
use crate::mmu::Mmu;
use crate::outbox::extent;
use crate::role::{Role, below};
use crate::roots::RootId;
use crate::spte::{Frame, Spte, SpteRef};
use crate::track::{Leaf, Trapped};

/// What a slow fault found out.
pub(crate) struct Target<'a> {
    pub walk: &'a Walk,
    pub l2: L2Gfn,
    /// Rights of a leaf or direct page: the walk's, without writes while the guest's dirty flag is clear or the slot
    /// is read-only.
    pub rights: Access,
    /// The page of memory behind `l2`.
    pub frame: Frame,
    /// The L1 frame behind `l2`.
    pub gfn: Gfn,
    pub write: bool,
}

impl Mmu {
    /// The size of the leaf that guest, memory and tracking allow.
    pub(crate) fn leaf_level(&self, target: &Target<'_>) -> Level {
        let limit = target.walk.level.min(self.config.max_level);
        if limit == Level::K4 {
            return limit;
        }
        let mut level = self.slots.max_level(target.gfn, limit, self.defect(Defect::CollapseAcrossSlot));
        if let Some(track) = &self.track
            && target.write
            && target.frame >= self.config.first_tracked
        {
            while level > Level::K4 {
                let base = base_frame(target, level);
                if track.strategy.traps_huge(track, base, level) || track.strategy.admit(track, base, level, false) {
                    break;
                }
                level = below(level);
            }
        }
        level
    }

    /// Brings EPT02 into accord with `target`'s walk, down to a leaf.
    pub(crate) fn map(
        &mut self,
        env: &mut Env<'_>,
        root: RootId,
        page: u32,
        target: &Target<'_>,
    ) -> Result<Outcome, NoMemory> {
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

    pub(crate) fn map_leaf(
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
        if frame < self.config.first_tracked {
            return true;
        }
        let touched = self.arena.header(at.page()).touched >> (at.index() >> 6) & 1 != 0;
        track.strategy.admit(track, frame, level, touched)
    }

    /// Maps the neighbours of a small leaf that are present, allowed and in use, and posts the window's extents.
    fn map_window(&mut self, env: &mut Env<'_>, leaf: &Leaf) {
        let window = self.config.extent as usize;
        let first = leaf.at.index() & !(window - 1);
        let (root, base) = leaf.path();
        let base = base - (leaf.at.index() - first) as u64;
        let mut words = [0; BLOCK];
        for start in (first..first + window).step_by(BLOCK) {
            let at = SpteRef::new(leaf.at.page(), start);
            let block: Extent = extent(root, base + (start - first) as u64, window.min(BLOCK) as u64);
            self.map_block(env, leaf, (at, block), &mut words);
        }
    }

    /// Maps `block` of that window, which begins at `at` and is no longer than a block.
    fn map_block(&mut self, env: &mut Env<'_>, leaf: &Leaf, (at, block): (SpteRef, Extent), words: &mut [u64; BLOCK]) {
        let words = self.guest_block(env, at, words);
        if block.frames == BLOCK as u64
            && let Some(spte) = self.map_straight(at, words)
        {
            return self.out.map(env.mapper, &mut self.stats, block, (spte.frame(), Level::K4, spte.access()));
        }
        for (start, index) in (block.start.0..block.start.0 + block.frames).zip(at.index()..) {
            let at = SpteRef::new(at.page(), index);
            if at != leaf.at {
                let word = words.and_then(|words| words.get(index % BLOCK)).copied();
                // An entry of 0 is present in no format.
                if self.arena.spte(at).present() || word == Some(0) || !self.map_neighbour(env, at, word) {
                    continue;
                }
            }
            let (spte, page) = (self.arena.spte(at), extent(block.root, start, 1));
            self.out.map(env.mapper, &mut self.stats, page, (spte.frame(), Level::K4, spte.access()));
        }
    }

    /// Maps what EPT12 has at `at` (`word`, if that was read already) if that needs no change of EPT12: its accessed flag must be set, and
    /// writes wait for its dirty flag.
    fn map_neighbour(&mut self, env: &mut Env<'_>, at: SpteRef, word: Option<u64>) -> bool {
        let header = *self.arena.header(at.page());
        let role = header.role;
        let (gfn, access) = if role.direct() {
            (header.gfn.plus(at.index() as u64), role.access())
        } else {
            let entry = if let Some(word) = word {
                GuestEntry(word)
            } else {
                let Some((offset, width)) = guest::entry_place(role, at.index()) else { return false };
                let Some(table) = self.slots.find(header.gfn) else { return false };
                guest::read_entry(env.memory, table.frame, offset, width)
            };
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
