//! Splits: a huge leaf replaced by a full table, at a write (shatter), at the start or at a clear (eager).

use umbra_shared::{Gfn, Level};

use crate::access::Access;
use crate::config::NoMemory;
use crate::defects::Defect;
use crate::head::Head;
use crate::memory::Env;
use crate::mmu::Mmu;
use crate::spte::{Frame, Spte, SpteRef};

impl Mmu {
    /// Tops the split caches up if they are below their minimum.
    fn top_up_split_caches(&mut self) -> Result<(), NoMemory> {
        let caches = self.config.caches;
        if self.arena.top_up(caches.pages)? {
            self.stats.topups += 1;
        }
        if self.lists.top_up(caches.descs)? {
            self.stats.topups += 1;
        }
        Ok(())
    }

    /// Frees what the split caches hold.
    pub(crate) fn drop_split_caches(&mut self) {
        self.arena.drop_cache();
        self.lists.drop_cache();
    }

    /// Replaces the huge leaf at `at` by a table of leaves one size down, mapping the L1 frames from `gfn`. Rights and
    /// frames stay; what tracking does not admit is closed. The leaf stays as it is when this fails.
    ///
    /// # Errors
    /// No memory.
    pub(crate) fn split_leaf(
        &mut self,
        env: &mut Env<'_>,
        at: SpteRef,
        level: Level,
        gfn: Gfn,
    ) -> Result<(), NoMemory> {
        let below = Level::from_number(level.number() - 1).ok_or(NoMemory)?;
        self.drain_log();
        self.top_up_split_caches()?;
        let huge = self.arena.spte(at);
        let mut rights = huge.access();
        if huge.mmu_writable() {
            rights = rights.or(Access::WRITE);
        }
        let role = self.arena.header(at.page()).role.child(true, self.split_rights(rights), 0);
        let (child, made) = match self.arena.find(gfn, role) {
            Some(child) => (child, false),
            None => (self.alloc_page(gfn, role, true)?, true),
        };
        if let Err(error) = self.link(env, at, child) {
            if made {
                self.arena.release(child);
            }
            self.arena.set(at, huge);
            return Err(error);
        }
        self.rmaps.remove(&mut self.lists, huge.frame(), level, at);
        if below == Level::K4 {
            self.fill_small(env, child, huge.frame());
        } else {
            self.fill_large(env, child, below, huge.frame());
        }
        self.stats.shattered += 1;
        if !made && below > Level::K4 {
            // What is below the child that was there already may have holes: posted as gone, and faults map it again.
            self.announce(env, at, None);
        } else if huge.writable() || self.arena.header(child).present < 512 {
            self.announce_closed(env, child);
        }
        Ok(())
    }

    /// The leaf for `frame` in direct page `page`.
    fn split_entry(&self, page: u32, index: usize, frame: Frame, level: Level) -> Spte {
        let rights = self.arena.header(page).role.access();
        let writable = rights.allows(Access::WRITE);
        let open = writable
            && (self.admits(frame, level, SpteRef::new(page, index)) || self.defect(Defect::WriteKeptByShatter));
        Spte::leaf(frame, level, if open { rights } else { rights.without(Access::WRITE) }, writable)
    }

    /// Fills a table of 4 KiB leaves. Its frames are one 2 MiB region of memory if that is aligned, so that the heads
    /// of their reverse maps are found once.
    fn fill_small(&mut self, env: &mut Env<'_>, page: u32, first: Frame) {
        let header = *self.arena.header(page);
        let rights = header.role.access();
        let writable = rights.allows(Access::WRITE);
        let closed = Spte::leaf(first, Level::K4, rights.without(Access::WRITE), writable);
        let open = Spte::leaf(first, Level::K4, rights, writable);
        let skip = if self.defect(Defect::RmapLostAtSplit) { 511 } else { 512 };
        let keep_open = self.defect(Defect::WriteKeptByShatter);
        let longest = self.config.longest_list;
        // A word of `admitted` for each 64 entries; strategies decide by page, or for all alike.
        let admitted: [u64; 8] = std::array::from_fn(|word| self.admitted_word(page, word, first));
        let Ok((heads, used)) = self.rmaps.chunk(first) else { return };
        let Some((table, header)) = self.arena.page_mut(page) else { return };
        let fresh = header.present == 0 && *used == 0;
        let mut filled = 0;
        for (block, word) in admitted.iter().enumerate() {
            let start = block * 64;
            let Some((sptes, heads)) = table.get_mut(start..start + 64).zip(heads.get_mut(start..start + 64)) else {
                continue;
            };
            let base = if *word == u64::MAX || keep_open { open } else { closed };
            let alike = *word == 0 || *word == u64::MAX || keep_open;
            let free = fresh || sptes.iter().fold(0, |all, spte| all | spte.0) == 0 && Head::are_empty(heads);
            if alike && free && skip == 512 {
                Head::fill_straight(heads, SpteRef::new(page, start));
                Spte::fill_straight(sptes, Spte(base.0 + ((start as u64) << 12)));
                *used += 64;
                filled += 64;
                continue;
            }
            for (offset, (spte, head)) in sptes.iter_mut().zip(heads.iter_mut()).enumerate() {
                let index = start + offset;
                if spte.present() {
                    continue;
                }
                let at = SpteRef::new(page, index);
                if index >= skip {
                    // Seeded defect: not listed.
                } else if head.is_empty() {
                    *head = Head::one(at);
                    *used += 1;
                } else if self.lists.count(*head) >= longest || self.lists.add(head, at, true).is_err() {
                    // Left out: a fault maps it.
                    continue;
                }
                let is_open = keep_open || word >> offset & 1 != 0;
                *spte = Spte(if is_open { open } else { closed }.0 + ((index as u64) << 12));
                filled += 1;
            }
        }
        header.present += filled;
        self.rmaps.settle(first);
        let _ = env;
    }

    fn admitted_word(&self, page: u32, word: usize, first: Frame) -> u64 {
        let Some(track) = &self.track else { return u64::MAX };
        if first < self.config.first_tracked {
            return u64::MAX;
        }
        let touched = self.arena.header(page).touched >> word & 1 != 0;
        track.strategy.admit_word(track, first.plus(word as u64 * 64), touched)
    }

    fn fill_large(&mut self, env: &mut Env<'_>, page: u32, level: Level, first: Frame) {
        for index in 0..512 {
            let at = SpteRef::new(page, index);
            if self.arena.spte(at).present() {
                continue;
            }
            let frame = first.plus(index as u64 * level.frames());
            let leaf = self.split_entry(page, index, frame, level);
            // Left out when there is no memory: a fault maps it.
            let _ = self.add_leaf(env, at, level, leaf);
        }
    }

    /// After an open leaf was split, or one whose table could not be filled: its closed and missing parts are posted.
    fn announce_closed(&mut self, env: &mut Env<'_>, page: u32) {
        for index in 0..512 {
            let at = SpteRef::new(page, index);
            let spte = self.arena.spte(at);
            if !spte.writable() {
                let access = if spte.present() { Some(spte.access()) } else { None };
                self.announce(env, at, access);
            }
        }
    }

    /// Splits every huge leaf, down to 4 KiB. What finds no memory stays huge.
    pub(crate) fn split_everything(&mut self, env: &mut Env<'_>) {
        for level in [Level::G1, Level::M2] {
            for page in 1..self.arena.end() {
                if self.arena.header(page).role.level() != level {
                    continue;
                }
                let mut entries = self.arena.present(page);
                while let Some((at, spte)) = entries.next(&self.arena) {
                    let tracked = spte.is_leaf(level) && spte.frame() >= self.config.first_tracked;
                    if tracked && self.split_at(env, at, level).is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// Splits the huge leaf at `at`, finding out which L1 frames it maps.
    ///
    /// # Errors
    /// No memory.
    pub(crate) fn split_at(&mut self, env: &mut Env<'_>, at: SpteRef, level: Level) -> Result<(), NoMemory> {
        let frame = self.arena.spte(at).frame();
        let gfn = self.slots.gfn_of(frame).ok_or(NoMemory)?;
        self.split_leaf(env, at, level, gfn)
    }

    /// Splits every huge leaf that maps `frame`, for a clear in chunks.
    pub(crate) fn split_around(&mut self, env: &mut Env<'_>, frame: Frame) {
        for level in [Level::G1, Level::M2] {
            if self.rmaps.head(frame, level).is_empty() {
                continue;
            }
            for at in self.leaves_of(frame, level) {
                // The list changes under way: only what is still a leaf of this frame is split.
                let spte = self.arena.spte(at);
                if spte.is_leaf(level) && spte.frame().0 == frame.0 & !(level.frames() - 1) {
                    let _ = self.split_at(env, at, level);
                }
            }
        }
    }
}
