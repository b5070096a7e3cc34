//! `--toggle`: what `roots` can change about a VM, there and back, and what a host must have for it.

use crate::failure::Failure;
use crate::host;
use crate::kvm::vm::{failed, open};
use crate::kvm::{Error, capabilities};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use std::fmt;
use std::str::FromStr;
use umbra_shared::smm::View;
use umbra_shared::toggle::Toggle;

/// What changes, and by whose hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The firmware changes its vCPU's mode.
    Firmware(Toggle),
    /// The firmware touches its pages without paging, changes that bit there and back, and touches them again before paging is on again (unpaged.rs).
    Unpaged(Toggle),
    /// The monitor sets CR0.WP and clears it, by `KVM_SET_SREGS`.
    Sregs,
    /// The monitor takes a bit out of CPUID and puts it back.
    Cpuid,
    /// The guest, a hypervisor here, leaves its L2, which touches the pages, and enters it again.
    Nested,
    /// The monitor deletes a memory slot and makes it again.
    SlotDelete,
    /// The monitor moves a memory slot away and back.
    SlotMove,
    /// SMIs strike the guest while it writes under dirty logging: a row of its own kind (storm.rs).
    SmiStorm,
    /// A script of changes with memory growing alongside (script.rs).
    Script,
    /// Twelve roles in turn, each of which touches all pages: what a quota is for. Umbra's shadow MMU alone has it.
    TwelveRoles,
}

impl Change {
    fn all() -> impl Iterator<Item = Self> {
        let own = [
            Self::Sregs,
            Self::Cpuid,
            Self::Nested,
            Self::SlotDelete,
            Self::SlotMove,
            Self::SmiStorm,
            Self::Script,
            Self::TwelveRoles,
        ];
        let unpaged = [Toggle::None, Toggle::La57, Toggle::Lme].map(Self::Unpaged);
        Toggle::ALL.iter().copied().map(Self::Firmware).chain(unpaged).chain(own)
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Firmware(toggle) => toggle.name(),
            Self::Unpaged(Toggle::La57) => "cr4.la57:unpaged",
            Self::Unpaged(Toggle::Lme) => "efer.lme:unpaged",
            Self::Unpaged(_) => "none:unpaged",
            Self::Sregs => "sregs",
            Self::Cpuid => "cpuid",
            Self::Nested => "nested",
            Self::SlotDelete => "slot-delete",
            Self::SlotMove => "slot-move",
            Self::SmiStorm => "smm:storm",
            Self::Script => "script",
            Self::TwelveRoles => "12-roles",
        }
    }

    /// Whether that ground has it: KVM, or Umbra's shadow MMU, whose L2 announces roles and has no mode of its own.
    const fn is_on(self, ground: On) -> bool {
        match ground {
            On::Kvm => !matches!(self, Self::TwelveRoles),
            On::L2 | On::Walker => {
                matches!(self, Self::Firmware(_) | Self::SlotDelete | Self::Script | Self::TwelveRoles)
                    && !matches!(self, Self::Firmware(Toggle::SmmShared))
            }
        }
    }

    const fn is_for(self, by: By) -> bool {
        match by {
            By::First => true,
            By::Each => self.is_of_a_vcpu(),
            By::Together => matches!(self, Self::Firmware(toggle) if toggle.is_of_a_bit()),
        }
    }

    /// Whether it happens to one vCPU, rather than to the VM.
    const fn is_of_a_vcpu(self) -> bool {
        matches!(self, Self::Firmware(_) | Self::Sregs | Self::Cpuid | Self::Nested)
    }
}

/// What the changes are made on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// A VM of this host's KVM.
    Kvm,
    /// An L2 on Umbra's shadow MMU.
    L2,
    /// The model: Umbra's shadow MMU on the software walker.
    Walker,
}

/// Which vCPUs make a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The first alone, while the others hold what they have.
    First,
    /// All of them, one after the other.
    Each,
    /// All of them at once: none comes back before all have gone.
    Together,
}

impl By {
    const fn suffix(self) -> &'static str {
        match self {
            Self::First => "",
            Self::Each => "@all",
            Self::Together => "@once",
        }
    }
}

/// A change, and which vCPUs make it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Toggling {
    /// What changes.
    pub change: Change,
    /// Which vCPUs make it.
    pub by: By,
}

impl fmt::Display for Toggling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.change.name(), self.by.suffix())
    }
}

impl FromStr for Toggling {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let several = [By::Each, By::Together].into_iter().find_map(|by| Some((text.strip_suffix(by.suffix())?, by)));
        let (name, by) = several.unwrap_or((text, By::First));
        let Some(change) = Change::all().find(|change| change.name() == name) else {
            let names: Vec<_> = Change::all().map(Change::name).collect();
            return Err(format!("--toggle {text}: there is no such toggle; there are {}", names.join(", ")));
        };
        if !change.is_for(by) {
            return Err(match by {
                By::Together => {
                    format!("--toggle {text}: the toggles of a bit alone can be made at once (leave @once away)")
                }
                _ => format!("--toggle {text}: it is none that each vCPU makes (leave @all away)"),
            });
        }
        Ok(Self { change, by })
    }
}

impl Toggling {
    /// What SMM must see for it.
    #[must_use]
    pub const fn smm(self) -> Option<View> {
        match self.change {
            Change::Firmware(Toggle::Smm) => Some(View::Own),
            Change::Firmware(Toggle::SmmShared) => Some(View::Shared),
            _ => None,
        }
    }

    /// Why this host cannot do it, as far as that can be known without a guest.
    ///
    /// # Errors
    /// [`Error::Capability`] with what is missing.
    pub fn check(self) -> Result<(), Error> {
        let toggle = match self.change {
            Change::Firmware(toggle) | Change::Unpaged(toggle) => toggle,
            Change::SmiStorm => Toggle::Smm,
            Change::Nested => return capabilities::nested_svm().map(|_| ()),
            _ => return Ok(()),
        };
        if host::vendor() == "pvm" {
            return Err(Error::Capability {
                capability: "hardware virtualization",
                consequence: "a PVM host emulates ring 0, where the firmware changes its mode".into(),
            });
        }
        if toggle.is_smm() {
            return capabilities::smm();
        }
        let cpuid = open()?.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        offered(toggle, cpuid.as_slice())
    }
}

/// Whether a guest with that CPUID has what the toggle changes.
fn offered(toggle: Toggle, cpuid: &[kvm_cpuid_entry2]) -> Result<(), Error> {
    let Some((leaf, register, bit)) = toggle.needs() else { return Ok(()) };
    let entry = cpuid.iter().find(|entry| entry.function == leaf && entry.index == 0);
    if entry.is_some_and(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx][register] >> bit & 1 == 1) {
        return Ok(());
    }
    Err(Error::Capability {
        capability: toggle.name(),
        consequence: format!("KVM offers guests no such bit here (CPUID {leaf:#x})"),
    })
}

/// What `--toggle` asks for.
#[derive(Clone, Debug, Default)]
pub struct Toggles {
    /// A row each.
    pub rows: Vec<Toggling>,
    /// Whether they were asked for by name, so that a missing one is a failure.
    pub by_name: bool,
}

impl Toggles {
    /// What the words name; without words all there is, by the first vCPU alone and, where there are several, by all of them.
    ///
    /// # Errors
    /// [`Failure::Input`].
    pub fn new(words: &[String], vcpus: usize, on: On) -> Result<Self, Failure> {
        let mut rows = Vec::new();
        for word in words {
            let toggling: Toggling = word.parse().map_err(Failure::Input)?;
            if toggling.by != By::First && vcpus == 1 {
                let suffix = toggling.by.suffix();
                return Err(Failure::Input(format!("--toggle {word}: {suffix} takes --vcpus 2 or more")));
            }
            if !toggling.change.is_on(on) {
                return Err(Failure::Input(match on {
                    On::Kvm => format!("--toggle {word}: Umbra's shadow MMU alone has it (--roots)"),
                    On::L2 | On::Walker => {
                        format!("--toggle {word}: it is KVM's; the shadow MMU of --roots has no such thing")
                    }
                }));
            }
            if rows.contains(&toggling) {
                return Err(Failure::Input(format!("--toggle {word}: it is there twice")));
            }
            rows.push(toggling);
        }
        if words.is_empty() {
            for change in Change::all().filter(|change| change.is_on(on)) {
                let ways: &[By] = if vcpus > 1 { &[By::First, By::Each, By::Together] } else { &[By::First] };
                rows.extend(ways.iter().filter(|&&by| change.is_for(by)).map(|&by| Toggling { change, by }));
            }
        }
        Ok(Self { rows, by_name: !words.is_empty() })
    }
}

/// `KVM_SET_SREGS` with CR0.WP changed, and again with what it was.
pub fn set_sregs(vcpu: &kvm_ioctls::VcpuFd) -> Result<(), Error> {
    const CR0_WP: u64 = 1 << 16;
    let before = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let mut changed = before;
    changed.cr0 ^= CR0_WP;
    vcpu.set_sregs(&changed).map_err(failed("KVM_SET_SREGS"))?;
    vcpu.set_sregs(&before).map_err(failed("KVM_SET_SREGS"))
}

/// `KVM_SET_CPUID2` without ERMS (leaf 7, EBX bit 9: nothing depends on it), and again with what it was.
pub fn set_cpuid(vcpu: &kvm_ioctls::VcpuFd) -> Result<(), Error> {
    const ERMS: u32 = 1 << 9;
    let before = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_CPUID2"))?;
    let mut changed = before.clone();
    if let Some(entry) = changed.as_mut_slice().iter_mut().find(|entry| entry.function == 7 && entry.index == 0) {
        entry.ebx ^= ERMS;
    }
    vcpu.set_cpuid2(&changed).map_err(|_| Error::Capability {
        capability: "KVM_SET_CPUID2 after KVM_RUN",
        consequence: "this kernel refuses it".into(),
    })?;
    vcpu.set_cpuid2(&before).map_err(failed("KVM_SET_CPUID2"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn toggles(words: &[&str], vcpus: usize) -> Result<Vec<String>, String> {
        let words: Vec<_> = words.iter().map(ToString::to_string).collect();
        Toggles::new(&words, vcpus, On::Kvm)
            .map(|toggles| toggles.rows.iter().map(ToString::to_string).collect())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for change in Change::all() {
            for by in [By::First, By::Each, By::Together].into_iter().filter(|&by| change.is_for(by)) {
                let toggling = Toggling { change, by };
                assert_eq!(toggling.to_string().parse(), Ok(toggling));
            }
        }
        assert_eq!(toggles(&["cr0.wp@all", "slot-move"], 2).unwrap(), ["cr0.wp@all", "slot-move"]);
    }

    #[test]
    fn a_bit_that_the_cpu_lacks_is_refused() {
        let cpuid = |ecx| [kvm_cpuid_entry2 { function: 7, ecx, ..kvm_cpuid_entry2::default() }];
        let why = offered(Toggle::La57, &cpuid(1 << 3)).unwrap_err().to_string();
        assert!(why.contains("cr4.la57 is missing here") && why.contains("CPUID 0x7"), "{why}");
        assert!(offered(Toggle::La57, &[]).is_err() && offered(Toggle::Cr0Wp, &[]).is_ok());
        assert!(offered(Toggle::La57, &cpuid(1 << 16)).is_ok() && offered(Toggle::Pke, &cpuid(1 << 3)).is_ok());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        assert!(
            toggles(&["cr0.pw"], 1).unwrap_err().contains("cr0.pw: there is no such toggle; there are none, cr0.wp")
        );
        assert!(toggles(&["cr0.wp@all"], 1).unwrap_err().contains("--vcpus 2"));
        assert!(toggles(&["slot-delete@all"], 2).unwrap_err().contains("leave @all away"));
        assert!(toggles(&["smm@once"], 2).unwrap_err().contains("leave @once away"));
        assert!(toggles(&["cr4.pge@once"], 1).unwrap_err().contains("--vcpus 2"));
        assert!(toggles(&["cr0.wp", "cr0.wp"], 1).unwrap_err().contains("twice"));
    }

    #[test]
    fn by_default_there_are_all_and_with_two_vcpus_in_both_ways() {
        let (one, two) = (toggles(&[], 1).unwrap(), toggles(&[], 2).unwrap());
        assert_eq!(one.len(), Change::all().count() - 1);
        assert_eq!(two.len(), 2 * one.len() - 7 + 7, "seven are none of a vCPU's, and seven are of a bit");
    }
}
