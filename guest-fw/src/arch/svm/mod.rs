//! This vCPU as an SVM hypervisor.

mod vmcb;
mod world;

use super::l2::{Exit, Extension, Left, Tables, Violation, main};
use super::paging::Format;
use super::privileged::{control_registers, read_msr, write_msr};
use super::registers::Registers;
use super::{gdt, idt, port, ring0, vcpu};
use core::arch::x86_64::__cpuid;
use core::fmt;
use umbra_shared::PAGE_SIZE;
use umbra_shared::layout::{vcpu_area, vcpu_area as area};
use umbra_shared::nested::Nested;
use umbra_shared::protocol::DOORBELL_PORT;
use vmcb::{Segment, Vmcb, exit, intercept};

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
/// `TLB_CONTROL`: VMRUN flushes everything (15.16.2), the one value that every CPU with SVM has.
const FLUSH: u32 = 1;
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
pub struct Svm {
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
            write_msr(VM_HSAVE_PA, vcpu_area(vcpu) + area::HOST_REGION);
        }
    });
    result
}

impl Svm {
    fn set_up(&mut self, vcpu: usize, pml4: u64, root: u64) {
        let mut controls = [0; 3];
        // SAFETY: at ring 0.
        ring0::call(&mut || controls = unsafe { control_registers() });
        let [cr0, _, cr4] = controls;
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
        vmcb.nested_cr3 = root;
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
        self.begin(vcpu);
    }

    /// L2 is at [`main`], on an empty stack.
    fn begin(&mut self, vcpu: usize) {
        // SAFETY: this vCPU's own page; L2 is not running.
        let vmcb = unsafe { &mut *self.vmcb };
        vmcb.rflags = port::USER_FLAGS.into();
        vmcb.rip = main::<Self> as *const () as u64;
        // As a function finds it that was called: 8 below a multiple of 16.
        vmcb.rsp = vcpu_area(vcpu) + area::L2_STACK_TOP - 8;
    }
}

impl Extension for Svm {
    type Absent = Absent;

    fn format(_: &Nested) -> Format {
        Format::LONG
    }

    fn new(vcpu: usize, tables: &Tables) -> Result<Self, Absent> {
        features()?;
        switch_on(vcpu)?;
        let mut svm = Self { vmcb: page(vcpu, area::CONTROL_BLOCK).cast(), registers: Registers::new() };
        // SAFETY: three pages and two of this vCPU's area, which are for nothing else (layout.rs).
        unsafe {
            let ports = page(vcpu, area::IO_MAP);
            ports.write_bytes(0xff, 3 * PAGE_SIZE as usize);
            // A set bit intercepts (15.10.1); the doorbells' four are in one half of a byte.
            ports.add(usize::from(DOORBELL_PORT / 8)).write(!(0xf << (DOORBELL_PORT % 8)));
            page(vcpu, area::MSR_MAP).write_bytes(0xff, 2 * PAGE_SIZE as usize);
        }
        svm.set_up(vcpu, tables.pml4, tables.root);
        Ok(svm)
    }

    fn enter(&mut self) -> Left {
        let mut ticks = 0;
        ring0::call(&mut || {
            // SAFETY: SVM is on since `new`, the VMCB was set up there, and L2 runs this program's code on this program's memory. Its
            // address is its physical one.
            unsafe {
                ticks = world::enter(&raw mut self.registers, self.vmcb.expose_provenance() as u64);
                world::set_global_interrupts();
            }
        });
        // SAFETY: this vCPU's own page; L2 is not running.
        let vmcb = unsafe { &mut *self.vmcb };
        vmcb.tlb_control = 0;
        let information = [vmcb.exit_info_1, vmcb.exit_info_2];
        let exit = match vmcb.exit_code {
            exit::VMMCALL => {
                vmcb.rip += VMMCALL_BYTES;
                Exit::Hypercall
            }
            exit::NPF => {
                let [qualification, address] = information;
                Exit::Violation(Violation { code: exit::NPF, qualification, address })
            }
            exit::INTR | exit::NMI => Exit::Interrupted,
            code => Exit::Other { code, information, rip: vmcb.rip },
        };
        Left { exit, ticks }
    }

    fn set_rax(&mut self, value: u64) {
        // SAFETY: this vCPU's own page; L2 is not running.
        unsafe { (*self.vmcb).rax = value };
    }

    fn restart(&mut self) {
        self.begin(vcpu::current());
    }

    fn use_flags(&mut self, on: bool) -> bool {
        // NPT has no other way (APM 2, 15.25.6).
        on
    }

    fn forget(&mut self) {
        // SAFETY: this vCPU's own page; L2 is not running.
        unsafe { (*self.vmcb).tlb_control = FLUSH };
    }

    unsafe fn hypercall() -> u64 {
        let value;
        // SAFETY: L1 intercepts VMMCALL and changes RAX, nothing else.
        unsafe { core::arch::asm!("vmmcall", out("rax") value) };
        value
    }
}
