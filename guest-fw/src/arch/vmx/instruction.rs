//! VMX instructions, and what they say when they fail (Intel SDM 3C, 31.2 to 31.4).

use super::vmcs::{Field, field};
use core::fmt;

/// A VMX instruction that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed {
    instruction: &'static str,
    /// A field's encoding or an address.
    operand: u64,
    why: Why,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// CF: `VMfailInvalid`. There is no current VMCS that could hold an error number.
    Invalid,
    /// ZF: `VMfailValid`, with the VM-instruction error.
    Valid(u64),
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { instruction, operand, why } = self;
        match why {
            Why::Invalid => write!(f, "{instruction} {operand:#x} failed, and there is no current VMCS (CF)"),
            Why::Valid(number) => {
                write!(f, "{instruction} {operand:#x} failed: VM-instruction error {number}, {}", meaning(*number))
            }
        }
    }
}

/// 31.4, in short.
const fn meaning(error: u64) -> &'static str {
    match error {
        1 => "VMCALL in root operation",
        2 => "VMCLEAR of a bad address",
        3 => "VMCLEAR of the VMXON region",
        4 => "VMLAUNCH of a VMCS that is not clear",
        5 => "VMRESUME of a VMCS that was not launched",
        6 => "VMRESUME after VMXOFF",
        7 => "a control field is wrong",
        8 => "a host-state field is wrong",
        9 => "VMPTRLD of a bad address",
        10 => "VMPTRLD of the VMXON region",
        11 => "VMPTRLD of another revision",
        12 => "no such VMCS field",
        13 => "a read-only VMCS field",
        15 => "VMXON in root operation",
        16 => "the executive VMCS is wrong",
        17 => "the executive VMCS was not launched",
        18 => "not the VMXON pointer",
        19 => "VMCALL with a VMCS that is not clear",
        20 => "VMCALL with wrong exit controls",
        22 => "VMCALL with another MSEG revision",
        23 => "VMXOFF under dual-monitor treatment",
        24 => "VMCALL with wrong SMM features",
        25 => "wrong execution controls when returning from SMM",
        26 => "events are blocked by MOV SS",
        28 => "a bad operand of INVEPT or INVVPID",
        _ => "a number that the manual does not have",
    }
}

/// What the flags after an instruction say: CF is bit 0, ZF bit 6.
///
/// # Safety
/// At ring 0, in VMX operation, if the flags say that it failed.
pub unsafe fn outcome(instruction: &'static str, operand: u64, flags: u64) -> Result<(), Failed> {
    let why = match (flags & 1 != 0, flags >> 6 & 1 != 0) {
        (false, false) => return Ok(()),
        (true, _) => Why::Invalid,
        (false, true) => {
            let error: u64;
            // SAFETY: VMfailValid means that there is a current VMCS; the field exists in each.
            unsafe {
                core::arch::asm!("vmread {}, {}", out(reg) error, in(reg) u64::from(field::INSTRUCTION_ERROR.0), options(nostack));
            }
            Why::Valid(error)
        }
    };
    Err(Failed { instruction, operand, why })
}

/// An instruction whose operand is a physical address in memory.
macro_rules! with_address {
    ($name:ident, $mnemonic:literal, $text:literal) => {
        #[doc = $text]
        ///
        /// # Safety
        /// At ring 0 with CR4.VMXE set; the page at `address` is for nothing else.
        ///
        /// # Errors
        /// As the processor says.
        pub unsafe fn $name(address: u64) -> Result<(), Failed> {
            let flags: u64;
            // SAFETY: the caller's.
            unsafe {
                core::arch::asm!(concat!($mnemonic, " [{}]\npushfq\npop {}"), in(reg) &raw const address, lateout(reg) flags);
                outcome($mnemonic, address, flags)
            }
        }
    };
}

with_address!(vmxon, "vmxon", "Enters VMX operation with the VMXON region at `address`.");
with_address!(vmclear, "vmclear", "Makes the VMCS at `address` clear.");
with_address!(vmptrld, "vmptrld", "Makes the VMCS at `address` the current one.");

/// Writes a field of the current VMCS.
///
/// # Safety
/// At ring 0, in VMX operation; an entry with that value does no harm.
///
/// # Errors
/// As the processor says.
pub unsafe fn vmwrite(field: Field, value: u64) -> Result<(), Failed> {
    let flags: u64;
    let encoding = u64::from(field.0);
    // SAFETY: the caller's.
    unsafe {
        core::arch::asm!("vmwrite {}, {}\npushfq\npop {}", in(reg) encoding, in(reg) value, lateout(reg) flags);
        outcome("vmwrite", encoding, flags)
    }
}

/// Reads a field of the current VMCS.
///
/// # Safety
/// At ring 0, in VMX operation.
///
/// # Errors
/// As the processor says.
pub unsafe fn vmread(field: Field) -> Result<u64, Failed> {
    let (value, flags): (u64, u64);
    let encoding = u64::from(field.0);
    // SAFETY: the caller's.
    unsafe {
        core::arch::asm!("vmread {}, {}\npushfq\npop {}", out(reg) value, in(reg) encoding, lateout(reg) flags);
        outcome("vmread", encoding, flags)?;
    }
    Ok(value)
}

/// Forgets the translations that were made by the tables of one EPT pointer (SDM 3C, 29.4.3).
///
/// # Safety
/// At ring 0, in VMX operation.
///
/// # Errors
/// As the processor says.
pub unsafe fn invept_single_context(ept_pointer: u64) -> Result<(), Failed> {
    const SINGLE_CONTEXT: u64 = 1;
    let descriptor = [ept_pointer, 0];
    let flags: u64;
    // SAFETY: the caller's.
    unsafe {
        core::arch::asm!("invept {}, [{}]\npushfq\npop {}", in(reg) SINGLE_CONTEXT, in(reg) &raw const descriptor, lateout(reg) flags);
        outcome("invept", ept_pointer, flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_its_instruction_operand_and_error() {
        let failed = Failed { instruction: "vmwrite", operand: 0x6c14, why: Why::Valid(12) };
        assert_eq!(failed.to_string(), "vmwrite 0x6c14 failed: VM-instruction error 12, no such VMCS field");
        // SAFETY: these flags need no VMREAD.
        let outcome = |flags| unsafe { outcome("vmxon", 0x1000, flags) };
        assert_eq!(outcome(0x2), Ok(()));
        assert_eq!(outcome(0x3).unwrap_err().to_string(), "vmxon 0x1000 failed, and there is no current VMCS (CF)");
    }
}
