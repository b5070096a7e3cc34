//! On what ground a scenario runs, and by which clock.

use serde::{Deserialize, Serialize};

/// The clock that phases are measured by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Clock {
    /// The lab's instruction clock: one TSC tick is one executed instruction.
    Instructions,
    /// `CLOCK_MONOTONIC`, in nanoseconds.
    Nanoseconds,
}

impl Clock {
    /// The unit's name in tables and Records.
    #[must_use]
    pub const fn unit(self) -> &'static str {
        match self {
            Self::Instructions => "instructions",
            Self::Nanoseconds => "nanoseconds",
        }
    }
}

/// Where this process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ground {
    /// On a machine with a /dev/kvm of its own.
    Kvm,
    /// Inside the lab, as PID 1.
    Lab(Clock),
}

impl Ground {
    /// The clock that phases are measured by here.
    #[must_use]
    pub const fn clock(self) -> Clock {
        match self {
            Self::Kvm => Clock::Nanoseconds,
            Self::Lab(clock) => clock,
        }
    }

    /// The Record's `host.ground`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Lab(_) => "lab",
        }
    }
}
