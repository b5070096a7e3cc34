//! Strategies and the mechanisms that make them effective under a running L2.

use super::source::Kind;
use super::watch::Watch;
use crate::kvm::ring::DEFAULT_ENTRIES;
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
    /// KVM's dirty rings of L2's vCPUs.
    KvmRing,
    /// Asynchronous write protection by userfaultfd, and `PAGEMAP_SCAN`.
    Pagemap,
}

impl Mechanism {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Mprotect, Self::UffdWp, Self::KvmBitmap, Self::KvmClear, Self::KvmRing, Self::Pagemap];

    /// The name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mprotect => "mprotect",
            Self::UffdWp => "uffd-wp",
            Self::KvmBitmap => "kvm-bitmap",
            Self::KvmClear => "kvm-clear",
            Self::KvmRing => "kvm-ring",
            Self::Pagemap => "pagemap",
        }
    }

    /// Enables what it needs in L2's VM, before there are slots.
    ///
    /// # Errors
    /// [`Error::Capability`] where this host lacks it.
    pub fn prepare(self, vm: &VmFd, source: Kind) -> Result<(), Error> {
        const NAME: &str = "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2";
        if !self.sources().contains(&source) {
            let [needed, ..] = self.sources() else { return Ok(()) };
            let name = self.name();
            return Err(match self {
                // Memory is registered with one userfaultfd at a time.
                Self::Pagemap => Error::Capability {
                    capability: "a fault source beside userfaultfd's write protection",
                    consequence: format!(
                        "{name} registers L2's pages itself, as {source} does (use tracepoint or poison)"
                    ),
                },
                _ => Error::Capability {
                    capability: needed.capability(),
                    consequence: format!("{name} needs it to learn where L2 wrote (here: {source})"),
                },
            });
        }
        match self {
            Self::KvmClear => {
                kvm::vm::enable(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, NAME, 1, "kvm-clear needs Linux 5.2 or later")
            }
            Self::KvmRing => kvm::ring::enable(vm, DEFAULT_ENTRIES),
            Self::Pagemap => Watch::check(),
            Self::Mprotect | Self::UffdWp | Self::KvmBitmap => Ok(()),
        }
    }

    /// The fault sources that it works with, the cheapest first. `mprotect` has to be told where L2 wrote; `uffd-wp` is its own way to learn it.
    #[must_use]
    pub const fn sources(self) -> &'static [Kind] {
        match self {
            Self::Mprotect => &[Kind::Tracepoint],
            Self::UffdWp => &[Kind::Userfault],
            Self::Pagemap => &[Kind::Tracepoint, Kind::Poison],
            Self::KvmBitmap | Self::KvmClear | Self::KvmRing => &Kind::ALL,
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
const FITTING: [(&str, &[Mechanism]); 5] = [
    ("write-protect", &[Mechanism::Mprotect, Mechanism::UffdWp]),
    ("lazy-huge", &[Mechanism::Mprotect, Mechanism::UffdWp]),
    ("log", &[Mechanism::KvmBitmap, Mechanism::KvmClear, Mechanism::KvmRing, Mechanism::Pagemap]),
    ("twin", &[Mechanism::Mprotect, Mechanism::UffdWp]),
    ("twin+log", &[Mechanism::KvmBitmap, Mechanism::KvmClear, Mechanism::KvmRing]),
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

    /// Whether a log of L2's VM finds writes: KVM's, or what pages tell by themselves.
    #[must_use]
    pub const fn logs(self) -> bool {
        !matches!(self.mechanism, Mechanism::Mprotect | Mechanism::UffdWp)
    }

    /// Whether the shadow MMU finds writes: with `log` the kernel does all of it.
    #[must_use]
    pub fn traps(self) -> bool {
        self.strategy != "log"
    }
}

impl fmt::Display for Means {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.strategy, self.mechanism.name())
    }
}
