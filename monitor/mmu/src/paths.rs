//! Paths: the ways by which an entry is reached from roots. What happens to it is posted, flushed and marked on each.

use umbra_shared::{L2Gfn, Level};

use crate::access::Access;
use crate::dirty::L2Set;
use crate::memory::{Env, Extent};
use crate::mmu::Mmu;
use crate::outbox::extent;
use crate::ptelist::PteLists;
use crate::roots::RootId;
use crate::spte::SpteRef;

/// Paths that are announced one by one; an entry with more is announced as "everything".
const MAX_PATHS: usize = 64;

/// The L2 ranges that lead through one entry.
pub(crate) struct Paths {
    found: [(u32, u64); MAX_PATHS],
    len: usize,
    overflow: bool,
}

impl Mmu {
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

    /// Whether the present walk comes to `page` for the first time: pages that many entries share are walked once.
    pub(crate) fn first_visit(&mut self, page: u32) -> bool {
        let visit = self.visit;
        std::mem::replace(&mut self.arena.header_mut(page).visit, visit) != visit
    }

    /// A new path leads to `page`: writes on it to leaves that are open, or dirty already, will leave no trace of their
    /// own. They are marked by L2 frame now.
    pub(crate) fn mark_new_path(&mut self, page: u32) {
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
    pub(crate) fn share(&mut self, page: u32) {
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
}
