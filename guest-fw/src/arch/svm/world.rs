//! The switch to L2 and back: VMRUN exchanges RAX, RSP, RIP, RFLAGS and what belongs to the mode (AMD APM 2, 15.5.1); the other registers are
//! exchanged here.

use crate::arch::registers::{Registers, load_registers, pop_kept, push_kept, read_tsc, store_registers};
use core::mem::offset_of;

/// Enters L2 once, at ring 0, and returns when it was left. GIF is clear then (15.17); [`set_global_interrupts`] sets it again. Returns the TSC
/// ticks from before VMRUN to after it.
///
/// FS, GS, LDTR, TR and the registers of SYSCALL and SYSENTER stay what they are in L1 (15.5.1): L2 is the same program and uses neither, so
/// nobody needs VMLOAD and VMSAVE.
///
/// # Safety
/// SVM is on, `vmcb` is the physical address of a VMCB whose guest may run on the memory of this program, and `registers` are its own.
#[unsafe(naked)]
pub unsafe extern "C" fn enter(registers: *mut Registers, vmcb: u64) -> u64 {
    core::arch::naked_asm!(
        push_kept!(),
        "push rdi",
        "push rsi",
        "fxrstor64 [rdi + {fx}]",
        read_tsc!(),
        "push rax",
        "mov rax, rsi",
        load_registers!(),
        "vmrun rax",
        "push rdi",
        "mov rdi, [rsp + 24]",
        store_registers!(),
        read_tsc!(),
        "pop rdx",
        "sub rax, rdx",
        "fxsave64 [rdi + {fx}]",
        "pop rsi",
        "pop rdi",
        pop_kept!(),
        "ret",
        fx = const offset_of!(Registers, fx),
        rbx = const offset_of!(Registers, rbx),
        rcx = const offset_of!(Registers, rcx),
        rdx = const offset_of!(Registers, rdx),
        rsi = const offset_of!(Registers, rsi),
        rdi = const offset_of!(Registers, rdi),
        rbp = const offset_of!(Registers, rbp),
        r8 = const offset_of!(Registers, r8_to_r15),
    )
}

/// STGI.
///
/// # Safety
/// SVM is on, at ring 0.
pub unsafe fn set_global_interrupts() {
    // SAFETY: the caller's; nothing is pending that could find no handler, as every vector has one.
    unsafe { core::arch::asm!("stgi", options(nostack)) };
}
