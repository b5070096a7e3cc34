//! What this host's KVM offers.

use super::Error;
use super::vm::open;
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
