//! The virtual machine control block: AMD APM 2, appendix B, tables B-1 (control area) and B-2 (state save area). Only what L1 uses has a
//! name; the rest is zero.

use core::mem::offset_of;

/// Intercepts of the third word (offset 00Ch).
pub mod intercept {
    /// Physical interrupts.
    pub const INTR: u32 = 1 << 0;
    /// NMI.
    pub const NMI: u32 = 1 << 1;
    /// HLT.
    pub const HLT: u32 = 1 << 24;
    /// INVLPGA.
    pub const INVLPGA: u32 = 1 << 26;
    /// IN and OUT to ports whose bit in the I/O permission map is set.
    pub const IO: u32 = 1 << 27;
    /// RDMSR and WRMSR of registers whose bits in the MSR permission map are set.
    pub const MSR: u32 = 1 << 28;
    /// A triple fault.
    pub const SHUTDOWN: u32 = 1 << 31;
    /// The fourth word (offset 010h): VMRUN (must be set, 15.5.1), VMMCALL, VMLOAD, VMSAVE, STGI, CLGI and SKINIT.
    pub const SVM_INSTRUCTIONS: u32 = 0x7f;
}

/// Exit codes (appendix C).
pub mod exit {
    /// VMMCALL.
    pub const VMMCALL: u64 = 0x81;
    /// A physical interrupt or NMI: the host has dealt with it.
    pub const INTR: u64 = 0x60;
    /// NMI.
    pub const NMI: u64 = 0x61;
    /// A nested page fault: EXITINFO1 is the error code, EXITINFO2 the guest physical address (15.25.6).
    pub const NPF: u64 = 0x400;
}

/// A segment register as the VMCB holds it.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Segment {
    /// The selector.
    pub selector: u16,
    /// Bits 40 to 47 and 52 to 55 of the descriptor, put together (APM 2, figure 15-1).
    pub attributes: u16,
    /// The limit in bytes.
    pub limit: u32,
    /// The base.
    pub base: u64,
}

/// The control area and the state save area.
#[repr(C, align(4096))]
pub struct Vmcb {
    /// CR and DR accesses.
    pub intercept_registers: [u32; 2],
    /// Exceptions, a bit each.
    pub intercept_exceptions: u32,
    /// See [`intercept`].
    pub intercept_3: u32,
    /// See [`intercept::SVM_INSTRUCTIONS`].
    pub intercept_4: u32,
    reserved_014: [u8; 0x2c],
    /// Physical address of the I/O permission map.
    pub io_map: u64,
    /// Physical address of the MSR permission map.
    pub msr_map: u64,
    /// Added to the TSC.
    pub tsc_offset: u64,
    /// The address space identifier; 0 is the host's.
    pub asid: u32,
    /// What VMRUN flushes: 0 is nothing.
    pub tlb_control: u32,
    reserved_060: [u8; 0x10],
    /// Why L2 was left.
    pub exit_code: u64,
    /// More about it.
    pub exit_info_1: u64,
    /// More about it.
    pub exit_info_2: u64,
    /// An event that was being delivered.
    pub exit_interrupt_info: u64,
    /// Bit 0: nested paging.
    pub nested_control: u64,
    reserved_098: [u8; 0x18],
    /// The root of the nested page table.
    pub nested_cr3: u64,
    reserved_0b8: [u8; 0x400 - 0xb8],
    /// ES, CS, SS, DS.
    pub segments: [Segment; 4],
    /// FS and GS: VMRUN leaves them as they are.
    pub fs_gs: [Segment; 2],
    /// The GDT's base and limit.
    pub gdtr: Segment,
    /// LDTR: VMRUN leaves it as it is.
    pub ldtr: Segment,
    /// The IDT's base and limit.
    pub idtr: Segment,
    /// TR: VMRUN leaves it as it is.
    pub tr: Segment,
    reserved_4a0: [u8; 0x2b],
    /// The privilege level.
    pub cpl: u8,
    reserved_4cc: [u8; 4],
    /// EFER: SVME must be set.
    pub efer: u64,
    reserved_4d8: [u8; 0x70],
    /// CR4.
    pub cr4: u64,
    /// CR3.
    pub cr3: u64,
    /// CR0.
    pub cr0: u64,
    /// DR7.
    pub dr7: u64,
    /// DR6.
    pub dr6: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// RIP.
    pub rip: u64,
    reserved_580: [u8; 0x58],
    /// RSP.
    pub rsp: u64,
    reserved_5e0: [u8; 0x18],
    /// RAX.
    pub rax: u64,
    reserved_600: [u8; 0x68],
    /// L2's PAT, with nested paging.
    pub pat: u64,
    reserved_670: [u8; 0x1000 - 0x670],
}

const _: () = {
    assert!(size_of::<Vmcb>() == 4096);
    assert!(offset_of!(Vmcb, intercept_3) == 0x00c);
    assert!(offset_of!(Vmcb, io_map) == 0x040);
    assert!(offset_of!(Vmcb, asid) == 0x058);
    assert!(offset_of!(Vmcb, exit_code) == 0x070);
    assert!(offset_of!(Vmcb, exit_info_2) == 0x080);
    assert!(offset_of!(Vmcb, nested_control) == 0x090);
    assert!(offset_of!(Vmcb, nested_cr3) == 0x0b0);
    assert!(offset_of!(Vmcb, segments) == 0x400);
    assert!(offset_of!(Vmcb, gdtr) == 0x460);
    assert!(offset_of!(Vmcb, idtr) == 0x480);
    assert!(offset_of!(Vmcb, cpl) == 0x4cb);
    assert!(offset_of!(Vmcb, efer) == 0x4d0);
    assert!(offset_of!(Vmcb, cr4) == 0x548);
    assert!(offset_of!(Vmcb, rflags) == 0x570);
    assert!(offset_of!(Vmcb, rip) == 0x578);
    assert!(offset_of!(Vmcb, rsp) == 0x5d8);
    assert!(offset_of!(Vmcb, rax) == 0x5f8);
    assert!(offset_of!(Vmcb, pat) == 0x668);
};
