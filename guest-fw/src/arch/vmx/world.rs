//! The switch to L2 and back: an entry and an exit exchange RSP, RIP, RFLAGS, CR0, CR3, CR4 and segments (Intel SDM 3C, 27.3 and 28.5); the other
//! registers are exchanged here.

use super::vmcs::host;
use crate::arch::registers::{Registers, load_registers, pop_kept, push_kept, read_tsc, store_registers};
use core::mem::offset_of;

/// What came of an entry.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Entered {
    /// TSC ticks from before it to after it; 0 if it failed.
    pub ticks: u64,
    /// RFLAGS if the entry, or the writing of RSP before it, failed; 0 if L2 ran.
    pub flags: u64,
}

/// Enters L2 once, at ring 0, and returns when it was left. `launched` is 0 the first time, and 1 later on.
///
/// RSP is written into the VMCS when it is not what it was the last time, which it nearly always is: to a guest hypervisor that write is an exit.
///
/// # Safety
/// In VMX operation; the current VMCS is set up, its RIP for exits is [`left`], its guest may run on the memory of this program, and
/// `registers` are that guest's.
#[unsafe(naked)]
pub unsafe extern "C" fn enter(registers: *mut Registers, launched: u64) -> Entered {
    core::arch::naked_asm!(
        push_kept!(),
        "push rdi",
        "fxrstor64 [rdi + {fx}]",
        read_tsc!(),
        "push rax",
        "cmp rsp, [rdi + {host_rsp}]",
        "je 2f",
        "mov eax, {rsp_field}",
        "vmwrite rax, rsp",
        "jbe 4f",
        "mov [rdi + {host_rsp}], rsp",
        "2:",
        "test rsi, rsi",
        "mov rax, [rdi + {rax}]",
        load_registers!(),
        "jnz 3f",
        "vmlaunch",
        "jmp 4f",
        "3:",
        "vmresume",
        "4:",
        "pushfq",
        "pop rdx",
        "xor eax, eax",
        "add rsp, 16",
        pop_kept!(),
        "ret",
        fx = const offset_of!(Registers, fx),
        host_rsp = const offset_of!(Registers, host_rsp),
        rsp_field = const host::RSP.0,
        rax = const offset_of!(Registers, rax),
        rbx = const offset_of!(Registers, rbx),
        rcx = const offset_of!(Registers, rcx),
        rdx = const offset_of!(Registers, rdx),
        rsi = const offset_of!(Registers, rsi),
        rdi = const offset_of!(Registers, rdi),
        rbp = const offset_of!(Registers, rbp),
        r8 = const offset_of!(Registers, r8_to_r15),
    )
}

/// Where an exit leads, on the stack that [`enter`] left: the TSC, the registers' address, and what `enter` pushed before.
///
/// # Safety
/// Only an exit may come here.
#[unsafe(naked)]
pub unsafe extern "C" fn left() -> ! {
    core::arch::naked_asm!(
        "push rdi",
        "mov rdi, [rsp + 16]",
        "mov [rdi + {rax}], rax",
        store_registers!(),
        read_tsc!(),
        "pop rdx",
        "sub rax, rdx",
        "fxsave64 [rdi + {fx}]",
        "pop rdi",
        "xor edx, edx",
        pop_kept!(),
        "ret",
        fx = const offset_of!(Registers, fx),
        rax = const offset_of!(Registers, rax),
        rbx = const offset_of!(Registers, rbx),
        rcx = const offset_of!(Registers, rcx),
        rdx = const offset_of!(Registers, rdx),
        rsi = const offset_of!(Registers, rsi),
        rdi = const offset_of!(Registers, rdi),
        rbp = const offset_of!(Registers, rbp),
        r8 = const offset_of!(Registers, r8_to_r15),
    )
}
