//! What this host's KVM offers.

use super::Error;
use super::vm::open;
use crate::host;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::Kvm;
use serde::Serialize;
use std::os::raw::c_ulong;

/// Capabilities that decide what Umbra can do here: number and name in include/uapi/linux/kvm.h.
const LIST: &[(c_ulong, &str, &str)] = &[
    (10, "KVM_CAP_NR_MEMSLOTS", "memory slots"),
    (66, "KVM_CAP_MAX_VCPUS", "vCPUs"),
    (117, "KVM_CAP_X86_SMM", "system management mode"),
    (118, "KVM_CAP_MULTI_ADDRESS_SPACE", "address spaces (2: SMM has its own)"),
    (157, "KVM_CAP_NESTED_STATE", "nested virtualization"),
    (168, "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", "manual dirty-log clearing (1), initially all set (2), or both (3)"),
    (192, "KVM_CAP_DIRTY_LOG_RING", "dirty ring, bytes"),
    (223, "KVM_CAP_DIRTY_LOG_RING_ACQ_REL", "dirty ring with acquire and release, bytes"),
    (203, "KVM_CAP_BINARY_STATS_FD", "statistics"),
    (232, "KVM_CAP_MEMORY_FAULT_INFO", "addresses of memory faults"),
    (236, "KVM_CAP_PRE_FAULT_MEMORY", "populating from userspace"),
];

/// One capability as this host answers.
#[derive(Clone, Debug, Serialize)]
pub struct Capability {
    /// Its name in linux/kvm.h.
    pub name: &'static str,
    /// What it gives.
    pub meaning: &'static str,
    /// 0 for none; else 1 or a number of its own.
    pub value: i32,
}

/// Asks for all of them.
///
/// # Errors
/// [`Error::NoDevice`] and [`Error::Permission`].
pub fn read() -> Result<Vec<Capability>, Error> {
    // Some are only known to a VM, not to /dev/kvm.
    let vm = open()?.create_vm().map_err(super::vm::failed("KVM_CREATE_VM"))?;
    Ok(LIST
        .iter()
        .map(|&(number, name, meaning)| Capability { name, meaning, value: vm.check_extension_raw(number).max(0) })
        .collect())
}

/// Whether guests of this KVM have system management mode, with a view of memory of its own.
///
/// # Errors
/// [`Error::Capability`].
pub fn smm() -> Result<(), Error> {
    let vm = open()?.create_vm().map_err(super::vm::failed("KVM_CREATE_VM"))?;
    if super::vm::offered(&vm, 117) == 0 {
        return Err(missing("KVM_CAP_X86_SMM", "guests have no system management mode".into()));
    }
    if super::vm::offered(&vm, 118) < 2 {
        return Err(missing("KVM_CAP_MULTI_ADDRESS_SPACE", "SMM has no view of memory of its own".into()));
    }
    Ok(())
}

/// What KVM says about guests' guests by one of the extensions.
struct Nested {
    /// Its module.
    module: &'static str,
    /// Of the extension: whose it is, and the way that needs it.
    vendor: &'static str,
    way: &'static str,
}

const SVM: Nested = Nested { module: "kvm_amd", vendor: "AMD", way: "svm" };
const VMX: Nested = Nested { module: "kvm_intel", vendor: "Intel", way: "vmx" };

fn missing(capability: &'static str, consequence: String) -> Error {
    Error::Capability { capability, consequence }
}

impl Nested {
    /// The module, its parameter and the capability; then KVM is open.
    fn open(&self) -> Result<Kvm, Error> {
        let Self { module, vendor, way } = *self;
        match host::parameter(module, "nested").as_deref() {
            Some("1" | "Y") => {}
            Some(_) => return Err(missing("nested=1", format!("{way} needs that parameter of {module}"))),
            None => return Err(missing(module, format!("{way} needs a CPU of {vendor}'s and its KVM module"))),
        }
        let kvm = open()?;
        if kvm.check_extension_raw(157) <= 0 {
            return Err(missing("KVM_CAP_NESTED_STATE", format!("{way} needs Linux 4.20 or later")));
        }
        Ok(kvm)
    }
}

fn cpuid(kvm: &Kvm) -> Result<CpuId, Error> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(super::vm::failed("KVM_GET_SUPPORTED_CPUID"))
}

fn leaf(cpuid: &CpuId, number: u32) -> Option<&kvm_cpuid_entry2> {
    cpuid.as_slice().iter().find(|entry| entry.function == number)
}

/// Bits of a guest's physical address (CPUID 80000008h). Without the leaf a processor has 36.
fn address_bits(cpuid: &CpuId) -> u8 {
    leaf(cpuid, 0x8000_0008).map_or(36, |entry| entry.eax.to_le_bytes()[0])
}

/// What KVM offers to a guest that runs guests of its own by SVM with nested paging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NestedNpt {
    /// Bits of a physical address.
    pub address_bits: u8,
    /// Leaves of 1 GiB (CPUID 80000001h, EDX bit 26).
    pub giant_pages: bool,
}

/// Whether a guest of this KVM can run guests of its own by SVM with nested paging, and what it is offered.
///
/// # Errors
/// [`Error::Capability`] with what is missing first: the module, its parameter, the capability, or a bit of CPUID (AMD APM 3, E.4.2 and E.4.9).
pub fn nested_svm() -> Result<NestedNpt, Error> {
    let cpuid = cpuid(&SVM.open()?)?;
    let Some(extended) = leaf(&cpuid, 0x8000_0001).filter(|entry| entry.ecx >> 2 & 1 == 1) else {
        return Err(missing("SVM in CPUID", "KVM offers guests none here".to_owned()));
    };
    if leaf(&cpuid, 0x8000_000a).is_none_or(|entry| entry.edx & 1 == 0) {
        return Err(missing("nested paging in CPUID", "KVM offers guests none here (kvm_amd.npt=0?)".to_owned()));
    }
    Ok(NestedNpt { address_bits: address_bits(&cpuid), giant_pages: extended.edx >> 26 & 1 == 1 })
}

/// What KVM offers to a guest that runs guests of its own by VMX with extended page tables (Intel SDM 3D, A.10; 2A, CPUID).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NestedEpt {
    /// Bits of a physical address.
    pub address_bits: u8,
    /// Entries may permit execution alone.
    pub execute_only: bool,
    /// Leaves of 1 GiB.
    pub giant_pages: bool,
    /// Accessed and dirty flags.
    pub accessed_dirty: bool,
}

/// One of the MSRs that say what KVM offers, 0 where it has none.
fn feature_msr(kvm: &Kvm, index: u32) -> Result<u64, Error> {
    let entry = kvm_msr_entry { index, ..kvm_msr_entry::default() };
    // One entry always fits.
    let mut msrs = Msrs::from_entries(&[entry]).map_err(|_| missing("KVM_GET_MSRS", "no room".to_owned()))?;
    let read = kvm.get_msrs(&mut msrs).map_err(super::vm::failed("KVM_GET_MSRS"))?;
    Ok(msrs.as_slice().first().filter(|_| read == 1).map_or(0, |entry| entry.data))
}

/// Whether a guest of this KVM can run guests of its own by VMX with extended page tables, and what it is offered.
///
/// # Errors
/// [`Error::Capability`] with what is missing first: the module, its parameter, the capability, the bit of CPUID (Intel SDM 2A, CPUID), or EPT among
/// the controls (SDM 3D, A.3.3).
pub fn nested_vmx() -> Result<NestedEpt, Error> {
    const IA32_VMX_PROCBASED_CTLS2: u32 = 0x48b;
    const IA32_VMX_EPT_VPID_CAP: u32 = 0x48c;
    let kvm = VMX.open()?;
    let cpuid = cpuid(&kvm)?;
    if leaf(&cpuid, 1).is_none_or(|entry| entry.ecx >> 5 & 1 == 0) {
        return Err(missing("VMX in CPUID", "KVM offers guests none here".to_owned()));
    }
    // The high half of the register are controls that may be set; enabling EPT is the second of them.
    if feature_msr(&kvm, IA32_VMX_PROCBASED_CTLS2)? >> 33 & 1 == 0 {
        return Err(missing("nested EPT", "KVM offers guests none here (kvm_intel.ept=0?)".to_owned()));
    }
    let offered = feature_msr(&kvm, IA32_VMX_EPT_VPID_CAP)?;
    let bit = |bit: u32| offered >> bit & 1 == 1;
    Ok(NestedEpt {
        address_bits: address_bits(&cpuid),
        execute_only: bit(0),
        giant_pages: bit(17),
        accessed_dirty: bit(21),
    })
}
