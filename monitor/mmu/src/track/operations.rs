//! Start, harvest, clear and stop; and what strategies do with leaves.

use umbra_shared::{L2Gfn, Level};

use super::{LOG_ENTRIES, Leaf, Strategy, Tracking};
use crate::config::{MmuError, Split};
use crate::defects::Defect;
use crate::dirty::{PageSet, bits};
use crate::head::Head;
use crate::memory::{Env, Extent};
use crate::mmu::Mmu;
use crate::ptelist::PteLists;
use crate::roots::RootId;
use crate::spte::{Frame, Spte, SpteRef};

impl Mmu {
    /// Turns tracking on: from now on every write to L1's memory through EPT02, and every page that the MMU itself
    /// writes, will be reported.
    ///
    /// # Errors
    /// It is on already.
    pub fn start(&mut self, env: &mut Env<'_>) -> Result<(), MmuError> {
        if self.track.is_some() {
            return Err(MmuError::Tracking);
        }
        let mut track = Box::new(Tracking::new(&self.config));
        if track.strategy.starts_all_set() {
            let first_tracked = self.config.first_tracked;
            for slot in self.slots.slots() {
                let first = slot.first.max(first_tracked);
                let end = slot.first.plus(slot.frames);
                track.dirty.insert_range(first, end.0.saturating_sub(first.0));
            }
        }
        if track.strategy.uses_log() {
            track.log = Vec::with_capacity(LOG_ENTRIES);
        }
        self.track = Some(track);
        self.arm_everything(env);
        if self.config.split == Split::Eager {
            self.split_everything(env);
        }
        self.finish(env);
        Ok(())
    }

    fn arm_everything(&mut self, env: &mut Env<'_>) {
        let Some(track) = self.track.take() else { return };
        if !track.strategy.starts_all_set() {
            self.arm_leaves(env, &track);
        }
        self.track = Some(track);
    }

    fn arm_leaves(&mut self, env: &mut Env<'_>, track: &Tracking) {
        for page in 1..self.arena.end() {
            let level = self.arena.header(page).role.level();
            let mut entries = self.arena.present(page);
            while let Some((at, spte)) = entries.next(&self.arena) {
                if !spte.is_leaf(level) || spte.frame() < self.config.first_tracked {
                    continue;
                }
                let armed = track.strategy.arm(track, spte, level);
                if armed != spte {
                    self.arena.set(at, armed);
                    if armed.access() == spte.access() {
                        self.flush_paths(env, at);
                    } else {
                        self.announce(env, at, Some(armed.access()));
                    }
                }
            }
        }
    }

    /// Reports the dirty pages into `into` and returns their number. They stay dirty until they are cleared.
    ///
    /// # Errors
    /// Tracking is off.
    pub fn harvest(&mut self, env: &mut Env<'_>, into: &mut PageSet) -> Result<u64, MmuError> {
        let strategy = self.track.as_ref().ok_or(MmuError::NotTracking)?.strategy;
        strategy.harvest(self, env);
        self.finish(env);
        let track = self.track.as_mut().ok_or(MmuError::NotTracking)?;
        Ok(track.dirty.report(&mut track.reported, into))
    }

    /// The L2 frames through which dirty pages were written, or that share a shadow page with one, since they were
    /// cleared. To be called after [`Self::harvest`]. `None` when there are more than the set may name: all of L2.
    ///
    /// # Errors
    /// Tracking is off, or not by L2 frame.
    pub fn harvest_l2(&mut self) -> Result<Option<Vec<L2Gfn>>, MmuError> {
        let l2 = self.track.as_mut().and_then(|track| track.l2.as_mut()).ok_or(MmuError::NotTracking)?;
        let frames = l2.report();
        Ok(if l2.overflowed() { None } else { Some(frames) })
    }

    /// Clears those of `count` pages from `first` that the last harvest reported; their next write is noticed again.
    /// L2 frames stay reported until every reported page is cleared.
    ///
    /// # Errors
    /// Tracking is off.
    pub fn clear(&mut self, env: &mut Env<'_>, first: Frame, count: u64) -> Result<(), MmuError> {
        let room = self.track.as_ref().ok_or(MmuError::NotTracking)?.reported.room();
        let end = first.0.saturating_add(count).min(room);
        // Writes since the harvest belong to what is cleared now.
        self.drain_log();
        let mut at = first.0;
        let (mut split_region, mut rearmed) = (u64::MAX, u64::MAX);
        while at < end {
            let base = at & !63;
            let Some(track) = &mut self.track else { break };
            let word = track.reported.word(Frame(base));
            let from = std::mem::replace(&mut at, (base + 64).min(end));
            if word == 0 {
                continue;
            }
            let word = word & u64::MAX >> (63 - (at - 1 - base)) & u64::MAX << (from - base);
            if word == 0 {
                continue;
            }
            if self.config.split == Split::EagerClear && base >> 9 != split_region {
                split_region = base >> 9;
                self.split_around(env, Frame(base));
            }
            self.clear_word(env, Frame(base), word);
            // A leaf that holds all of them is dealt with once.
            if base >> 9 != rearmed {
                rearmed = base >> 9;
                self.rearm_huge(env, Frame(base));
            }
        }
        if let Some(track) = self.track.as_mut()
            && let Some(l2) = &mut track.l2
            && track.reported.is_empty()
        {
            l2.clear_all();
        }
        self.finish(env);
        Ok(())
    }

    /// Clears those of the 64 pages from `first` on that `word` has a bit for. Huge leaves hold all of them, or none.
    fn clear_word(&mut self, env: &mut Env<'_>, first: Frame, word: u64) {
        let small = self.rmaps.has_small(first);
        let Some(track) = &mut self.track else { return };
        let strategy = track.strategy;
        track.reported.remove_word(first, word);
        if small {
            for bit in bits(word) {
                self.clear_small(env, first.plus(bit), strategy);
            }
        } else {
            track.dirty.remove_word(first, word);
        }
    }

    /// The huge leaves that map `frame` notice writes again.
    fn rearm_huge(&mut self, env: &mut Env<'_>, frame: Frame) {
        let Some(strategy) = self.track.as_ref().map(|track| track.strategy) else { return };
        for level in [Level::M2, Level::G1] {
            if !self.rmaps.head(frame, level).is_empty() && !self.defect(Defect::HugeNotProtected) {
                strategy.rearm(self, env, frame, level);
            }
        }
    }

    /// Clears a page that may have leaves of 4 KiB. To clear one may mark others, which are to be cleared after it.
    fn clear_small(&mut self, env: &mut Env<'_>, frame: Frame, strategy: &'static dyn Strategy) {
        let Some(track) = &mut self.track else { return };
        track.dirty.remove(frame);
        if !self.rmaps.head(frame, Level::K4).is_empty() {
            strategy.rearm(self, env, frame, Level::K4);
        }
    }

    /// Turns tracking off, at any moment of a round, and collapses what was split as configured. Leaves that tracking
    /// had closed open at their next write.
    ///
    /// # Errors
    /// It is off already.
    pub fn stop(&mut self, env: &mut Env<'_>) -> Result<(), MmuError> {
        let track = self.track.take().ok_or(MmuError::NotTracking)?;
        self.keep_room(track.twins);
        for page in 1..self.arena.end() {
            self.arena.header_mut(page).touched = 0;
        }
        self.drop_split_caches();
        self.collapse_everything(env);
        self.finish(env);
        Ok(())
    }

    /// Marks the page behind a small leaf, and opens the leaf. Posted at once: no neighbour is expected to follow.
    #[inline]
    pub fn mark_and_open(&mut self, env: &mut Env<'_>, leaf: &Leaf) {
        let Some((spte, header)) = self.arena.entry_mut(leaf.at) else { return };
        *spte = spte.opened();
        let Some(track) = &mut self.track else { return };
        track.dirty.insert(spte.frame());
        if header.shared() || track.l2.is_some() {
            let spte = *spte;
            return self.post_opened(env, leaf, spte);
        }
        let extent = Extent { root: leaf.root, start: leaf.l2, frames: 1 };
        self.out.protect_now(env.mapper, &mut self.stats, extent, spte.access());
    }

    /// [`Self::mark_and_open`] where there is more to it than one path.
    #[inline(never)]
    fn post_opened(&mut self, env: &mut Env<'_>, leaf: &Leaf, spte: Spte) {
        self.mark_l2(leaf.at, 0);
        if self.arena.header(leaf.at.page()).shared() {
            // It may have been mapped by another path, which this one's mapper was not told of.
            self.post_map(env, leaf, spte);
        } else {
            let extent = Extent { root: leaf.root, start: leaf.l2, frames: 1 };
            self.out.protect_now(env.mapper, &mut self.stats, extent, spte.access());
        }
    }

    /// Closes every leaf of `level` that maps `frame`: the next write by any alias traps.
    pub fn close_leaves(&mut self, env: &mut Env<'_>, frame: Frame, level: Level) {
        let head = self.rmaps.head(frame, level);
        let many = head.has_chain() && level == Level::K4 && !self.defect(Defect::AliasNotProtected);
        if many && self.close_alike(env, head) {
            return;
        }
        let mut rest = PteLists::walk(head);
        while let Some(at) = self.lists.next(&mut rest) {
            self.close_leaf(env, at);
            if self.defect(Defect::AliasNotProtected) {
                return;
            }
        }
    }

    fn close_leaf(&mut self, env: &mut Env<'_>, at: SpteRef) {
        let Some((spte, _)) = self.arena.entry_mut(at) else { return };
        if spte.writable() {
            *spte = spte.closed();
            let access = spte.access();
            self.announce(env, at, Some(access));
        }
    }

    /// Closes the leaves of one list while they are alike, as the aliases of a page mostly are, and posts them together.
    /// `false` when some are left.
    #[inline(never)]
    fn close_alike(&mut self, env: &mut Env<'_>, head: Head) -> bool {
        let Some(first) = head.oldest() else { return true };
        let (_, start) = self.first_path(first);
        let Some((spte, header)) = self.arena.entry_mut(first) else { return true };
        if !spte.writable() || header.shared() {
            return false;
        }
        let (like, root) = (*spte, header.root());
        *spte = like.closed();
        let [l2, rest @ ..] = &mut self.out.alike;
        *l2 = L2Gfn(start);
        let (mut count, mut whole) = (1, true);
        for entries in self.lists.chain(head) {
            let done = self.arena.close_alike(entries, (like, root), rest.get_mut(count - 1..).unwrap_or_default());
            count += done;
            whole = done == entries.len();
            if !whole {
                break;
            }
        }
        let to = (self.roots.id(root), count);
        self.out.protect_alike(env.mapper, &mut self.stats, to, like.closed().access());
        whole
    }

    /// Clears the dirty flags of every leaf of `level` that maps `frame`: hardware sets them at the next write.
    pub fn clean_leaves(&mut self, env: &mut Env<'_>, frame: Frame, level: Level) {
        let mut cursor = self.rmaps.walk(frame, level);
        while let Some(at) = self.lists.next(&mut cursor) {
            self.clean(env, at);
            if self.defect(Defect::AliasNotProtected) {
                break;
            }
        }
    }

    /// Closes the open blocks of 64 around every small leaf that maps `frame`; what other dirty flags in them say is
    /// marked first.
    pub fn close_blocks(&mut self, env: &mut Env<'_>, frame: Frame) {
        let mut cursor = self.rmaps.walk(frame, Level::K4);
        while let Some(at) = self.lists.next(&mut cursor) {
            self.close_block(env, at);
            if self.defect(Defect::AliasNotProtected) {
                break;
            }
        }
    }

    /// Opens the block of 64 entries around a leaf; what is mapped into it later will be open as well.
    pub fn open_block(&mut self, env: &mut Env<'_>, leaf: &Leaf) {
        let page = leaf.at.page();
        let first = leaf.at.index() & !63;
        self.arena.header_mut(page).touched |= 1 << (first >> 6);
        self.stats.blocks_opened += 1;
        let (root, path) = leaf.path();
        let base = path - (leaf.at.index() - first) as u64;
        let more = usize::from(self.defect(Defect::BlockOffByOne));
        for index in first..(first + 64 + more).min(512) {
            let at = SpteRef::new(page, index);
            let spte = self.arena.spte(at);
            if spte.mmu_writable() && !spte.writable() {
                self.open(env, at, Some((root, base + (index - first) as u64)));
            }
        }
    }

    /// Closes the open block around `at`, whose page was cleared; what its other dirty flags say is marked first.
    fn close_block(&mut self, env: &mut Env<'_>, at: SpteRef) {
        let bit = 1 << (at.index() >> 6);
        let header = self.arena.header_mut(at.page());
        if header.touched & bit == 0 {
            return;
        }
        header.touched &= !bit;
        let frame = self.arena.spte(at).frame();
        let first = at.index() & !63;
        for index in first..first + 64 {
            let entry = SpteRef::new(at.page(), index);
            let spte = self.arena.spte(entry);
            if !spte.present() {
                continue;
            }
            if spte.dirty() && spte.frame() != frame {
                self.mark_written(entry, 0);
            }
            if spte.writable() || spte.dirty() {
                self.arena.set(entry, spte.clean().closed());
                self.announce(env, entry, Some(spte.closed().access()));
            }
        }
    }

    /// Marks every page whose small leaf has its dirty flag set: in all shadow pages, or in open blocks alone. The flags
    /// stay. Huge leaves are for traps: their flags would say too little.
    pub fn scan_dirty(&mut self, _env: &mut Env<'_>, open_blocks: bool) {
        for page in 1..self.arena.end() {
            let header = self.arena.header(page);
            let blocks = if open_blocks { header.touched } else { 0xff };
            if blocks == 0 || header.present == 0 || header.role.level() != Level::K4 {
                continue;
            }
            for block in (0..8).filter(|block| blocks >> block & 1 != 0) {
                self.scan_block(page, block * 64);
            }
        }
    }

    fn scan_block(&mut self, page: u32, first: usize) {
        let table = self.arena.table(page);
        let Some(block) = table.get(first..first + 64) else { return };
        let all = block.iter().fold(0, |all, spte| all | spte.0);
        if all & Spte::DIRTY_BIT == 0 {
            return;
        }
        if let Some(track) = &mut self.track
            && track.l2.is_none()
            && !self.defects.has(Defect::DirtyClearedBeforeHarvest)
        {
            for spte in block.iter().filter(|spte| spte.dirty()) {
                track.dirty.insert(spte.frame());
            }
            return;
        }
        for index in first..first + 64 {
            let at = SpteRef::new(page, index);
            let spte = self.arena.spte(at);
            if !spte.dirty() {
                continue;
            }
            if self.defect(Defect::DirtyClearedBeforeHarvest) && index % 8 == 3 {
                self.arena.set(at, spte.clean());
                continue;
            }
            self.mark_written(at, 0);
        }
    }

    /// What hardware does with the log before it sets a dirty flag (SDM 3C 29.3.6). `false`: the log is full, and the
    /// access exits instead.
    pub(crate) fn log_write(&mut self, root: RootId, l2: L2Gfn) -> bool {
        let dropped = self.defect(Defect::LogOverflowDropped);
        match &mut self.track {
            Some(track) if track.strategy.uses_log() => {
                if track.log.len() >= LOG_ENTRIES {
                    return dropped;
                }
                track.log.push((root, l2));
                true
            }
            _ => true,
        }
    }

    /// Reads the log and empties it: at a log-full exit, at a harvest, and before tables change.
    pub fn drain_log(&mut self) {
        let Some(track) = &mut self.track else { return };
        if track.log.is_empty() {
            return;
        }
        let mut log = std::mem::take(&mut track.log);
        self.stats.log_drains += 1;
        self.stats.log_entries += log.len() as u64;
        for (root, l2) in log.drain(..) {
            let Ok(page) = self.roots.get(root).map(|root| root.page) else { continue };
            let found = self.lookup(page, l2);
            if found.spte.is_leaf(found.level) {
                self.mark_written(found.at, l2.0 & (found.level.frames() - 1));
            }
        }
        if let Some(track) = &mut self.track {
            track.log = log;
        }
    }

    /// Whether a write to the leaf at `at` would trap for tracking alone.
    #[must_use]
    pub fn is_closed(&self, at: SpteRef) -> bool {
        self.arena.spte(at).is_closed()
    }
}
