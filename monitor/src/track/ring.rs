//! `ring` and `ring-N`: KVM's dirty ring.

use super::Tracker;
use crate::guest::Machine;
use crate::kvm::ring::Rings;
use crate::kvm::{self, Error};
use crate::pages::PageSet;
use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, kvm_dirty_gfn};
use kvm_ioctls::VmFd;
use std::sync::{Arc, Mutex, MutexGuard};

/// The rings of all vCPUs.
pub struct Ring {
    rings: Arc<Mutex<Rings>>,
}

/// Enables rings of `entries` entries. The variant with acquire and release is taken where there is one (Linux 6.1); on x86 both are the same.
pub fn prepare(vm: &VmFd, entries: u32) -> Result<(), Error> {
    let bytes = u64::from(entries) * size_of::<kvm_dirty_gfn>() as u64;
    let (cap, name) = if kvm::vm::offered(vm, KVM_CAP_DIRTY_LOG_RING_ACQ_REL) > 0 {
        (KVM_CAP_DIRTY_LOG_RING_ACQ_REL, "KVM_CAP_DIRTY_LOG_RING_ACQ_REL")
    } else {
        (KVM_CAP_DIRTY_LOG_RING, "KVM_CAP_DIRTY_LOG_RING")
    };
    let largest = kvm::vm::offered(vm, cap);
    if largest == 0 {
        let consequence = "ring needs Linux 5.11 or later".to_owned();
        return Err(Error::Capability { capability: name, consequence });
    }
    if bytes > largest {
        let most = largest / size_of::<kvm_dirty_gfn>() as u64;
        return Err(Error::Capability {
            capability: name,
            consequence: format!("it allows rings of {most} entries at most"),
        });
    }
    kvm::vm::enable(vm, cap, name, bytes, &format!("it refuses rings of {entries} entries"))
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
