//! The firmware as a guest: loading it, booting it, giving it commands and reading what it reports.

pub mod image;
pub mod machine;
pub mod plan;
pub mod smis;

pub use image::Image;
pub use machine::Machine;
pub use plan::Plan;

use crate::{Failure, kvm};
use std::time::Duration;

/// What can go wrong between the monitor and its guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The firmware file is not one.
    #[error("--firmware {name}: {reason}")]
    Image {
        /// The file.
        name: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// The guest broke.
    #[error("the guest broke on vCPU {vcpu}: {what}")]
    Broken {
        /// Which vCPU.
        vcpu: usize,
        /// What happened, and where.
        what: String,
    },
    /// The monitor could not go on with the guest.
    #[error("vCPU {vcpu} cannot go on: {what}")]
    Failed {
        /// Which vCPU.
        vcpu: usize,
        /// What failed, and where the guest was.
        what: String,
    },
    /// The guest said nothing for too long.
    #[error("vCPU {vcpu} said nothing for {} s during {command}; it was at {place}", after.as_secs_f64())]
    Silent {
        /// Which vCPU.
        vcpu: usize,
        /// How long the monitor waited.
        after: Duration,
        /// What it had been told to do.
        command: &'static str,
        /// The symbol at RIP.
        place: String,
    },
    /// The guest's vCPU lacks what it was asked for.
    #[error("{0}")]
    NotHere(String),
    /// The guest's memory does not fit.
    #[error("--memory: {0}")]
    Memory(String),
    /// KVM failed.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Kvm(error) => error.into(),
            Error::NotHere(what) => Self::NotHere(what),
            Error::Image { .. } | Error::Memory(_) => Self::Input(error.to_string()),
            Error::Broken { .. } | Error::Failed { .. } | Error::Silent { .. } => Self::Check(error.to_string()),
        }
    }
}
