//! Dirty trackers behind one trait: what a scenario drives on a running guest.

mod area;
mod explain;
mod log;
mod mincore;
mod pagemap;
mod ring;
mod shadow;
mod soft_dirty;
mod uffd_wp;

pub use explain::{Expectation, Host};

use area::Area;
use log::Clearing;
use pagemap::Order;

use crate::guest::Machine;
use crate::hostmm::userfault::{Mode, Userfault};
use crate::kvm::ring::{DEFAULT_ENTRIES, MAX_ENTRIES, MIN_ENTRIES};
use crate::kvm::{self, Error};
use crate::nested::Means;
use crate::pages::PageSet;
use kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
use kvm_ioctls::VmFd;
use std::fmt;
use std::str::FromStr;

/// A way to learn which pages a guest wrote. The order of calls is start, then (harvest, clear) again and again, then
/// stop. All buffers are allocated and touched when the tracker is made, so that nothing but the tracker's own work falls into a timed
/// window.
pub trait Tracker {
    /// Begins to track.
    ///
    /// # Errors
    /// The system's.
    fn start(&mut self, machine: &Machine) -> Result<(), Error>;

    /// Fetches what was written since the last harvest into buffers of its own.
    ///
    /// # Errors
    /// The system's.
    fn harvest(&mut self, machine: &Machine) -> Result<(), Error>;

    /// Makes the harvested pages report again. Trackers whose harvest does that already say so by [`Tracker::clears`].
    ///
    /// # Errors
    /// The system's.
    fn clear(&mut self, machine: &Machine) -> Result<(), Error>;

    /// Whether [`Tracker::clear`] is a step of its own.
    fn clears(&self) -> bool;

    /// Ends tracking.
    ///
    /// # Errors
    /// The system's.
    fn stop(&mut self, machine: &Machine) -> Result<(), Error>;

    /// Puts what the last harvest found into `into`. Never called inside a window.
    fn report(&mut self, machine: &Machine, into: &mut PageSet);

    /// Something that must never happen, if it has: an entry that names no tracked page, for instance.
    fn fault(&self) -> Option<String> {
        None
    }

    /// Events that the tracker itself counted, by name.
    fn counters(&self, _machine: &Machine) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// The trackers there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `KVM_GET_DIRTY_LOG`, which fetches, clears and protects again in one call.
    Bitmap,
    /// Manual protection: `KVM_GET_DIRTY_LOG` only fetches, `KVM_CLEAR_DIRTY_LOG` clears.
    Clear,
    /// The same with the log initially all set: enabling protects nothing.
    ClearInitSet,
    /// The dirty ring, with that many entries a vCPU.
    Ring(u32),
    /// Outside KVM: asynchronous write protection, scanned and protected again in one call.
    Pagemap,
    /// The same; what a scan reported is protected by a step of its own.
    PagemapTwoSteps,
    /// Outside KVM: synchronous write protection, a fault for each page.
    UffdWp,
    /// Outside KVM: soft-dirty bits.
    SoftDirty,
    /// Outside KVM: residency.
    Mincore,
    /// A strategy of the shadow MMU that L2 runs on.
    Shadow(Means),
}

/// KVM's own trackers: those that run without `--tracker`.
pub const OF_KVM: [Kind; 4] = [Kind::Bitmap, Kind::Clear, Kind::ClearInitSet, Kind::Ring(DEFAULT_ENTRIES)];

/// All trackers: those that `--tracker all` runs.
pub const ALL: [Kind; 9] = [
    Kind::Bitmap,
    Kind::Clear,
    Kind::ClearInitSet,
    Kind::Ring(DEFAULT_ENTRIES),
    Kind::Pagemap,
    Kind::PagemapTwoSteps,
    Kind::UffdWp,
    Kind::SoftDirty,
    Kind::Mincore,
];

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bitmap => f.write_str("bitmap"),
            Self::Clear => f.write_str("clear"),
            Self::ClearInitSet => f.write_str("clear+init-set"),
            Self::Ring(DEFAULT_ENTRIES) => f.write_str("ring"),
            Self::Ring(entries) => write!(f, "ring-{entries}"),
            Self::Pagemap => f.write_str("pagemap"),
            Self::PagemapTwoSteps => f.write_str("pagemap-2step"),
            Self::UffdWp => f.write_str("uffd-wp"),
            Self::SoftDirty => f.write_str("soft-dirty"),
            Self::Mincore => f.write_str("mincore"),
            Self::Shadow(means) => write!(f, "{means}"),
        }
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "bitmap" => Ok(Self::Bitmap),
            "clear" => Ok(Self::Clear),
            "clear+init-set" => Ok(Self::ClearInitSet),
            "ring" => Ok(Self::Ring(DEFAULT_ENTRIES)),
            "pagemap" => Ok(Self::Pagemap),
            "pagemap-2step" => Ok(Self::PagemapTwoSteps),
            "uffd-wp" => Ok(Self::UffdWp),
            "soft-dirty" => Ok(Self::SoftDirty),
            "mincore" => Ok(Self::Mincore),
            _ => match text.strip_prefix("ring-").map(str::parse::<u32>) {
                Some(Ok(entries)) if entries.is_power_of_two() && (MIN_ENTRIES..=MAX_ENTRIES).contains(&entries) => {
                    Ok(Self::Ring(entries))
                }
                Some(_) => Err(format!(
                    "--tracker {text}: the size of a ring is a power of two from {MIN_ENTRIES} to {MAX_ENTRIES}"
                )),
                None => Err(format!(
                    "--tracker {text}: there is no such tracker; there are bitmap, clear, clear+init-set, ring, ring-N, pagemap, pagemap-2step, uffd-wp, soft-dirty, mincore, and all for all of them"
                )),
            },
        }
    }
}

impl Kind {
    /// What a user should know about it, in one line.
    #[must_use]
    pub const fn description(self) -> &'static str {
        match self {
            Self::Bitmap => "KVM_GET_DIRTY_LOG: one call fetches, clears and protects again",
            Self::Clear => "manual protection: KVM_GET_DIRTY_LOG fetches, KVM_CLEAR_DIRTY_LOG clears",
            Self::ClearInitSet => {
                "the same, initially all set: enabling protects nothing, the first harvest reports all"
            }
            Self::Ring(_) => "the dirty ring, 4096 entries a vCPU (ring-N: N entries)",
            Self::Pagemap => {
                "outside KVM: userfaultfd's asynchronous write protection; PAGEMAP_SCAN fetches and protects again"
            }
            Self::PagemapTwoSteps => "the same; PAGEMAP_SCAN fetches, then only what it reported is protected again",
            Self::UffdWp => "outside KVM: userfaultfd's synchronous write protection, a thread answers each fault",
            Self::SoftDirty => "outside KVM: soft-dirty bits of pagemap, cleared by clear_refs",
            Self::Mincore => "outside KVM: mincore, which reports what is resident, written or not",
            Self::Shadow(_) => "the shadow MMU under L2",
        }
    }

    /// Entries of each vCPU's ring, for the trackers that have one.
    #[must_use]
    pub const fn ring_entries(self) -> Option<u32> {
        match self {
            Self::Ring(entries) => Some(entries),
            _ => None,
        }
    }

    /// Whether the first harvest reports every page.
    #[must_use]
    pub fn initially_all_set(self) -> bool {
        matches!(self, Self::ClearInitSet | Self::Shadow(Means { strategy: "lazy-huge", .. }))
    }

    /// Whether it is one of KVM's, or a way around KVM.
    #[must_use]
    pub const fn is_of_kvm(self) -> bool {
        matches!(self, Self::Bitmap | Self::Clear | Self::ClearInitSet | Self::Ring(_))
    }

    /// Whether it compares bytes, so that a write of the bytes that were there may go unseen.
    #[must_use]
    pub fn compares(self) -> bool {
        matches!(self, Self::Shadow(means) if means.compares())
    }

    /// Whether writes between harvest and clear are lost, so that the guest must stand still meanwhile.
    #[must_use]
    pub const fn needs_standstill(self) -> bool {
        matches!(self, Self::SoftDirty)
    }

    /// Enables what the tracker needs, before the VM has slots or vCPUs.
    ///
    /// # Errors
    /// [`Error::Capability`] where KVM or the kernel around it lacks it.
    pub fn prepare(self, vm: &VmFd) -> Result<(), Error> {
        const NAME: &str = "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2";
        // KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE and KVM_DIRTY_LOG_INITIALLY_SET.
        let manual = |flags: u64, needs: &str| {
            let offered = kvm::vm::offered(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
            if offered & flags != flags {
                return Err(Error::Capability { capability: NAME, consequence: needs.to_owned() });
            }
            kvm::vm::enable(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, NAME, flags, needs)
        };
        match self {
            Self::Bitmap | Self::Mincore | Self::Shadow(_) => Ok(()),
            Self::Clear => manual(1, "clear needs Linux 5.2 or later"),
            Self::ClearInitSet => manual(3, "clear+init-set needs Linux 5.7 or later"),
            Self::Ring(entries) => kvm::ring::enable(vm, entries),
            Self::Pagemap | Self::PagemapTwoSteps => Userfault::open(Mode::Asynchronous).map(|_| ()),
            Self::UffdWp => Userfault::open(Mode::Synchronous).map(|_| ()),
            Self::SoftDirty => soft_dirty::check(),
        }
    }

    /// What it lacks here, found out by making a VM for it.
    #[must_use]
    pub fn missing(self) -> Option<String> {
        let prepared = kvm::vm::open().and_then(|kvm| {
            let vm = kvm.create_vm().map_err(kvm::vm::failed("KVM_CREATE_VM"))?;
            self.prepare(&vm)
        });
        prepared.err().map(|error| error.to_string())
    }

    /// Makes the tracker for a machine that was prepared for it. A CLEAR covers `chunk` pages.
    ///
    /// # Errors
    /// [`Error::Capability`] if the machine has no rings and the tracker needs them, or its memory is of a kind that it cannot track.
    pub fn build(self, machine: &Machine, chunk: Option<u64>) -> Result<Box<dyn Tracker>, Error> {
        Ok(match self {
            Self::Bitmap => Box::new(log::Log::new(machine, Clearing::ByGet)),
            Self::Clear | Self::ClearInitSet => {
                let chunk = chunk.unwrap_or(kvm::log::WHOLE_SLOT);
                Box::new(log::Log::new(machine, Clearing::Manual { chunk }))
            }
            Self::Ring(_) => Box::new(ring::Ring::new(machine)?),
            Self::Pagemap => Box::new(pagemap::WrittenPages::new(Area::of(machine), Order::AtOnce)?),
            Self::PagemapTwoSteps => Box::new(pagemap::WrittenPages::new(Area::of(machine), Order::TwoSteps)?),
            Self::UffdWp => Box::new(uffd_wp::Faults::new(Area::of(machine))?),
            Self::SoftDirty => Box::new(soft_dirty::SoftDirty::new(Area::of(machine))?),
            Self::Mincore => Box::new(mincore::Resident::new(Area::of(machine))),
            Self::Shadow(_) => Box::new(shadow::Shadowed::new(machine)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_to_what_they_name() {
        assert!(ALL.starts_with(&OF_KVM) && OF_KVM.iter().all(|kind| kind.is_of_kvm()));
        for kind in ALL.into_iter().chain([Kind::Ring(1024), Kind::Ring(65536)]) {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
    }

    #[test]
    fn bad_names_say_what_there_is() {
        for (name, part) in [
            ("rings", "no such tracker"),
            ("ring-1000", "power of two"),
            ("ring-128", "256"),
            ("ring-x", "power of two"),
        ] {
            let complaint = name.parse::<Kind>().unwrap_err();
            assert!(complaint.contains(part) && complaint.contains(name), "{complaint}");
        }
    }
}
