//! System management mode: the handler, its installation while SMRAM is open, and an SMI on request.
//!
//! The CPU enters the handler in a real mode with CS at SMBASE and all other segments flat up to 4 GiB (AMD APM 2, 10.3.3), so 32-bit addresses
//! reach everything. RSM brings every register back.

use super::{port, tsc, vcpu};
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;
use umbra_shared::layout::{vcpu_area, vcpu_area as area};
use umbra_shared::protocol::Doorbell;
use umbra_shared::smm::{ENTRY, LEDGER, LOG, LOG_ENTRIES, Ledger, saved, smbase};

// The handler: the interrupted RIP in the log, then one more SMI in the ledger, so that what is counted is there for who looks on; and the new count
// where everybody sees it.
core::arch::global_asm!(
    ".pushsection .rodata.smm, \"a\", @progbits",
    ".code16",
    "smm_handler:",
    "mov eax, dword ptr cs:[{handled}]",
    "mov ecx, eax",
    "and ecx, {log_mask}",
    "shl ecx, 3",
    "mov edx, dword ptr cs:[{rip}]",
    "mov dword ptr cs:[ecx + {log}], edx",
    "mov edx, dword ptr cs:[{rip} + 4]",
    "mov dword ptr cs:[ecx + {log} + 4], edx",
    "inc eax",
    "mov dword ptr cs:[{handled}], eax",
    "mov ebx, dword ptr cs:[{report}]",
    "mov dword ptr [ebx], eax",
    "rsm",
    "smm_handler_end:",
    ".code64",
    ".popsection",
    handled = const LEDGER + core::mem::offset_of!(Ledger, handled) as u64,
    report = const LEDGER + core::mem::offset_of!(Ledger, report) as u64,
    log = const LOG,
    log_mask = const LOG_ENTRIES - 1,
    rip = const saved::RIP,
);

#[cfg(not(test))]
unsafe extern "C" {
    static smm_handler: [u8; 0];
    static smm_handler_end: [u8; 0];
}

/// The handler's bytes.
#[cfg(not(test))]
fn handler() -> &'static [u8] {
    // SAFETY: both symbols bound the section's bytes, which nobody writes.
    unsafe {
        let (begin, end) = (smm_handler.as_ptr(), smm_handler_end.as_ptr());
        core::slice::from_raw_parts(begin, end.addr() - begin.addr())
    }
}

#[cfg(test)]
fn handler() -> &'static [u8] {
    &[]
}

/// Puts handler and ledger into the SMRAM of vCPU `index`, which must be open: it is reached at its own address, as everybody's memory. Only vCPU
/// 0 calls this, before there is an SMI.
pub fn install(index: usize) {
    let ledger = Ledger { handled: 0, report: vcpu_area(index) + area::SMM_REPORT };
    let entry = core::ptr::with_exposed_provenance_mut::<u8>((smbase(index) + ENTRY) as usize);
    let place = core::ptr::with_exposed_provenance_mut::<Ledger>((smbase(index) + LEDGER) as usize);
    // SAFETY: 64 KiB below the image, mapped at their own address and for nothing else (layout.rs); nobody has a reference.
    unsafe {
        entry.copy_from_nonoverlapping(handler().as_ptr(), handler().len());
        place.write_volatile(ledger);
    }
}

/// SMIs that this vCPU's handler has reported.
fn reported() -> u64 {
    let address = vcpu_area(vcpu::current()) + area::SMM_REPORT;
    // SAFETY: eight bytes of this vCPU's area, for nothing else; the handler writes them.
    unsafe { AtomicU64::from_ptr(core::ptr::with_exposed_provenance_mut(address as usize)).load(Relaxed) }
}

/// Asks the chipset for an SMI, and returns what it took in TSC ticks: the way to the monitor and back, the entry, the handler, RSM. Panics if the
/// handler did not run once.
#[must_use]
pub fn visit() -> u64 {
    let before = reported();
    let begin = tsc::now();
    port::ring(Doorbell::Smi);
    let ticks = tsc::now().wrapping_sub(begin);
    let handled = reported().wrapping_sub(before);
    assert!(handled == 1, "an SMI was asked for, and SMM's handler ran {handled} times");
    ticks
}
