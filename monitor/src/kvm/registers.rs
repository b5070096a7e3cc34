//! A vCPU's state in 64-bit mode: what the firmware expects where it begins, as L1 and as L2.

use super::Error;
use super::vm::failed;
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

const CR0_PE_MP_ET_NE_PG: u64 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 31;
const CR4_PAE_OSFXSR_OSXMMEXCPT: u64 = 1 << 5 | 1 << 9 | 1 << 10;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;

/// A descriptor table, or a segment in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Its linear address.
    pub base: u64,
    /// Its last byte's offset.
    pub limit: u32,
}

/// 64-bit mode: Intel SDM 3A, 9.8.5, with flat segments.
#[derive(Clone, Copy, Debug)]
pub struct LongMode {
    /// The page tables.
    pub cr3: u64,
    /// The privilege level, 0 to 3.
    pub ring: u8,
    /// Selectors of code, data and task.
    pub selectors: [u16; 3],
    /// The TSS.
    pub task: Table,
    /// The GDT, if it is loaded already.
    pub gdt: Option<Table>,
    /// The IDT, if it is loaded already.
    pub idt: Option<Table>,
    /// Where it goes on, and with what.
    pub registers: kvm_regs,
}

impl LongMode {
    /// Puts `vcpu` into this state.
    ///
    /// # Errors
    /// The system's: KVM refuses what no processor could be in.
    pub fn load(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let [code, data, task] = self.selectors;
        let code = kvm_segment {
            limit: 0xffff_ffff,
            selector: code,
            // Execute, read, accessed.
            type_: 0xb,
            present: 1,
            dpl: self.ring,
            s: 1,
            l: 1,
            g: 1,
            ..kvm_segment::default()
        };
        // Read, write, accessed.
        let data = kvm_segment { selector: data, type_: 0x3, l: 0, db: 1, ..code };
        // A busy 64-bit TSS: VMX refuses to enter without one (SDM 3C, 26.3.1.2).
        let task = kvm_segment {
            base: self.task.base,
            limit: self.task.limit,
            selector: task,
            type_: 0xb,
            present: 1,
            ..kvm_segment::default()
        };
        let table = |table: Table| kvm_dtable {
            base: table.base,
            limit: u16::try_from(table.limit).unwrap_or(u16::MAX),
            ..kvm_dtable::default()
        };
        let mut special = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        special.cs = code;
        (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
        special.tr = task;
        if let Some(gdt) = self.gdt {
            special.gdt = table(gdt);
        }
        if let Some(idt) = self.idt {
            special.idt = table(idt);
        }
        special.cr0 = CR0_PE_MP_ET_NE_PG;
        special.cr3 = self.cr3;
        special.cr4 = CR4_PAE_OSFXSR_OSXMMEXCPT;
        special.efer = EFER_LME_LMA;
        vcpu.set_sregs(&special).map_err(failed("KVM_SET_SREGS"))?;
        vcpu.set_regs(&self.registers).map_err(failed("KVM_SET_REGS"))
    }
}
