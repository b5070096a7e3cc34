//! Dirty tracking: what every strategy shares, and the small trait in which they differ.
//!
//! A page is *dirty* from the moment a write is noticed until it is cleared, and only pages that the last harvest
//! reported can be cleared. Who copies pages clears first and copies then, so a write between harvest and clear is in
//! the copy. Memory follows L1's pages: whichever alias was written, the page is reported once.

mod combined;
mod dirty_bit;
mod lazy_huge;
mod log;
mod operations;
pub(crate) mod twin;
mod twin_log;
mod write_protect;

pub use combined::Combined;
pub use dirty_bit::DirtyBit;
pub use lazy_huge::LazyHuge;
pub use log::{LOG_ENTRIES, Log};
pub use twin::Twin;
pub use twin_log::TwinLog;
pub use write_protect::WriteProtect;

use std::fmt::Debug;

use umbra_shared::{L2Gfn, Level};

use crate::config::{Config, NoMemory};
use crate::dirty::{L2Set, PageSet};
use crate::memory::Env;
use crate::mmu::Mmu;
use crate::roots::RootId;
use crate::spte::{Frame, Spte, SpteRef};

/// Every strategy by its name on the command line.
pub const STRATEGIES: [&dyn Strategy; 7] = [&WriteProtect, &LazyHuge, &DirtyBit, &Log, &Combined, &Twin, &TwinLog];

/// The strategy named `name`.
#[must_use]
pub fn strategy(name: &str) -> Option<&'static dyn Strategy> {
    STRATEGIES.into_iter().find(|strategy| strategy.name() == name)
}

/// State of tracking while it is on.
#[derive(Debug)]
pub struct Tracking {
    /// How writes are noticed.
    pub strategy: &'static dyn Strategy,
    /// Pages written and not cleared.
    pub dirty: PageSet,
    /// Of those, pages that the last harvest named.
    pub(crate) reported: PageSet,
    /// The same by L2 frame, where asked for.
    pub(crate) l2: Option<L2Set>,
    /// What hardware logged and nobody has read yet.
    pub(crate) log: Vec<(RootId, L2Gfn)>,
    /// Copies of open huge leaves.
    pub(crate) twins: Vec<twin::Copied>,
    /// How many copies there may be.
    pub(crate) max_twins: u32,
    /// 2 MiB of memory that are written densely, by number.
    pub(crate) dense: PageSet,
    /// See [`Config::logs_huge`].
    pub(crate) logs_huge: bool,
}

impl Tracking {
    fn new(config: &Config) -> Self {
        Self {
            strategy: config.strategy,
            dirty: PageSet::new(config.memory_frames),
            reported: PageSet::new(config.memory_frames),
            l2: config.by_l2.then(|| L2Set::new(config.max_l2_regions)),
            log: Vec::new(),
            twins: Vec::new(),
            max_twins: config.max_twins,
            dense: PageSet::new(config.memory_frames.div_ceil(Level::M2.frames())),
            logs_huge: config.logs_huge,
        }
    }

    /// Heap bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.dirty.bytes()
            + self.reported.bytes()
            + self.dense.bytes()
            + self.l2.as_ref().map_or(0, L2Set::bytes)
            + (self.log.capacity() * size_of::<(RootId, L2Gfn)>() + self.twins.capacity() * size_of::<twin::Copied>())
                as u64
            + self.twins.iter().map(twin::Copied::bytes).sum::<u64>()
    }

    /// Whether the 2 MiB around `frame` are written densely.
    pub(crate) fn is_dense(&self, frame: Frame) -> bool {
        self.dense.contains(Frame(frame.0 >> 9))
    }

    /// Whether one more huge leaf may be copied.
    pub(crate) fn has_room_for_twin(&self) -> bool {
        self.twins.len() < self.max_twins as usize
    }
}

/// A leaf that a write hit, and the path on which it did.
#[derive(Clone, Copy, Debug)]
pub struct Leaf {
    /// The entry.
    pub at: SpteRef,
    /// Its size.
    pub level: Level,
    /// The page that was written.
    pub l2: L2Gfn,
    /// The root that the access came by.
    pub root: RootId,
}

impl Leaf {
    /// The root, and the first L2 frame of the leaf.
    #[must_use]
    pub const fn path(&self) -> (RootId, u64) {
        (self.root, self.l2.align_down(self.level).0)
    }
}

/// What a strategy did about a write to a closed huge leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trapped {
    /// The leaf is open, and what is written will be reported.
    Opened,
    /// Nothing: map the page by itself.
    Split,
}

/// How a strategy notices writes. Everything that is common to strategies, splits and aliases is the MMU's.
///
/// What must hold: while a page is not in [`Tracking::dirty`], every write to it either traps, or leaves a trace that
/// [`Strategy::harvest`] turns into a mark.
pub trait Strategy: Debug + Sync {
    /// The name on the command line.
    fn name(&self) -> &'static str;

    /// Refuses configurations that make no sense with this strategy, with the reason.
    ///
    /// # Errors
    /// The reason.
    fn check(&self, _config: &Config) -> Result<(), String> {
        Ok(())
    }

    /// Whether entries' dirty flags are traces: the MMU then saves them from zaps.
    fn uses_dirty_bits(&self) -> bool {
        false
    }

    /// Whether hardware logs L2 frames whose dirty flag it sets.
    fn uses_log(&self) -> bool {
        false
    }

    /// Whether writes are found by comparing bytes, so that a write of the bytes that were there may go unseen.
    fn compares(&self) -> bool {
        false
    }

    /// Whether every page counts as dirty when tracking starts.
    fn starts_all_set(&self) -> bool {
        false
    }

    /// What becomes of a leaf when tracking starts.
    fn arm(&self, track: &Tracking, spte: Spte, level: Level) -> Spte;

    /// Whether a leaf may be mapped open, without a trap at its first write. `touched`: its block of 64 is open.
    fn admit(&self, track: &Tracking, frame: Frame, level: Level, touched: bool) -> bool;

    /// [`Strategy::admit`] for 64 small leaves of consecutive frames at once, as bits.
    fn admit_word(&self, track: &Tracking, first: Frame, touched: bool) -> u64 {
        (0..64).fold(0, |word, bit| word | u64::from(self.admit(track, first.plus(bit), Level::K4, touched)) << bit)
    }

    /// A write hit a closed leaf of 4 KiB. By default its page is marked, and the leaf opened.
    fn trap(&self, mmu: &mut Mmu, env: &mut Env<'_>, leaf: &Leaf) {
        mmu.mark_and_open(env, leaf);
    }

    /// Whether writes to the huge leaf of `level` at `frame` may be handled on the leaf as a whole, by [`Strategy::trap_huge`].
    fn traps_huge(&self, _track: &Tracking, _frame: Frame, _level: Level) -> bool {
        false
    }

    /// A write hit a closed huge leaf. By default it is split.
    ///
    /// # Errors
    /// No memory; the leaf is as before.
    fn trap_huge(&self, _mmu: &mut Mmu, _env: &mut Env<'_>, _leaf: &Leaf) -> Result<Trapped, NoMemory> {
        Ok(Trapped::Split)
    }

    /// Turns traces into marks.
    fn harvest(&self, _mmu: &mut Mmu, _env: &mut Env<'_>) {}

    /// Page `frame` was cleared: every leaf of `level` that maps it must notice its next write.
    fn rearm(&self, mmu: &mut Mmu, env: &mut Env<'_>, frame: Frame, level: Level);
}
