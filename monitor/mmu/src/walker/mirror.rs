//! What a mapper would have mapped, at a number of watched frames, going by what the MMU posted and by nothing else.

use umbra_shared::L2Gfn;

use crate::access::Access;
use crate::memory::Extent;
use crate::roots::RootId;
use crate::spte::Frame;

/// The mirror of a mapper: what is mapped at each watched frame of each root.
#[derive(Debug, Default)]
pub struct Mirror {
    watched: Vec<L2Gfn>,
    roots: Vec<Vec<Option<(Frame, Access)>>>,
}

impl Mirror {
    /// A mirror that watches `frames`.
    #[must_use]
    pub fn new(mut frames: Vec<L2Gfn>) -> Self {
        frames.sort_unstable();
        frames.dedup();
        Self { watched: frames, roots: Vec::new() }
    }

    fn update(&mut self, extent: Extent, change: impl Fn(u64, Option<(Frame, Access)>) -> Option<(Frame, Access)>) {
        let root = extent.root.index() as usize;
        if self.roots.len() <= root {
            self.roots.resize(root + 1, vec![None; self.watched.len()]);
        }
        let Some(mapped) = self.roots.get_mut(root) else { return };
        let first = self.watched.partition_point(|&frame| frame < extent.start);
        for (frame, mapped) in self.watched.iter().zip(mapped).skip(first) {
            let offset = frame.0 - extent.start.0;
            if offset >= extent.frames {
                break;
            }
            *mapped = change(offset, *mapped);
        }
    }

    /// `map` was posted.
    pub fn map(&mut self, extent: Extent, frame: Frame, access: Access) {
        self.update(extent, |offset, _| Some((frame.plus(offset), access)));
    }

    /// `protect` was posted.
    pub fn protect(&mut self, extent: Extent, access: Access) {
        self.update(extent, |_, mapped| mapped.map(|(frame, _)| (frame, access)));
    }

    /// `unmap` was posted.
    pub fn unmap(&mut self, extent: Extent) {
        self.update(extent, |_, _| None);
    }

    /// What is mapped at `l2` under `root`. `None`: `l2` is not watched.
    #[must_use]
    pub fn find(&self, root: RootId, l2: L2Gfn) -> Option<Option<(Frame, Access)>> {
        let at = self.watched.binary_search(&l2).ok()?;
        Some(self.roots.get(root.index() as usize).and_then(|mapped| mapped.get(at).copied()).flatten())
    }
}
