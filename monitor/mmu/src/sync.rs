//! Invalidations: EPT02 is brought up to date with EPT12.
//!
//! Guest tables are re-synchronised, not write-protected. L1 runs in a VM of its own, whose memory KVM maps; trapping
//! L1's stores to tables would need a read-only mapping of each table and an emulated store for each entry (FACTS: an
//! exit costs thousands of instructions), while the architecture only promises L1 anything after INVEPT or its SVM
//! equals. So every shadow page may lag behind its table (KVM's *unsync*) until an invalidation applies to it, or until
//! a new path is linked to it: then each present entry is compared with the guest's, cut, or dropped.

use umbra_shared::{Gfn, L2Gfn, Level};

use crate::access::Access;
use crate::block::BLOCK;
use crate::defects::Defect;
use crate::format::Format;
use crate::guest::{self, Decoded, GuestEntry};
use crate::memory::Env;
use crate::mmu::Mmu;
use crate::roots::RootId;
use crate::spte::{Spte, SpteRef};

/// What L1 did that may make translations void.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalidation {
    /// INVEPT type 2 (SDM 3C 31.3), or `TLB_CONTROL` 1 (APM 15.16.1): all contexts.
    All,
    /// INVEPT type 1 with an EPTP whose table is this: all roots over it, whatever their other role bits.
    Table(u64),
    /// `TLB_CONTROL` 3 or 7 for the ASID that uses this root, a new ASID, or another nCR3 for a running ASID.
    Root(RootId),
    /// INVLPGA: it names a linear address and an ASID, so any L2 GPA of the root may be meant. Over-approximated.
    Invlpga(RootId),
    /// INVVPID: only combined mappings of linear addresses go, which EPT02 has none of (SDM 3C 29.4.3.1).
    Invvpid,
    /// L2 loads its own CR3: the same.
    L2Cr3,
}

impl Mmu {
    /// Makes `what` effective. Roots that are not loaded are brought up to date when they are loaded again.
    pub fn invalidate(&mut self, env: &mut Env<'_>, what: Invalidation) {
        self.stats.invalidations += 1;
        let applies = |id: RootId, table: u64| match what {
            Invalidation::All => true,
            Invalidation::Table(at) => at == table,
            Invalidation::Root(root) | Invalidation::Invlpga(root) => root == id,
            Invalidation::Invvpid | Invalidation::L2Cr3 => false,
        };
        self.stamp = self.stamp.wrapping_add(1);
        for index in 0..self.roots.end() {
            let Some(root) = self.roots.at_mut(index) else { continue };
            if !applies(root.id, root.table) {
                continue;
            }
            if root.count == 0 {
                root.pending_sync = true;
            } else {
                let page = root.page;
                root.pending_sync = false;
                self.sync_page(env, page);
            }
        }
        self.finish(env);
        if self.defect(Defect::UnloadedNotSynced) {
            for index in 0..self.roots.end() {
                if let Some(root) = self.roots.at_mut(index) {
                    root.pending_sync = false;
                }
            }
        }
    }

    /// Synchronises the root at `index` now.
    pub(crate) fn sync_root(&mut self, env: &mut Env<'_>, index: u32) {
        let Some(root) = self.roots.at_mut(index) else { return };
        root.pending_sync = false;
        let page = root.page;
        self.sync_below(env, page);
    }

    /// Synchronises `page` and everything below it.
    pub(crate) fn sync_below(&mut self, env: &mut Env<'_>, page: u32) {
        self.stamp = self.stamp.wrapping_add(1);
        self.sync_page(env, page);
    }

    fn sync_page(&mut self, env: &mut Env<'_>, page: u32) {
        let header = *self.arena.header(page);
        if header.stamp == self.stamp || header.role.direct() || !header.in_use() {
            return;
        }
        self.arena.header_mut(page).stamp = self.stamp;
        let mut left = header.present;
        let small = header.role.level() == Level::K4;
        let (mut room, mut words) = ([0; BLOCK], None);
        for index in 0..512 {
            if left == 0 {
                break;
            }
            let at = SpteRef::new(page, index);
            if small && index % BLOCK == 0 {
                words = self.guest_block(env, at, &mut room).copied();
            }
            let spte = self.arena.spte(at);
            if spte.present() {
                left -= 1;
                let word = words.as_ref().and_then(|words| words.get(index % BLOCK));
                if word.is_some_and(|word| self.leads_to(header.role.format(), spte, GuestEntry(*word))) {
                    self.stats.synced += 1;
                    continue;
                }
                if let Some(child) = self.sync_entry(env, at) {
                    self.sync_page(env, child);
                }
            }
        }
    }

    /// Whether `entry` is an ordinary small leaf that leads where the shadow leaf `spte` does, and permits everything: most of those that are compared.
    fn leads_to(&self, format: Format, spte: Spte, entry: GuestEntry) -> bool {
        let all = guest::plain_leaf(format, self.config.caps, entry).is_some_and(|flags| flags.accessed && flags.dirty);
        all && self
            .slots
            .find(Gfn(entry.0 >> 12 & 0xff_ffff_ffff))
            .is_some_and(|backing| backing.writable && backing.frame == spte.frame())
    }

    /// Synchronises the entries on the way to `l2` under root page `page`, as a violation demands: the processor
    /// forgets what it had cached for that address at every level (SDM 3C 29.4.3.1). Pages below that other paths
    /// share can then be filled again without this path seeing it through an entry that is void.
    pub(crate) fn sync_path(&mut self, env: &mut Env<'_>, page: u32, l2: L2Gfn) {
        if l2.0 >= self.arena.header(page).role.format().frames() {
            return;
        }
        let mut page = page;
        loop {
            let header = self.arena.header(page);
            if header.role.direct() {
                return;
            }
            let at = SpteRef::new(page, Format::shadow_index(header.role.level(), l2));
            if !self.arena.spte(at).present() {
                return;
            }
            let Some(child) = self.sync_entry(env, at) else { return };
            page = child;
        }
    }

    /// Compares the present entry at `at` with EPT12, and cuts or drops it. Gives the child of a link that stays.
    fn sync_entry(&mut self, env: &mut Env<'_>, at: SpteRef) -> Option<u32> {
        let header = *self.arena.header(at.page());
        let spte = self.arena.spte(at);
        // The synthetic root of 32-bit tables has no entries to compare.
        let Some((offset, width)) = guest::entry_place(header.role, at.index()) else { return Some(spte.child()) };
        let decoded = match self.slots.find(header.gfn) {
            None => Decoded::NotPresent,
            Some(backing) => {
                let entry = guest::read_entry(env.memory, backing.frame, offset, width);
                guest::decode(header.role.format(), self.config.caps, header.role.level(), entry)
            }
        };
        self.stats.synced += 1;
        if !self.sync_spte(env, at, spte, decoded) {
            self.drop_spte(env, at);
            return None;
        }
        (!spte.is_leaf(header.role.level())).then(|| spte.child())
    }

    /// Whether entry `spte` at `at` may stay, now that EPT12 says `decoded`. Rights are cut here.
    fn sync_spte(&mut self, env: &mut Env<'_>, at: SpteRef, spte: Spte, decoded: Decoded) -> bool {
        let role = self.arena.header(at.page()).role;
        let level = role.level();
        match decoded {
            Decoded::NotPresent | Decoded::Reserved => false,
            Decoded::Table { gfn, access, accessed } => {
                if spte.is_leaf(level) || !accessed {
                    return false;
                }
                let child = *self.arena.header(spte.child());
                let quadrant = child.role.quadrant();
                if child.gfn != gfn || child.role != role.child(false, role.access().and(access), quadrant) {
                    return false;
                }
                true
            }
            Decoded::Leaf { gfn, access, accessed, dirty } => {
                let half = if level == Level::M2 { (at.index() as u64 & 1) << 9 } else { 0 };
                let gfn = if role.format().has_4_byte_gpte() { gfn.plus(half) } else { gfn };
                let Some(backing) = self.slots.find(gfn) else { return false };
                let mut rights = role.access().and(access);
                if !dirty || !backing.writable {
                    rights = rights.without(Access::WRITE);
                }
                if !accessed {
                    return false;
                }
                if !spte.is_leaf(level) {
                    let child = self.arena.header(spte.child());
                    let wanted = role.child(true, self.split_rights(rights), 0);
                    return child.gfn == gfn && child.role == wanted;
                }
                spte.frame() == backing.frame && (self.defect(Defect::SyncIgnoresAccess) || self.cut(env, at, rights))
            }
        }
    }

    /// Cuts a leaf down to `rights`; `false` when nothing would be left.
    fn cut(&mut self, env: &mut Env<'_>, at: SpteRef, rights: Access) -> bool {
        let spte = self.arena.spte(at);
        let new = spte.cut(rights);
        if !new.present() {
            return false;
        }
        if new != spte {
            self.arena.set(at, new);
            if new.access() != spte.access() {
                self.announce(env, at, Some(new.access()));
            }
        }
        true
    }
}
