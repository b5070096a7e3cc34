//! Collapses: small leaves become huge again when tracking stops.
//!
//! Candidates are direct pages alone: they exist because a guest leaf was split, so all their entries together are that
//! leaf, whether they are present or not.

use umbra_shared::Level;

use crate::access::Access;
use crate::config::Collapse;
use crate::defects::Defect;
use crate::memory::Env;
use crate::mmu::Mmu;
use crate::outbox::extent;
use crate::ptelist::PteLists;
use crate::spte::{Frame, Spte, SpteRef};

impl Mmu {
    /// Applies the configured collapse to every table that could be one leaf.
    pub(crate) fn collapse_everything(&mut self, env: &mut Env<'_>) {
        if self.config.collapse == Collapse::None {
            return;
        }
        for level in [Level::K4, Level::M2] {
            for page in 1..self.arena.end() {
                let header = self.arena.header(page);
                if header.in_use() && header.role.direct() && header.role.level() == level {
                    self.collapse_page(env, page, level);
                }
            }
        }
    }

    fn collapse_page(&mut self, env: &mut Env<'_>, page: u32, level: Level) {
        let Some(above) = Level::from_number(level.number() + 1) else { return };
        let header = *self.arena.header(page);
        let across = self.defect(Defect::CollapseAcrossSlot);
        if self.slots.max_level(header.gfn, above.min(self.config.max_level), across) < above {
            return;
        }
        let Some(backing) = self.slots.find(header.gfn) else { return };
        let rights = header.role.access();
        let leaf = Spte::leaf(backing.frame, above, rights, rights.allows(Access::WRITE));
        self.stats.collapsed += 1;
        let mut cursor = PteLists::walk(header.parents);
        let parents: Vec<SpteRef> = std::iter::from_fn(|| self.lists.next(&mut cursor)).collect();
        for at in parents {
            let last = !self.arena.header(page).in_use() || self.arena.spte(at) != Spte::link(page);
            if last {
                continue;
            }
            self.drop_spte(env, at);
            // In place needs no memory but a list entry; without one the next fault brings the leaf back.
            if self.config.collapse == Collapse::InPlace && self.add_leaf(env, at, above, leaf).is_ok() {
                self.post_collapsed(env, at, above, leaf);
            }
        }
    }

    /// Drops the tables that split huge leaves over the 2 MiB at `first`: faults bring the leaves back. Whether there were any.
    pub(crate) fn drop_split_tables(&mut self, env: &mut Env<'_>, first: Frame) -> bool {
        let mut dropped = false;
        for leaf in self.leaves_of(first, Level::K4) {
            let header = *self.arena.header(leaf.page());
            if !header.in_use() || !header.role.direct() || self.arena.spte(leaf).frame() != first {
                continue;
            }
            let limit = Level::M2.min(self.config.max_level);
            if leaf.index() != 0 || self.slots.max_level(header.gfn, limit, false) < Level::M2 {
                continue;
            }
            let mut cursor = PteLists::walk(header.parents);
            let parents: Vec<SpteRef> = std::iter::from_fn(|| self.lists.next(&mut cursor)).collect();
            for at in parents {
                if self.arena.header(leaf.page()).in_use() && self.arena.spte(at) == Spte::link(leaf.page()) {
                    self.drop_spte(env, at);
                    dropped = true;
                }
            }
        }
        dropped
    }

    fn post_collapsed(&mut self, env: &mut Env<'_>, at: SpteRef, level: Level, leaf: Spte) {
        let (root, start) = self.first_path(at);
        if let Some(id) = self.roots.at(root).map(|root| root.id)
            && !self.arena.header(at.page()).shared()
        {
            let extent = extent(id, start, level.frames());
            self.out.map(env.mapper, &mut self.stats, extent, (leaf.frame(), level, leaf.access()));
        }
    }
}
