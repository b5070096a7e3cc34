//! From the monitor's entry, at ring 0 in long mode, to Rust at ring 3; and the page tables that hold until then.
//!
//! The monitor enters each vCPU at `_start` with CR3 = `boot_pml4`, RDI = [`ENTERED_BY_MONITOR`](umbra_shared::protocol::ENTERED_BY_MONITOR) and RSI = its index.

use super::gdt::{FIRST_TSS, GDT_POINTER, USER_CODE, USER_DATA};
use super::idt::IDT_POINTER;
use super::port::USER_FLAGS;
use umbra_shared::layout::{MAX_VCPUS, VCPU_AREA_BYTES, VCPU_AREAS, vcpu_area};

// The first GiB at its own addresses, by 2 MiB leaves, present, writable, open to ring 3, accessed and dirty
// (Intel SDM 3A, tables 4-15 to 4-18).
core::arch::global_asm!(
    ".pushsection .umbra.tables, \"aw\", @progbits",
    ".balign 4096",
    ".global boot_pml4",
    "boot_pml4:",
    ".quad boot_pdpt + 0x27",
    ".fill 511, 8, 0",
    "boot_pdpt:",
    ".quad boot_directory + 0x27",
    ".fill 511, 8, 0",
    "boot_directory:",
    ".set address, 0",
    ".rept 512",
    ".quad address + 0xe7",
    ".set address, address + 0x200000",
    ".endr",
    ".popsection",
);

/// The ELF's entry. RDI and RSI go on to [`crate::boot::start`].
///
/// # Safety
/// Only a CPU in the state described above may come here.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn _start() -> ! {
    core::arch::naked_asm!(
        // An index beyond the areas has no stack to report from.
        "cmp rsi, {vcpus}",
        "jae 2f",
        "lgdt [rip + {gdt}]",
        "lidt [rip + {idt}]",
        "mov eax, esi",
        "shl eax, 4",
        "add eax, {first_tss}",
        "ltr ax",
        // Ring 3's stack, as a function finds it that was called: 8 below a multiple of 16.
        "imul rax, rsi, {area_bytes}",
        "lea rax, [rax + {areas} + {stack_top} - 8]",
        "lea rsp, [rax - 64]",
        "push {user_data}",
        "push rax",
        "push {user_flags}",
        "push {user_code}",
        "lea rax, [rip + {start}]",
        "push rax",
        "iretq",
        "2:",
        "hlt",
        "jmp 2b",
        vcpus = const MAX_VCPUS,
        gdt = sym GDT_POINTER,
        idt = sym IDT_POINTER,
        first_tss = const FIRST_TSS,
        area_bytes = const VCPU_AREA_BYTES,
        areas = const VCPU_AREAS,
        stack_top = const vcpu_area::STACK_TOP,
        user_data = const USER_DATA,
        user_flags = const USER_FLAGS,
        user_code = const USER_CODE,
        start = sym crate::boot::start,
    )
}
