//! The switch to L2 and back: VMRUN exchanges RAX, RSP, RIP, RFLAGS and what belongs to the mode (AMD APM 2, 15.5.1); the other registers are
//! exchanged here.

use core::mem::offset_of;

/// L2's registers that VMRUN leaves alone.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub struct Registers {
    rbx: u64,
    rcx: u64,
    rdx: u64,
    rsi: u64,
    rdi: u64,
    rbp: u64,
    r8_to_r15: [u64; 8],
    /// x87, MMX and SSE, as FXSAVE lays them out (APM 5, FXSAVE).
    fx: [u8; 512],
}

impl Registers {
    /// All zero, but for the control words' values after a reset: no x87 or SSE exception is open (APM 2, table 14-1).
    pub const fn new() -> Self {
        let mut fx = [0; 512];
        [fx[0], fx[1]] = 0x037f_u16.to_le_bytes();
        [fx[24], fx[25]] = 0x1f80_u16.to_le_bytes();
        Self { rbx: 0, rcx: 0, rdx: 0, rsi: 0, rdi: 0, rbp: 0, r8_to_r15: [0; 8], fx }
    }
}

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
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push rdi",
        "push rsi",
        "fxrstor64 [rdi + {fx}]",
        "rdtsc",
        "shl rdx, 32",
        "or rax, rdx",
        "push rax",
        "mov rax, rsi",
        "mov rbx, [rdi + {rbx}]",
        "mov rcx, [rdi + {rcx}]",
        "mov rdx, [rdi + {rdx}]",
        "mov rsi, [rdi + {rsi}]",
        "mov rbp, [rdi + {rbp}]",
        "mov r8, [rdi + {r8}]",
        "mov r9, [rdi + {r8} + 8]",
        "mov r10, [rdi + {r8} + 16]",
        "mov r11, [rdi + {r8} + 24]",
        "mov r12, [rdi + {r8} + 32]",
        "mov r13, [rdi + {r8} + 40]",
        "mov r14, [rdi + {r8} + 48]",
        "mov r15, [rdi + {r8} + 56]",
        "mov rdi, [rdi + {rdi}]",
        "vmrun rax",
        "push rdi",
        "mov rdi, [rsp + 24]",
        "mov [rdi + {rbx}], rbx",
        "mov [rdi + {rcx}], rcx",
        "mov [rdi + {rdx}], rdx",
        "mov [rdi + {rsi}], rsi",
        "mov [rdi + {rbp}], rbp",
        "mov [rdi + {r8}], r8",
        "mov [rdi + {r8} + 8], r9",
        "mov [rdi + {r8} + 16], r10",
        "mov [rdi + {r8} + 24], r11",
        "mov [rdi + {r8} + 32], r12",
        "mov [rdi + {r8} + 40], r13",
        "mov [rdi + {r8} + 48], r14",
        "mov [rdi + {r8} + 56], r15",
        "pop rax",
        "mov [rdi + {rdi}], rax",
        "rdtsc",
        "shl rdx, 32",
        "or rax, rdx",
        "pop rdx",
        "sub rax, rdx",
        "fxsave64 [rdi + {fx}]",
        "pop rsi",
        "pop rdi",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
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
