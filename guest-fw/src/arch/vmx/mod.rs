//! This vCPU as a VMX hypervisor.

mod capability;
mod instruction;
mod vmcs;
mod world;

use super::l2::{Exit, Extension, Left, Tables, Violation, main};
use super::paging::Format;
use super::privileged::{control_registers, read_msr, write_cr4, write_msr};
use super::registers::Registers;
use super::{gdt, idt, port, ring0, vcpu};
use capability::Controls;
use core::arch::x86_64::__cpuid;
use core::fmt;
use instruction::{Failed, invept_single_context, outcome, vmclear, vmptrld, vmread, vmwrite, vmxon};
use umbra_shared::PAGE_SIZE;
use umbra_shared::layout::{vcpu_area, vcpu_area as area};
use umbra_shared::nested::{Flags, Nested};
use umbra_shared::paging::ept;
use umbra_shared::protocol::DOORBELL_PORT;
use vmcs::{Field, field, guest, host, reason, rights};

/// CR4.VMXE (SDM 3A, 2.5).
const CR4_VMXE: u64 = 1 << 13;
/// `IA32_FEATURE_CONTROL` (SDM 3C, 24.7): locked; VMXON outside SMX operation.
const LOCKED: u64 = 1 << 0;
const VMXON_ALLOWED: u64 = 1 << 2;
/// DR7 after a reset (SDM 3A, table 10-1).
const DR7: u64 = 0x400;
/// The segment registers that a VMCS has, in its order.
const SEGMENTS: usize = 8;

/// Why this vCPU cannot have an L2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absent {
    /// CPUID 1 ECX bit 5 is clear.
    Vmx,
    /// `IA32_FEATURE_CONTROL` is locked without VMXON.
    SwitchedOff,
    /// A capability MSR forbids these bits of its control.
    Control {
        /// The MSR.
        register: u32,
        /// The bits.
        bits: u32,
    },
    /// `IA32_VMX_EPT_VPID_CAP` lacks these bits.
    Ept(u64),
}

impl fmt::Display for Absent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vmx => write!(f, "this vCPU has no VMX (CPUID 1, ECX bit 5)"),
            Self::SwitchedOff => write!(f, "VMX is switched off on this vCPU (IA32_FEATURE_CONTROL)"),
            Self::Control { register, bits } => {
                write!(f, "this vCPU's VMX lacks the controls {bits:#x} (capability MSR {register:#x})")
            }
            Self::Ept(bits) => write!(f, "this vCPU's EPT lacks {bits:#x} of IA32_VMX_EPT_VPID_CAP"),
        }
    }
}

/// The L2 of one vCPU.
pub struct Vmx {
    registers: Registers,
    launched: bool,
    ept_pointer: u64,
    /// Bits of the EPT pointer that the CPU offers.
    offered: u64,
}

/// A page of vCPU `vcpu`'s area.
fn page(vcpu: usize, offset: u64) -> *mut u8 {
    core::ptr::with_exposed_provenance_mut((vcpu_area(vcpu) + offset) as usize)
}

/// Calls `work` at ring 0, and returns what it does. Panics, here at ring 3, if an instruction failed.
fn at_ring_0<T>(mut work: impl FnMut() -> Result<T, Failed>) -> T {
    let mut result = None;
    ring0::call(&mut || result = Some(work()));
    match result {
        Some(Ok(value)) => value,
        Some(Err(failed)) => panic!("{failed}"),
        None => unreachable!("ring 0 was not called"),
    }
}

/// Enters VMX operation, and says what it offers.
fn switch_on(vcpu: usize) -> Result<Controls, Absent> {
    #[allow(unused_unsafe)] // To older compilers than today's it is unsafe.
    // SAFETY: every x86-64 CPU has CPUID.
    if unsafe { __cpuid(1) }.ecx >> 5 & 1 == 0 {
        return Err(Absent::Vmx);
    }
    at_ring_0(|| {
        // SAFETY: a CPU with VMX has these registers; the pages are in the system slot and for nothing else.
        unsafe {
            let control = read_msr(capability::FEATURE_CONTROL);
            match control & (LOCKED | VMXON_ALLOWED) {
                LOCKED => return Ok(Err(Absent::SwitchedOff)),
                0 | VMXON_ALLOWED => write_msr(capability::FEATURE_CONTROL, control | LOCKED | VMXON_ALLOWED),
                _ => {}
            }
            let controls = match capability::controls_here() {
                Ok(controls) => controls,
                Err(absent) => return Ok(Err(absent)),
            };
            let [_, _, cr4] = control_registers();
            write_cr4(cr4 | CR4_VMXE);
            // The revision, bit 31 clear (SDM 3C, 25.2).
            let revision = read_msr(capability::BASIC) as u32 & 0x7fff_ffff;
            for offset in [area::HOST_REGION, area::CONTROL_BLOCK] {
                let region = page(vcpu, offset);
                region.write_bytes(0, PAGE_SIZE as usize);
                region.cast::<[u8; 4]>().write(revision.to_le_bytes());
            }
            vmxon(vcpu_area(vcpu) + area::HOST_REGION)?;
            vmclear(vcpu_area(vcpu) + area::CONTROL_BLOCK)?;
            vmptrld(vcpu_area(vcpu) + area::CONTROL_BLOCK)?;
            Ok(Ok(controls))
        }
    })
}

/// Writes fields of the current VMCS.
///
/// # Safety
/// As [`vmwrite`].
unsafe fn write_all(fields: &[(Field, u64)]) -> Result<(), Failed> {
    // SAFETY: the caller's.
    fields.iter().try_for_each(|&(field, value)| unsafe { vmwrite(field, value) })
}

/// What an entry is to do beside loading L2: nothing is injected, no MSR is loaded.
///
/// # Safety
/// As [`vmwrite`].
unsafe fn write_controls(vcpu: usize, controls: &Controls, ept_pointer: u64) -> Result<(), Failed> {
    let ports = vcpu_area(vcpu) + area::IO_MAP;
    // SAFETY: the caller's.
    unsafe {
        write_all(&[
            (field::PIN_CONTROLS, controls.pin.into()),
            (field::PROCESSOR_CONTROLS, controls.processor.into()),
            (field::SECONDARY_CONTROLS, controls.secondary.into()),
            (field::EXIT_CONTROLS, controls.exit.into()),
            (field::ENTRY_CONTROLS, controls.entry.into()),
            (field::VPID, u64::from(controls.secondary & vmcs::secondary::VPID != 0)),
            (field::IO_BITMAP_A, ports),
            (field::IO_BITMAP_B, ports + PAGE_SIZE),
            (field::EPT_POINTER, ept_pointer),
            (field::LINK_POINTER, u64::MAX),
            (field::EXCEPTION_BITMAP, 0),
            (field::EXIT_MSR_STORES, 0),
            (field::EXIT_MSR_LOADS, 0),
            (field::ENTRY_MSR_LOADS, 0),
            (field::ENTRY_INTERRUPTION, 0),
        ])
    }
}

/// L2's state: ring 3 of 64-bit mode, as L1's own ring 3 is, on tables and a stack of its own.
///
/// # Safety
/// As [`vmwrite`].
unsafe fn write_guest(vcpu: usize, pml4: u64, [cr0, _, cr4]: [u64; 3]) -> Result<(), Failed> {
    let task = gdt::task(vcpu);
    let unusable = (0, 0, 0, rights::UNUSABLE);
    let code = (gdt::USER_CODE, 0, u32::MAX, rights::CODE);
    let data = (gdt::USER_DATA, 0, u32::MAX, rights::DATA);
    let busy = (task.selector, task.base, task.limit, rights::TASK);
    let segments: [(u16, u64, u32, u32); SEGMENTS] = [data, code, data, data, unusable, unusable, unusable, busy];
    // The same descriptors: the vectors' stubs report L2's exceptions as they report L1's.
    let tables = descriptor_tables();
    // SAFETY: the caller's.
    unsafe {
        for (index, (selector, base, limit, rights)) in segments.into_iter().enumerate() {
            write_all(&[
                (guest::SELECTORS.nth(index), selector.into()),
                (guest::BASES.nth(index), base),
                (guest::LIMITS.nth(index), limit.into()),
                (guest::RIGHTS.nth(index), rights.into()),
            ])?;
        }
        for (index, (base, limit)) in tables.into_iter().enumerate() {
            vmwrite(guest::BASES.nth(SEGMENTS + index), base)?;
            vmwrite(guest::LIMITS.nth(SEGMENTS + index), limit.into())?;
        }
        write_all(&[
            (guest::CR0, cr0),
            (guest::CR3, pml4),
            (guest::CR4, cr4),
            (guest::DR7, DR7),
            (guest::DEBUG_CONTROL, 0),
            (guest::INTERRUPTIBILITY, 0),
            (guest::ACTIVITY, 0),
            (guest::PENDING_DEBUG, 0),
            (guest::SYSENTER_CS, 0),
            (guest::SYSENTER_ESP, 0),
            (guest::SYSENTER_EIP, 0),
        ])?;
        write_begin(vcpu)
    }
}

/// L2 is at [`main`], on an empty stack.
///
/// # Safety
/// As [`vmwrite`].
unsafe fn write_begin(vcpu: usize) -> Result<(), Failed> {
    // SAFETY: the caller's.
    unsafe {
        write_all(&[
            (guest::RIP, main::<Vmx> as *const () as u64),
            // As a function finds it that was called: 8 below a multiple of 16.
            (guest::RSP, vcpu_area(vcpu) + area::L2_STACK_TOP - 8),
            (guest::RFLAGS, port::USER_FLAGS.into()),
        ])
    }
}

/// L1's state after an exit: ring 0, as now. RSP is written by each entry.
///
/// # Safety
/// As [`vmwrite`].
unsafe fn write_host(vcpu: usize, controls: [u64; 3]) -> Result<(), Failed> {
    let task = gdt::task(vcpu);
    let [(gdt_base, _), (idt_base, _)] = descriptor_tables();
    // ES, CS, SS, DS, FS, GS, TR: nothing in 64-bit mode looks at those that are null.
    let selectors = [0, gdt::KERNEL_CODE, 0, 0, 0, 0, task.selector];
    // FS, GS, TR, GDTR, IDTR, and SYSENTER's stack and instruction.
    let bases = [0, 0, task.base, gdt_base, idt_base, 0, 0];
    // SAFETY: the caller's.
    unsafe {
        for (index, selector) in selectors.into_iter().enumerate() {
            vmwrite(host::SELECTORS.nth(index), selector.into())?;
        }
        for (index, base) in bases.into_iter().enumerate() {
            vmwrite(host::BASES.nth(index), base)?;
        }
        for (index, value) in controls.into_iter().enumerate() {
            vmwrite(host::CR0.nth(index), value)?;
        }
        vmwrite(host::SYSENTER_CS, 0)?;
        vmwrite(host::RIP, world::left as *const () as u64)
    }
}

/// Base and limit of GDT and IDT.
fn descriptor_tables() -> [(u64, u16); 2] {
    let (gdt, idt) = (&gdt::GDT_POINTER, &idt::IDT_POINTER);
    [
        (core::ptr::from_ref(gdt.base).expose_provenance() as u64, gdt.limit),
        (core::ptr::from_ref(idt.base).expose_provenance() as u64, idt.limit),
    ]
}

/// Why L2 was left.
///
/// # Safety
/// At ring 0; L2 was entered and left.
unsafe fn exit() -> Result<Exit, Failed> {
    // SAFETY: the caller's. RIP moves behind VMCALL, whose length the processor gives.
    unsafe {
        let code = vmread(field::EXIT_REASON)?;
        Ok(match code {
            reason::VMCALL => {
                let length = vmread(field::INSTRUCTION_LENGTH)?;
                vmwrite(guest::RIP, vmread(guest::RIP)? + length)?;
                Exit::Hypercall
            }
            reason::EPT_VIOLATION | reason::EPT_MISCONFIGURATION => Exit::Violation(Violation {
                code,
                qualification: vmread(field::EXIT_QUALIFICATION)?,
                address: vmread(field::GUEST_PHYSICAL_ADDRESS)?,
            }),
            // No exception exits, so it is an NMI.
            reason::EXCEPTION | reason::INTERRUPT => Exit::Interrupted,
            code => {
                let failed = u64::from(code & reason::ENTRY_FAILED != 0);
                let information = [vmread(field::EXIT_QUALIFICATION)?, failed];
                Exit::Other { code: code & 0xffff, information, rip: vmread(guest::RIP)? }
            }
        })
    }
}

impl Extension for Vmx {
    type Absent = Absent;

    fn format(_: &Nested) -> Format {
        Format::EPT
    }

    fn new(vcpu: usize, tables: &Tables) -> Result<Self, Absent> {
        let Tables { pml4, root, nested, .. } = *tables;
        let controls = switch_on(vcpu)?;
        // SAFETY: two pages of this vCPU's area, which are for nothing else (layout.rs).
        unsafe {
            let ports = page(vcpu, area::IO_MAP);
            ports.write_bytes(0xff, 2 * PAGE_SIZE as usize);
            // A set bit exits (25.6.4); the doorbells' four are in one half of a byte.
            ports.add(usize::from(DOORBELL_PORT / 8)).write(!(0xf << (DOORBELL_PORT % 8)));
        }
        let unused = if nested.flags == Flags::Unused { ept::EPTP_ACCESSED_DIRTY } else { 0 };
        let ept_pointer = root | (controls.ept & !unused);
        at_ring_0(|| {
            // SAFETY: at ring 0, in VMX operation. L2 runs this program's code on this program's memory.
            unsafe {
                let registers = control_registers();
                write_controls(vcpu, &controls, ept_pointer)?;
                write_guest(vcpu, pml4, registers)?;
                write_host(vcpu, registers)
            }
        });
        Ok(Self { registers: Registers::new(), launched: false, ept_pointer, offered: controls.ept })
    }

    fn enter(&mut self) -> Left {
        let (exit, ticks) = at_ring_0(|| {
            // SAFETY: at ring 0; the VMCS was set up by `new`, and is the current one: each vCPU has one.
            unsafe {
                let entered = world::enter(&raw mut self.registers, self.launched.into());
                outcome(if self.launched { "vmresume" } else { "vmlaunch" }, self.ept_pointer, entered.flags)?;
                Ok((exit()?, entered.ticks))
            }
        });
        self.launched = true;
        Left { exit, ticks }
    }

    fn set_rax(&mut self, value: u64) {
        self.registers.rax = value;
    }

    fn restart(&mut self) {
        let index = vcpu::current();
        // SAFETY: at ring 0, in VMX operation since `new`; each vCPU has one VMCS.
        at_ring_0(|| unsafe { write_begin(index) });
    }

    fn use_flags(&mut self, on: bool) -> bool {
        let flags = if on { ept::EPTP_ACCESSED_DIRTY } else { 0 };
        if flags & !self.offered != 0 {
            return false;
        }
        self.ept_pointer = self.ept_pointer & !ept::EPTP_ACCESSED_DIRTY | flags;
        // SAFETY: at ring 0, in VMX operation since `new`; the same table, and bits that the CPU offers.
        at_ring_0(|| unsafe { vmwrite(field::EPT_POINTER, self.ept_pointer) });
        true
    }

    fn forget(&mut self) {
        // SAFETY: at ring 0, in VMX operation since `new`.
        at_ring_0(|| unsafe { invept_single_context(self.ept_pointer) });
    }

    unsafe fn hypercall() -> u64 {
        let value;
        // SAFETY: VMCALL always exits, and L1 changes RAX, nothing else.
        unsafe { core::arch::asm!("vmcall", out("rax") value) };
        value
    }
}
