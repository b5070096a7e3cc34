//! What leaves the MMU: changes gathered into extents, and flushes gathered to the end of an operation.

use umbra_shared::{L2Gfn, Level};

use crate::access::Access;
use crate::memory::{Extent, Flush, Mapper};
use crate::roots::RootId;
use crate::spte::Frame;
use crate::stats::Stats;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Map(Frame, Level, Access),
    Protect(Access),
    Unmap,
}

const FLUSHES: usize = 8;
const BATCH: usize = 64;

/// Leaves of one root and size that get the same rights at once.
#[derive(Debug)]
pub struct Batch {
    starts: [L2Gfn; BATCH],
    count: usize,
    root: u32,
    access: Access,
}

impl Batch {
    /// An empty batch.
    #[inline]
    #[must_use]
    pub fn new() -> Self {
        Self { starts: [L2Gfn(0); BATCH], count: 0, root: 0, access: Access::NONE }
    }

    /// Adds the leaf at `start` under the root at index `root`; `false` when the batch must be posted first, because it
    /// is full or of another root or rights.
    #[inline]
    pub fn add(&mut self, root: u32, start: L2Gfn, access: Access) -> bool {
        if self.count == 0 {
            (self.root, self.access) = (root, access);
        } else if self.root != root || self.access != access {
            return false;
        }
        let Some(place) = self.starts.get_mut(self.count) else { return false };
        *place = start;
        self.count += 1;
        true
    }

    /// The index of the leaves' root.
    #[must_use]
    pub const fn root(&self) -> u32 {
        self.root
    }
}

/// Changes on their way out. Neighbouring ones of a kind become one.
#[derive(Debug, Default)]
pub struct Outbox {
    pending: Option<(Extent, Change)>,
    flushes: Vec<Extent>,
    flush_all: bool,
}

impl Outbox {
    /// An empty box. Its room for flushes is taken once.
    #[must_use]
    pub fn new() -> Self {
        Self { pending: None, flushes: Vec::with_capacity(FLUSHES), flush_all: false }
    }

    #[inline]
    fn push(&mut self, mapper: &mut dyn Mapper, stats: &mut Stats, extent: Extent, change: Change) {
        if let Some((last, kind)) = &mut self.pending {
            let next = last.root == extent.root && last.start.plus(last.frames) == extent.start;
            let same = match (*kind, change) {
                (Change::Map(frame, level, access), Change::Map(next_frame, next_level, next_access)) => {
                    frame.plus(last.frames) == next_frame && level == next_level && access == next_access
                }
                (kind, change) => kind == change,
            };
            if next && same {
                last.frames += extent.frames;
                return;
            }
            self.post(mapper, stats);
        }
        self.pending = Some((extent, change));
    }

    fn post(&mut self, mapper: &mut dyn Mapper, stats: &mut Stats) {
        match self.pending.take() {
            None => {}
            Some((extent, Change::Map(frame, level, access))) => {
                stats.map_extents += 1;
                stats.map_pages += extent.frames;
                mapper.map(extent, frame, level, access);
            }
            Some((extent, Change::Protect(access))) => {
                stats.protect_extents += 1;
                stats.protect_pages += extent.frames;
                mapper.protect(extent, access);
            }
            Some((extent, Change::Unmap)) => {
                stats.unmap_extents += 1;
                mapper.unmap(extent);
            }
        }
    }

    /// A leaf is mapped.
    #[inline]
    pub fn map(
        &mut self,
        mapper: &mut dyn Mapper,
        stats: &mut Stats,
        extent: Extent,
        (frame, level, access): (Frame, Level, Access),
    ) {
        self.push(mapper, stats, extent, Change::Map(frame, level, access));
    }

    /// Rights have changed.
    #[inline]
    pub fn protect(&mut self, mapper: &mut dyn Mapper, stats: &mut Stats, extent: Extent, access: Access) {
        self.push(mapper, stats, extent, Change::Protect(access));
    }

    /// Rights have changed, and no neighbour's change is expected.
    #[inline]
    pub fn protect_now(&mut self, mapper: &mut dyn Mapper, stats: &mut Stats, extent: Extent, access: Access) {
        if self.pending.is_some() {
            self.post(mapper, stats);
        }
        stats.protect_extents += 1;
        stats.protect_pages += extent.frames;
        mapper.protect(extent, access);
    }

    /// A leaf is mapped, and no neighbour's mapping is expected.
    #[inline]
    pub fn map_now(
        &mut self,
        mapper: &mut dyn Mapper,
        stats: &mut Stats,
        extent: Extent,
        (frame, level, access): (Frame, Level, Access),
    ) {
        if self.pending.is_some() {
            self.post(mapper, stats);
        }
        stats.map_extents += 1;
        stats.map_pages += extent.frames;
        mapper.map(extent, frame, level, access);
    }

    /// Rights of all leaves in `batch` have changed, each of `frames` frames under `root`; it is empty afterwards. One
    /// leaf is gathered with its neighbours, several go at once.
    pub fn protect_batch(
        &mut self,
        mapper: &mut dyn Mapper,
        stats: &mut Stats,
        batch: &mut Batch,
        (root, frames): (RootId, u64),
    ) {
        let leaves = batch.starts.get(..batch.count).unwrap_or_default();
        if let [start] = leaves {
            let extent = Extent { root, start: *start, frames };
            self.protect(mapper, stats, extent, batch.access);
            self.flush(extent);
        } else if !leaves.is_empty() {
            self.post(mapper, stats);
            stats.protect_extents += leaves.len() as u64;
            stats.protect_pages += leaves.len() as u64 * frames;
            mapper.protect_all(root, leaves, frames, batch.access);
            if leaves.len() > FLUSHES {
                self.flush_all();
            } else {
                for start in leaves {
                    self.flush(Extent { root, start: *start, frames });
                }
            }
        }
        batch.count = 0;
    }

    /// Nothing is mapped any more.
    #[inline]
    pub fn unmap(&mut self, mapper: &mut dyn Mapper, stats: &mut Stats, extent: Extent) {
        self.push(mapper, stats, extent, Change::Unmap);
    }

    /// Cached translations of `extent` are void.
    #[inline]
    pub fn flush(&mut self, extent: Extent) {
        if self.flush_all {
            return;
        }
        if let Some(last) = self.flushes.last_mut()
            && last.root == extent.root
        {
            let end = last.start.plus(last.frames);
            if end == extent.start {
                last.frames += extent.frames;
                return;
            }
            if extent.start >= last.start && extent.start.plus(extent.frames) <= end {
                return;
            }
        }
        if self.flushes.len() == FLUSHES {
            self.flush_all = true;
            self.flushes.clear();
        } else {
            self.flushes.push(extent);
        }
    }

    /// Every cached translation is void.
    pub fn flush_all(&mut self) {
        self.flush_all = true;
        self.flushes.clear();
    }

    /// Sends what is left: changes first, then flushes. `forget` is a seeded defect.
    #[inline]
    pub fn finish(&mut self, mapper: &mut dyn Mapper, stats: &mut Stats, forget: bool) {
        if self.pending.is_some() {
            self.post(mapper, stats);
        }
        if self.flush_all || !self.flushes.is_empty() {
            self.send_flushes(mapper, stats, forget);
        }
    }

    fn send_flushes(&mut self, mapper: &mut dyn Mapper, stats: &mut Stats, forget: bool) {
        if forget {
            // Seeded defect.
        } else if self.flush_all {
            stats.flushes += 1;
            mapper.flush(Flush::All);
        } else {
            for extent in &self.flushes {
                stats.flushes += 1;
                mapper.flush(Flush::Extent(*extent));
            }
        }
        self.flush_all = false;
        self.flushes.clear();
    }

    /// Heap bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (self.flushes.capacity() * size_of::<Extent>()) as u64
    }
}

/// `frames` frames from `start` under `root`.
#[must_use]
pub const fn extent(root: RootId, start: u64, frames: u64) -> Extent {
    Extent { root, start: L2Gfn(start), frames }
}
