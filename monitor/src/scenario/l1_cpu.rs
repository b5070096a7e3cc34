//! L1's processor and its table, in the shadow MMU's words: what whoever runs L2 offers L1, and so what an entry means.

use crate::kvm;
use crate::kvm::capabilities::{self, NestedEpt, NestedNpt};
use umbra_mmu::Format;
use umbra_mmu::guest::GuestCaps;
use umbra_shared::PAGE_SIZE;
use umbra_shared::control::Exit;
use umbra_shared::nested::{self, Flags, Nested, Way};

/// SVM's exit code of a nested page fault (APM 2, appendix C).
pub const NESTED_PAGE_FAULT: u64 = 0x400;
/// VMX's basic exit reasons (SDM 3D, appendix C).
pub const EPT_VIOLATION: u64 = 48;
pub const EPT_MISCONFIGURATION: u64 = 49;

impl From<NestedEpt> for GuestCaps {
    fn from(offered: NestedEpt) -> Self {
        let NestedEpt { address_bits, execute_only, giant_pages, .. } = offered;
        Self { address_bits, execute_only, giant_pages }
    }
}

impl From<NestedNpt> for GuestCaps {
    fn from(offered: NestedNpt) -> Self {
        let NestedNpt { address_bits, giant_pages } = offered;
        Self { address_bits, giant_pages, ..Self::default() }
    }
}

/// What L1's processor can do where L2 runs by `way`.
///
/// # Errors
/// [`kvm::Error::Capability`] where this host has no such way.
pub fn caps_of(way: Way) -> Result<GuestCaps, kvm::Error> {
    Ok(match way {
        Way::Svm => capabilities::nested_svm()?.into(),
        Way::Vmx => capabilities::nested_vmx()?.into(),
        Way::Umbra | Way::Plain => GuestCaps::default(),
    })
}

/// The code by which L1 is told of a violation, and to how many bytes the address is known. Umbra's fault sources know the page of an access, not always
/// the byte.
#[must_use]
pub const fn violation(way: Way) -> (u64, u64) {
    match way {
        Way::Svm => (NESTED_PAGE_FAULT, 1),
        Way::Vmx => (EPT_VIOLATION, 1),
        Way::Umbra | Way::Plain => (Exit::Violation as u64, PAGE_SIZE),
    }
}

/// The format of L1's table.
pub fn format_of(nested: &Nested) -> Format {
    match nested.format {
        nested::Format::Ept => Format::Ept { five_levels: false, accessed_dirty: nested.flags != Flags::Unused },
        _ => Format::Npt { five_levels: false, nx: true },
    }
}
