//! The shadow MMU of an L2, and the windows that make it effective, as one thing under one lock.

use super::log::Clearing;
use super::memory::{L1Pages, View};
use super::places::{Places, Recipe};
use super::roots_log::RootsLog;
use super::source::{Fault, Place};
use super::watch::Watch;
use super::window::Page;
use super::windows::Windows;
use super::{Means, Mechanism, Options};
use crate::kvm::Error;
use crate::pages::PageSet;
use std::sync::Arc;
use umbra_mmu::guest::Reflection;
use umbra_mmu::track::{WriteProtect, strategy};
use umbra_mmu::{
    Config, Env, Format, Frame, Invalidation, Kind, Memory, Mmu, MmuError, ModeBits, Outcome, Request, RootId,
    RootRole, Slot, Split,
};
use umbra_shared::control::{Entry, Exit};
use umbra_shared::role::Role;
use umbra_shared::{L2Gfn, Level, nested};

/// Pages that an invalidation maps again at most: the cost of a doorbell is bounded.
const AHEAD: usize = 512;

/// Pages that one leaf table maps.
const ONE_TABLE: u32 = 512;

/// The root that L2 runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Loaded {
    root: RootId,
    table: u64,
    role: RootRole,
}

/// What became of a fault of L2's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handled {
    /// L2 may try again.
    Resume,
    /// It is L1's business: why, the address, and the qualification.
    ToL1(Exit, u64, u64),
}

/// The MMU and its windows.
pub struct Shadow {
    /// The MMU.
    pub mmu: Mmu,
    /// The windows, of each root that has some.
    pub places: Places,
    /// What became of roots, if somebody wants to know.
    pub log: Option<RootsLog>,
    view: View,
    means: Means,
    loaded: Option<Loaded>,
    /// Stretches of 2 MiB that one fault may map.
    far: u64,
    tracking: bool,
    /// vCPUs that are inside L2.
    running: usize,
    /// What the last harvest by the MMU found.
    found: umbra_mmu::PageSet,
    /// Faults that L2's VM reported.
    pub faults: u64,
}

impl Shadow {
    pub(super) fn new(memory: Arc<L1Pages>, options: &Options) -> Result<Self, Error> {
        let means = options.means;
        let strategy = if means.traps() { strategy(means.strategy) } else { None };
        let config = Config {
            extent: options.extent.min(ONE_TABLE),
            first_tracked: memory.first_tracked(),
            split: Split::Shatter,
            max_twins: options.twins,
            roots: options.roots,
            logs_huge: means.traps() && means.logs(),
            ..Config::new(memory.frames(), strategy.unwrap_or(&WriteProtect))
        };
        let mut mmu = Mmu::new(config, &memory.slots()).map_err(|error| lost(&error))?;
        if means.compares() {
            let leaves = (memory.frames() - memory.first_tracked().0).div_ceil(Level::M2.frames());
            let copies = u32::try_from(leaves).unwrap_or(u32::MAX).min(options.twins);
            mmu.prepare_twins(copies).map_err(|_| {
                Error::Memory(format!("--twins {}: no memory for {copies} copies of 2 MiB", options.twins))
            })?;
        }
        let found = umbra_mmu::PageSet::new(memory.frames());
        let recipe = Recipe { memory: Arc::clone(&memory), options: *options, in_kvm: Arc::default() };
        let places = Places::new(recipe)?;
        let view = View(memory);
        let far = u64::from(options.extent / ONE_TABLE).max(1);
        let log = options.log_roots.then(RootsLog::default);
        Ok(Self { mmu, places, log, view, means, loaded: None, far, tracking: false, running: 0, found, faults: 0 })
    }

    /// The root that L2 runs on.
    pub(crate) fn root(&self) -> Option<RootId> {
        self.loaded.map(|loaded| loaded.root)
    }

    /// L1's memory.
    pub(super) fn memory_map(&self) -> &L1Pages {
        &self.view.0
    }

    /// Takes a vCPU into L2. False: what L1 wants cannot be, because L2 has other windows, another vCPU is in L2 with another EPT12, or the root
    /// is none.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn enter(&mut self, entry: &Entry) -> Result<bool, Error> {
        let windows = self.places.here().windows();
        if windows.is_empty() {
            self.places.here_mut().create(entry.windows(), entry.tables)?;
        } else if !windows
            .iter()
            .map(|window| (window.first, window.pages.len() as u64))
            .eq(entry.windows().iter().map(|window| (window.first, window.frames)))
        {
            return Ok(false);
        }
        let role = root_role(entry);
        let same = self.loaded.is_some_and(|loaded| (loaded.table, loaded.role) == (entry.root, role));
        if !same && (self.running > 0 || !self.load(entry.root, role)?) {
            return Ok(false);
        }
        // Here, rather than at each fault that would like to know.
        self.view.0.look_for_holes();
        self.map_tables()?;
        self.running += 1;
        Ok(true)
    }

    /// A vCPU inside L2 is in another role. False: another vCPU is in L2 as well, and would be without its root.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn change_role(&mut self, role: Role) -> Result<bool, Error> {
        let Some(loaded) = self.loaded else { return Ok(false) };
        let new = RootRole { smm: role.is_smm(), mode: ModeBits(role.mode()), ..loaded.role };
        if new != loaded.role && (self.running > 1 || !self.load(loaded.table, new)?) {
            return Ok(false);
        }
        self.map_tables()?;
        Ok(true)
    }

    /// Makes another root the one that L2 runs on, then lets go of the one before: where both are one, it stays. False if it cannot be loaded: the old
    /// one stays, and what the windows map is still what it grants.
    fn load(&mut self, table: u64, role: RootRole) -> Result<bool, Error> {
        let mut env = Env { memory: &mut self.view, mapper: &mut self.places };
        let Ok(root) = self.mmu.load_root(&mut env, role, table) else { return Ok(false) };
        if let Some(log) = &mut self.log {
            log.loads(root, role, &self.places);
        }
        if let Some(old) = self.loaded.replace(Loaded { root, table, role }) {
            let mut env = Env { memory: &mut self.view, mapper: &mut self.places };
            self.mmu.drop_root(&mut env, old.root).map_err(|error| lost(&error))?;
        }
        let alive = |root| self.mmu.load_count(root).is_ok();
        if let Some(log) = &mut self.log {
            log.ends(alive);
        }
        self.places.switch(root, alive)?;
        self.check_windows()?;
        Ok(true)
    }

    /// L1's tracked memory goes away and comes back, as a memory slot that is deleted and made again.
    ///
    /// # Errors
    /// The system's.
    pub fn replace_memory(&mut self) -> Result<(), Error> {
        if let Some(log) = &mut self.log {
            log.empties(&self.places);
        }
        let all = self.view.0.slots();
        let first = self.view.0.first_tracked();
        let others: Vec<Slot> = all.iter().filter(|slot| slot.first < first).copied().collect();
        for map in [others, all] {
            let mut env = Env { memory: &mut self.view, mapper: &mut self.places };
            self.mmu.memory_changed(&mut env, &map).map_err(|error| lost(&error))?;
        }
        self.check_windows()
    }

    /// Maps L2's own page tables: some hosts cannot handle a fault of the processor's walk.
    fn map_tables(&mut self) -> Result<(), Error> {
        if self.places.here().tables_mapped {
            return Ok(());
        }
        let mut all = true;
        for gfn in self.places.here().tables() {
            if self.places.here().page(L2Gfn(gfn)).is_some_and(|page| page == Page::CLOSED) {
                let request = Request { table_walk: true, ..Request::READ };
                all &= self.resolve(L2Gfn(gfn).address(), request)? == Handled::Resume;
            }
        }
        // What EPT12 does not permit is tried again at each entry.
        self.places.here_mut().tables_mapped = all;
        Ok(())
    }

    /// A vCPU has left L2.
    pub(super) fn leave(&mut self) {
        self.running = self.running.saturating_sub(1);
    }

    /// Handles an access that failed. `None` if it was at no page of a window.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn handle(&mut self, fault: &Fault) -> Result<Option<Handled>, Error> {
        self.faults += 1;
        let address = match fault.place {
            Place::Gpa(address) => Some(address),
            Place::Hva(at) => self.places.here().gfn_at(at).map(L2Gfn::address),
        };
        let Some(address) = address else { return Ok(None) };
        let handled = self.resolve(address, fault.request());
        self.places.here().source().settled(fault).map_err(|error| Error::call("settling a fault of L2", error))?;
        handled.map(Some)
    }

    /// Asks the MMU for an access, and makes its answer effective.
    fn resolve(&mut self, address: u64, request: Request) -> Result<Handled, Error> {
        let Some(loaded) = self.loaded else { return Err(Error::Memory("L2 runs without EPT12".into())) };
        let mut env = Env { memory: &mut self.view, mapper: &mut self.places };
        let outcome = self.mmu.fault(&mut env, loaded.root, address, request).map_err(|error| lost(&error))?;
        if let Outcome::Mapped { .. } = outcome {
            self.map_ahead(address)?;
        }
        self.check_windows()?;
        let write = u64::from(request.kind == Kind::Write) << 1;
        Ok(match outcome {
            Outcome::Mapped { .. } if !self.is_mapped(address) && !self.is_effective(loaded.root, address)? => {
                Handled::ToL1(Exit::ExecuteRights, address, write)
            }
            Outcome::Mapped { .. } | Outcome::Retry => Handled::Resume,
            Outcome::Reflected(Reflection::EptMisconfiguration) => Handled::ToL1(Exit::Misconfigured, address, write),
            Outcome::Reflected(Reflection::EptViolation(bits) | Reflection::NestedPageFault(bits)) => {
                Handled::ToL1(Exit::Violation, address, bits)
            }
            Outcome::WantsMemory { .. } => Handled::ToL1(Exit::Beyond, address, write),
        })
    }

    /// Whether a window maps something at `address`: that is what EPT02 grants there.
    fn is_mapped(&self, address: u64) -> bool {
        self.places.here().page(L2Gfn::containing(address)).is_some_and(|page| page != Page::CLOSED)
    }

    /// Whether a mapping can grant what EPT02 does at `address`. EPT02 may grant less than EPT12 does by now: execution is asked for, if that is it.
    fn is_effective(&mut self, root: RootId, address: u64) -> Result<bool, Error> {
        let can_grant = |mmu: &Mmu| {
            let granted = mmu.peek(root, L2Gfn::containing(address)).ok().flatten();
            granted.is_none_or(|(_, _, access)| Windows::can_grant(access))
        };
        if can_grant(&self.mmu) {
            return Ok(true);
        }
        let mut env = Env { memory: &mut self.view, mapper: &mut self.places };
        let outcome = self.mmu.fault(&mut env, root, address, Request::EXECUTE).map_err(|error| lost(&error))?;
        self.check_windows()?;
        Ok(matches!(outcome, Outcome::Mapped { .. } | Outcome::Retry) && can_grant(&self.mmu))
    }

    /// Maps the rest of the stretch of huge pages that `address` is in, up to the first that EPT12 has not or that is mapped already. To map one costs
    /// far less than a fault. Only memory that the host has, lest it be taken for nothing; and not while something tracks, where pages that are mapped
    /// before they are touched are of no use.
    fn map_ahead(&mut self, address: u64) -> Result<(), Error> {
        if self.far <= 1 || self.tracking || !self.view.0.is_resident() {
            return Ok(());
        }
        let next = address / Level::M2.bytes() + 1;
        match next.next_multiple_of(self.far) - next {
            0 => Ok(()),
            more => self.prefetch(next * Level::M2.bytes(), more),
        }
    }

    /// Maps what L2 will touch from `address` on, in so many stretches of 2 MiB, as far as EPT12 has it and no flag of EPT12's must be set for that. What
    /// it does not do, a fault will. It is in the windows after [`Self::check_windows`].
    fn prefetch(&mut self, address: u64, stretches: u64) -> Result<(), Error> {
        let Some(loaded) = self.loaded else { return Ok(()) };
        let mut env = Env { memory: &mut self.view, mapper: &mut self.places };
        self.mmu.prefetch(&mut env, loaded.root, address, stretches).map_err(|error| lost(&error))
    }

    /// L1 was asked about `address`, and comes back.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn answered(&mut self, address: u64) -> Result<(), Error> {
        self.prefetch(address, 1)?;
        self.check_windows()
    }

    /// What the mapper could not do.
    fn check_windows(&mut self) -> Result<(), Error> {
        match self.places.settle() {
            None => Ok(()),
            Some(error) => Err(Error::call("mapping L1's memory into a window of L2", error)),
        }
    }

    /// L1 invalidates what was translated by EPT12. What that closed is mapped again at once, if EPT12 has it elsewhere now: a fault costs more.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn invalidate(&mut self) -> Result<(), Error> {
        self.places.here_mut().invalidated = Vec::with_capacity(AHEAD);
        let mut env = Env { memory: &mut self.view, mapper: &mut self.places };
        self.mmu.invalidate(&mut env, Invalidation::All);
        self.check_windows()?;
        for gfn in std::mem::take(&mut self.places.here_mut().invalidated) {
            self.prefetch(gfn.address(), 1)?;
        }
        self.check_windows()
    }

    /// Begins to track.
    ///
    /// # Errors
    /// The system's.
    pub fn start(&mut self) -> Result<(), Error> {
        self.tracking = true;
        if self.means.logs() {
            let clearing = match self.means.mechanism {
                Mechanism::KvmClear => Clearing::Manual,
                Mechanism::KvmRing => Clearing::Ring,
                Mechanism::Pagemap => Clearing::Protection,
                _ => Clearing::ByGet,
            };
            self.places.start_log(clearing)?;
        }
        if self.means.traps() {
            let mut env = Env { memory: &mut self.view, mapper: &mut self.places };
            self.mmu.start(&mut env).map_err(|error| lost(&error))?;
        }
        self.check_windows()
    }

    /// Finds out what was written since the last harvest.
    ///
    /// # Errors
    /// The system's.
    pub fn harvest(&mut self) -> Result<(), Error> {
        if self.means.logs() {
            self.places.harvest_log()?;
        }
        if !self.means.traps() {
            return Ok(());
        }
        let logged = self.logged_densely();
        let mut env = Env { memory: &mut self.view, mapper: &mut self.places };
        self.mmu.harvest(&mut env, &mut self.found).map_err(|error| lost(&error))?;
        for (first, pages) in logged {
            self.mmu.count_logged(&mut env, first, pages);
        }
        self.check_windows()?;
        self.places.settle_slots()
    }

    /// 2 MiB of memory of which the log has found so many pages that a copy would be cheaper, with how many.
    fn logged_densely(&self) -> Vec<(Frame, u32)> {
        let mut dense = Vec::new();
        let leaves = (self.view.0.first_tracked().0..).step_by(512).map(Frame);
        for log in self.places.logs() {
            for (first, words) in leaves.clone().zip(log.found().words().chunks(8)) {
                // A word may have 64 of them, and to count costs.
                let most = words.iter().fold(0, |most, word| most + if *word == 0 { 0 } else { 64 });
                if most < self.mmu.break_even() {
                    continue;
                }
                let pages = words.iter().map(|word| word.count_ones()).sum();
                if pages >= self.mmu.break_even() {
                    dense.push((first, pages));
                }
            }
        }
        dense
    }

    /// Makes what was found report again.
    ///
    /// # Errors
    /// The system's.
    pub fn clear(&mut self) -> Result<(), Error> {
        if self.means.logs() {
            self.places.clear_log()?;
        }
        if !self.means.traps() {
            return Ok(());
        }
        let first = self.view.0.first_tracked();
        let mut env = Env { memory: &mut self.view, mapper: &mut self.places };
        self.mmu.clear(&mut env, first, u64::MAX).map_err(|error| lost(&error))?;
        self.check_windows()
    }

    /// Ends tracking.
    ///
    /// # Errors
    /// The system's.
    pub fn stop(&mut self) -> Result<(), Error> {
        self.tracking = false;
        if self.means.traps() {
            let mut env = Env { memory: &mut self.view, mapper: &mut self.places };
            self.mmu.stop(&mut env).map_err(|error| lost(&error))?;
        }
        if self.means.logs() {
            self.places.stop_log()?;
        }
        self.check_windows()
    }

    /// Whether clearing is a step of its own.
    #[must_use]
    pub fn clears(&self) -> bool {
        self.means.traps() || self.means.mechanism != Mechanism::KvmBitmap
    }

    /// Puts the tracked pages that the last harvest found into `into`, by their numbers.
    pub fn report(&self, into: &mut PageSet) {
        let memory = &self.view.0;
        let base = memory.first_tracked();
        for (first, number, pages) in memory.tracked() {
            for page in 0..pages {
                let frame = first.plus(page);
                let logged = || self.places.logs().any(|log| log.found().contains(frame.0 - base.0));
                if self.means.traps() && self.found.contains(frame) || logged() {
                    into.insert(number + page);
                }
            }
        }
    }

    /// What was counted since L2 was made, by name.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let (mmu, windows) = (self.mmu.stats(), self.places.counts());
        let mut counters = vec![
            ("l2_faults", self.faults),
            ("l2_reflected", mmu.reflected),
            ("ept12_synced", mmu.synced),
            ("window_maps", windows.maps),
            ("window_mapped_pages", windows.mapped_pages),
            ("window_gathered_pages", windows.gathered_pages),
            ("window_protects", windows.protects),
            ("window_closes", windows.closes),
            ("window_evicted_pages", windows.evicted_pages),
        ];
        if self.means.compares() {
            counters.push(("twins", mmu.twins));
            counters.push(("twin_pages_compared", mmu.compared));
            counters.push(("twin_bytes", self.mmu.twin_bytes()));
            counters.push(("made_dense", mmu.made_dense));
            if self.means.logs() {
                counters.push(("slots_cut", self.places.all().iter().map(|place| place.due.cuts).sum()));
            }
        }
        if self.places.here().log.is_some() {
            counters.push(("log_transfers", self.places.logs().map(|log| log.transfers).sum()));
            counters.push(("ring_full_exits", self.places.logs().map(|log| log.ring_exits).sum()));
            let (scans, protections) = self
                .places
                .logs()
                .filter_map(|log| log.watch())
                .map(Watch::calls)
                .fold((0, 0), |sum, calls| (sum.0 + calls.0, sum.1 + calls.1));
            if self.means.mechanism == Mechanism::Pagemap {
                counters.push(("pagemap_scans", scans));
                counters.push(("pagemap_protections", protections));
            }
        }
        counters
    }

    /// Bytes that the MMU takes.
    #[must_use]
    pub fn memory(&self) -> Memory {
        self.mmu.memory_in_use()
    }
}

/// What L1 says about L2's root.
fn root_role(entry: &Entry) -> RootRole {
    let format = match entry.format {
        nested::Format::Ept => Format::Ept { five_levels: false, accessed_dirty: entry.accessed_dirty },
        nested::Format::Npt => Format::Npt { five_levels: false, nx: true },
        nested::Format::Pae => Format::Pae { nx: true },
        nested::Format::ThirtyTwoBit => Format::Bits32 { pse: true },
    };
    RootRole { smm: entry.role.is_smm(), mode: ModeBits(entry.role.mode()), ..RootRole::new(format) }
}

fn lost(error: &MmuError) -> Error {
    Error::Memory(format!("the shadow MMU: {error}"))
}
