//! L2's registers that neither SVM nor VMX exchanges, and the instructions that exchange them.

/// They lie here while L2 does not run.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub struct Registers {
    /// VMRUN exchanges this one itself; on VMX it is exchanged here.
    pub rax: u64,
    pub(super) rbx: u64,
    pub(super) rcx: u64,
    pub(super) rdx: u64,
    pub(super) rsi: u64,
    pub(super) rdi: u64,
    pub(super) rbp: u64,
    /// What VMX was told last to load into RSP when L2 is left.
    pub(super) host_rsp: u64,
    pub(super) r8_to_r15: [u64; 8],
    /// x87, MMX and SSE, as FXSAVE lays them out (APM 5, FXSAVE; SDM 2A, FXSAVE).
    pub(super) fx: [u8; 512],
}

impl Registers {
    /// All zero, but for the control words' values after a reset: no x87 or SSE exception is open (APM 2, table 14-1; SDM 3A, table 10-1).
    pub const fn new() -> Self {
        let mut fx = [0; 512];
        [fx[0], fx[1]] = 0x037f_u16.to_le_bytes();
        [fx[24], fx[25]] = 0x1f80_u16.to_le_bytes();
        Self { rax: 0, rbx: 0, rcx: 0, rdx: 0, rsi: 0, rdi: 0, rbp: 0, host_rsp: 0, r8_to_r15: [0; 8], fx }
    }
}

/// Pushes what a C function must keep.
macro_rules! push_kept {
    () => {
        "push rbx\npush rbp\npush r12\npush r13\npush r14\npush r15"
    };
}

/// The reverse of [`push_kept`].
macro_rules! pop_kept {
    () => {
        "pop r15\npop r14\npop r13\npop r12\npop rbp\npop rbx"
    };
}

/// RAX becomes the time stamp counter; RDX is lost.
macro_rules! read_tsc {
    () => {
        "rdtsc\nshl rdx, 32\nor rax, rdx"
    };
}

/// Loads all but RAX from the [`Registers`] at RDI; changes no flags.
macro_rules! load_registers {
    () => {
        "mov rbx, [rdi + {rbx}]
        mov rcx, [rdi + {rcx}]
        mov rdx, [rdi + {rdx}]
        mov rsi, [rdi + {rsi}]
        mov rbp, [rdi + {rbp}]
        mov r8, [rdi + {r8}]
        mov r9, [rdi + {r8} + 8]
        mov r10, [rdi + {r8} + 16]
        mov r11, [rdi + {r8} + 24]
        mov r12, [rdi + {r8} + 32]
        mov r13, [rdi + {r8} + 40]
        mov r14, [rdi + {r8} + 48]
        mov r15, [rdi + {r8} + 56]
        mov rdi, [rdi + {rdi}]"
    };
}

/// Stores all but RAX into the [`Registers`] at RDI; L2's own RDI is on the stack, and is popped. RAX is lost.
macro_rules! store_registers {
    () => {
        "mov [rdi + {rbx}], rbx
        mov [rdi + {rcx}], rcx
        mov [rdi + {rdx}], rdx
        mov [rdi + {rsi}], rsi
        mov [rdi + {rbp}], rbp
        mov [rdi + {r8}], r8
        mov [rdi + {r8} + 8], r9
        mov [rdi + {r8} + 16], r10
        mov [rdi + {r8} + 24], r11
        mov [rdi + {r8} + 32], r12
        mov [rdi + {r8} + 40], r13
        mov [rdi + {r8} + 48], r14
        mov [rdi + {r8} + 56], r15
        pop rax
        mov [rdi + {rdi}], rax"
    };
}

pub(super) use {load_registers, pop_kept, push_kept, read_tsc, store_registers};
