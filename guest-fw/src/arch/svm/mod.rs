//! This vCPU as an SVM hypervisor: one L2, which is the same program on tables and a stack of its own.
//!
//! L2 waits in VMMCALL between two pieces of work. [`L2::run`] hands it one and lets it run until the next VMMCALL, handling what comes
//! between. Everything that L2 does not need is intercepted, ports and MSRs included; a doorbell that it rings goes to the monitor, so that a
//! panic or an exception in L2 is reported like any other.

mod vmcb;
mod world;

use super::{gdt, idt, port, ring0};
use crate::nested::Run;
use core::arch::x86_64::__cpuid;
use core::fmt;
use umbra_shared::layout::{vcpu_area, vcpu_area as area};
use umbra_shared::protocol::DOORBELL_PORT;
use umbra_shared::{L2Gfn, PAGE_SIZE};
use vmcb::{Segment, Vmcb, exit, intercept};
use world::Registers;

/// EFER (APM 2, 3.1.7): LME, LMA and SVME.
const EFER: u32 = 0xc000_0080;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;
const EFER_SVME: u64 = 1 << 12;
/// `VM_CR` (APM 2, 15.30.1), whose bit 4 keeps SVM off.
const VM_CR: u32 = 0xc001_0114;
const VM_CR_SVMDIS: u64 = 1 << 4;
/// `VM_HSAVE_PA` (APM 2, 15.30.4).
const VM_HSAVE_PA: u32 = 0xc001_0117;
/// DR6 and DR7 after a reset (APM 2, table 14-1).
const DR6: u64 = 0xffff_0ff0;
const DR7: u64 = 0x400;
/// The PAT after a reset (APM 2, 7.8.2).
const PAT: u64 = 0x0007_0406_0007_0406;
/// Bytes of VMMCALL. The CPU need not say where the next instruction is (the feature "NRIP save").
const VMMCALL_BYTES: u64 = 3;

/// Why this vCPU cannot have an L2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absent {
    /// CPUID `8000_0001h` ECX bit 2 is clear.
    Svm,
    /// CPUID `8000_000Ah` EDX bit 0 is clear.
    NestedPaging,
    /// `VM_CR` keeps SVM off.
    SwitchedOff,
}

impl fmt::Display for Absent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Svm => "this vCPU has no SVM (CPUID 80000001h, ECX bit 2)",
            Self::NestedPaging => "this vCPU's SVM has no nested paging (CPUID 8000000Ah, EDX bit 0)",
            Self::SwitchedOff => "SVM is switched off on this vCPU (VM_CR.SVMDIS)",
        })
    }
}

/// The L2 of one vCPU.
pub struct L2 {
    vmcb: *mut Vmcb,
    registers: Registers,
}

/// A page of vCPU `vcpu`'s area.
fn page(vcpu: usize, offset: u64) -> *mut u8 {
    core::ptr::with_exposed_provenance_mut((vcpu_area(vcpu) + offset) as usize)
}

/// Whether this vCPU has what it takes, as far as CPUID says.
fn features() -> Result<(), Absent> {
    let bit = |word: u32, bit: u32| word >> bit & 1 == 1;
    #[allow(unused_unsafe)] // To older compilers than today's it is unsafe.
    // SAFETY: every x86-64 CPU has CPUID.
    let leaf = |number| unsafe { __cpuid(number) };
    if leaf(0x8000_0000).eax < 0x8000_000a || !bit(leaf(0x8000_0001).ecx, 2) {
        return Err(Absent::Svm);
    }
    if !bit(leaf(0x8000_000a).edx, 0) {
        return Err(Absent::NestedPaging);
    }
    Ok(())
}

/// # Safety
/// At ring 0; the register exists.
unsafe fn read_msr(register: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller's.
    unsafe { core::arch::asm!("rdmsr", in("ecx") register, out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// # Safety
/// At ring 0; the register may have that value.
unsafe fn write_msr(register: u32, value: u64) {
    // SAFETY: the caller's.
    unsafe {
        core::arch::asm!("wrmsr", in("ecx") register, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack));
    }
}

/// Sets EFER.SVME and `VM_HSAVE_PA`.
fn switch_on(vcpu: usize) -> Result<(), Absent> {
    let mut result = Ok(());
    ring0::call(&mut || {
        // SAFETY: a CPU with SVM has all three; the page is in the system slot and for nothing else.
        unsafe {
            if read_msr(VM_CR) & VM_CR_SVMDIS != 0 {
                result = Err(Absent::SwitchedOff);
                return;
            }
            write_msr(EFER, read_msr(EFER) | EFER_SVME);
            write_msr(VM_HSAVE_PA, vcpu_area(vcpu) + area::HOST_SAVE);
        }
    });
    result
}

/// CR0 and CR4 as they are.
fn control_registers() -> (u64, u64) {
    let (mut cr0, mut cr4) = (0, 0);
    ring0::call(&mut || {
        // SAFETY: reads, at ring 0.
        unsafe {
            core::arch::asm!("mov {}, cr0", out(reg) cr0, options(nomem, nostack));
            core::arch::asm!("mov {}, cr4", out(reg) cr4, options(nomem, nostack));
        }
    });
    (cr0, cr4)
}

impl L2 {
    /// Makes the L2 of vCPU `vcpu`, which executes this: on the tables `pml4`, its own, and `nested_cr3`, L1's. It has run up to its first
    /// VMMCALL, for which it needs nothing but the system slot.
    ///
    /// # Errors
    /// What this vCPU lacks.
    pub fn new(vcpu: usize, pml4: u64, nested_cr3: u64) -> Result<Self, Absent> {
        features()?;
        switch_on(vcpu)?;
        let mut l2 = Self { vmcb: page(vcpu, area::VMCB).cast(), registers: Registers::new() };
        // SAFETY: three pages and two of this vCPU's area, which are for nothing else (layout.rs).
        unsafe {
            let ports = page(vcpu, area::IO_MAP);
            ports.write_bytes(0xff, 3 * PAGE_SIZE as usize);
            // A set bit intercepts (15.10.1); the doorbells' four are in one half of a byte.
            ports.add(usize::from(DOORBELL_PORT / 8)).write(!(0xf << (DOORBELL_PORT % 8)));
            page(vcpu, area::MSR_MAP).write_bytes(0xff, 2 * PAGE_SIZE as usize);
        }
        l2.set_up(vcpu, pml4, nested_cr3);
        l2.run(&mut || (), &mut |gfn| panic!("L2 has no system slot at its frame {gfn}"));
        Ok(l2)
    }

    fn set_up(&mut self, vcpu: usize, pml4: u64, nested_cr3: u64) {
        let (cr0, cr4) = control_registers();
        // SAFETY: the page is this vCPU's VMCB, and for nothing else; zeroes are valid in it.
        let vmcb = unsafe {
            self.vmcb.write_bytes(0, 1);
            &mut *self.vmcb
        };
        vmcb.intercept_3 = intercept::INTR
            | intercept::NMI
            | intercept::HLT
            | intercept::INVLPGA
            | intercept::IO
            | intercept::MSR
            | intercept::SHUTDOWN;
        vmcb.intercept_4 = intercept::SVM_INSTRUCTIONS;
        vmcb.io_map = vcpu_area(vcpu) + area::IO_MAP;
        vmcb.msr_map = vcpu_area(vcpu) + area::MSR_MAP;
        vmcb.asid = 1;
        vmcb.nested_control = 1;
        vmcb.nested_cr3 = nested_cr3;
        // Attributes: type, S, DPL 3, P; L for code, D for data; G.
        let code = Segment { selector: gdt::USER_CODE, attributes: 0xafb, limit: u32::MAX, base: 0 };
        let data = Segment { selector: gdt::USER_DATA, attributes: 0xcf3, limit: u32::MAX, base: 0 };
        vmcb.segments = [data, code, data, data];
        vmcb.cpl = 3;
        // The same descriptors: the vectors' stubs report L2's exceptions as they report L1's.
        let (gdt, idt) = (&gdt::GDT_POINTER, &idt::IDT_POINTER);
        vmcb.gdtr = Segment {
            limit: gdt.limit.into(),
            base: core::ptr::from_ref(gdt.base).expose_provenance() as u64,
            ..Segment::default()
        };
        vmcb.idtr = Segment {
            limit: idt.limit.into(),
            base: core::ptr::from_ref(idt.base).expose_provenance() as u64,
            ..Segment::default()
        };
        vmcb.efer = EFER_LONG_MODE | EFER_SVME;
        (vmcb.cr0, vmcb.cr3, vmcb.cr4) = (cr0, pml4, cr4);
        (vmcb.dr6, vmcb.dr7, vmcb.pat) = (DR6, DR7, PAT);
        vmcb.rflags = port::USER_FLAGS.into();
        vmcb.rip = main as *const () as u64;
        // As a function finds it that was called: 8 below a multiple of 16.
        vmcb.rsp = vcpu_area(vcpu) + area::L2_STACK_TOP - 8;
    }

    /// Lets L2 do `work`. `violation` is called for each frame that L1's table does not let L2 touch, at ring 0; L2 then tries again.
    ///
    /// Panics if L2 is left for another reason.
    pub fn run(&mut self, work: &mut dyn FnMut(), violation: &mut dyn FnMut(L2Gfn)) -> Run {
        let mut work: &mut dyn FnMut() = work;
        let work = (&raw mut work).expose_provenance() as u64;
        let mut run = Run::default();
        ring0::call(&mut || {
            // SAFETY: this vCPU's own page; L2 is not running.
            unsafe { (*self.vmcb).rax = work };
            loop {
                // SAFETY: SVM is on since `new`, the VMCB was set up there, and L2 runs this program's code on this program's memory. Its
                // address is its physical one.
                run.ticks = unsafe { world::enter(&raw mut self.registers, self.vmcb.expose_provenance() as u64) };
                run.entries += 1;
                // SAFETY: L2 is not running.
                let vmcb = unsafe { &mut *self.vmcb };
                match vmcb.exit_code {
                    exit::VMMCALL => {
                        vmcb.rip += VMMCALL_BYTES;
                        break;
                    }
                    exit::NPF => violation(L2Gfn::containing(vmcb.exit_info_2)),
                    exit::INTR | exit::NMI => {}
                    code => panic!(
                        "L2 was left at {:#x} with exit code {code:#x} ({:#x}, {:#x})",
                        vmcb.rip, vmcb.exit_info_1, vmcb.exit_info_2
                    ),
                }
            }
            // SAFETY: ring 0, SVM is on.
            unsafe { world::set_global_interrupts() };
        });
        run
    }
}

/// Where L2 begins, at ring 3: it asks for work, and does it.
extern "C" fn main() -> ! {
    loop {
        let work: *mut &mut dyn FnMut();
        // SAFETY: L1 intercepts VMMCALL and changes RAX, nothing else.
        unsafe { core::arch::asm!("vmmcall", out("rax") work) };
        // SAFETY: `run` passes a pointer to its own variable and waits; L2 sees the same memory at the same addresses.
        unsafe { (*work)() };
    }
}
