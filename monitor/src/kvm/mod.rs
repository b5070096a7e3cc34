//! Everything that talks to /dev/kvm: capabilities, VM, vCPUs, memory, dirty log, dirty ring, statistics.

pub mod bus;
pub mod capabilities;
pub mod carry;
pub mod clock;
pub mod copies;
pub mod events;
pub mod exits;
pub mod fault_trace;
pub mod footprint;
pub(crate) mod ioctls;
pub mod log;
pub mod memory;
pub mod probes;
pub mod registers;
pub mod ring;
pub mod stats;
pub mod urgent;
pub mod vcpu;
pub mod vm;
pub mod witness;

pub use memory::Backing;
pub use vm::Vm;

use crate::failure::Failure;
use std::io;

/// What can go wrong between the monitor and KVM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// /dev/kvm is not there.
    #[error("/dev/kvm does not exist: this host offers no KVM (load kvm_intel or kvm_amd, or use `umbra lab`)")]
    NoDevice,
    /// /dev/kvm is there, but not for this user.
    #[error("/dev/kvm: permission denied (become root or join the group that owns it, or use `umbra lab`)")]
    Permission,
    /// A capability is missing.
    #[error("{capability} is missing here: {consequence}")]
    Capability {
        /// Its name in linux/kvm.h, or that of the kernel's feature.
        capability: &'static str,
        /// What does not work without it, and where it would.
        consequence: String,
    },
    /// A system call failed.
    #[error("{what} failed: {source}")]
    Call {
        /// The call and what it was for.
        what: &'static str,
        /// The error.
        source: io::Error,
    },
    /// Memory that the host cannot give.
    #[error("{0}")]
    Memory(String),
}

impl Error {
    pub(crate) fn call(what: &'static str, source: impl Into<io::Error>) -> Self {
        Self::Call { what, source: source.into() }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::NoDevice | Error::Permission | Error::Capability { .. } => Self::NotHere(error.to_string()),
            Error::Memory(_) => Self::Input(error.to_string()),
            Error::Call { .. } => Self::Check(error.to_string()),
        }
    }
}
