//! Strategies and the mechanisms that make them effective under a running L2.

use super::source::Kind;
use crate::kvm::{self, Error};
use kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
use kvm_ioctls::VmFd;
use std::fmt;
use umbra_mmu::track::{Strategy, strategy};

/// What makes a strategy effective.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    /// A closed leaf is mapped read-only.
    Mprotect,
    /// A closed leaf is write-protected by userfaultfd.
    UffdWp,
    /// KVM's log of L2's VM, which one call fetches and clears.
    KvmBitmap,
    /// The same with manual protection.
    KvmClear,
}

impl Mechanism {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Mprotect, Self::UffdWp, Self::KvmBitmap, Self::KvmClear];

    /// The name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mprotect => "mprotect",
            Self::UffdWp => "uffd-wp",
            Self::KvmBitmap => "kvm-bitmap",
            Self::KvmClear => "kvm-clear",
        }
    }

    /// Enables what it needs in L2's VM, before there are slots.
    ///
    /// # Errors
    /// [`Error::Capability`] where KVM lacks it.
    pub fn prepare(self, vm: &VmFd, source: Kind) -> Result<(), Error> {
        const NAME: &str = "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2";
        if !self.sources().contains(&source) {
            let [needed, ..] = self.sources() else { return Ok(()) };
            return Err(Error::Capability {
                capability: needed.capability(),
                consequence: format!("{} needs it to learn where L2 wrote (here: {source})", self.name()),
            });
        }
        if self == Self::KvmClear {
            return kvm::vm::enable(
                vm,
                KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                NAME,
                1,
                "kvm-clear needs Linux 5.2 or later",
            );
        }
        Ok(())
    }

    /// The fault sources that it works with, the cheapest first. `mprotect` has to be told where L2 wrote; `uffd-wp` is its own way to learn it.
    #[must_use]
    pub const fn sources(self) -> &'static [Kind] {
        match self {
            Self::Mprotect => &[Kind::Tracepoint],
            Self::UffdWp => &[Kind::Userfault],
            Self::KvmBitmap | Self::KvmClear => &Kind::ALL,
        }
    }
}

/// A strategy made effective.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Means {
    /// The strategy's name in umbra-mmu.
    pub strategy: &'static str,
    /// How.
    pub mechanism: Mechanism,
}

/// What fits together.
const FITTING: [(&str, &[Mechanism]); 4] = [
    ("write-protect", &[Mechanism::Mprotect, Mechanism::UffdWp]),
    ("lazy-huge", &[Mechanism::Mprotect, Mechanism::UffdWp]),
    ("log", &[Mechanism::KvmBitmap, Mechanism::KvmClear]),
    ("twin", &[Mechanism::Mprotect, Mechanism::UffdWp]),
];

impl Means {
    /// All that there are.
    pub fn all() -> impl Iterator<Item = Self> {
        FITTING
            .iter()
            .flat_map(|&(strategy, mechanisms)| mechanisms.iter().map(move |&mechanism| Self { strategy, mechanism }))
    }

    /// Whether writes are found by comparing bytes, so that a write of the bytes that were there may go unseen.
    #[must_use]
    pub fn compares(self) -> bool {
        strategy(self.strategy).is_some_and(Strategy::compares)
    }

    /// Whether KVM's log of L2's VM does the work; else the shadow MMU does.
    #[must_use]
    pub fn is_logged(self) -> bool {
        self.strategy == "log"
    }
}

impl fmt::Display for Means {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.strategy, self.mechanism.name())
    }
}
