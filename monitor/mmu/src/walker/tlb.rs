//! Cached translations, by root and L2 frame. Nothing leaves but by a flush or for want of room.

use umbra_shared::{L2Gfn, Level};

use super::Mirror;
use crate::access::Access;
use crate::memory::Extent;
use crate::roots::RootId;
use crate::spte::Frame;

#[derive(Clone, Copy, Debug)]
struct Entry {
    root: RootId,
    l2: L2Gfn,
    frame: Frame,
    access: Access,
    dirty: bool,
}

/// A direct-mapped TLB of 4 KiB translations; a huge leaf's are cached page by page, as hardware may.
#[derive(Debug)]
pub struct Tlb {
    entries: Vec<Option<Entry>>,
    mask: u64,
    /// Entries that flushes removed.
    pub forgotten: u64,
    /// What a mapper would have mapped, for tests that ask.
    pub mirror: Option<Box<Mirror>>,
}

impl Tlb {
    /// An empty TLB of `2^bits` entries.
    #[must_use]
    pub fn new(bits: u32) -> Self {
        Self { entries: vec![None; 1 << bits], mask: (1 << bits) - 1, forgotten: 0, mirror: None }
    }

    fn place(&self, root: RootId, l2: L2Gfn) -> usize {
        let mixed = (l2.0 ^ u64::from(root.index()) << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 24;
        usize::try_from(mixed & self.mask).unwrap_or(0)
    }

    /// The page, rights and dirty flag cached for `l2` under `root`.
    #[must_use]
    pub fn find(&self, root: RootId, l2: L2Gfn) -> Option<(Frame, Access, bool)> {
        let entry = self.entries.get(self.place(root, l2))?.as_ref()?;
        (entry.root.index() == root.index() && entry.l2 == l2).then_some((entry.frame, entry.access, entry.dirty))
    }

    /// Caches a translation.
    pub fn insert(&mut self, root: RootId, l2: L2Gfn, _level: Level, frame: Frame, access: Access, dirty: bool) {
        let place = self.place(root, l2);
        if let Some(entry) = self.entries.get_mut(place) {
            *entry = Some(Entry { root, l2, frame, access, dirty });
        }
    }

    /// Forgets what is cached for `extent`. Roots are told apart by their index, so a new root at an old place
    /// depends on the old one's flush.
    pub fn forget(&mut self, extent: Extent) {
        if extent.frames <= 16 {
            for offset in 0..extent.frames {
                let place = self.place(extent.root, extent.start.plus(offset));
                self.forget_place(place, extent);
            }
            return;
        }
        for place in 0..self.entries.len() {
            self.forget_place(place, extent);
        }
    }

    fn forget_place(&mut self, place: usize, extent: Extent) {
        if let Some(place) = self.entries.get_mut(place)
            && let Some(entry) = place
            && entry.root.index() == extent.root.index()
            && entry.l2.0.wrapping_sub(extent.start.0) < extent.frames
        {
            *place = None;
            self.forgotten += 1;
        }
    }

    /// Forgets everything.
    pub fn forget_all(&mut self) {
        self.forgotten += 1;
        self.entries.fill(None);
    }
}
