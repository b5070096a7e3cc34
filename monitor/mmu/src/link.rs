//! Links, leaves and zaps: the only places where reverse maps, parents and entries change together.
//!
//! The invariants are: a present leaf is listed once in the reverse map of its frame and size, and nothing else is;
//! a link is listed once among its child's parents; a page without parents that is no root does not exist.

use umbra_shared::{Gfn, Level};

use crate::access::Access;
use crate::config::NoMemory;
use crate::defects::Defect;
use crate::head::Head;
use crate::memory::Env;
use crate::mmu::Mmu;
use crate::role::Role;
use crate::spte::{Frame, Spte, SpteRef};

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

    /// Before leaf `at` goes: what its dirty flag says must not be lost.
    fn collect_dirty(&mut self, at: SpteRef, spte: Spte, level: Level) {
        // Who compares huge leaves finds out by that what was written.
        let uses = self.track.as_ref().is_some_and(|track| {
            track.strategy.uses_dirty_bits() && (level == Level::K4 || !track.strategy.compares())
        });
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

    /// Every leaf of `level` that maps `frame`, gathered so that lists may change.
    pub(crate) fn leaves_of(&self, frame: Frame, level: Level) -> Vec<SpteRef> {
        let mut cursor = self.rmaps.walk(frame, level);
        std::iter::from_fn(|| self.lists.next(&mut cursor)).collect()
    }
}
