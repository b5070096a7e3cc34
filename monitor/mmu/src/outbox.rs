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

/// Leaves that are posted together at most.
const ALIKE: usize = 64;
/// Changes on their way out. Neighbouring ones of a kind become one.
#[derive(Debug)]
pub struct Outbox {
    pending: Option<(Extent, Change)>,
    flushes: Vec<Extent>,
    flush_all: bool,
    /// Room for leaves that change alike.
    pub alike: [L2Gfn; ALIKE],
}

impl Outbox {
    /// An empty box. Its room for flushes is taken once.
    #[must_use]
    pub fn new() -> Self {
        Self { pending: None, flushes: Vec::with_capacity(FLUSHES), flush_all: false, alike: [L2Gfn(0); ALIKE] }
    }

    #[inline(never)]
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

    #[inline(never)]
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

    /// Rights have changed, and no neighbour's change is expected: posted at once unless something waits to go first.
    #[inline]
    pub fn protect_now(&mut self, mapper: &mut dyn Mapper, stats: &mut Stats, extent: Extent, access: Access) {
        if self.pending.is_some() {
            return self.protect(mapper, stats, extent, access);
        }
        stats.protect_extents += 1;
        stats.protect_pages += extent.frames;
        mapper.protect(extent, access);
    }

    /// A leaf is mapped, and no neighbour's mapping is expected: posted at once unless something waits to go first.
    #[inline]
    pub fn map_now(
        &mut self,
        mapper: &mut dyn Mapper,
        stats: &mut Stats,
        extent: Extent,
        (frame, level, access): (Frame, Level, Access),
    ) {
        if self.pending.is_some() {
            return self.map(mapper, stats, extent, (frame, level, access));
        }
        stats.map_extents += 1;
        stats.map_pages += extent.frames;
        mapper.map(extent, frame, level, access);
    }

    /// Rights of the first `count` of `self.alike` have changed, all of them small leaves under `root`.
    pub fn protect_alike(
        &mut self,
        mapper: &mut dyn Mapper,
        stats: &mut Stats,
        (root, count): (RootId, usize),
        access: Access,
    ) {
        if self.pending.is_some() {
            self.post(mapper, stats);
        }
        stats.protect_extents += count as u64;
        stats.protect_pages += count as u64;
        mapper.protect_all(root, self.alike.get(..count).unwrap_or_default(), 1, access);
        if count > FLUSHES {
            return self.flush_all();
        }
        for at in 0..count {
            let start = self.alike.get(at).copied().unwrap_or_default();
            self.flush(Extent { root, start, frames: 1 });
        }
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
        if self.pending.is_some() || self.flush_all || !self.flushes.is_empty() {
            self.send(mapper, stats, forget);
        }
    }

    #[inline(never)]
    fn send(&mut self, mapper: &mut dyn Mapper, stats: &mut Stats, forget: bool) {
        self.post(mapper, stats);
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
