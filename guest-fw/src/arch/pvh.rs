//! The PVH entry: plain `qemu -kernel` boots the same file, for the self-test.
//!
//! The ELF note `XEN_ELFNOTE_PHYS32_ENTRY` (type 18, Xen's `public/elfnote.h`) names an entry at which the CPU is in 32-bit
//! protected mode with flat segments and without paging (Xen's `docs/misc/pvh.pandoc`). The order of steps to long mode is Intel SDM 3A,
//! 9.8.5.

use super::gdt::{GDT_POINTER, KERNEL_CODE};

/// CR4: PAE, OSFXSR, OSXMMEXCPT.
const CR4: u32 = 1 << 5 | 1 << 9 | 1 << 10;
/// CR0: PG, NE, ET, MP, PE.
const CR0: u32 = 1 << 31 | 1 << 5 | 1 << 4 | 1 << 1 | 1;
/// The EFER MSR (SDM 4, table 2-2) and its LME bit.
const EFER: u32 = 0xc000_0080;
const LME: u32 = 1 << 8;

core::arch::global_asm!(
    ".pushsection .note.pvh, \"a\", @note",
    ".balign 4",
    ".long 4, 8, 18",
    ".asciz \"Xen\"",
    ".quad pvh_entry",
    ".popsection",
    ".pushsection .text.pvh, \"ax\", @progbits",
    ".code32",
    ".global pvh_entry",
    "pvh_entry:",
    // Mask both interrupt controllers (8259A, OCW1): ring 3 runs with IF set, and their vectors are those of exceptions.
    "movb $0xff, %al",
    "outb %al, $0x21",
    "outb %al, $0xa1",
    "movl ${cr4}, %eax",
    "movl %eax, %cr4",
    "movl $boot_pml4, %eax",
    "movl %eax, %cr3",
    "movl ${efer}, %ecx",
    "rdmsr",
    "orl ${lme}, %eax",
    "wrmsr",
    "movl ${cr0}, %eax",
    "movl %eax, %cr0",
    "lgdtl {gdt}",
    "ljmpl ${kernel_code}, $1f",
    ".code64",
    "1:",
    // No monitor, vCPU 0.
    "xorl %edi, %edi",
    "xorl %esi, %esi",
    "jmp _start",
    ".popsection",
    cr4 = const CR4,
    cr0 = const CR0,
    efer = const EFER,
    lme = const LME,
    kernel_code = const KERNEL_CODE,
    gdt = sym GDT_POINTER,
    options(att_syntax),
);
