//! `twin`: the first write to a 2 MiB leaf traps, the leaf is copied and opened as a whole; the harvest closes it and
//! compares, as distributed shared memory does. Leaves of 4 KiB trap as with `write-protect`.

use umbra_shared::Level;

use super::{Leaf, Strategy, Tracking, Trapped};
use crate::config::{Config, NoMemory, Split};
use crate::defects::Defect;
use crate::memory::Env;
use crate::mmu::Mmu;
use crate::spte::{Frame, Spte};

/// Huge leaves stay huge: a fault and a copy each 2 MiB and round. A write of the bytes that were there is not seen.
#[derive(Clone, Copy, Debug)]
pub struct Twin;

/// The memory of a copy. It is used again and again, so that a trap need not wait for memory.
pub(crate) type Room = Vec<[u64; 512]>;

/// A copy of 2 MiB.
#[derive(Debug)]
pub struct Copied {
    first: Frame,
    /// Pages that are in `pages`; the others were all zeroes.
    kept: [u64; 8],
    pages: Room,
}

impl Copied {
    /// Heap bytes.
    pub(crate) fn bytes(&self) -> u64 {
        room_bytes(&self.pages)
    }

    /// Whether it is a copy of the leaf at `first`.
    pub(crate) fn is_of(&self, first: Frame) -> bool {
        self.first == first
    }
}

/// Heap bytes of the memory for a copy.
pub(crate) fn room_bytes(room: &Room) -> u64 {
    (room.capacity() * size_of::<[u64; 512]>()) as u64
}

impl Mmu {
    /// Allocates and touches the memory for `copies` copies of huge leaves, so that no trap has to. More are allocated
    /// when they are needed, up to the configured number.
    ///
    /// # Errors
    /// No memory.
    pub fn prepare_twins(&mut self, copies: u32) -> Result<(), NoMemory> {
        for _ in self.spare.len()..copies.min(self.config.max_twins) as usize {
            let mut room = Room::new();
            room.try_reserve_exact(512).map_err(|_| NoMemory)?;
            // Not zeroes, which need not be touched.
            room.resize(512, [u64::MAX; 512]);
            self.spare.push(room);
        }
        self.prepared_twins = self.spare.len();
        Ok(())
    }

    /// Bytes that copies of huge leaves take, with a leaf in them or none.
    #[must_use]
    pub fn twin_bytes(&self) -> u64 {
        let used = self.track.as_ref().map_or(0, |track| track.twins.iter().map(Copied::bytes).sum());
        used + self.spare.iter().map(room_bytes).sum::<u64>()
    }

    /// Copies the huge leaf at `first`, unless there is a copy already. `false`: there are as many as there may be.
    pub(super) fn copy_huge(&mut self, env: &Env<'_>, first: Frame) -> Result<bool, NoMemory> {
        let Some(track) = &mut self.track else { return Ok(false) };
        if track.twins.iter().any(|twin| twin.is_of(first)) {
            return Ok(true);
        }
        if !track.has_room_for_twin() {
            return Ok(false);
        }
        let mut pages = self.spare.pop().unwrap_or_default();
        let kept = env.memory.copy_leaf(first, &mut pages)?;
        track.twins.push(Copied { first, kept, pages });
        self.stats.twins += 1;
        Ok(true)
    }

    /// Closes all leaves that were copied, marks what differs from its copy, and frees the copies.
    pub(super) fn compare_twins(&mut self, env: &mut Env<'_>) {
        let Some(track) = &mut self.track else { return };
        let mut twins = std::mem::take(&mut track.twins);
        // Neighbours are closed together.
        twins.sort_unstable_by_key(|twin| twin.first);
        if !self.defect(Defect::TwinLeftOpen) {
            for twin in &twins {
                self.close_leaves(env, twin.first, Level::M2);
            }
        }
        // Closed for every processor before anything is compared.
        self.finish(env);
        let Some(track) = &mut self.track else { return };
        self.stats.compared += twins.len() as u64 * Level::M2.frames();
        for twin in &twins {
            let changed = env.memory.changed_since(twin.first, &twin.kept, &twin.pages);
            for (word, block) in changed.into_iter().zip((0..).step_by(64)) {
                // A leaf begins at a multiple of its size, in memory too.
                track.dirty.insert_word(twin.first.plus(block), word);
            }
        }
        self.keep_room(twins);
    }

    /// Keeps the memory of copies that are not needed any more, as much as was prepared.
    pub(super) fn keep_room(&mut self, twins: Vec<Copied>) {
        let missing = self.prepared_twins.saturating_sub(self.spare.len());
        self.spare.extend(twins.into_iter().take(missing).map(|twin| twin.pages));
    }
}

impl Strategy for Twin {
    fn name(&self) -> &'static str {
        "twin"
    }

    fn check(&self, config: &Config) -> Result<(), String> {
        if matches!(config.split, Split::Eager | Split::EagerClear) {
            return Err(
                "twin copies huge leaves, and an eager split leaves none: take split=lazy or split=shatter".into()
            );
        }
        if config.by_l2 {
            return Err(
                "twin compares L1's pages and cannot tell which alias was written: drop the report by L2 frame".into(),
            );
        }
        Ok(())
    }

    fn arm(&self, _: &Tracking, spte: Spte, _: Level) -> Spte {
        spte.closed()
    }

    fn admit(&self, _: &Tracking, _: Frame, _: Level, _: bool) -> bool {
        false
    }

    fn admit_word(&self, _: &Tracking, _: Frame, _: bool) -> u64 {
        0
    }

    fn compares(&self) -> bool {
        true
    }

    fn traps_huge(&self, track: &Tracking, _: Frame, level: Level) -> bool {
        level == Level::M2 && track.has_room_for_twin()
    }

    fn trap_huge(&self, mmu: &mut Mmu, env: &mut Env<'_>, leaf: &Leaf) -> Result<Trapped, NoMemory> {
        let first = mmu.arena.spte(leaf.at).frame();
        if leaf.level > Level::M2 || !mmu.copy_huge(env, first)? {
            return Ok(Trapped::Split);
        }
        mmu.open(env, leaf.at, Some(leaf.path()));
        Ok(Trapped::Opened)
    }

    fn harvest(&self, mmu: &mut Mmu, env: &mut Env<'_>) {
        mmu.compare_twins(env);
    }

    fn rearm(&self, mmu: &mut Mmu, env: &mut Env<'_>, frame: Frame, level: Level) {
        // An open huge leaf has a copy that is older than the clear: its next harvest compares.
        if level == Level::K4 {
            mmu.close_leaves(env, frame, level);
        }
    }
}
