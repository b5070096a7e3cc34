//! Which vCPU this is, and the memory of the system slot that belongs to it.

use core::sync::atomic::{AtomicBool, Ordering};
use umbra_shared::histogram::Histogram;
use umbra_shared::layout::{self, MAX_VCPUS, VCPU_AREA_BYTES, VCPU_AREAS};
use umbra_shared::protocol::BootPage;

/// The index of the vCPU that executes this: its stack lies in its area.
#[must_use]
pub fn current() -> usize {
    let stack: u64;
    // SAFETY: reads a register.
    unsafe { core::arch::asm!("mov {}, rsp", out(reg) stack, options(nomem, nostack, preserves_flags)) };
    ((stack.wrapping_sub(VCPU_AREAS)) / VCPU_AREA_BYTES) as usize
}

/// What a vCPU's workload owns beyond its stack: claimed once, so that there is one reference to each.
pub struct Memory {
    /// The stall histogram.
    pub histogram: &'static mut Histogram,
    /// This vCPU's part of the plans.
    pub plan: &'static mut [u32],
}

static CLAIMED: [AtomicBool; MAX_VCPUS] = [const { AtomicBool::new(false) }; MAX_VCPUS];

/// Claims histogram and plan of this vCPU; `plan` is the address of its part of the plans and how many entries it has. Panics at the
/// second call on a vCPU, and if the plan leaves the system slot.
///
/// The monitor may read the histogram only while this vCPU waits in a doorbell.
#[must_use]
pub fn claim(plan: (u64, usize)) -> Memory {
    let index = current();
    assert!(!CLAIMED[index].swap(true, Ordering::Relaxed), "vCPU {index}'s memory is claimed twice");
    let (address, entries) = plan;
    let end = (entries as u64).checked_mul(4).and_then(|bytes| address.checked_add(bytes));
    assert!(
        address >= layout::PLANS && address.is_multiple_of(4) && end.is_some_and(|end| end <= layout::SYSTEM_LIMIT),
        "a plan of {entries} entries at {address:#x} leaves the system slot"
    );
    let histogram = layout::vcpu_area(index) + layout::vcpu_area::HISTOGRAM;
    // SAFETY: the system slot is mapped at its own addresses; the histogram lies in this vCPU's area, and the parts of the plans of
    // different vCPUs do not overlap (Pattern::share). CLAIMED makes these the only references. Any bytes are valid in both.
    unsafe {
        Memory {
            histogram: &mut *core::ptr::with_exposed_provenance_mut(histogram as usize),
            plan: core::slice::from_raw_parts_mut(core::ptr::with_exposed_provenance_mut(address as usize), entries),
        }
    }
}

/// A copy of the boot page.
#[must_use]
pub fn boot_page() -> BootPage {
    // SAFETY: the page is in the system slot, mapped at its own address; any bytes are a valid BootPage.
    unsafe { core::ptr::with_exposed_provenance::<BootPage>(layout::BOOT_PAGE as usize).read_volatile() }
}

/// Writes the boot page, where no monitor did.
pub fn set_boot_page(page: BootPage) {
    // SAFETY: as above; without a monitor this is the only CPU.
    unsafe { core::ptr::with_exposed_provenance_mut::<BootPage>(layout::BOOT_PAGE as usize).write_volatile(page) };
}
