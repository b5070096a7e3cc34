//! What is mapped before L2 touches it: it costs no fault then, and nothing counts as touched.

use umbra_shared::{Gfn, L2Gfn, Level};

use crate::access::{Access, Request};
use crate::block::BLOCK;
use crate::config::{MmuError, NoMemory};
use crate::defects::Defect;
use crate::fault::{Outcome, PAGES_A_FAULT};
use crate::guest::{self, Decoded, Ended, GuestEntry, Walk};
use crate::map::Target;
use crate::memory::Env;
use crate::mmu::{Found, Mmu};
use crate::outbox::extent;
use crate::roots::RootId;
use crate::spte::{Spte, SpteRef};

impl Mmu {
    /// Maps what EPT12 has at `l2_gpa` for reading, and in so many stretches of 2 MiB (one at least: that around `l2_gpa`), as far as no flag of EPT12
    /// must be set for that and there is room. Ends at the first page that cannot be mapped so, or is mapped already.
    ///
    /// # Errors
    /// A stale root, or no memory: what was mapped before that stays.
    pub fn prefetch(&mut self, env: &mut Env<'_>, root: RootId, l2_gpa: u64, stretches: u64) -> Result<(), MmuError> {
        let (page, frames) = self.roots.get(root).map(|root| (root.page, root.frames))?;
        let first = L2Gfn::containing(l2_gpa);
        let end = (first.0 >> 9).saturating_add(stretches.max(1)).saturating_mul(512);
        let done = self.prefetch_until(env, root, page, (first, end.min(frames)));
        // Also when it failed: what was pushed out on the way is posted.
        self.finish(env);
        Ok(done?)
    }

    fn prefetch_until(
        &mut self,
        env: &mut Env<'_>,
        root: RootId,
        page: u32,
        (first, end): (L2Gfn, u64),
    ) -> Result<(), NoMemory> {
        let mut l2 = first;
        while l2.0 < end {
            let found = self.lookup_hinted(root, page, l2);
            if found.spte.present() {
                break;
            }
            let leaves = if found.level == Level::M2 { self.prefetch_leaves(env, &found, (root, l2), end)? } else { 0 };
            if leaves == 0 {
                let mapped = match found.level {
                    Level::K4 => self.resolve_below(env, root, found.at, l2, Access::READ)?,
                    _ => self.prefetch_by_walk(env, root, page, l2)?,
                };
                if mapped.is_none() {
                    break;
                }
            }
            l2 = L2Gfn(((l2.0 >> 9) + leaves.max(1)) << 9);
        }
        Ok(())
    }

    /// Maps the leaves of 2 MiB from `found` on that follow each other in its table of EPT12, up to frame `end`. How many they are. The entries above
    /// count as they were when they were linked or last synchronised, as in [`Self::resolve_below`].
    fn prefetch_leaves(
        &mut self,
        env: &mut Env<'_>,
        found: &Found,
        (root, l2): (RootId, L2Gfn),
        end: u64,
    ) -> Result<u64, NoMemory> {
        let (page, first) = (found.at.page(), found.at.index());
        if self.config.max_level < Level::M2 || self.defect(Defect::FaultMapsNothing) {
            return Ok(0);
        }
        let (mut words, mut done) = ([0; BLOCK], 0);
        // The leaf that comes next if EPT12 leads straight on, by its entry, and how many such there may be.
        let mut next = (0, Spte::NONE, 0);
        for (index, start) in (first..512).zip((l2.0 & !511..end).step_by(512)) {
            let at = SpteRef::new(page, index);
            let unread = done == 0 || index % BLOCK == 0;
            if unread && self.guest_block(env, at, &mut words).is_none() {
                break;
            }
            let word = words.get(index % BLOCK).copied().unwrap_or(0);
            let (entry, leaf, more) = next;
            let (leaf, more) = if more > 0 && word == entry {
                (leaf, more)
            } else {
                let Some(alike) = self.huge_leaf(at, GuestEntry(word)) else { break };
                alike
            };
            if self.arena.spte(at).present() {
                break;
            }
            self.add_leaf(env, at, Level::M2, leaf)?;
            let pages = extent(root, start, Level::M2.frames());
            self.out.map(env.mapper, &mut self.stats, pages, (leaf.frame(), Level::M2, leaf.access()));
            next = (word.wrapping_add(Level::M2.bytes()), Spte(leaf.0 + Level::M2.bytes()), more - 1);
            done += 1;
        }
        Ok(done)
    }

    /// The leaf of 2 MiB that `entry` of EPT12 makes at `at`, if none of the entry's flags must be set for reading; and how many there may be from it on
    /// that differ by nothing but consecutive frames: all that its slot holds, while nobody tracks.
    fn huge_leaf(&self, at: SpteRef, entry: GuestEntry) -> Option<(Spte, u64)> {
        let role = self.arena.header(at.page()).role;
        let decoded = guest::decode(role.format(), self.config.caps, Level::M2, entry);
        let Decoded::Leaf { gfn, access, accessed: true, dirty } = decoded else { return None };
        let backing = self.slots.find(gfn)?;
        let level = self.slots.max_level(gfn, Level::M2, self.defect(Defect::CollapseAcrossSlot));
        let granted = role.access().and(access);
        if level < Level::M2 || !granted.allows(Access::READ) {
            return None;
        }
        let permitted = if backing.writable && dirty { granted } else { granted.without(Access::WRITE) };
        let open = self.admits(backing.frame, Level::M2, at);
        let rights = if open { permitted } else { permitted.without(Access::WRITE) };
        let leaf = Spte::leaf(backing.frame, Level::M2, rights, permitted.allows(Access::WRITE));
        let alike = if self.track.is_some() { 1 } else { self.slots.straight(gfn) / Level::M2.frames() };
        Some((leaf, alike.max(1)))
    }

    fn prefetch_by_walk(
        &mut self,
        env: &mut Env<'_>,
        root: RootId,
        page: u32,
        l2: L2Gfn,
    ) -> Result<Option<Outcome>, NoMemory> {
        let (role, table) = (self.arena.header(page).role, self.arena.header(page).gfn);
        let mut walk = Walk::new();
        let ended = guest::walk(&mut walk, env.memory, &self.slots, self.config.caps, (role, table), l2, Request::READ);
        let flags = !role.format().has_accessed_dirty() || walk.accessed;
        if ended != Ended::AtPage || !flags || self.arena.in_use() + PAGES_A_FAULT > self.config.quota() {
            return Ok(None);
        }
        let gfn = Gfn(walk.gfn.0 | l2.0 & (walk.level.frames() - 1));
        let Some(backing) = self.slots.find(gfn) else { return Ok(None) };
        let rights = if backing.writable && walk.dirty { walk.access } else { walk.access.without(Access::WRITE) };
        let target = Target { walk: &walk, l2, rights, frame: backing.frame, gfn, write: false };
        self.map(env, root, page, &target).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::fault::Outcome;
    use crate::format::Format;
    use crate::memory::{Extent, Flush, L1Memory, Mapper, Slot};
    use crate::role::RootRole;
    use crate::spte::Frame;
    use crate::stateful::Rng;
    use crate::track::WriteProtect;
    use crate::walker::PlainMemory;
    use umbra_shared::paging::ept::{ACCESSED, DIRTY, LARGE, RIGHTS, WRITE_BACK};

    /// Leaves of EPT12, the first frame behind them, and memory, in which the tables come last.
    const LEAVES: u64 = 16;
    const FIRST: u64 = 512;
    const FRAMES: u64 = 20 * 512;
    const ROOT: u64 = FRAMES - 8;

    #[derive(Default)]
    struct Posted(Vec<(u64, u64, Frame)>);

    impl Mapper for Posted {
        fn map(&mut self, extent: Extent, frame: Frame, _: Level, _: Access) {
            self.0.push((extent.start.0, extent.frames, frame));
        }
        fn protect(&mut self, _: Extent, _: Access) {}
        fn unmap(&mut self, _: Extent) {}
        fn flush(&mut self, _: Flush) {}
    }

    fn mmu(memory: &mut PlainMemory, mapper: &mut Posted) -> (Mmu, RootId) {
        // Two slots, so that the leaves lie in both.
        let slot = |base: u64, frames: u64| Slot { base: Gfn(base), frames, first: Frame(base), ..Slot::identity(1) };
        let slots = [slot(0, 7 * 512), slot(7 * 512, FRAMES - 7 * 512)];
        let mut mmu = Mmu::new(Config { extent: 64, ..Config::new(FRAMES, &WriteProtect) }, &slots).unwrap();
        let role = RootRole::new(Format::Ept { five_levels: false, accessed_dirty: true });
        let root = mmu.load_root(&mut Env { memory, mapper }, role, ROOT << 12).unwrap();
        (mmu, root)
    }

    /// EPT12 with entry `at` changed by `change`, so many stretches mapped ahead from `from` on: those up to the first entry that a read would have to
    /// set a flag of, or that permits none, each as a read maps it.
    fn check(at: u64, change: u64, (from, stretches): (u64, u64)) {
        let (mut memory, mut posted) = (PlainMemory::new(FRAMES, 0), Posted::default());
        for table in [ROOT, ROOT + 1] {
            memory.write(Frame(table), 0, ((table + 1) << 12) | RIGHTS | ACCESSED);
        }
        for leaf in 0..LEAVES {
            let entry = (FIRST + leaf * 512) << 12 | RIGHTS | WRITE_BACK | LARGE | ACCESSED | DIRTY;
            memory.write(Frame(ROOT + 2), leaf * 8, if leaf == at { entry ^ change } else { entry });
        }
        let (mut ahead, root) = mmu(&mut memory, &mut posted);
        ahead.prefetch(&mut Env { memory: &mut memory, mapper: &mut posted }, root, from << 21, stretches).unwrap();
        ahead.audit().unwrap();
        let end = (from + stretches.max(1)).min(LEAVES);
        let mut mapped = 0;
        for leaf in 0..LEAVES {
            let l2 = L2Gfn(leaf * 512);
            let found = ahead.peek(root, l2).unwrap();
            let (mut by_fault, root) = mmu(&mut memory, &mut Posted::default());
            let entry = memory.read(Frame(ROOT + 2), leaf * 8);
            let mut env = Env { memory: &mut memory, mapper: &mut Posted::default() };
            let outcome = by_fault.fault(&mut env, root, l2.address(), Request::READ).unwrap();
            let flagless = entry & ACCESSED != 0 && matches!(outcome, Outcome::Mapped { .. });
            let expected = (from..end).contains(&leaf) && mapped == leaf - from && flagless;
            assert_eq!(found.is_some(), expected, "leaf {leaf} of {from}+{stretches}, {at} ^ {change:#x}");
            if expected {
                mapped += 1;
                assert_eq!(
                    found,
                    by_fault.peek(root, l2).unwrap(),
                    "leaf {leaf} of {from}+{stretches}, {at} ^ {change:#x}"
                );
            }
        }
        assert_eq!(posted.0.iter().map(|(_, frames, _)| frames).sum::<u64>(), mapped * 512);
        // The first one by a walk, the others of its table together.
        assert!(change != 0 || posted.0.len() <= 2, "{:?}", posted.0);
    }

    #[test]
    fn leaves_are_mapped_ahead_as_a_read_would_map_them() {
        let mut rng = Rng(1);
        // Rights, type, size, flags, frame, and none at all.
        let bits = [0, 1, 2, 3, 7, 8, 9, 14, 21, 24, 45, 51];
        for _ in 0..2000 {
            let change = if rng.once_in(4) { 0 } else { 1 << rng.pick(&bits) };
            check(rng.below(LEAVES), change, (rng.below(LEAVES), rng.below(LEAVES + 2)));
        }
    }
}
