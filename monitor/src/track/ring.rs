//! `ring` and `ring-N`: KVM's dirty ring.

use super::Tracker;
use crate::guest::Machine;
use crate::kvm::Error;
use crate::kvm::ring::Rings;
use crate::pages::PageSet;
use std::sync::{Arc, Mutex, MutexGuard};

/// The rings of all vCPUs.
pub struct Ring {
    rings: Arc<Mutex<Rings>>,
}

impl Ring {
    /// The rings of a machine that has them.
    pub fn new(machine: &Machine) -> Result<Self, Error> {
        let rings = machine.rings().ok_or_else(|| Error::Capability {
            capability: "KVM_CAP_DIRTY_LOG_RING",
            consequence: "this machine was made without rings".to_owned(),
        })?;
        Ok(Self { rings: Arc::clone(rings) })
    }

    fn lock(&self) -> MutexGuard<'_, Rings> {
        // A thread that panicked while it held the rings has left whole entries behind: the flags' protocol has no half-way.
        self.rings.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Tracker for Ring {
    fn start(&mut self, machine: &Machine) -> Result<(), Error> {
        machine.vm().log_dirty_pages(true)
    }

    fn harvest(&mut self, _machine: &Machine) -> Result<(), Error> {
        self.lock().collect();
        Ok(())
    }

    fn clear(&mut self, _machine: &Machine) -> Result<(), Error> {
        self.lock().reset()
    }

    fn clears(&self) -> bool {
        true
    }

    fn stop(&mut self, machine: &Machine) -> Result<(), Error> {
        machine.vm().log_dirty_pages(false)
    }

    fn report(&mut self, _machine: &Machine, into: &mut PageSet) {
        self.lock().drain(into);
    }

    fn counters(&self, _machine: &Machine) -> Vec<(&'static str, u64)> {
        let rings = self.lock();
        vec![("ring_full_exits", rings.full_exits())]
    }

    fn fault(&self) -> Option<String> {
        let strange = self.lock().strange_entries();
        (strange > 0).then(|| format!("{strange} entries of the dirty ring name no tracked page"))
    }
}
