//! Reverse maps: from a page of L1's memory to every leaf of EPT02 that maps it, a map for each leaf size.
//!
//! 8 bytes a page, and only for 2 MiB regions in which some 4 KiB leaf exists; 8 bytes a 2 MiB and 1 GiB region.

use umbra_shared::Level;

use crate::config::NoMemory;
use crate::head::Head;
use crate::ptelist::{Allowance, Cursor, PteLists, narrow};
use crate::spte::{Frame, SpteRef};

#[derive(Debug)]
struct Chunk {
    heads: Box<[Head; 512]>,
    used: u16,
}

/// All reverse maps of one MMU.
#[derive(Debug)]
pub struct Rmaps {
    regions: Vec<u32>,
    chunks: Vec<Option<Chunk>>,
    free: Vec<u32>,
    large: Vec<Head>,
    giant: Vec<Head>,
    live: u32,
    longest: u32,
    /// Allocation limit for tests.
    pub allowance: Allowance,
}

fn new_heads() -> Result<Box<[Head; 512]>, NoMemory> {
    let mut heads = Vec::new();
    heads.try_reserve_exact(512).map_err(|_| NoMemory)?;
    // In blocks, as new tables are.
    for _ in 0..8 {
        heads.extend_from_slice(std::hint::black_box(&[Head::default(); 64]));
    }
    heads.into_boxed_slice().try_into().map_err(|_| NoMemory)
}

impl Rmaps {
    /// Empty maps for `frames` pages of memory. Lists of more than `longest` entries are refused.
    #[must_use]
    pub fn new(frames: u64, longest: u32) -> Self {
        let of = |level: Level| usize::try_from(frames.div_ceil(level.frames())).unwrap_or(usize::MAX);
        Self {
            regions: vec![0; of(Level::M2)],
            chunks: Vec::new(),
            free: Vec::new(),
            large: vec![Head::default(); of(Level::M2)],
            giant: vec![Head::default(); of(Level::G1)],
            live: 0,
            longest,
            allowance: Allowance(u32::MAX),
        }
    }

    /// Heap bytes, without the lists' descriptors.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (self.regions.capacity() * 4
            + self.chunks.capacity() * size_of::<Option<Chunk>>()
            + self.free.capacity() * 4
            + (self.large.capacity() + self.giant.capacity() + self.live as usize * 512) * size_of::<Head>())
            as u64
    }

    fn region(frame: Frame) -> usize {
        usize::try_from(frame.0 >> 9).unwrap_or(usize::MAX)
    }

    #[inline]
    fn chunk_index(&self, frame: Frame) -> usize {
        // 0 stands for none, so stored indices are one higher.
        (self.regions.get(Self::region(frame)).copied().unwrap_or(0) as usize).wrapping_sub(1)
    }

    /// The list of `frame`'s leaves of `level`.
    #[must_use]
    #[inline]
    pub fn head(&self, frame: Frame, level: Level) -> Head {
        match level {
            Level::K4 => match self.chunks.get(self.chunk_index(frame)) {
                Some(Some(chunk)) => chunk.heads.get((frame.0 & 511) as usize).copied().unwrap_or_default(),
                _ => Head::default(),
            },
            Level::M2 => self.large.get(Self::region(frame)).copied().unwrap_or_default(),
            _ => self.giant.get(Self::region(frame) >> 9).copied().unwrap_or_default(),
        }
    }

    /// Makes sure that 4 KiB leaves of `frame`'s 2 MiB can be listed, and gives their heads and the count of used ones.
    ///
    /// # Errors
    /// No memory, or a frame beyond it.
    #[inline]
    pub fn chunk(&mut self, frame: Frame) -> Result<(&mut [Head; 512], &mut u16), NoMemory> {
        let mut index = self.chunk_index(frame);
        if !matches!(self.chunks.get(index), Some(Some(_))) {
            index = self.add_chunk(frame)?;
        }
        match self.chunks.get_mut(index) {
            Some(Some(chunk)) => Ok((&mut chunk.heads, &mut chunk.used)),
            _ => Err(NoMemory),
        }
    }

    fn add_chunk(&mut self, frame: Frame) -> Result<usize, NoMemory> {
        let region = self.regions.get_mut(Self::region(frame)).ok_or(NoMemory)?;
        self.allowance.take()?;
        let chunk = Some(Chunk { heads: new_heads()?, used: 0 });
        let index = if let Some(index) = self.free.pop() {
            if let Some(place) = self.chunks.get_mut(index as usize) {
                *place = chunk;
            }
            index
        } else {
            if self.chunks.len() == self.chunks.capacity() {
                let more = (self.chunks.len() / 8).max(16);
                self.chunks.try_reserve_exact(more).map_err(|_| NoMemory)?;
            }
            self.chunks.push(chunk);
            narrow(self.chunks.len() - 1)
        };
        *region = index + 1;
        self.live += 1;
        Ok(index as usize)
    }

    /// Frees the chunk of `frame`'s 2 MiB if nothing is listed in it any more.
    pub fn settle(&mut self, frame: Frame) {
        let index = self.chunk_index(frame);
        if let Some(place @ Some(_)) = self.chunks.get_mut(index)
            && place.as_ref().is_some_and(|chunk| chunk.used == 0)
        {
            *place = None;
            self.free.push(narrow(index));
            if let Some(region) = self.regions.get_mut(Self::region(frame)) {
                *region = 0;
            }
            self.live -= 1;
            if self.live == 0 {
                (self.chunks, self.free) = (Vec::new(), Vec::new());
            }
        }
    }

    fn head_mut(&mut self, frame: Frame, level: Level) -> Option<&mut Head> {
        match level {
            Level::K4 => {
                let index = self.chunk_index(frame);
                match self.chunks.get_mut(index) {
                    Some(Some(chunk)) => chunk.heads.get_mut((frame.0 & 511) as usize),
                    _ => None,
                }
            }
            Level::M2 => self.large.get_mut(Self::region(frame)),
            _ => self.giant.get_mut(Self::region(frame) >> 9),
        }
    }

    /// Lists the leaf at `entry`, which must not be listed yet. `false`: the list has its longest length.
    ///
    /// # Errors
    /// No memory; nothing changed.
    #[inline]
    pub fn add(&mut self, lists: &mut PteLists, frame: Frame, level: Level, entry: SpteRef) -> Result<bool, NoMemory> {
        if level > Level::K4 {
            return self.add_alias(lists, frame, level, entry);
        }
        let (heads, used) = self.chunk(frame)?;
        let head = heads.get_mut((frame.0 & 511) as usize).ok_or(NoMemory)?;
        if !head.is_empty() {
            return self.add_alias(lists, frame, level, entry);
        }
        *head = Head::one(entry);
        *used += 1;
        Ok(true)
    }

    /// [`Self::add`] where something may be listed already, or for a huge leaf.
    fn add_alias(
        &mut self,
        lists: &mut PteLists,
        frame: Frame,
        level: Level,
        entry: SpteRef,
    ) -> Result<bool, NoMemory> {
        let longest = self.longest;
        let head = self.head_mut(frame, level).ok_or(NoMemory)?;
        if lists.count(*head) >= longest {
            return Ok(false);
        }
        lists.add(head, entry, false)?;
        Ok(true)
    }

    /// Takes the leaf at `entry` off the list; `false` if it was not there.
    pub fn remove(&mut self, lists: &mut PteLists, frame: Frame, level: Level, entry: SpteRef) -> bool {
        let Some(head) = self.head_mut(frame, level) else { return false };
        let removed = lists.remove(head, entry);
        if removed && head.is_empty() && level == Level::K4 {
            let index = self.chunk_index(frame);
            if let Some(Some(chunk)) = self.chunks.get_mut(index) {
                chunk.used -= 1;
                if chunk.used == 0 {
                    self.settle(frame);
                }
            }
        }
        removed
    }

    /// Whether any 4 KiB leaf of `frame`'s 2 MiB region is listed.
    #[must_use]
    pub fn has_small(&self, frame: Frame) -> bool {
        matches!(self.chunks.get(self.chunk_index(frame)), Some(Some(_)))
    }

    /// The longest list there may be, and whether every chunk's count of used heads is right: for the audit.
    pub(crate) fn counts_hold(&self) -> bool {
        let live = self.chunks.iter().flatten().count();
        live == self.live as usize
            && self.chunks.iter().flatten().all(|chunk| {
                chunk.used > 0 && chunk.heads.iter().filter(|head| !head.is_empty()).count() == usize::from(chunk.used)
            })
    }

    /// Every list with its first frame and leaf size, for the audit.
    pub(crate) fn lists(&self) -> impl Iterator<Item = (Frame, Level, Head)> + '_ {
        let small = self.regions.iter().enumerate().filter(|&(_, &chunk)| chunk != 0).flat_map(|(region, &chunk)| {
            let chunk = self.chunks.get(chunk as usize - 1).and_then(Option::as_ref);
            chunk.into_iter().flat_map(move |chunk| {
                chunk
                    .heads
                    .iter()
                    .enumerate()
                    .map(move |(index, &head)| (Frame((region as u64) << 9 | index as u64), Level::K4, head))
            })
        });
        let large = self.large.iter().enumerate().map(|(at, &head)| (Frame((at as u64) << 9), Level::M2, head));
        let giant = self.giant.iter().enumerate().map(|(at, &head)| (Frame((at as u64) << 18), Level::G1, head));
        small.chain(large).chain(giant).filter(|(_, _, head)| !head.is_empty())
    }

    /// A cursor over the leaves of `level` that map `frame`.
    #[must_use]
    pub fn walk(&self, frame: Frame, level: Level) -> Cursor {
        PteLists::walk(self.head(frame, level))
    }
}
