//! The virtual-machine control structure: names of its fields (Intel SDM 3D, appendix B) and bits of its controls (3C, 25.6 to 25.8). Only what
//! L1 uses has a name.

/// A field's encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field(pub u32);

/// Fields of the control areas and of the exit information.
pub mod field {
    use super::Field;

    /// The virtual-processor identifier; 0 is the host's.
    pub const VPID: Field = Field(0x0000);
    /// Physical address of I/O bitmap A: ports 0 to 7fffh.
    pub const IO_BITMAP_A: Field = Field(0x2000);
    /// Physical address of I/O bitmap B: the others.
    pub const IO_BITMAP_B: Field = Field(0x2002);
    /// The EPT pointer (25.6.11).
    pub const EPT_POINTER: Field = Field(0x201a);
    /// The physical address whose access made an EPT violation or misconfiguration.
    pub const GUEST_PHYSICAL_ADDRESS: Field = Field(0x2400);
    /// All ones: no VMCS shadowing.
    pub const LINK_POINTER: Field = Field(0x2800);
    /// Pin-based controls.
    pub const PIN_CONTROLS: Field = Field(0x4000);
    /// Primary processor-based controls.
    pub const PROCESSOR_CONTROLS: Field = Field(0x4002);
    /// Exceptions that exit, a bit each.
    pub const EXCEPTION_BITMAP: Field = Field(0x4004);
    /// VM-exit controls.
    pub const EXIT_CONTROLS: Field = Field(0x400c);
    /// MSRs to store at an exit.
    pub const EXIT_MSR_STORES: Field = Field(0x400e);
    /// MSRs to load at an exit.
    pub const EXIT_MSR_LOADS: Field = Field(0x4010);
    /// VM-entry controls.
    pub const ENTRY_CONTROLS: Field = Field(0x4012);
    /// MSRs to load at an entry.
    pub const ENTRY_MSR_LOADS: Field = Field(0x4014);
    /// An event to inject at an entry.
    pub const ENTRY_INTERRUPTION: Field = Field(0x4016);
    /// Secondary processor-based controls.
    pub const SECONDARY_CONTROLS: Field = Field(0x401e);
    /// Why the last VMX instruction failed (31.4).
    pub const INSTRUCTION_ERROR: Field = Field(0x4400);
    /// Why L2 was left.
    pub const EXIT_REASON: Field = Field(0x4402);
    /// Bytes of the instruction that exited.
    pub const INSTRUCTION_LENGTH: Field = Field(0x440c);
    /// More about the exit.
    pub const EXIT_QUALIFICATION: Field = Field(0x6400);
}

/// Fields of the guest-state area.
pub mod guest {
    use super::Field;

    /// Selector of ES; CS, SS, DS, FS, GS, LDTR and TR follow, 2 apart, as in the next three.
    pub const SELECTORS: Field = Field(0x0800);
    /// Limits: ES and so on to TR, then GDTR and IDTR.
    pub const LIMITS: Field = Field(0x4800);
    /// Access rights: ES and so on to TR.
    pub const RIGHTS: Field = Field(0x4814);
    /// Bases: ES and so on to TR, then GDTR and IDTR.
    pub const BASES: Field = Field(0x6806);
    /// `IA32_DEBUGCTL`.
    pub const DEBUG_CONTROL: Field = Field(0x2802);
    /// Blocking by STI, MOV SS and so on.
    pub const INTERRUPTIBILITY: Field = Field(0x4824);
    /// Active, halted, shut down or waiting.
    pub const ACTIVITY: Field = Field(0x4826);
    /// `IA32_SYSENTER_CS`.
    pub const SYSENTER_CS: Field = Field(0x482a);
    /// CR0.
    pub const CR0: Field = Field(0x6800);
    /// CR3.
    pub const CR3: Field = Field(0x6802);
    /// CR4.
    pub const CR4: Field = Field(0x6804);
    /// DR7.
    pub const DR7: Field = Field(0x681a);
    /// RSP.
    pub const RSP: Field = Field(0x681c);
    /// RIP.
    pub const RIP: Field = Field(0x681e);
    /// RFLAGS.
    pub const RFLAGS: Field = Field(0x6820);
    /// Debug exceptions that are pending.
    pub const PENDING_DEBUG: Field = Field(0x6822);
    /// `IA32_SYSENTER_ESP`; `IA32_SYSENTER_EIP` follows.
    pub const SYSENTER_ESP: Field = Field(0x6824);
    /// `IA32_SYSENTER_EIP`.
    pub const SYSENTER_EIP: Field = Field(0x6826);
}

/// Fields of the host-state area.
pub mod host {
    use super::Field;

    /// Selector of ES; CS, SS, DS, FS, GS and TR follow, 2 apart.
    pub const SELECTORS: Field = Field(0x0c00);
    /// `IA32_SYSENTER_CS`.
    pub const SYSENTER_CS: Field = Field(0x4c00);
    /// CR0; CR3 and CR4 follow, 2 apart.
    pub const CR0: Field = Field(0x6c00);
    /// Base of FS; those of GS, TR, GDTR and IDTR, `IA32_SYSENTER_ESP` and `IA32_SYSENTER_EIP` follow, 2 apart.
    pub const BASES: Field = Field(0x6c06);
    /// RSP.
    pub const RSP: Field = Field(0x6c14);
    /// RIP.
    pub const RIP: Field = Field(0x6c16);
}

impl Field {
    /// The field `index` places further on in a list whose members are 2 apart.
    pub const fn nth(self, index: usize) -> Self {
        Self(self.0 + 2 * index as u32)
    }
}

/// Access rights of a segment register (25.4.1): a descriptor's bits 47:40 in bits 7:0, bits 55:52 in bits 15:12.
pub mod rights {
    /// Ring 3's 64-bit code: execute, read, accessed; S, DPL 3, P; L, G.
    pub const CODE: u32 = 0xa0fb;
    /// Ring 3's data: read, write, accessed; S, DPL 3, P; D, G.
    pub const DATA: u32 = 0xc0f3;
    /// A busy 64-bit TSS, present.
    pub const TASK: u32 = 0x8b;
    /// The register is not usable.
    pub const UNUSABLE: u32 = 1 << 16;
}

/// Pin-based controls (25.6.1).
pub mod pin {
    /// Interrupts exit.
    pub const INTERRUPTS: u32 = 1 << 0;
    /// NMIs exit.
    pub const NMI: u32 = 1 << 3;
}

/// Primary processor-based controls (25.6.2).
pub mod processor {
    /// HLT exits.
    pub const HLT: u32 = 1 << 7;
    /// Ports exit as the bitmaps say.
    pub const IO_BITMAPS: u32 = 1 << 25;
    /// There are secondary controls.
    pub const SECONDARY: u32 = 1 << 31;
}

/// Secondary processor-based controls (25.6.2).
pub mod secondary {
    /// Extended page tables.
    pub const EPT: u32 = 1 << 1;
    /// L2's translations have an identifier, and survive entries and exits.
    pub const VPID: u32 = 1 << 5;
}

/// VM-exit controls (25.7.1): the host is in 64-bit mode.
pub const EXIT_TO_64_BIT: u32 = 1 << 9;
/// VM-entry controls (25.8.1): L2 is in IA-32e mode.
pub const ENTRY_TO_IA32E: u32 = 1 << 9;

/// Basic exit reasons (appendix C).
pub mod reason {
    /// An exception, or an NMI.
    pub const EXCEPTION: u64 = 0;
    /// An interrupt.
    pub const INTERRUPT: u64 = 1;
    /// VMCALL.
    pub const VMCALL: u64 = 18;
    /// An EPT violation.
    pub const EPT_VIOLATION: u64 = 48;
    /// An EPT misconfiguration.
    pub const EPT_MISCONFIGURATION: u64 = 49;
    /// Set beside the reason when it is an entry that failed (27.8).
    pub const ENTRY_FAILED: u64 = 1 << 31;
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86_64::structures::gdt::DescriptorFlags;

    /// Appendix B: bits 11:10 are the type (0 control, 1 exit information, 2 guest, 3 host), 14:13 the width (0: 16 bits, 1: 64, 2: 32, 3:
    /// natural), 9:1 the index.
    fn encoding(kind: u32, width: u32, index: u32) -> Field {
        Field(width << 13 | kind << 10 | index << 1)
    }

    #[test]
    fn fields_are_encoded_as_the_manual_says() {
        const CONTROL: u32 = 0;
        const EXIT: u32 = 1;
        const GUEST: u32 = 2;
        const HOST: u32 = 3;
        for (found, kind, width, index) in [
            (field::VPID, CONTROL, 0, 0),
            (field::IO_BITMAP_A, CONTROL, 1, 0),
            (field::IO_BITMAP_B, CONTROL, 1, 1),
            (field::EPT_POINTER, CONTROL, 1, 13),
            (field::GUEST_PHYSICAL_ADDRESS, EXIT, 1, 0),
            (field::LINK_POINTER, GUEST, 1, 0),
            (field::PIN_CONTROLS, CONTROL, 2, 0),
            (field::PROCESSOR_CONTROLS, CONTROL, 2, 1),
            (field::EXCEPTION_BITMAP, CONTROL, 2, 2),
            (field::EXIT_CONTROLS, CONTROL, 2, 6),
            (field::EXIT_MSR_STORES, CONTROL, 2, 7),
            (field::EXIT_MSR_LOADS, CONTROL, 2, 8),
            (field::ENTRY_CONTROLS, CONTROL, 2, 9),
            (field::ENTRY_MSR_LOADS, CONTROL, 2, 10),
            (field::ENTRY_INTERRUPTION, CONTROL, 2, 11),
            (field::SECONDARY_CONTROLS, CONTROL, 2, 15),
            (field::INSTRUCTION_ERROR, EXIT, 2, 0),
            (field::EXIT_REASON, EXIT, 2, 1),
            (field::INSTRUCTION_LENGTH, EXIT, 2, 6),
            (field::EXIT_QUALIFICATION, EXIT, 3, 0),
            (guest::SELECTORS.nth(7), GUEST, 0, 7),
            (guest::LIMITS, GUEST, 2, 0),
            (guest::LIMITS.nth(9), GUEST, 2, 9),
            (guest::RIGHTS, GUEST, 2, 10),
            (guest::INTERRUPTIBILITY, GUEST, 2, 18),
            (guest::ACTIVITY, GUEST, 2, 19),
            (guest::SYSENTER_CS, GUEST, 2, 21),
            (guest::DEBUG_CONTROL, GUEST, 1, 1),
            (guest::CR0, GUEST, 3, 0),
            (guest::CR3, GUEST, 3, 1),
            (guest::CR4, GUEST, 3, 2),
            (guest::BASES, GUEST, 3, 3),
            (guest::BASES.nth(9), GUEST, 3, 12),
            (guest::DR7, GUEST, 3, 13),
            (guest::RSP, GUEST, 3, 14),
            (guest::RIP, GUEST, 3, 15),
            (guest::RFLAGS, GUEST, 3, 16),
            (guest::PENDING_DEBUG, GUEST, 3, 17),
            (guest::SYSENTER_ESP, GUEST, 3, 18),
            (guest::SYSENTER_EIP, GUEST, 3, 19),
            (host::SELECTORS.nth(6), HOST, 0, 6),
            (host::SYSENTER_CS, HOST, 2, 0),
            (host::CR0.nth(2), HOST, 3, 2),
            (host::BASES, HOST, 3, 3),
            (host::BASES.nth(6), HOST, 3, 9),
            (host::RSP, HOST, 3, 10),
            (host::RIP, HOST, 3, 11),
        ] {
            assert_eq!(found, encoding(kind, width, index), "{found:x?}");
        }
    }

    /// Bits 47:40 and 55:52 of a descriptor.
    fn of_descriptor(descriptor: DescriptorFlags) -> u32 {
        u32::try_from(descriptor.bits() >> 40 & 0xf0ff).unwrap()
    }

    #[test]
    fn rights_are_those_of_the_descriptors() {
        assert_eq!(of_descriptor(DescriptorFlags::USER_CODE64), rights::CODE);
        assert_eq!(of_descriptor(DescriptorFlags::USER_DATA), rights::DATA);
    }
}
