//! Links, leaves and zaps: the only places where reverse maps, parents and entries change together.
//!
//! The invariants are: a present leaf is listed once in the reverse map of its frame and size, and nothing else is;
//! a link is listed once among its child's parents; a page without parents that is no root does not exist.

use umbra_shared::{Gfn, L2Gfn, Level};

use crate::access::Access;
use crate::config::NoMemory;
use crate::defects::Defect;
use crate::dirty::L2Set;
use crate::memory::{Env, Extent};
use crate::mmu::Mmu;
use crate::outbox::extent;
use crate::ptelist::{Head, PteLists};
use crate::role::Role;
use crate::roots::RootId;
use crate::spte::{Frame, Spte, SpteRef};

/// Paths that are announced one by one; an entry with more is announced as "everything".
const MAX_PATHS: usize = 64;

/// The L2 ranges that lead through one entry.
pub(crate) struct Paths {
    found: [(u32, u64); MAX_PATHS],
    len: usize,
    overflow: bool,
}

impl Mmu {
    /// A new, empty shadow page, if the quota has room.
    pub(crate) fn alloc_page(&mut self, gfn: Gfn, role: Role, for_split: bool) -> Result<u32, NoMemory> {
        if self.arena.in_use() >= self.config.quota() {
            return Err(NoMemory);
        }
        let page = self.arena.alloc(gfn, role, for_split)?;
        self.stats.pages_made += 1;
        Ok(page)
    }

    /// The L2 frames under entry `at`, by the page's first path: exact unless the page is shared.
    #[inline]
    pub(crate) fn first_path(&self, at: SpteRef) -> (u32, u64) {
        let header = self.arena.header(at.page());
        (header.root(), header.l2_base + at.index() as u64 * header.role.level().frames())
    }

    fn collect_paths(&self, at: SpteRef, offset: u64, paths: &mut Paths) {
        let header = self.arena.header(at.page());
        let offset = offset + at.index() as u64 * header.role.level().frames();
        if header.is_root() {
            if let Some(place) = paths.found.get_mut(paths.len) {
                *place = (header.root(), offset);
                paths.len += 1;
            } else {
                paths.overflow = true;
            }
            return;
        }
        let mut cursor = PteLists::walk(header.parents);
        while let Some(parent) = self.lists.next(&mut cursor) {
            if paths.overflow {
                return;
            }
            self.collect_paths(parent, offset, paths);
        }
    }

    /// Every path to entry `at`, up to a bound.
    pub(crate) fn paths(&self, at: SpteRef) -> Paths {
        let mut paths = Paths { found: [(0, 0); MAX_PATHS], len: 0, overflow: false };
        self.collect_paths(at, 0, &mut paths);
        paths
    }

    #[inline]
    fn root_extent(&self, index: u32, start: u64, frames: u64) -> Option<Extent> {
        self.roots.at(index).map(|root| extent(root.id, start, frames))
    }

    /// Posts an unmap (`access` none) or a change of rights of entry `at` on all its paths, and asks for the flush.
    #[inline]
    pub(crate) fn announce(&mut self, env: &mut Env<'_>, at: SpteRef, access: Option<Access>) {
        let header = self.arena.header(at.page());
        let frames = header.role.level().frames();
        if !header.shared() {
            let (root, start) = self.first_path(at);
            if let Some(extent) = self.root_extent(root, start, frames) {
                self.announce_extent(env, extent, access);
            }
            return;
        }
        let paths = self.paths(at);
        if paths.overflow {
            let all: Vec<Extent> =
                self.roots.iter().map(|root| extent(root.id, 0, root.role.format.frames())).collect();
            for extent in all {
                self.announce_extent(env, extent, None);
            }
            self.out.flush_all();
            return;
        }
        for &(root, start) in paths.found.iter().take(paths.len) {
            if let Some(extent) = self.root_extent(root, start, frames) {
                self.announce_extent(env, extent, access);
            }
        }
    }

    #[inline]
    fn announce_extent(&mut self, env: &mut Env<'_>, extent: Extent, access: Option<Access>) {
        match access {
            Some(access) => self.out.protect(env.mapper, &mut self.stats, extent, access),
            None => self.out.unmap(env.mapper, &mut self.stats, extent),
        }
        self.out.flush(extent);
    }

    /// Marks the page behind leaf `at` as written through `at`. `offset` picks the 4 KiB page in a larger leaf.
    #[inline]
    pub(crate) fn mark_written(&mut self, at: SpteRef, offset: u64) {
        let frame = self.arena.spte(at).frame().plus(offset);
        let Some(track) = &mut self.track else { return };
        track.dirty.insert(frame);
        if track.l2.is_some() {
            self.mark_l2(at, offset);
        }
    }

    pub(crate) fn mark_l2(&mut self, at: SpteRef, offset: u64) {
        if self.track.as_ref().and_then(|track| track.l2.as_ref()).is_none_or(L2Set::is_all) {
            return;
        }
        let shared = self.arena.header(at.page()).shared();
        let first = self.first_path(at);
        let paths = if shared { Some(self.paths(at)) } else { None };
        let Some(l2) = self.track.as_mut().and_then(|track| track.l2.as_mut()) else { return };
        match paths {
            None => l2.insert(L2Gfn(first.1 + offset)),
            Some(paths) => {
                if paths.overflow {
                    l2.overflow();
                }
                for &(_, start) in paths.found.iter().take(paths.len) {
                    l2.insert(L2Gfn(start + offset));
                }
            }
        }
    }

    /// Before leaf `at` goes: what its dirty flag says must not be lost.
    fn collect_dirty(&mut self, at: SpteRef, spte: Spte, level: Level) {
        let uses = self.track.as_ref().is_some_and(|track| track.strategy.uses_dirty_bits());
        if uses && spte.dirty() && !self.defect(Defect::DirtyLostAtZap) {
            for offset in 0..level.frames() {
                self.mark_written(at, offset);
            }
        }
    }

    /// Before `page` is unlinked: dirty flags below are marked by L2 frame, while the paths to them are there.
    pub(crate) fn save_dirty_below(&mut self, page: u32) {
        if self.track.as_ref().is_some_and(|track| track.l2.is_some() && track.strategy.uses_dirty_bits()) {
            self.visit = self.visit.wrapping_add(1);
            self.collect_dirty_below(page);
        }
    }

    /// As [`Self::collect_dirty`] for everything below a link.
    fn collect_dirty_below(&mut self, page: u32) {
        if !self.first_visit(page) {
            return;
        }
        let level = self.arena.header(page).role.level();
        let mut entries = self.arena.present(page);
        while let Some((at, spte)) = entries.next(&self.arena) {
            if spte.is_leaf(level) {
                self.collect_dirty(at, spte, level);
            } else {
                self.collect_dirty_below(spte.child());
            }
        }
    }

    /// Puts a leaf where nothing is. A full list loses its oldest entry.
    #[inline]
    pub(crate) fn add_leaf(
        &mut self,
        env: &mut Env<'_>,
        at: SpteRef,
        level: Level,
        leaf: Spte,
    ) -> Result<(), NoMemory> {
        while !self.rmaps.add(&mut self.lists, leaf.frame(), level, at)? {
            self.drop_oldest(env, leaf.frame(), level)?;
        }
        self.arena.set(at, leaf);
        self.stats.mapped += 1;
        Ok(())
    }

    /// Makes room in a full list.
    #[cold]
    fn drop_oldest(&mut self, env: &mut Env<'_>, frame: Frame, level: Level) -> Result<(), NoMemory> {
        let oldest = self.rmaps.head(frame, level).oldest().ok_or(NoMemory)?;
        self.drop_spte(env, oldest);
        self.stats.evicted += 1;
        Ok(())
    }

    /// Links `child` at `at`, where nothing is (or, in a split, the leaf that the child replaces).
    pub(crate) fn link(&mut self, env: &mut Env<'_>, at: SpteRef, child: u32) -> Result<(), NoMemory> {
        let mut parents = self.arena.header(child).parents;
        let first = parents.is_empty();
        if self.lists.count(parents) >= self.config.longest_list
            && let Some(oldest) = parents.oldest()
        {
            self.drop_spte(env, oldest);
            self.stats.evicted += 1;
            parents = self.arena.header(child).parents;
        }
        self.lists.add(&mut parents, at, false)?;
        let (root, l2_base) = self.first_path(at);
        let shared = self.arena.header(at.page()).shared();
        let header = self.arena.header_mut(child);
        header.parents = parents;
        if first {
            header.set_path(root, l2_base);
            if shared {
                header.set_shared();
            }
        } else {
            self.share(child);
        }
        self.arena.set(at, Spte::link(child));
        if !first && self.track.as_ref().is_some_and(|track| track.l2.is_some()) {
            self.visit = self.visit.wrapping_add(1);
            self.mark_new_path(child);
        }
        Ok(())
    }

    /// Whether the present walk comes to `page` for the first time: pages that many entries share are walked once.
    fn first_visit(&mut self, page: u32) -> bool {
        let visit = self.visit;
        std::mem::replace(&mut self.arena.header_mut(page).visit, visit) != visit
    }

    /// A new path leads to `page`: writes on it to leaves that are open, or dirty already, will leave no trace of their
    /// own. They are marked by L2 frame now.
    fn mark_new_path(&mut self, page: u32) {
        if !self.first_visit(page) {
            return;
        }
        let level = self.arena.header(page).role.level();
        let by_flag = self.track.as_ref().is_some_and(|track| track.strategy.uses_dirty_bits());
        let mut entries = self.arena.present(page);
        while let Some((at, spte)) = entries.next(&self.arena) {
            if !spte.is_leaf(level) {
                self.mark_new_path(spte.child());
            } else if if by_flag { spte.dirty() } else { spte.writable() } {
                for offset in 0..level.frames() {
                    self.mark_l2(at, offset);
                }
            }
        }
    }

    /// Marks `page` and everything below as reachable by several paths.
    fn share(&mut self, page: u32) {
        if self.arena.header(page).shared() {
            return;
        }
        self.arena.header_mut(page).set_shared();
        let level = self.arena.header(page).role.level();
        if level == Level::K4 {
            return;
        }
        let mut entries = self.arena.present(page);
        while let Some((_, spte)) = entries.next(&self.arena) {
            if !spte.is_leaf(level) {
                self.share(spte.child());
            }
        }
    }

    /// Removes entry `at`, leaf or link, with everything that only it kept alive.
    pub(crate) fn drop_spte(&mut self, env: &mut Env<'_>, at: SpteRef) {
        let spte = self.arena.spte(at);
        if !spte.present() {
            return;
        }
        // Entries of the log are translated by the tables that were in effect when they were written.
        self.drain_log();
        let level = self.arena.header(at.page()).role.level();
        if spte.is_leaf(level) {
            self.collect_dirty(at, spte, level);
            self.rmaps.remove(&mut self.lists, spte.frame(), level, at);
            self.arena.set(at, Spte::NONE);
            self.announce(env, at, None);
            self.stats.zapped += 1;
            return;
        }
        self.save_dirty_below(spte.child());
        self.arena.set(at, Spte::NONE);
        self.announce(env, at, None);
        self.unlink(env, spte.child(), at);
    }

    /// Takes `at` off the parents of `child`, which goes when it was the last.
    pub(crate) fn unlink(&mut self, env: &mut Env<'_>, child: u32, at: SpteRef) {
        self.forget_hints();
        if self.defect(Defect::ParentLost) && self.arena.header(child).shared() {
            return;
        }
        let mut parents = self.arena.header(child).parents;
        self.lists.remove(&mut parents, at);
        self.arena.header_mut(child).parents = parents;
        if parents.is_empty() && !self.arena.header(child).is_root() {
            self.free_page(env, child);
        }
    }

    /// Empties `page` and frees it. Its unmapping was announced where it was unlinked.
    pub(crate) fn free_page(&mut self, env: &mut Env<'_>, page: u32) {
        self.forget_hints();
        self.empty_page(env, page);
        self.arena.release(page);
        self.stats.pages_freed += 1;
    }

    fn empty_page(&mut self, env: &mut Env<'_>, page: u32) {
        let level = self.arena.header(page).role.level();
        let uses_dirty = self.track.as_ref().is_some_and(|track| track.strategy.uses_dirty_bits());
        if level == Level::K4 && !uses_dirty && !self.empty_straight(page) {
            return;
        }
        let mut entries = self.arena.present(page);
        while let Some((at, spte)) = entries.next(&self.arena) {
            if spte.is_leaf(level) {
                self.collect_dirty(at, spte, level);
                self.rmaps.remove(&mut self.lists, spte.frame(), level, at);
                self.arena.set(at, Spte::NONE);
                self.stats.zapped += 1;
            } else {
                self.arena.set(at, Spte::NONE);
                self.unlink(env, spte.child(), at);
            }
        }
    }

    /// The common case: blocks of 64 leaves that map their 2 MiB region of memory straight and have no aliases, whose
    /// heads are then found once. Whether anything is left.
    fn empty_straight(&mut self, page: u32) -> bool {
        let Some((table, header)) = self.arena.page_mut(page) else { return false };
        let Some(first) = table.iter().find(|spte| spte.present()).map(|spte| spte.frame()) else { return false };
        if !self.rmaps.has_small(first) {
            return header.present > 0;
        }
        let Ok((heads, used)) = self.rmaps.chunk(first) else { return true };
        for start in (0..512).step_by(64) {
            let Some((sptes, heads)) = table.get_mut(start..start + 64).zip(heads.get_mut(start..start + 64)) else {
                continue;
            };
            let base = Spte::leaf(Frame((first.0 & !511) + start as u64), Level::K4, Access::READ, false);
            let own = Head::one(SpteRef::new(page, start));
            if Spte::are_straight(sptes, base) && Head::are_straight(heads, own) {
                heads.fill(Head::default());
                sptes.fill(Spte::NONE);
                *used -= 64;
                header.present -= 64;
                self.stats.zapped += 64;
            }
        }
        let left = header.present > 0;
        self.rmaps.settle(first);
        left
    }

    /// Removes `page` from everywhere. A root loses its entries, but stays.
    pub(crate) fn zap_page(&mut self, env: &mut Env<'_>, page: u32) {
        if self.arena.header(page).is_root() {
            for index in 0..512 {
                self.drop_spte(env, SpteRef::new(page, index));
            }
            return;
        }
        // Each drop takes one parent away, and the last one the page.
        while self.arena.header(page).in_use() {
            let Some(parent) = self.arena.header(page).parents.oldest() else { return };
            let before = self.lists.count(self.arena.header(page).parents);
            self.drop_spte(env, parent);
            if self.arena.header(page).in_use() && self.lists.count(self.arena.header(page).parents) >= before {
                return;
            }
        }
    }

    /// Makes room for `count` shadow pages under the quota: kept roots first, the least recently used of them first;
    /// then pages in turn, as a clock's hand finds them.
    pub(crate) fn make_pages_available(&mut self, env: &mut Env<'_>, count: u32) -> Result<(), NoMemory> {
        let quota = self.config.quota();
        while self.arena.in_use() + count > quota {
            self.stats.evicted += 1;
            if let Some(index) = self.roots.least_recent() {
                self.zap_root(env, index);
                continue;
            }
            let end = self.arena.end();
            let is_victim = |page: &u32| self.arena.header(*page).in_use() && !self.arena.header(*page).is_root();
            let after = (self.hand + 1..end).find(is_victim);
            let Some(victim) = after.or_else(|| (1..=self.hand.min(end)).find(is_victim)) else {
                return Err(NoMemory);
            };
            self.hand = victim;
            let before = self.arena.in_use();
            self.zap_page(env, victim);
            if self.arena.in_use() >= before {
                return Err(NoMemory);
            }
        }
        Ok(())
    }

    /// A leaf is open for writes from now on. Posted for `path` alone: other paths find out by a fault.
    #[inline]
    pub(crate) fn open(&mut self, env: &mut Env<'_>, at: SpteRef, path: Option<(RootId, u64)>) {
        let Some((spte, _)) = self.arena.entry_mut(at) else { return };
        *spte = spte.opened();
        let spte = *spte;
        let frames = self.arena.header(at.page()).role.level().frames();
        let extent = if let Some((root, start)) = path {
            Some(extent(root, start, frames))
        } else {
            let (root, start) = self.first_path(at);
            self.root_extent(root, start, frames)
        };
        let Some(extent) = extent else { return };
        let header = self.arena.header(at.page());
        if header.shared() {
            let leaf = (spte.frame(), header.role.level(), spte.access());
            self.out.map(env.mapper, &mut self.stats, extent, leaf);
        } else {
            self.out.protect(env.mapper, &mut self.stats, extent, spte.access());
        }
    }

    /// Clears a leaf's dirty flag, so that hardware sets it again at the next write.
    pub(crate) fn clean(&mut self, env: &mut Env<'_>, at: SpteRef) {
        let spte = self.arena.spte(at);
        if spte.dirty() {
            self.arena.set(at, spte.clean());
            self.flush_paths(env, at);
        }
    }

    /// Asks for a flush of all paths to `at`.
    pub(crate) fn flush_paths(&mut self, _env: &mut Env<'_>, at: SpteRef) {
        let header = self.arena.header(at.page());
        let frames = header.role.level().frames();
        if header.shared() {
            let paths = self.paths(at);
            if paths.overflow {
                self.out.flush_all();
            }
            for &(root, start) in paths.found.iter().take(paths.len) {
                if let Some(extent) = self.root_extent(root, start, frames) {
                    self.out.flush(extent);
                }
            }
        } else {
            let (root, start) = self.first_path(at);
            if let Some(extent) = self.root_extent(root, start, frames) {
                self.out.flush(extent);
            }
        }
    }

    /// Every leaf of `level` that maps `frame`, gathered so that lists may change.
    pub(crate) fn leaves_of(&self, frame: Frame, level: Level) -> Vec<SpteRef> {
        let mut cursor = self.rmaps.walk(frame, level);
        std::iter::from_fn(|| self.lists.next(&mut cursor)).collect()
    }
}
