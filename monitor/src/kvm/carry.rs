//! A guest's state moves from a vCPU of one VM to one of another.

use super::Error;
use super::vm::failed;
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

/// The guest's clock goes with it (Intel SDM 4, table 2-2).
const MSR_IA32_TSC: u32 = 0x10;

/// Moves registers, FPU and TSC. The guest has no interrupt or exception pending: it stands behind an OUT.
///
/// # Errors
/// The system's.
pub fn carry(from: &mut VcpuFd, to: &VcpuFd) -> Result<(), Error> {
    finish_exit(from)?;
    to.set_sregs(&from.get_sregs().map_err(failed("KVM_GET_SREGS"))?).map_err(failed("KVM_SET_SREGS"))?;
    to.set_regs(&from.get_regs().map_err(failed("KVM_GET_REGS"))?).map_err(failed("KVM_SET_REGS"))?;
    to.set_fpu(&from.get_fpu().map_err(failed("KVM_GET_FPU"))?).map_err(failed("KVM_SET_FPU"))?;
    let wanted = kvm_msr_entry { index: MSR_IA32_TSC, ..kvm_msr_entry::default() };
    let mut tsc =
        Msrs::from_entries(&[wanted]).map_err(|_| Error::Memory("one register does not fit a list".into()))?;
    from.get_msrs(&mut tsc).map_err(failed("KVM_GET_MSRS"))?;
    to.set_msrs(&tsc).map_err(failed("KVM_SET_MSRS"))?;
    Ok(())
}

/// Lets KVM complete what the last exit was about, after which other registers can be loaded (Documentation/virt/kvm/api.rst, 5, "The `kvm_run`
/// structure": pending operations are completed by an entry with `immediate_exit`).
///
/// # Errors
/// The system's.
pub fn finish_exit(vcpu: &mut VcpuFd) -> Result<(), Error> {
    vcpu.set_kvm_immediate_exit(1);
    let left = vcpu.run().map(|_| ());
    vcpu.set_kvm_immediate_exit(0);
    match left {
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Ok(()),
        Err(error) => Err(failed("KVM_RUN, to finish an exit")(error)),
        Ok(()) => Err(Error::Memory("a vCPU that should have left at once ran".into())),
    }
}
