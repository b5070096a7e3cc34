//! A whole measurement in the model: EPT12 of a shape, an MMU of a configuration, and the phases of a dirty-tracking
//! run on the software walker. `umbra run model` is written on this; benchmarks and large tests too.
//!
//! The caller drives the phases one by one and may time each from outside. What a phase returns are counts and bytes;
//! what a harvest returns are page sets, to be compared with the truth that the caller knows.

mod shape;

pub use shape::{AliasKind, ModelConfig};

use umbra_shared::{Gfn, L2Gfn, Level};

use crate::access::Request;
use crate::config::Config;
use crate::dirty::PageSet;
use crate::memory::{Slot, Slots};
use crate::mmu::Mmu;
use crate::role::{ModeBits, RootRole};
use crate::roots::RootId;
use crate::spte::Frame;
use crate::stats::{Memory, Stats};
use crate::tables::{Tables, span};
use crate::walker::{Ended, PlainMemory, Walker};

/// One access of L2, by L2 page number (0 to `l2_pages`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageAccess {
    /// The L2 page.
    pub page: u64,
    /// A write; else a read.
    pub write: bool,
}

/// What a phase did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Phase {
    /// Accesses of L2 in it.
    pub accesses: u64,
    /// What the MMU counted in it.
    pub stats: Stats,
    /// Exits for a full log.
    pub log_exits: u64,
    /// The most faults that one access took.
    pub worst_faults: u32,
    /// Heap bytes of the MMU at its end.
    pub memory: Memory,
}

/// What a harvest reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reported {
    /// Tracked L1 pages.
    pub pages: PageSet,
    /// How many those are.
    pub count: u64,
    /// Pages of EPT12 that the MMU wrote (A/D flags) and that are dirty therefore. Not among `pages`.
    pub table_pages: u64,
    /// L2 pages, where the configuration asks for them; `None` where it does not, or stands for all of L2.
    pub l2: Option<Vec<u64>>,
    /// Tracked L1 pages that the strategy's definition reports whether they were written or not, predicted without
    /// looking at what was reported: with `lazy-huge` those not cleared since the start.
    pub explained: PageSet,
}

/// Called around every access, for timing. The default does nothing and costs nothing.
pub trait Hooks {
    /// An access begins.
    fn begin(&mut self) {}
    /// An access ended, after `faults` faults.
    fn end(&mut self, _faults: u32) {}
    /// `done` accesses of the phase are done; called now and then.
    fn progress(&mut self, _done: u64) {}
}

/// No hooks.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoHooks;

impl Hooks for NoHooks {}

/// Accesses between two calls of [`Hooks::progress`].
const PROGRESS: u64 = 1 << 16;

/// A measurement under way.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    /// The MMU, for what the phases do not cover.
    pub mmu: Mmu,
    /// The walker with L1's memory.
    pub walker: Walker,
    root: RootId,
    address: u64,
    stride: u64,
    multiplier: u64,
    harvested: PageSet,
    explained: PageSet,
    value: u64,
    mark: (Stats, u64),
}

impl Model {
    /// Builds EPT12 and an MMU with its root loaded. Nothing is mapped yet.
    ///
    /// # Errors
    /// A configuration that makes no sense, in one line.
    pub fn new(config: ModelConfig) -> Result<Self, String> {
        config.check()?;
        let stride = config.stride();
        let leaves = stride / span(config.format, config.leaf) * config.aliases;
        let tables = leaves / 256 + leaves / 65536 + config.aliases * 4 + 64;
        let first_table = config.pages.next_multiple_of(Level::G1.frames().min(config.pages.next_power_of_two()));
        let frames = first_table + tables;
        let mmu_config = Config { memory_frames: frames, ..config.mmu };
        let slots = [
            Slot { max_level: config.mmu.max_level, ..Slot::identity(config.pages) },
            Slot { base: Gfn(first_table), first: Frame(first_table), ..Slot::identity(tables) },
        ];
        Slots::new(&slots, frames)?;
        let mut mmu = Mmu::new(mmu_config, &slots).map_err(|error| error.to_string())?;
        // Only a strategy that compares contents needs contents.
        let content_from = if config.mmu.strategy.compares() { 0 } else { first_table };
        let multiplier = config.multiplier();
        let mut walker = Walker::new(PlainMemory::new(frames, content_from), 9);
        let mut tables = Tables::new(config.format, first_table, frames);
        let model = |l2| shape::l1_page(&config, stride, multiplier, l2);
        shape::build(&config, stride, &mut tables, &mut walker.memory, model);
        let address = tables.address();
        let root = mmu.load_root(&mut walker.env(), RootRole::new(config.format), address);
        Ok(Self {
            root: root.map_err(|error| error.to_string())?,
            address,
            stride,
            multiplier,
            harvested: PageSet::new(frames),
            explained: PageSet::new(config.pages),
            value: 0,
            mark: (mmu.stats(), 0),
            mmu,
            walker,
            config,
        })
    }

    /// L2 pages that are mapped.
    #[must_use]
    pub const fn l2_pages(&self) -> u64 {
        self.config.pages * self.config.aliases
    }

    /// The L1 page behind L2 page `page`.
    #[must_use]
    pub fn l1_page(&self, page: u64) -> u64 {
        shape::l1_page(&self.config, self.stride, self.multiplier, self.l2_gfn(page))
    }

    /// The L2 frame of L2 page `page`: aliases may lie apart.
    #[must_use]
    pub const fn l2_gfn(&self, page: u64) -> L2Gfn {
        L2Gfn(page / self.config.pages * self.stride + page % self.config.pages)
    }

    /// The root and the address of its table.
    #[must_use]
    pub const fn root(&self) -> (RootId, u64) {
        (self.root, self.address)
    }

    fn phase(&mut self, accesses: u64, worst_faults: u32) -> Phase {
        let (stats, log_exits) = self.mark;
        self.mark = (self.mmu.stats(), self.walker.log_exits);
        Phase {
            accesses,
            stats: self.mark.0.since(stats),
            log_exits: self.mark.1 - log_exits,
            worst_faults,
            memory: self.mmu.memory_in_use(),
        }
    }

    /// L2 makes `accesses`, in order.
    ///
    /// # Errors
    /// An access that EPT12 permits did not come through: the model is broken.
    pub fn round(
        &mut self,
        accesses: impl IntoIterator<Item = PageAccess>,
        hooks: &mut impl Hooks,
    ) -> Result<Phase, String> {
        let (mut done, mut worst) = (0, 0);
        for PageAccess { page, write } in accesses {
            let l2 = self.l2_gfn(page);
            let request = if write { Request::WRITE } else { Request::READ };
            self.value += 1;
            hooks.begin();
            let ended = self.walker.execute(&mut self.mmu, self.root, l2, request, (0, self.value));
            let Ended::Done { frame, faults, .. } = ended else {
                return Err(format!("{:?} of L2 page {page} ended as {ended:?}", request.kind));
            };
            hooks.end(faults);
            worst = worst.max(faults);
            if frame.0 != self.l1_page(page) {
                return Err(format!("L2 page {page} reached L1 page {}, not {}", frame.0, self.l1_page(page)));
            }
            done += 1;
            if done % PROGRESS == 0 {
                hooks.progress(done);
            }
        }
        Ok(self.phase(done, worst))
    }

    /// L2's role changes: the root of its new role is loaded, then the one before is let go. The others are what they were.
    ///
    /// # Errors
    /// The MMU refuses the root: the model is broken.
    pub fn change_role(&mut self, mode: ModeBits, smm: bool) -> Result<Phase, String> {
        let role = RootRole { smm, mode, ..RootRole::new(self.config.format) };
        let refused = |error: crate::config::MmuError| error.to_string();
        let root = self.mmu.load_root(&mut self.walker.env(), role, self.address).map_err(refused)?;
        self.mmu.drop_root(&mut self.walker.env(), self.root).map_err(refused)?;
        self.root = root;
        Ok(self.phase(0, 0))
    }

    /// L1's tracked memory goes away and comes back, as a memory slot that is deleted and made again.
    ///
    /// # Errors
    /// The MMU refuses the map: the model is broken.
    pub fn replace_memory(&mut self) -> Result<Phase, String> {
        let slots = self.mmu.slots().clone();
        let others: Vec<Slot> = slots.slots().iter().filter(|slot| slot.base.0 != 0).copied().collect();
        let all: Vec<Slot> = slots.slots().to_vec();
        for map in [others, all] {
            self.mmu.memory_changed(&mut self.walker.env(), &map).map_err(|error| error.to_string())?;
        }
        Ok(self.phase(0, 0))
    }

    /// L2 reads every page of every alias once.
    ///
    /// # Errors
    /// As [`Self::round`].
    pub fn populate(&mut self, hooks: &mut impl Hooks) -> Result<Phase, String> {
        let pages = self.l2_pages();
        self.round((0..pages).map(|page| PageAccess { page, write: false }), hooks)
    }

    /// L2 writes every page once, through its first alias: what it costs after tracking has stopped.
    ///
    /// # Errors
    /// As [`Self::round`].
    pub fn retouch(&mut self, hooks: &mut impl Hooks) -> Result<Phase, String> {
        let pages = self.config.pages;
        self.round((0..pages).map(|page| PageAccess { page, write: true }), hooks)
    }

    /// Tracking starts.
    ///
    /// # Errors
    /// It is on already.
    pub fn enable(&mut self) -> Result<Phase, String> {
        self.mmu.start(&mut self.walker.env()).map_err(|error| error.to_string())?;
        if self.config.mmu.strategy.starts_all_set() {
            self.explained.insert_range(Frame(0), self.config.pages);
        }
        Ok(self.phase(0, 0))
    }

    /// Reports. [`Model::collect`] has the sets; this is the part that a phase times.
    ///
    /// # Errors
    /// Tracking is off.
    pub fn harvest(&mut self) -> Result<Phase, String> {
        let mut harvested = std::mem::take(&mut self.harvested);
        let result = self.mmu.harvest(&mut self.walker.env(), &mut harvested);
        self.harvested = harvested;
        result.map_err(|error| error.to_string())?;
        Ok(self.phase(0, 0))
    }

    /// What the last harvest reported.
    pub fn collect(&mut self) -> Reported {
        let mut pages = PageSet::new(self.config.pages);
        let mut table_pages = 0;
        for frame in self.harvested.iter() {
            if frame.0 < self.config.pages {
                pages.insert(frame);
            } else {
                table_pages += 1;
            }
        }
        let l2 = self.mmu.harvest_l2().ok().flatten();
        let pages_of = self.config.pages;
        let l2 = l2.map(|frames| {
            let page = |gfn: L2Gfn| gfn.0 / self.stride * pages_of + gfn.0 % self.stride;
            frames.into_iter().filter(|gfn| gfn.0 % self.stride < pages_of).map(page).collect()
        });
        Reported { count: pages.len(), pages, table_pages, l2, explained: self.explained.clone() }
    }

    /// Clears everything that was reported, in chunks of `chunk` L1 pages (0: all at once).
    ///
    /// # Errors
    /// Tracking is off.
    pub fn clear(&mut self, chunk: u64) -> Result<Phase, String> {
        let frames = self.harvested.room();
        let chunk = if chunk == 0 { frames } else { chunk };
        let mut first = 0;
        while first < frames {
            self.mmu.clear(&mut self.walker.env(), Frame(first), chunk).map_err(|error| error.to_string())?;
            first = first.saturating_add(chunk);
        }
        self.explained = PageSet::new(self.config.pages);
        Ok(self.phase(0, 0))
    }

    /// Tracking stops.
    ///
    /// # Errors
    /// It is off already.
    pub fn disable(&mut self) -> Result<Phase, String> {
        self.mmu.stop(&mut self.walker.env()).map_err(|error| error.to_string())?;
        self.explained = PageSet::new(self.config.pages);
        Ok(self.phase(0, 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Format;
    use crate::config::{Collapse, Split};
    use crate::track::STRATEGIES;

    fn formats() -> Vec<(Format, Level)> {
        vec![
            (Format::EPT, Level::K4),
            (Format::EPT, Level::M2),
            (Format::Npt { five_levels: true, nx: true }, Level::M2),
            (Format::Pae { nx: true }, Level::K4),
            (Format::Bits32 { pse: true }, Level::K4),
            (Format::Bits32 { pse: true }, Level::M2),
        ]
    }

    /// Every strategy, split, collapse, format and kind of alias: three rounds whose writes are known to the page.
    #[test]
    fn every_combination_reports_the_truth() {
        let mut runs = 0;
        for strategy in STRATEGIES {
            for (format, leaf) in formats() {
                for (number, kind) in
                    [AliasKind::Contiguous, AliasKind::Scattered, AliasKind::SharedTables].into_iter().enumerate()
                {
                    let split = [Split::Lazy, Split::Shatter, Split::Eager, Split::EagerClear][(runs + number) % 4];
                    let collapse = [Collapse::None, Collapse::Lazy, Collapse::InPlace][runs % 3];
                    let mmu = Config { split, collapse, extent: 16, ..Config::new(1, strategy) };
                    let mut config = ModelConfig::new(4096, format, leaf, mmu);
                    config.aliases = 3;
                    config.alias_kind = kind;
                    config.mmu.by_l2 = Config { by_l2: true, ..mmu }.check().is_ok();
                    if config.check().is_err() || mmu.check().is_err() {
                        continue;
                    }
                    runs += 1;
                    check_rounds(config);
                }
            }
        }
        assert!(runs > 60, "{runs} combinations");
    }

    fn check_rounds(config: ModelConfig) {
        let name = format!("{config:?}");
        let mut model = Model::new(config).unwrap();
        model.populate(&mut NoHooks).unwrap();
        model.enable().unwrap();
        for round in 0..3u64 {
            let accesses: Vec<PageAccess> = (0..model.l2_pages())
                .filter(|page| (page + round).is_multiple_of(37))
                .map(|page| PageAccess { page, write: page % 3 != 0 })
                .collect();
            let mut truth = PageSet::new(config.pages);
            let mut truth_l2 = Vec::new();
            for access in accesses.iter().filter(|access| access.write) {
                truth.insert(Frame(model.l1_page(access.page)));
                truth_l2.push(access.page);
            }
            let phase = model.round(accesses.iter().copied(), &mut NoHooks).unwrap();
            assert!(phase.worst_faults <= 2, "{name}");
            model.harvest().unwrap();
            let reported = model.collect();
            for frame in truth.iter() {
                assert!(reported.pages.contains(frame), "missed {frame:?}: {name}");
            }
            for frame in reported.pages.iter() {
                assert!(truth.contains(frame) || reported.explained.contains(frame), "extra {frame:?}: {name}");
            }
            if let Some(l2) = &reported.l2 {
                assert!(truth_l2.iter().all(|page| l2.contains(page)), "missed by L2: {name}");
            }
            model.clear(round * 512).unwrap();
            model.mmu.audit().unwrap();
        }
        model.disable().unwrap();
        model.retouch(&mut NoHooks).unwrap();
        model.mmu.audit().unwrap();
    }

    #[test]
    fn nonsense_is_refused_in_one_line() {
        let mmu = Config::new(1, STRATEGIES[0]);
        let good = ModelConfig::new(4096, Format::Pae { nx: true }, Level::K4, mmu);
        assert_eq!(good.check(), Ok(()));
        for bad in [
            ModelConfig { aliases: 0, ..good },
            ModelConfig { aliases: 1000, ..good },
            ModelConfig { pages: 0, ..good },
            ModelConfig { leaf: Level::G1, ..good },
            ModelConfig { pages: 1000, leaf: Level::M2, ..good },
        ] {
            let why = bad.check().unwrap_err();
            assert!(!why.contains('\n') && why.len() < 160, "{why}");
        }
    }
}
