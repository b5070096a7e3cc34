//! The time stamp counter.

/// TSC ticks now. Not serialising: a load or store before it may still be in flight, but not one that faults to the hypervisor.
#[inline]
#[must_use]
pub fn now() -> u64 {
    // SAFETY: every x86-64 CPU has RDTSC, and CR4.TSD is clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}
