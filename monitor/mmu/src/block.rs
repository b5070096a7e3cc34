//! Sixty-four neighbours at once: what a fault maps ahead is mostly a stretch of EPT12 that leads straight on, entry by entry, to consecutive
//! frames. Then one entry is decoded and the others are compared with it.

use umbra_shared::{Gfn, Level};

use crate::access::Access;
use crate::defects::Defect;
use crate::guest::{self, Decoded, GuestEntry};
use crate::head::Head;
use crate::memory::Env;
use crate::mmu::Mmu;
use crate::spte::{Frame, Spte, SpteRef};

/// Entries of a block.
pub(crate) const BLOCK: usize = 64;
const BLOCK_ENTRIES: u16 = 64;

impl Mmu {
    /// Maps the block of small leaves that begins at `at`, if it leads straight on, all of it is permitted alike, and nothing else is mapped
    /// there. Gives its first leaf. Whatever is not that simple is left to be mapped one by one. `words` are its entries in EPT12, if it has any.
    pub(crate) fn map_straight(&mut self, at: SpteRef, words: Option<&[u64; BLOCK]>) -> Option<Spte> {
        let (first, permitted) = self.straight(at, words)?;
        let writable = permitted.allows(Access::WRITE);
        let open = writable && self.admits_block(at, first)?;
        let rights = if open { permitted } else { permitted.without(Access::WRITE) };
        if rights.is_none() || self.config.longest_list < 2 {
            return None;
        }
        let leaf = Spte::leaf(first, Level::K4, rights, writable);
        let start = at.index();
        let (heads, used) = self.rmaps.chunk(first).ok()?;
        let (table, header) = self.arena.page_mut(at.page())?;
        let within = (first.0 & 511) as usize;
        let sptes = table.get_mut(start..start + BLOCK);
        let fitting = sptes.zip(heads.get_mut(within..within + BLOCK)).and_then(|(sptes, heads)| {
            let present = count_fitting(sptes, heads, leaf, at)?;
            Head::fill_straight(heads, at);
            Spte::fill_straight(sptes, leaf);
            Some(BLOCK_ENTRIES - present)
        });
        if let Some(filled) = fitting {
            *used += filled;
            header.present += filled;
            self.stats.mapped += u64::from(filled);
        }
        // Also when nothing was filled: a chunk without a list does not stay.
        self.rmaps.settle(first);
        fitting.map(|_| leaf)
    }

    /// Reads the entries in EPT12 of the block that `at` is in into `words`. `None` where there are none, or they have 4 bytes.
    pub(crate) fn guest_block<'a>(
        &self,
        env: &Env<'_>,
        at: SpteRef,
        words: &'a mut [u64; BLOCK],
    ) -> Option<&'a [u64; BLOCK]> {
        let header = self.arena.header(at.page());
        if header.role.direct() {
            return None;
        }
        let (offset, width) = guest::entry_place(header.role, at.index() & !(BLOCK - 1))?;
        let table = self.slots.find(header.gfn).filter(|_| width == 8)?;
        env.memory.read_block(table.frame, offset, words);
        Some(words)
    }

    /// Where the block at `at` leads and what is permitted there, if its entries in EPT12 (`words`) differ by nothing but consecutive frames.
    fn straight(&self, at: SpteRef, words: Option<&[u64; BLOCK]>) -> Option<(Frame, Access)> {
        let header = *self.arena.header(at.page());
        let role = header.role;
        let (gfn, access) = if role.direct() {
            (header.gfn.plus(at.index() as u64), role.access())
        } else {
            let words = words.filter(|_| !self.defect(Defect::PrefetchIgnoresAccessed))?;
            let decoded = guest::decode(role.format(), self.config.caps, Level::K4, GuestEntry(words[0]));
            let Decoded::Leaf { gfn, access, accessed: true, dirty } = decoded else { return None };
            if gfn.0 & (BLOCK as u64 - 1) != 0 || !leads_straight_on(words) {
                return None;
            }
            (gfn, role.access().and(if dirty { access } else { access.without(Access::WRITE) }))
        };
        let last = Gfn(gfn.0.checked_add(BLOCK as u64 - 1)?);
        let (backing, end) = (self.slots.find(gfn)?, self.slots.find(last)?);
        let whole = end.frame == backing.frame.plus(BLOCK as u64 - 1) && end.writable == backing.writable;
        // The heads of a block lie in one chunk.
        if !whole || backing.frame.0 & (BLOCK as u64 - 1) != 0 {
            return None;
        }
        Some((backing.frame, if backing.writable { access } else { access.without(Access::WRITE) }))
    }

    /// Whether tracking lets all leaves of a block be mapped open; `None` if some of them alone.
    fn admits_block(&self, at: SpteRef, first: Frame) -> Option<bool> {
        let Some(track) = &self.track else { return Some(true) };
        if first < self.config.first_tracked {
            return Some(true);
        }
        let touched = self.arena.header(at.page()).touched >> (at.index() >> 6) & 1 != 0;
        match track.strategy.admit_word(track, first, touched) {
            0 => Some(false),
            u64::MAX => Some(true),
            _ => None,
        }
    }
}

/// Whether the entries' frames are consecutive and all else is the same. No carry leaves the frame: it begins at a multiple of 64.
fn leads_straight_on(words: &[u64; BLOCK]) -> bool {
    let mut expected = words[0];
    let mut differs = 0;
    for word in words {
        differs |= word ^ expected;
        expected = expected.wrapping_add(1 << 12);
    }
    differs == 0
}

/// How many entries of the block are there already, if those are what would be mapped, and no other page is listed.
fn count_fitting(sptes: &[Spte], heads: &[Head], leaf: Spte, at: SpteRef) -> Option<u16> {
    // Mostly the block is empty, or holds the one leaf that a fault has just mapped.
    let first = sptes.iter().position(|spte| *spte != Spte::default()).unwrap_or(sptes.len());
    let (before, rest) = heads.split_at_checked(first)?;
    let others = sptes.get(first + 1..).unwrap_or_default();
    let listed = rest.get(1..).unwrap_or_default();
    if Spte::are_empty(others) && Head::are_empty(before) && Head::are_empty(listed) {
        let (Some(spte), Some(head)) = (sptes.get(first), rest.first()) else { return Some(0) };
        let expected = Spte(leaf.0 + ((first as u64) << 12));
        let fits = *spte == expected && *head == Head::one(SpteRef(at.0 + u32::try_from(first).ok()?));
        return fits.then_some(1);
    }
    let (mut present, mut differs) = (0_u16, false);
    for ((spte, head), offset) in sptes.iter().zip(heads).zip(0_u32..) {
        let mapped = spte.present();
        let listed = if mapped { Head::one(SpteRef(at.0 + offset)) } else { Head::default() };
        let expected = if mapped { Spte(leaf.0 + (u64::from(offset) << 12)) } else { Spte::default() };
        present += u16::from(mapped);
        differs |= *spte != expected || *head != listed;
    }
    (!differs).then_some(present)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::Request;
    use crate::config::Config;
    use crate::fault::Outcome;
    use crate::format::Format;
    use crate::memory::{NoMapper, Slot};
    use crate::role::RootRole;
    use crate::stateful::Rng;
    use crate::track::WriteProtect;
    use crate::walker::PlainMemory;
    use umbra_shared::L2Gfn;
    use umbra_shared::paging::ept::{RIGHTS, WRITE, WRITE_BACK};

    /// EPT12's root; the tables below follow. Its leaf table begins with a block that leads to frames 64 and on.
    const ROOT: u64 = 1;
    const FIRST: u64 = 64;

    fn straight() -> [u64; BLOCK] {
        let mut words = [0; BLOCK];
        for (word, frame) in words.iter_mut().zip(FIRST..) {
            *word = frame << 12 | RIGHTS | WRITE_BACK;
        }
        words
    }

    #[test]
    fn consecutive_frames_alone_lead_straight_on() {
        assert!(leads_straight_on(&straight()));
        for (at, change) in [(0, 1 << 12), (1, WRITE), (63, 1 << 12), (31, 1 << 63), (5, u64::MAX)] {
            let mut words = straight();
            words[at] ^= change;
            assert!(!leads_straight_on(&words), "{at} {change:#x}");
        }
    }

    /// One block under EPT12 with entry `at` changed by `change`, and one fault at `touched`. What is mapped is what EPT12 has, entry by entry, and
    /// nothing of a page that it has not.
    fn check_block(at: usize, change: u64, touched: u64, request: Request) {
        let mut words = straight();
        words[at] ^= change;
        let mut memory = PlainMemory::new(512, 0);
        for table in [ROOT, ROOT + 1, ROOT + 2] {
            memory.write(Frame(table), 0, ((table + 1) << 12) | RIGHTS);
        }
        for (offset, word) in (0..).step_by(8).zip(words) {
            memory.write(Frame(ROOT + 3), offset, word);
        }
        let config = Config { extent: 64, ..Config::new(512, &WriteProtect) };
        let mut mmu = Mmu::new(config, &[Slot::identity(512)]).unwrap();
        let mut mapper = NoMapper;
        let mut env = Env { memory: &mut memory, mapper: &mut mapper };
        let role = RootRole::new(Format::Ept { five_levels: false, accessed_dirty: false });
        let root = mmu.load_root(&mut env, role, ROOT << 12).unwrap();
        let outcome = mmu.fault(&mut env, root, touched << 12, request).unwrap();
        let done = matches!(outcome, Outcome::Mapped { .. });
        assert!(done || change != 0 && touched == at as u64, "{at} {change:#x} {touched}: {outcome:?}");
        let mut count = 0;
        for (page, &word) in (0..).zip(&words) {
            let Some((frame, _, access)) = mmu.peek(root, L2Gfn(page)).unwrap() else { continue };
            count += 1;
            assert_eq!(frame.0, word >> 12 & 0xff_ffff_ffff, "{at} {change:#x} {touched}: page {page}");
            let bits = access.bits();
            assert!(bits != 0 && word & RIGHTS & bits == bits, "{at} {change:#x} {touched}: page {page}");
        }
        assert!(count >= u64::from(done) && (change != 0 || count == 64), "{at} {change:#x} {touched}: {count} mapped");
    }

    #[test]
    fn a_block_is_mapped_as_its_entries_are() {
        let mut rng = Rng(1);
        let bits = [0, 1, 2, 3, 12, 14, 20, 45, 51];
        for _ in 0..3000 {
            let change = if rng.once_in(4) { 0 } else { 1 << rng.pick(&bits) };
            let at = usize::try_from(rng.below(64)).unwrap();
            let touched = if rng.once_in(3) { at as u64 } else { rng.below(64) };
            check_block(at, change, touched, rng.pick(&[Request::READ, Request::WRITE]));
        }
    }
}
