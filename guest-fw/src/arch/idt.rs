//! IDT and exception stubs. The stubs have fixed addresses (see `link.ld`), so the IDT is complete at link time.
//!
//! Every vector has a stub of [`STUB_BYTES`] and an IST stack, so the 128 bytes below an interrupted stack pointer (the red zone of
//! the System V ABI) stay untouched. An exception fills the mailbox's report and rings; it never returns. The vCPU is known by its
//! stack: each stack lies inside its vCPU's area, and the areas are aligned to their size.
//!
//! Intel SDM 3A, 6.14 (64-bit exception handling), table 6-1 (error codes); AMD APM 2, 8.9.

use super::gdt::{self, Pointer};
use umbra_shared::layout;

/// Ring 3 may raise this vector; it loads RDI into CR3. It is that of #OF, which INTO raises, which 64-bit mode does not have: on a PVM
/// host INT n reaches the guest only for the vectors that the host itself opens to user programs, 3 and 4, and is a #UD otherwise.
pub const LOAD_CR3: u8 = 4;

/// Ring 3 may raise this vector too; it calls the function at RDI with RSI as its argument, at ring 0 ([`super::ring0`]).
pub const CALL_AT_RING_0: u8 = 0x80;

const VECTORS: usize = 256;
const STUB_BYTES: u64 = 16;
const BREAKPOINT: usize = 3;

/// A 64-bit interrupt gate (SDM 3A, figure 6-8).
#[derive(Clone, Copy)]
#[repr(C)]
struct Gate {
    offset_low: u16,
    selector: u16,
    ist: u8,
    /// Present, DPL, type 14 (interrupt gate: IF is cleared).
    access: u8,
    offset_middle: u16,
    offset_high: u32,
    reserved: u32,
}

impl Gate {
    const fn new(vector: usize) -> Self {
        let offset = layout::IMAGE_START + vector as u64 * STUB_BYTES;
        let ist = match vector {
            2 => gdt::IST_NMI,
            8 => gdt::IST_DOUBLE_FAULT,
            18 => gdt::IST_MACHINE_CHECK,
            _ => gdt::IST_GENERAL,
        };
        let open = vector == LOAD_CR3 as usize || vector == CALL_AT_RING_0 as usize || vector == BREAKPOINT;
        let privilege = if open { 3 } else { 0 };
        Self {
            offset_low: offset as u16,
            selector: gdt::KERNEL_CODE,
            ist,
            access: 0x8e | privilege << 5,
            offset_middle: (offset >> 16) as u16,
            offset_high: (offset >> 32) as u32,
            reserved: 0,
        }
    }
}

/// The IDT as it lies in memory.
#[repr(C, align(16))]
pub struct Idt([Gate; VECTORS]);

/// The one IDT; all vCPUs load it.
pub static IDT: Idt = {
    let mut gates = [Gate::new(0); VECTORS];
    let mut vector = 0;
    while vector < VECTORS {
        gates[vector] = Gate::new(vector);
        vector += 1;
    }
    Idt(gates)
};

/// For LIDT.
pub static IDT_POINTER: Pointer<Idt> = Pointer { limit: size_of::<Idt>() as u16 - 1, base: &IDT };

/// Where an exception goes on at ring 3, on a fresh stack, instead of ringing the monitor's doorbell: 0 if nowhere. Under plain QEMU
/// there is nobody to ring for.
pub static RESUME_AT: core::sync::atomic::AtomicU64 = core::sync::atomic::AtomicU64::new(0);

#[cfg(not(test))]
mod stubs {
    //! The stubs themselves, and what they share.
    use super::RESUME_AT;
    use crate::arch::gdt::{USER_CODE, USER_DATA};
    use crate::arch::port::USER_FLAGS;
    use core::mem::offset_of;
    use umbra_shared::layout::{VCPU_AREA_BYTES, vcpu_area};
    use umbra_shared::protocol::{DOORBELL_PORT, Doorbell, ExceptionReport, Mailbox};

    // Vectors 8, 10..=14, 17, 21, 29 and 30 come with an error code (SDM 3A table 6-1; APM 2 table 8-1 for #VC and #SX).
    core::arch::global_asm!(
        ".pushsection .umbra.vectors, \"ax\", @progbits",
        ".global vectors",
        "vectors:",
        ".set vector, 0",
        ".rept 256",
        ".balign 16",
        ".if vector == {load_cr3}",
        "mov cr3, rdi",
        "iretq",
        ".elseif vector == {call_at_ring_0}",
        "jmp {call}",
        ".else",
        ".if (vector != 8) && ((vector < 10) || (vector > 14)) && (vector != 17) && (vector != 21) && (vector != 29) && (vector != 30)",
        "push 0",
        ".endif",
        "push vector",
        "jmp {report}",
        ".endif",
        ".set vector, vector + 1",
        ".endr",
        ".balign 4096",
        ".popsection",
        load_cr3 = const super::LOAD_CR3,
        report = sym report,
        call_at_ring_0 = const super::CALL_AT_RING_0,
        call = sym call,
    );

    /// The CPU aligns the stack to 16 and pushes five words (SDM 3A, 6.14.2).
    #[unsafe(naked)]
    unsafe extern "C" fn call() -> ! {
        core::arch::naked_asm!("mov rax, rdi", "mov rdi, rsi", "sub rsp, 8", "cld", "call rax", "add rsp, 8", "iretq")
    }

    /// On the stack: vector, error code, RIP, CS, RFLAGS, RSP, SS. The interrupted registers are lost, nobody returns to them.
    #[unsafe(naked)]
    unsafe extern "C" fn report() -> ! {
        core::arch::naked_asm!(
            "mov rdi, rsp",
            "and rdi, {area_mask}",
            "mov rax, [rsp]",
            "mov [rdi + {exception} + {vector}], rax",
            "mov rax, [rsp + 8]",
            "mov [rdi + {exception} + {error_code}], rax",
            "mov rax, [rsp + 16]",
            "mov [rdi + {exception} + {rip}], rax",
            "mov rax, [rsp + 24]",
            "mov [rdi + {exception} + {cs}], rax",
            "mov rax, [rsp + 40]",
            "mov [rdi + {exception} + {rsp_}], rax",
            "mov rax, cr2",
            "mov [rdi + {exception} + {cr2}], rax",
            "mov rsi, [rip + {resume_at}]",
            "test rsi, rsi",
            "jnz 3f",
            "mov edx, {port}",
            "2:",
            "mov eax, {doorbell}",
            "out dx, eax",
            "jmp 2b",
            "3:",
            "add rdi, {stack_top} - 8",
            "push {user_data}",
            "push rdi",
            "push {user_flags}",
            "push {user_code}",
            "push rsi",
            "iretq",
            area_mask = const -VCPU_AREA_BYTES.cast_signed(),
            exception = const offset_of!(Mailbox, exception),
            vector = const offset_of!(ExceptionReport, vector),
            error_code = const offset_of!(ExceptionReport, error_code),
            rip = const offset_of!(ExceptionReport, rip),
            cs = const offset_of!(ExceptionReport, cs),
            rsp_ = const offset_of!(ExceptionReport, rsp),
            cr2 = const offset_of!(ExceptionReport, cr2),
            resume_at = sym RESUME_AT,
            port = const DOORBELL_PORT,
            doorbell = const Doorbell::Exception as u32,
            stack_top = const vcpu_area::STACK_TOP,
            user_data = const USER_DATA,
            user_code = const USER_CODE,
            user_flags = const USER_FLAGS,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_three_gates_are_open_to_ring_3() {
        for (vector, gate) in IDT.0.iter().enumerate() {
            let open = gate.access >> 5 & 3 == 3;
            let meant = [BREAKPOINT, LOAD_CR3.into(), CALL_AT_RING_0.into()].contains(&vector);
            assert_eq!(open, meant, "vector {vector}");
            assert!((1..=4).contains(&gate.ist), "vector {vector} has no stack of its own");
        }
    }

    #[test]
    fn gates_point_to_their_stubs() {
        let gate = &IDT.0[14];
        let offset =
            u64::from(gate.offset_low) | u64::from(gate.offset_middle) << 16 | u64::from(gate.offset_high) << 32;
        assert_eq!(offset, layout::IMAGE_START + 14 * 16);
    }
}
