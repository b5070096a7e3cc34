//! Out of long mode and back: paging can only be switched off from 32-bit code (Intel SDM 3A, 4.1.2 and 9.8.5.4; AMD APM 2, 14.7).
//!
//! Everything here lies below 4 GiB at its own address, so code, stack and descriptor tables are the same with paging on and off. What is done
//! while it is off is a [`Stay`]; two of them switch on PAE or 32-bit paging for a moment, on tables that are there at link time.

use super::gdt::{KERNEL_CODE, KERNEL_CODE_32, KERNEL_DATA};
use umbra_shared::toggle::Toggle;

/// CR0.PG.
pub(super) const PAGING: u32 = 1 << 31;
pub(super) const CR4_PSE: u32 = 1 << 4;
pub(super) const CR4_PAE: u32 = 1 << 5;
const CR4_LA57: u32 = 1 << 12;
pub(super) const EFER: u32 = 0xc000_0080;
pub(super) const EFER_LME: u32 = 1 << 8;

/// What is done outside of long mode.
#[derive(Clone, Copy, Debug)]
pub enum Stay {
    /// Nothing.
    Bare,
    /// PAE paging on and off.
    Pae,
    /// 32-bit paging on and off.
    Bits32,
    /// CR4.LA57 changed and changed back.
    La57,
    /// EFER.LME changed and changed back.
    Lme,
}

// PAE's four pointers (present is the only bit that they may have, SDM 3A table 4-8) and a directory of 4 MiB leaves (table 4-4); both map
// the first GiB at its own addresses. PAE's directory is long mode's own.
core::arch::global_asm!(
    ".pushsection .umbra.tables, \"aw\", @progbits",
    ".balign 4096",
    "unpaged_32bit:",
    ".set address, 0",
    ".rept 256",
    ".long address + 0xe3",
    ".set address, address + 0x400000",
    ".endr",
    ".fill 768, 4, 0",
    "unpaged_pae:",
    ".quad ring0_directory + 1",
    ".fill 3, 8, 0",
    ".popsection",
);

/// Leaves long mode, makes `stay`, comes back, and returns the TSC ticks from before to after. Outside of long mode the upper halves of all
/// registers are undefined (SDM 1, 3.4.1.1), so those that a C function keeps lie on the stack meanwhile.
///
/// # Safety
/// At ring 0, with interrupts off, on a stack below 4 GiB; the CPU has what the stay changes.
pub unsafe fn visit(stay: Stay) -> u64 {
    let routine = match stay {
        Stay::Bare => bare,
        Stay::Pae => pae,
        Stay::Bits32 => bits32,
        Stay::La57 => la57,
        Stay::Lme => lme,
    };
    // SAFETY: the caller's; the routine is one of the five below.
    unsafe { call(routine as *const () as u64, 0) }
}

/// Leaves long mode, calls the 32-bit code at `routine` with paging off and ESI = `argument`, and comes back. The routine keeps EBX, EBP, EDI and
/// the state that it finds. Returns the TSC ticks from before to after.
///
/// # Safety
/// As [`visit`]; and what the routine does.
pub unsafe fn call(routine: u64, argument: u64) -> u64 {
    // SAFETY: the caller's.
    unsafe { leave_and_return(routine, argument) }
}

/// RDI is the address of the 32-bit routine to call with paging off; it finds ESI as RSI was, and keeps EBX, EBP and EDI.
#[unsafe(naked)]
unsafe extern "C" fn leave_and_return(routine: u64, argument: u64) -> u64 {
    core::arch::naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov rax, cr3",
        "push rax",
        // What 32-bit code reads through. Ring 3 finds null selectors in them, as it did.
        "mov eax, {data}",
        "mov ss, eax",
        "mov ds, eax",
        "mov es, eax",
        "rdtsc",
        "shl rdx, 32",
        "or rax, rdx",
        "push rax",
        "lea rax, [rip + ring0_pml4]",
        "mov cr3, rax",
        // For the far return at the end: eight bytes are what 32-bit code pops.
        "lea rax, [rip + 3f]",
        "movabs rcx, {code}",
        "or rax, rcx",
        "push rax",
        "push {code32}",
        "lea rax, [rip + 2f]",
        "push rax",
        "retfq",
        ".code32",
        "2:",
        "mov eax, cr0",
        "and eax, {no_paging}",
        "mov cr0, eax",
        "call edi",
        "lea eax, [ring0_pml4]",
        "mov cr3, eax",
        "mov eax, cr0",
        "or eax, {paging}",
        "mov cr0, eax",
        "retf",
        ".code64",
        "3:",
        "mov esp, esp",
        "rdtsc",
        "shl rdx, 32",
        "or rax, rdx",
        "pop rcx",
        "sub rax, rcx",
        "pop rcx",
        "mov cr3, rcx",
        "xor ecx, ecx",
        "mov ds, ecx",
        "mov es, ecx",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        data = const KERNEL_DATA,
        code = const (KERNEL_CODE as u64) << 32,
        code32 = const KERNEL_CODE_32,
        paging = const PAGING,
        no_paging = const !PAGING,
    )
}

/// The 32-bit routine that changes a bit of long mode's there and back, by its address; of other toggles one that changes nothing.
pub(super) fn change(toggle: Toggle) -> u32 {
    let routine: unsafe extern "C" fn() = match toggle {
        Toggle::La57 => la57,
        Toggle::Lme => lme,
        _ => bare,
    };
    (routine as *const ()).addr() as u32
}

#[unsafe(naked)]
unsafe extern "C" fn bare() {
    core::arch::naked_asm!(".code32", "ret", ".code64")
}

#[unsafe(naked)]
unsafe extern "C" fn la57() {
    core::arch::naked_asm!(
        ".code32",
        "mov eax, cr4",
        "xor eax, {bit}",
        "mov cr4, eax",
        "xor eax, {bit}",
        "mov cr4, eax",
        "ret",
        ".code64",
        bit = const CR4_LA57,
    )
}

#[unsafe(naked)]
unsafe extern "C" fn lme() {
    core::arch::naked_asm!(
        ".code32",
        "mov ecx, {efer}",
        "rdmsr",
        "xor eax, {bit}",
        "wrmsr",
        "xor eax, {bit}",
        "wrmsr",
        "ret",
        ".code64",
        efer = const EFER,
        bit = const EFER_LME,
    )
}

/// Without EFER.LME, CR0.PG means PAE paging. QEMU's emulation sets the accessed bit in the pointers, where it is reserved, so that they are
/// written anew each time.
#[unsafe(naked)]
unsafe extern "C" fn pae() {
    core::arch::naked_asm!(
        ".code32",
        "mov ecx, {efer}",
        "rdmsr",
        "and eax, {no_lme}",
        "wrmsr",
        "lea eax, [ring0_directory + 1]",
        "mov dword ptr [unpaged_pae], eax",
        "lea eax, [unpaged_pae]",
        "mov cr3, eax",
        "mov eax, cr0",
        "or eax, {paging}",
        "mov cr0, eax",
        "and eax, {no_paging}",
        "mov cr0, eax",
        "rdmsr",
        "or eax, {lme}",
        "wrmsr",
        "ret",
        ".code64",
        efer = const EFER,
        lme = const EFER_LME,
        no_lme = const !EFER_LME,
        paging = const PAGING,
        no_paging = const !PAGING,
    )
}

#[unsafe(naked)]
unsafe extern "C" fn bits32() {
    core::arch::naked_asm!(
        ".code32",
        "mov ecx, {efer}",
        "rdmsr",
        "and eax, {no_lme}",
        "wrmsr",
        "mov esi, cr4",
        "mov eax, esi",
        "and eax, {no_pae}",
        "or eax, {pse}",
        "mov cr4, eax",
        "lea eax, [unpaged_32bit]",
        "mov cr3, eax",
        "mov eax, cr0",
        "or eax, {paging}",
        "mov cr0, eax",
        "and eax, {no_paging}",
        "mov cr0, eax",
        "mov cr4, esi",
        "rdmsr",
        "or eax, {lme}",
        "wrmsr",
        "ret",
        ".code64",
        efer = const EFER,
        lme = const EFER_LME,
        no_lme = const !EFER_LME,
        pse = const CR4_PSE,
        no_pae = const !CR4_PAE,
        paging = const PAGING,
        no_paging = const !PAGING,
    )
}
