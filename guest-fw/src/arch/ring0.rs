//! The second gate from ring 3 to ring 0: calls a function there. Only a firmware that is a hypervisor goes through it; on a PVM host, where
//! ring 0 is emulated and INT n does not get here, there is no SVM anyway.

use super::idt::CALL_AT_RING_0;

/// Calls `work` at ring 0 with interrupts off, on this vCPU's general exception stack (8 KiB).
pub fn call(work: &mut dyn FnMut()) {
    let mut work: &mut dyn FnMut() = work;
    let argument = &raw mut work;
    // SAFETY: the stub calls `trampoline` with `argument`, which lives until it has returned, and comes back by IRETQ. The callee may change
    // what a C function may.
    unsafe {
        core::arch::asm!(
            "int {vector}",
            vector = const CALL_AT_RING_0,
            in("rdi") trampoline as extern "C" fn(*mut &mut dyn FnMut()),
            in("rsi") argument,
            clobber_abi("C"),
        );
    }
}

extern "C" fn trampoline(work: *mut &mut dyn FnMut()) {
    // SAFETY: `call` passes a pointer to its own variable and waits.
    unsafe { (*work)() };
}
