//! KVM's dirty rings: one array of (slot, page) a vCPU, filled by KVM, emptied by the monitor (api.rst, 8.29).

use super::{Error, ioctls, vm};
use crate::pages::PageSet;
use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::mm::{self, MapFlags, ProtFlags};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use umbra_shared::PAGE_SIZE;

/// Entry flags (include/uapi/linux/kvm.h): KVM sets the first, the monitor sets the second when it has harvested the entry.
const DIRTY: u32 = 1 << 0;
const RESET: u32 = 1 << 1;

/// `KVM_EXIT_DIRTY_RING_FULL` (include/uapi/linux/kvm.h), which kvm-ioctls leaves to its callers.
pub const EXIT_FULL: u32 = 31;

/// Entries that a ring has by default: what QEMU's documentation suggests, and little enough that full rings happen at 64 MiB.
pub const DEFAULT_ENTRIES: u32 = 4096;
/// `KVM_DIRTY_RING_MAX_ENTRIES` (`include/linux/kvm_dirty_ring.h`).
pub const MAX_ENTRIES: u32 = 65536;
/// A page of entries: KVM takes no smaller ring.
pub const MIN_ENTRIES: u32 = 256;

/// One vCPU's ring, mapped.
struct Ring {
    entries: *mut kvm_dirty_gfn,
    count: u32,
    /// Where the next entry will be found. Wraps with the ring.
    next: u32,
}

// SAFETY: the mapping belongs to this value; what KVM writes concurrently is read through atomics and the flags' protocol.
unsafe impl Send for Ring {}

impl Ring {
    fn map(vcpu: &VcpuFd, count: u32) -> Result<Self, Error> {
        let bytes = count as usize * size_of::<kvm_dirty_gfn>();
        // All of it is mapped now: else the first round that fills the ring pays a fault for each of its pages, and a page table where it lies so.
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: the descriptor outlives this borrow; a new shared mapping of it at a place of the kernel's choice.
        let mapped = unsafe {
            let fd = BorrowedFd::borrow_raw(vcpu.as_raw_fd());
            let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE;
            mm::mmap(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, flags, fd, offset)
        };
        let entries = mapped.map_err(|error| Error::call("mapping the dirty ring", error))?.cast();
        Ok(Self { entries, count, next: 0 })
    }

    /// The next entry that KVM has filled, marked as harvested.
    fn take(&mut self) -> Option<(u32, u64)> {
        // SAFETY: `next` is below `count`, the mapping's length in entries.
        let entry = unsafe { self.entries.add(self.next as usize) };
        // SAFETY: the flags are an aligned u32 that both sides access atomically.
        let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
        // Acquire pairs with KVM's release of the entry: slot and offset are complete once DIRTY is seen.
        if flags.load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
            return None;
        }
        // SAFETY: KVM does not touch a dirty entry before it is reset.
        let (slot, offset) = unsafe { ((*entry).slot, (*entry).offset) };
        flags.store(RESET, Ordering::Release);
        self.next = (self.next + 1) % self.count;
        Some((slot, offset))
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: our own mapping, made in `map` with this length.
        let result = unsafe { mm::munmap(self.entries.cast(), self.count as usize * size_of::<kvm_dirty_gfn>()) };
        debug_assert!(result.is_ok());
    }
}

/// Enables rings of `entries` entries. The variant with acquire and release is taken where there is one (Linux 6.1); on x86 both are the same.
///
/// # Errors
/// [`Error::Capability`] where KVM has no rings, or none so large.
pub fn enable(vm: &VmFd, entries: u32) -> Result<(), Error> {
    let bytes = u64::from(entries) * size_of::<kvm_dirty_gfn>() as u64;
    let (cap, name) = if vm::offered(vm, KVM_CAP_DIRTY_LOG_RING_ACQ_REL) > 0 {
        (KVM_CAP_DIRTY_LOG_RING_ACQ_REL, "KVM_CAP_DIRTY_LOG_RING_ACQ_REL")
    } else {
        (KVM_CAP_DIRTY_LOG_RING, "KVM_CAP_DIRTY_LOG_RING")
    };
    let largest = vm::offered(vm, cap);
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
    vm::enable(vm, cap, name, bytes, &format!("it refuses rings of {entries} entries"))
}

/// The rings of all vCPUs of a VM.
pub struct RingSet {
    vm: Arc<VmFd>,
    by_vcpu: Vec<Ring>,
}

impl RingSet {
    /// None yet. The capability has been enabled.
    #[must_use]
    pub const fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, by_vcpu: Vec::new() }
    }

    /// Maps the ring of the next vCPU, which has `entries` entries.
    ///
    /// # Errors
    /// The system's.
    pub fn add(&mut self, vcpu: &VcpuFd, entries: u32) -> Result<(), Error> {
        self.by_vcpu.push(Ring::map(vcpu, entries)?);
        Ok(())
    }

    /// Harvests the ring of vCPU `index`: slot and page of each entry.
    pub fn harvest_one(&mut self, index: usize, mut found: impl FnMut(u32, u64)) {
        let Some(ring) = self.by_vcpu.get_mut(index) else { return };
        while let Some((slot, offset)) = ring.take() {
            found(slot, offset);
        }
    }

    /// Harvests all rings.
    pub fn harvest(&mut self, mut found: impl FnMut(u32, u64)) {
        for index in 0..self.by_vcpu.len() {
            self.harvest_one(index, &mut found);
        }
    }

    /// Gives harvested entries back to KVM, which protects their pages again.
    ///
    /// # Errors
    /// The system's.
    pub fn reset(&self) -> Result<(), Error> {
        ioctls::reset_dirty_rings(&*self.vm)
            .map(|_| ())
            .map_err(|source| Error::Call { what: "KVM_RESET_DIRTY_RINGS", source })
    }
}

/// All rings of a VM, and what has been found in them. Behind a lock: a vCPU whose ring is full empties it on its own thread.
pub struct Rings {
    of_vcpus: RingSet,
    /// First tracked page and pages, by slot id.
    slots: Vec<(u64, u64)>,
    found: PageSet,
    full_exits: u64,
    strange: u64,
}

impl Rings {
    /// Rings of `entries` entries, whose capability has been enabled. `slots` gives the first tracked page and the length of each slot
    /// by its id (length 0: not tracked).
    #[must_use]
    pub fn new(vm: Arc<VmFd>, slots: Vec<(u64, u64)>, pages: u64) -> Self {
        Self { of_vcpus: RingSet::new(vm), slots, found: PageSet::new(pages), full_exits: 0, strange: 0 }
    }

    /// Maps the ring of the next vCPU.
    ///
    /// # Errors
    /// The system's.
    pub fn add(&mut self, vcpu: &VcpuFd, entries: u32) -> Result<(), Error> {
        self.of_vcpus.add(vcpu, entries)
    }

    /// Harvests the ring of `vcpu`, or all.
    fn collect_from(&mut self, vcpu: Option<usize>) {
        let Self { of_vcpus, slots, found, strange, .. } = self;
        let mut note = |slot: u32, offset: u64| {
            // The upper half of `slot` is the address space: 0, as there is no SMM here.
            match slots.get(slot as usize).filter(|(_, pages)| offset < *pages) {
                Some((first, _)) => {
                    found.insert(first + offset);
                }
                None => *strange += 1,
            }
        };
        match vcpu {
            Some(index) => of_vcpus.harvest_one(index, &mut note),
            None => of_vcpus.harvest(&mut note),
        }
    }

    /// Harvests all rings.
    pub fn collect(&mut self) {
        self.collect_from(None);
    }

    /// Gives harvested entries back to KVM, which protects their pages again.
    ///
    /// # Errors
    /// The system's.
    pub fn reset(&self) -> Result<(), Error> {
        self.of_vcpus.reset()
    }

    /// What vCPU `index` does when its ring is full (`KVM_EXIT_DIRTY_RING_FULL`).
    ///
    /// # Errors
    /// The system's.
    pub fn emptied_by(&mut self, index: usize) -> Result<(), Error> {
        self.full_exits += 1;
        self.collect_from(Some(index));
        self.reset()
    }

    /// Moves what was found since the last call into `into`.
    pub fn drain(&mut self, into: &mut PageSet) {
        into.add(&self.found);
        self.found.clear();
    }

    /// Exits because a ring was full, so far.
    #[must_use]
    pub const fn full_exits(&self) -> u64 {
        self.full_exits
    }

    /// Entries that named no tracked page: 0 unless KVM is broken.
    #[must_use]
    pub const fn strange_entries(&self) -> u64 {
        self.strange
    }
}
