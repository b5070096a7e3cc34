//! What this CPU's VMX can do: the capability MSRs (Intel SDM 3D, appendix A).

use super::Absent;
use super::vmcs::{ENTRY_TO_IA32E, EXIT_TO_64_BIT, pin, processor, secondary};
use crate::arch::privileged::read_msr;
use umbra_shared::paging::ept;

/// `IA32_FEATURE_CONTROL` (SDM 3C, 24.7).
pub const FEATURE_CONTROL: u32 = 0x3a;
/// `IA32_VMX_BASIC` (A.1).
pub const BASIC: u32 = 0x480;
/// The controls' registers, with those that allow more where bit 55 of `IA32_VMX_BASIC` is set (A.3 to A.5).
const PIN: [u32; 2] = [0x481, 0x48d];
const PROCESSOR: [u32; 2] = [0x482, 0x48e];
const EXIT: [u32; 2] = [0x483, 0x48f];
const ENTRY: [u32; 2] = [0x484, 0x490];
const SECONDARY: u32 = 0x48b;
/// `IA32_VMX_EPT_VPID_CAP` (A.10).
const EPT_VPID: u32 = 0x48c;

/// Bits of `IA32_VMX_EPT_VPID_CAP`.
mod ept_bit {
    pub const FOUR_LEVELS: u64 = 1 << 6;
    pub const WRITE_BACK: u64 = 1 << 14;
    pub const PAGES_2M: u64 = 1 << 16;
    pub const INVEPT: u64 = 1 << 20;
    pub const ACCESSED_DIRTY: u64 = 1 << 21;
    pub const INVEPT_SINGLE_CONTEXT: u64 = 1 << 25;
}

/// The controls that L2 runs under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Controls {
    pub pin: u32,
    pub processor: u32,
    pub secondary: u32,
    pub exit: u32,
    pub entry: u32,
    /// EPT pointer bits beside the root's address.
    pub ept: u64,
}

/// A control word with the bits `wanted` and those that must be set: the low half of its MSR are bits that must be set, the high half those
/// that may be (A.2).
const fn word(register: u32, capability: u64, wanted: u32) -> Result<u32, Absent> {
    let (must, may) = (capability as u32, (capability >> 32) as u32);
    if wanted & !may == 0 { Ok(must | wanted) } else { Err(Absent::Control { register, bits: wanted & !may }) }
}

/// The controls, from what `msr` says of the MSRs.
///
/// # Errors
/// What is missing.
pub fn controls(msr: impl Fn(u32) -> u64) -> Result<Controls, Absent> {
    let more = usize::from(msr(BASIC) >> 55 & 1 == 1);
    let word = |registers: [u32; 2], wanted| word(registers[more], msr(registers[more]), wanted);
    let pin = word(PIN, pin::INTERRUPTS | pin::NMI)?;
    let processor = word(PROCESSOR, processor::HLT | processor::IO_BITMAPS | processor::SECONDARY)?;
    let vpid = (msr(SECONDARY) >> 32) as u32 & secondary::VPID;
    let secondary = self::word(SECONDARY, msr(SECONDARY), secondary::EPT | vpid)?;
    let exit = word(EXIT, EXIT_TO_64_BIT)?;
    let entry = word(ENTRY, ENTRY_TO_IA32E)?;
    let has = msr(EPT_VPID);
    let needed = ept_bit::FOUR_LEVELS
        | ept_bit::WRITE_BACK
        | ept_bit::PAGES_2M
        | ept_bit::INVEPT
        | ept_bit::INVEPT_SINGLE_CONTEXT;
    if has & needed != needed {
        return Err(Absent::Ept(needed & !has));
    }
    // Bits 2:0 are the memory type of the tables: 6 is write-back.
    let accessed_dirty = if has & ept_bit::ACCESSED_DIRTY == 0 { 0 } else { ept::EPTP_ACCESSED_DIRTY };
    let ept = 6 | 3 << ept::EPTP_WALK_SHIFT | accessed_dirty;
    Ok(Controls { pin, processor, secondary, exit, entry, ept })
}

/// The same for this CPU.
///
/// # Safety
/// At ring 0 of a CPU that has VMX.
///
/// # Errors
/// What is missing.
pub unsafe fn controls_here() -> Result<Controls, Absent> {
    // SAFETY: the caller's. Which MSRs there are depends on others (A.3 to A.10): those of secondary controls and EPT need bits that KVM
    // and every CPU with EPT have.
    controls(|register| unsafe { read_msr(register) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A CPU whose default settings are those of appendix A.3 to A.5, and that may do everything.
    fn msr(register: u32) -> u64 {
        const ALL: u64 = 0xffff_ffff << 32;
        match register {
            BASIC => 1 << 55 | 0x1234,
            0x481 | 0x48d => ALL | 0x16,
            0x482 => ALL | 0x0401_e172,
            0x48e => ALL | 0x0400_6172,
            0x483 | 0x48f => ALL | 0x0003_6dfb,
            0x484 | 0x490 => ALL | 0x11fb,
            SECONDARY => ALL,
            EPT_VPID => 0x0f01_0633_4141,
            _ => unreachable!("{register:#x}"),
        }
    }

    #[test]
    fn controls_are_what_must_be_and_what_is_wanted() {
        let controls = controls(msr);
        // 0f01_0633_4141 has bits 0, 6, 8, 14, 16, 17, 20, 21, 25, 26.
        let expected = Controls {
            pin: 0x1f,
            processor: 0x8600_61f2,
            secondary: 0x22,
            exit: 0x0003_6ffb,
            entry: 0x13fb,
            ept: 0x5e,
        };
        assert_eq!(controls, Ok(expected));
    }

    #[test]
    fn what_a_cpu_lacks_is_named() {
        let with =
            |register: u32, value: u64| controls(move |asked| if asked == register { value } else { msr(asked) });
        assert_eq!(with(SECONDARY, 0), Err(Absent::Control { register: SECONDARY, bits: secondary::EPT }));
        assert_eq!(with(SECONDARY, 0x2 << 32).map(|controls| controls.secondary), Ok(secondary::EPT));
        assert_eq!(with(EPT_VPID, 0), Err(Absent::Ept(0x0211_4040)));
        let without_flags = msr(EPT_VPID) & !ept_bit::ACCESSED_DIRTY;
        assert_eq!(with(EPT_VPID, without_flags).map(|controls| controls.ept), Ok(0x1e));
        let no_bitmaps = 0xffff_ffff_0400_6172 & !(u64::from(processor::IO_BITMAPS) << 32);
        assert_eq!(with(0x48e, no_bitmaps), Err(Absent::Control { register: 0x48e, bits: processor::IO_BITMAPS }));
    }
}
