//! Mode changes at ring 0: a bit of CR0, CR4 or EFER is changed and changed back, each of which is an exit to a KVM that wants to know.
//!
//! They run on tables of their own, the first GiB at its own addresses for ring 0 alone: with CR4.SMEP or SMAP ring 0 can neither execute nor
//! reach a page that is open to ring 3, as all of the final tables' are. They are there at link time, so that they need no pool.

use super::{ring0, smm, unpaged};
use core::sync::atomic::AtomicU32;
use umbra_shared::protocol::{DOORBELL_PORT, Doorbell};
use umbra_shared::toggle::Toggle;

const CR0_WP: u64 = 1 << 16;
const CR4_PSE: u64 = 1 << 4;
const CR4_PGE: u64 = 1 << 7;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const CR4_PKE: u64 = 1 << 22;
/// EFER (Intel SDM 4, table 2-2; AMD APM 2, 3.1.7), its NXE.
const EFER: u32 = 0xc000_0080;
const EFER_NXE: u64 = 1 << 11;

// As the tables that the firmware boots with (entry.rs), less the bit that opens them to ring 3.
core::arch::global_asm!(
    ".pushsection .umbra.tables, \"aw\", @progbits",
    ".balign 4096",
    ".global ring0_pml4",
    "ring0_pml4:",
    ".quad ring0_pdpt + 0x23",
    ".fill 511, 8, 0",
    "ring0_pdpt:",
    ".quad ring0_directory + 0x23",
    ".fill 511, 8, 0",
    ".global ring0_directory",
    "ring0_directory:",
    ".set address, 0",
    ".rept 512",
    ".quad address + 0xe3",
    ".set address, address + 0x200000",
    ".endr",
    ".popsection",
);

/// vCPUs that have come to a meeting since the boot.
static MET: AtomicU32 = AtomicU32::new(0);

/// A function that changes the bits of `mask` in a register and changes them back, on ring 0's tables, and returns the TSC ticks from before the
/// first change to after the second. In between it comes to the meeting at `met`, if that is not null, and waits until it counts `all`. RDX is free between the instructions of `read` and `write`, which use RAX (and RDX for an MSR's upper half).
macro_rules! flip {
    ($(#[$doc:meta])* $name:ident, [$($read:literal),*], [$($write:literal),*]) => {
        $(#[$doc])*
        #[unsafe(naked)]
        unsafe extern "C" fn $name(mask: u64, met: *const AtomicU32, all: u32) -> u64 {
            core::arch::naked_asm!(
                "mov r9d, edx",
                "mov r10, cr3",
                "lea rax, [rip + ring0_pml4]",
                "mov cr3, rax",
                "mov ecx, {efer}",
                "rdtsc",
                "shl rdx, 32",
                "lea r8, [rax + rdx]",
                $($read,)*
                "xor rax, rdi",
                $($write,)*
                "test rsi, rsi",
                "jz 4f",
                "push rax",
                "push rdx",
                "lock inc dword ptr [rsi]",
                "2:",
                "cmp dword ptr [rsi], r9d",
                "jae 3f",
                "mov edx, {port}",
                "mov eax, {wait}",
                "out dx, eax",
                "jmp 2b",
                "3:",
                "pop rdx",
                "pop rax",
                "4:",
                "xor rax, rdi",
                $($write,)*
                "rdtsc",
                "shl rdx, 32",
                "add rax, rdx",
                "sub rax, r8",
                "mov cr3, r10",
                "ret",
                efer = const EFER,
                port = const DOORBELL_PORT,
                wait = const Doorbell::Wait as u32,
            )
        }
    };
}

flip! {
    /// # Safety
    /// At ring 0, with interrupts off; long mode bears the change of those bits of CR0.
    cr0, ["mov rax, cr0"], ["mov cr0, rax"]
}
flip! {
    /// # Safety
    /// As [`cr0`], of CR4; the CPU has the bits.
    cr4, ["mov rax, cr4"], ["mov cr4, rax"]
}
flip! {
    /// # Safety
    /// As [`cr0`], of EFER's lower half; the CPU has the bits.
    efer, ["rdmsr"], ["wrmsr"]
}

/// Makes the toggle once and returns what it took in TSC ticks. The caller has asked CPUID whether this CPU has it ([`Toggle::needs`]); one that
/// has not ends in #GP. With `all` the vCPUs meet in between, until so many have come since the boot; of a bit's toggles alone.
#[must_use]
pub fn toggle(toggle: Toggle, all: Option<u32>) -> u64 {
    assert!(all.is_none() || toggle.is_of_a_bit(), "{} is made by one vCPU at a time", toggle.name());
    let (met, all) = all.map_or((core::ptr::null(), 0), |all| (&raw const MET, all));
    if toggle.is_smm() {
        return smm::visit();
    }
    let mut ticks = 0;
    ring0::call(&mut || {
        // SAFETY: at ring 0 with interrupts off. The tables map this code, its stack and the descriptor tables as the final ones do; none of
        // those bits is one that long mode needs, and the ways through `unpaged` come back.
        ticks = unsafe {
            match toggle {
                Toggle::None | Toggle::Smm | Toggle::SmmShared => cr0(0, met, all),
                Toggle::Cr0Wp => cr0(CR0_WP, met, all),
                Toggle::Pse => cr4(CR4_PSE, met, all),
                Toggle::Pge => cr4(CR4_PGE, met, all),
                Toggle::Smep => cr4(CR4_SMEP, met, all),
                Toggle::Smap => cr4(CR4_SMAP, met, all),
                Toggle::Pke => cr4(CR4_PKE, met, all),
                Toggle::Nxe => efer(EFER_NXE, met, all),
                Toggle::Cr0Pg | Toggle::Pae | Toggle::Bits32 | Toggle::La57 | Toggle::Lme => unpaged::visit(toggle),
            }
        };
    });
    ticks
}
