//! What this host's KVM offers.

use super::Error;
use super::vm::open;
use crate::host;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
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
    let missing =
        |capability, consequence: &str| Err(Error::Capability { capability, consequence: consequence.to_owned() });
    if super::vm::offered(&vm, 117) == 0 {
        return missing("KVM_CAP_X86_SMM", "guests have no system management mode");
    }
    if super::vm::offered(&vm, 118) < 2 {
        return missing("KVM_CAP_MULTI_ADDRESS_SPACE", "SMM has no view of memory of its own");
    }
    Ok(())
}

/// Whether a guest of this KVM can run guests of its own by SVM with nested paging.
///
/// # Errors
/// [`Error::Capability`] with what is missing first: the module, its parameter, the capability, or a bit of CPUID (AMD APM 3, E.4.2 and E.4.9).
pub fn nested_svm() -> Result<(), Error> {
    let missing =
        |capability, consequence: &str| Err(Error::Capability { capability, consequence: consequence.to_owned() });
    match host::parameter("kvm_amd", "nested").as_deref() {
        Some("1" | "Y") => {}
        Some(_) => return missing("kvm_amd.nested", "svm needs the module's parameter nested=1"),
        None => return missing("kvm_amd", "svm needs an AMD CPU and its KVM module"),
    }
    let kvm = open()?;
    if kvm.check_extension_raw(157) <= 0 {
        return missing("KVM_CAP_NESTED_STATE", "svm needs Linux 4.20 or later");
    }
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(super::vm::failed("KVM_GET_SUPPORTED_CPUID"))?;
    let leaf = |number| cpuid.as_slice().iter().find(|entry| entry.function == number);
    if leaf(0x8000_0001).is_none_or(|entry| entry.ecx >> 2 & 1 == 0) {
        return missing("SVM in CPUID", "KVM offers guests none here");
    }
    if leaf(0x8000_000a).is_none_or(|entry| entry.edx & 1 == 0) {
        return missing("nested paging in CPUID", "KVM offers guests none here (kvm_amd.npt=0?)");
    }
    Ok(())
}
