//! Out of long mode and back: paging can only be switched off from 32-bit code (Intel SDM 3A, 4.1.2 and 9.8.5.4; AMD APM 2, 14.7).
//!
//! Everything here lies below 4 GiB at its own address, so code, stack and descriptor tables are the same with paging on and off. From there PAE
//! or 32-bit paging can be switched on for a while ([`Paged`]).

use super::gdt::{KERNEL_CODE, KERNEL_CODE_32, KERNEL_DATA};
use core::mem::offset_of;
use umbra_shared::paging::Mode;
use umbra_shared::toggle::Toggle;

/// CR0.PG.
const PAGING: u32 = 1 << 31;
const CR4_PSE: u32 = 1 << 4;
const CR4_PAE: u32 = 1 << 5;
const CR4_LA57: u32 = 1 << 12;
const EFER: u32 = 0xc000_0080;
const EFER_LME: u32 = 1 << 8;

unsafe extern "C" {
    /// [`Mode::Bits32`]'s table.
    static unpaged_32bit: u8;
    /// [`Mode::Pae`]'s four pointers.
    static unpaged_pae: u8;
}

/// What the 32-bit code of [`Paged::call`] finds at ESI, at the beginning of whatever else its work wants to find there.
#[derive(Default)]
#[repr(C)]
pub(super) struct Paged {
    cr3: u32,
    pae: u32,
    /// 32-bit code, called with paging on and ESI as it was; it keeps ESI and ESP.
    work: u32,
    /// CR4 as it was before.
    cr4: u32,
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

impl Paged {
    /// `work` in `mode`, which is not long mode, on the tables at `cr3`.
    pub(super) fn new(mode: Mode, cr3: u32, work: unsafe extern "C" fn()) -> Self {
        Self { cr3, pae: (mode == Mode::Pae).into(), work: address(work), cr4: 0 }
    }

    /// Leaves long mode, has the work done that `argument` begins with, and comes back. Returns the TSC ticks from before to after.
    ///
    /// # Safety
    /// As [`visit`]; `argument` is the address of a Paged, whose tables map code, stack, descriptor tables and the argument at their own
    /// addresses; and what the work does.
    pub(super) unsafe fn call(argument: u64) -> u64 {
        // SAFETY: the caller's; `paged` keeps what a routine has to keep.
        unsafe { call(address(paged).into(), argument) }
    }
}

/// Leaves long mode, makes the toggle, comes back, and returns the TSC ticks from before to after. A toggle that needs no 32-bit code does nothing
/// there.
///
/// # Safety
/// At ring 0, with interrupts off, on a stack below 4 GiB; the CPU has what the toggle changes.
pub unsafe fn visit(toggle: Toggle) -> u64 {
    let (mode, root) = match toggle {
        Toggle::Pae => (Mode::Pae, &raw const unpaged_pae),
        Toggle::Bits32 => (Mode::Bits32, &raw const unpaged_32bit),
        // SAFETY: the caller's; that routine changes a bit and changes it back.
        _ => return unsafe { call(change(toggle).into(), 0) },
    };
    let mut paged = Paged::new(mode, root.addr() as u32, bare);
    // SAFETY: the caller's; the two tables map the first GiB at its own addresses, and the work is none.
    unsafe { Paged::call((&raw mut paged).expose_provenance() as u64) }
}

/// Leaves long mode, calls the 32-bit code at `routine` with paging off and ESI = `argument`, and comes back. Outside of long mode the upper
/// halves of all registers are undefined (SDM 1, 3.4.1.1), so those that a C function keeps lie on the stack meanwhile. The routine keeps EBX,
/// EBP, EDI and the state that it finds. Returns the TSC ticks from before to after.
///
/// # Safety
/// As [`visit`]; and what the routine does.
#[unsafe(naked)]
pub(super) unsafe extern "C" fn call(routine: u64, argument: u64) -> u64 {
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
    address(match toggle {
        Toggle::La57 => la57,
        Toggle::Lme => lme,
        _ => bare,
    })
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

/// Switches on the paging that the [`Paged`] at ESI names, has its work done, and switches it off. Without EFER.LME, CR0.PG means what CR4.PAE says.
#[unsafe(naked)]
unsafe extern "C" fn paged() {
    core::arch::naked_asm!(
        ".code32",
        "push ebx",
        "push ebp",
        "push edi",
        "mov ecx, {efer}",
        "rdmsr",
        "and eax, {no_lme}",
        "wrmsr",
        "mov eax, cr4",
        "mov [esi + {cr4}], eax",
        "mov ebx, [esi + {cr3}]",
        "cmp dword ptr [esi + {pae}], 0",
        "je 2f",
        // QEMU's emulation sets the accessed bit in the pointers, where it is reserved.
        "and dword ptr [ebx], {no_accessed}",
        "and dword ptr [ebx + 8], {no_accessed}",
        "and dword ptr [ebx + 16], {no_accessed}",
        "and dword ptr [ebx + 24], {no_accessed}",
        "jmp 3f",
        "2:",
        "and eax, {no_pae}",
        "or eax, {pse}",
        "mov cr4, eax",
        "3:",
        "mov cr3, ebx",
        "mov eax, cr0",
        "or eax, {paging}",
        "mov cr0, eax",
        // Nobody sends an interrupt; but Bochs takes none of its host's from a guest that has them off.
        "sti",
        "call dword ptr [esi + {work}]",
        "cli",
        "mov eax, cr0",
        "and eax, {no_paging}",
        "mov cr0, eax",
        "mov eax, [esi + {cr4}]",
        "mov cr4, eax",
        "mov ecx, {efer}",
        "rdmsr",
        "or eax, {lme}",
        "wrmsr",
        "pop edi",
        "pop ebp",
        "pop ebx",
        "ret",
        ".code64",
        efer = const EFER,
        lme = const EFER_LME,
        no_lme = const !EFER_LME,
        pse = const CR4_PSE,
        no_pae = const !CR4_PAE,
        paging = const PAGING,
        no_paging = const !PAGING,
        no_accessed = const !0x20_u32,
        cr3 = const offset_of!(Paged, cr3),
        pae = const offset_of!(Paged, pae),
        work = const offset_of!(Paged, work),
        cr4 = const offset_of!(Paged, cr4),
    )
}

/// Where 32-bit code finds a routine.
fn address(routine: unsafe extern "C" fn()) -> u32 {
    (routine as *const ()).addr() as u32
}
