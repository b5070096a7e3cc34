//! Where roots are effective: a VM of KVM's for each root that is kept, with windows of its own, so that a root which L2 comes back to is still
//! mapped, in the windows and in KVM's own tables.

use super::log::{Clearing, Log};
use super::memory::L1Pages;
use super::window::Counts;
use super::windows::Windows;
use super::{Mechanism, Options};
use crate::kvm::ring::RingSet;
use crate::kvm::{self, Error};
use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use umbra_mmu::{Access, Extent, Flush, Frame, Mapper, RootId};
use umbra_shared::Level;

/// VMs that an L2 may have. An L1 that makes more roots than this gets the place of the one that L2 was on longest ago.
pub const MOST: usize = 16;

/// How a place is made.
pub struct Recipe {
    /// L1's memory.
    pub memory: Arc<L1Pages>,
    /// How L2 is run.
    pub options: Options,
    /// vCPUs that are in KVM.
    pub in_kvm: Arc<AtomicUsize>,
}

impl Recipe {
    fn make(&self) -> Result<Windows, Error> {
        let Options { means, source, .. } = &self.options;
        let vm = Arc::new(kvm::vm::create(&kvm::vm::open()?)?);
        means.mechanism.prepare(&vm, *source)?;
        let (memory, in_kvm) = (Arc::clone(&self.memory), Arc::clone(&self.in_kvm));
        let mut place = Windows::new(Arc::clone(&vm), memory, source.open()?, &self.options, in_kvm);
        if means.mechanism == Mechanism::KvmRing {
            place.rings = Some(RingSet::new(vm));
        }
        Ok(place)
    }
}

/// The places of one L2. There is always at least one.
pub struct Places {
    recipe: Recipe,
    all: Vec<Windows>,
    /// When L2 was last on each, in switches.
    used: Vec<u64>,
    switches: u64,
    current: usize,
    /// How KVM logs, while it does.
    logging: Option<Clearing>,
}

impl Places {
    /// One place, without windows.
    ///
    /// # Errors
    /// [`Error::Capability`] for what this host lacks; else the system's.
    pub fn new(recipe: Recipe) -> Result<Self, Error> {
        let first = recipe.make()?;
        Ok(Self { recipe, all: vec![first], used: vec![0], switches: 0, current: 0, logging: None })
    }

    /// The number of the place that L2 is on.
    #[must_use]
    pub const fn number(&self) -> usize {
        self.current
    }

    /// The place that L2 is on.
    #[must_use]
    pub fn here(&self) -> &Windows {
        &self.all[self.current]
    }

    /// The same, to change it.
    pub fn here_mut(&mut self) -> &mut Windows {
        &mut self.all[self.current]
    }

    /// All places.
    #[must_use]
    pub fn all(&self) -> &[Windows] {
        &self.all
    }

    /// A place, to change it.
    pub fn get_mut(&mut self, place: usize) -> Option<&mut Windows> {
        self.all.get_mut(place)
    }

    /// L2 goes on with `root`: on its place, if it has one; else on one whose root is gone, says `alive`; else on a new one.
    ///
    /// # Errors
    /// The system's.
    pub fn switch(&mut self, root: RootId, alive: impl Fn(RootId) -> bool) -> Result<(), Error> {
        self.switches += 1;
        let has = |place: &Windows| place.root() == Some(root);
        let is_free = |place: &Windows| place.root().is_none_or(|root| !alive(root));
        let found = self.all.iter().position(has).or_else(|| self.all.iter().position(is_free));
        self.current = match found {
            Some(place) => place,
            None if self.all.len() < MOST => self.add()?,
            None => {
                let oldest = (0..self.all.len()).min_by_key(|&place| self.used[place]).unwrap_or(0);
                self.all[oldest].close_all();
                oldest
            }
        };
        self.used[self.current] = self.switches;
        self.here_mut().serve(root);
        Ok(())
    }

    /// One more place, with the same windows; its number.
    fn add(&mut self) -> Result<usize, Error> {
        let mut place = self.recipe.make()?;
        let (wanted, tables) = self.here().wanted();
        place.create(&wanted, tables)?;
        place.unlogged.clone_from(&self.here().unlogged);
        self.all.push(place);
        self.used.push(0);
        if let Some(clearing) = self.logging {
            self.start_log_at(self.all.len() - 1, clearing)?;
        }
        Ok(self.all.len() - 1)
    }

    fn start_log_at(&mut self, place: usize, clearing: Clearing) -> Result<(), Error> {
        let (memory, place) = (&self.recipe.memory, &mut self.all[place]);
        let log = Log::new(place.windows(), clearing, memory.first_tracked(), memory.frames())?;
        place.start_log(log)
    }

    /// Begins to log.
    ///
    /// # Errors
    /// The system's.
    pub fn start_log(&mut self, clearing: Clearing) -> Result<(), Error> {
        self.logging = Some(clearing);
        // All is logged at first, whatever needed it not when it was logged last.
        self.all.iter_mut().filter_map(|place| place.unlogged.as_mut()).for_each(BTreeSet::clear);
        (0..self.all.len()).try_for_each(|place| self.start_log_at(place, clearing))
    }

    /// Ends it.
    ///
    /// # Errors
    /// The system's.
    pub fn stop_log(&mut self) -> Result<(), Error> {
        self.logging = None;
        self.all.iter_mut().try_for_each(|place| place.stop_log().map(|_| ()))
    }

    /// Fetches the logs.
    ///
    /// # Errors
    /// The system's.
    pub fn harvest_log(&mut self) -> Result<(), Error> {
        self.all.iter_mut().try_for_each(Windows::harvest_log)
    }

    /// Clears what was fetched.
    ///
    /// # Errors
    /// The system's.
    pub fn clear_log(&mut self) -> Result<(), Error> {
        self.all.iter_mut().try_for_each(Windows::clear_log)
    }

    /// See [`Windows::settle_slots`].
    ///
    /// # Errors
    /// The system's.
    pub fn settle_slots(&mut self) -> Result<(), Error> {
        self.all.iter_mut().try_for_each(Windows::settle_slots)
    }

    /// Counts the vCPUs that are in KVM.
    #[must_use]
    pub const fn in_kvm(&self) -> &Arc<AtomicUsize> {
        &self.recipe.in_kvm
    }

    /// The logs, while there are some.
    pub fn logs(&self) -> impl Iterator<Item = &Log> {
        self.all.iter().filter_map(|place| place.log.as_ref())
    }

    /// What all mappers did.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.all.iter().fold(Counts::default(), |sum, place| sum.plus(place.counts))
    }

    /// Maps what was posted and not mapped yet. Gives what went wrong first since this was last asked.
    pub fn settle(&mut self) -> Option<io::Error> {
        let mut failed = None;
        for place in 0..self.all.len() {
            let Some(error) = self.all[place].settle() else { continue };
            // The process may have too many mappings, and this place none left to close: the others have them. A fault comes again.
            let short = error.raw_os_error() == Some(libc::ENOMEM);
            if !(short && self.close_others(place)) {
                failed = failed.or(Some(error));
            }
        }
        failed
    }

    fn close_others(&mut self, place: usize) -> bool {
        let others = self.all.iter_mut().enumerate().filter(|(number, _)| *number != place);
        others.fold(false, |any, (_, other)| other.close_all() || any)
    }

    fn of(&mut self, root: RootId) -> Option<&mut Windows> {
        self.all.iter_mut().find(|place| place.root() == Some(root))
    }
}

impl Mapper for Places {
    fn map(&mut self, extent: Extent, frame: Frame, level: Level, access: Access) {
        if let Some(place) = self.of(extent.root) {
            place.map(extent, frame, level, access);
        }
    }

    fn protect(&mut self, extent: Extent, access: Access) {
        if let Some(place) = self.of(extent.root) {
            place.protect(extent, access);
        }
    }

    fn unmap(&mut self, extent: Extent) {
        if let Some(place) = self.of(extent.root) {
            place.unmap(extent);
        }
    }

    fn log_writes(&mut self, first: Frame, on: bool) {
        self.all.iter_mut().for_each(|place| place.log_writes(first, on));
    }

    fn flush(&mut self, _: Flush) {
        // Each call above has made KVM forget the pages before it returned, by its MMU notifier.
    }
}
