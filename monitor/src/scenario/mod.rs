//! Scenarios: set up, run, check against the truth, return a Record. One file each.

mod check;
mod collapse;
mod cures;
mod dirty_log;
mod dirty_rate;
mod each_way;
mod edits;
mod hostile;
mod l1_cpu;
mod l2;
mod model;
mod nested;
mod pass;
mod replay;
mod role_log;
mod roots;
mod roots_l2;
mod script;
mod setup;
mod snapshot;
mod soak;
mod storm;
mod toggles;
mod unpaged;
mod violations;

pub(crate) use pass::tries;
pub use setup::{Options, Setup};
pub(crate) use setup::{has_edits, has_l2};

use crate::cli::{NestedArgs, RunArgs, ShadowArgs};
use crate::failure::Failure;
use crate::ground::Ground;
use crate::kvm::vm::Resident;
use crate::progress::Progress;
use crate::report::Record;
use crate::track::{self, Kind};

/// A scenario.
pub struct Scenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it does, in one line.
    pub description: &'static str,
    /// The trackers that run without `--tracker`; none where the scenario has no trackers.
    pub trackers: &'static [Kind],
    work: Work,
}

/// How a scenario runs.
enum Work {
    /// On KVM: a machine for each row.
    Kvm(fn(&Setup, &Progress) -> Result<Record, Failure>),
    /// On the software walker: no KVM is needed.
    Model,
    /// As the first, or as the second where the mechanism is the walker.
    Roots,
}

/// The scenario that watches what is left behind.
const COLLAPSE: &str = "collapse";

/// The scenario without KVM.
const MODEL: &str = "model";

/// All scenarios.
pub const ALL: &[Scenario] = &[
    Scenario {
        name: "dirty-log",
        description: "what KVM's dirty tracking costs: populate, enable, rounds of dirty/get/clear, disable, retouch",
        trackers: &track::OF_KVM,
        work: Work::Kvm(dirty_log::run),
    },
    Scenario {
        name: COLLAPSE,
        description: "what logging leaves behind, stopped at rest or in mid-round: huge mappings and speed, when they are back",
        trackers: &[Kind::Bitmap, Kind::ClearInitSet],
        work: Work::Kvm(collapse::run),
    },
    Scenario {
        name: setup::DIRTY_RATE,
        description: "how fast a guest dirties its memory, by each tracker and by sampling: the error, the guest's loss, what stays behind",
        trackers: &track::ALL,
        work: Work::Kvm(dirty_rate::run),
    },
    Scenario {
        name: setup::HOSTILE,
        description: "a malicious L1: nonsense in its table, its control page and its doorbells; what L2 sees, and what the monitor maps",
        trackers: &[],
        work: Work::Kvm(hostile::run),
    },
    Scenario {
        name: MODEL,
        description: "Umbra's own shadow MMU on a software walker: every strategy on the same run, no KVM needed",
        trackers: &[],
        work: Work::Model,
    },
    Scenario {
        name: "snapshot",
        description: "which tracker for a snapshot: each of them where 0, 1, 10 and 100% of the pages are written",
        trackers: &track::ALL,
        work: Work::Kvm(snapshot::run),
    },
    Scenario {
        name: setup::NESTED,
        description: "the same for a guest's guest: what its writes cost under KVM's own nesting, and without (plain)",
        trackers: &track::OF_KVM,
        work: Work::Kvm(nested::run),
    },
    Scenario {
        name: setup::ROOTS,
        description: "which changes of mode, and of memory slots, cost a VM its page-table root: touch, toggle, touch again",
        trackers: &[],
        work: Work::Roots,
    },
    Scenario {
        name: setup::EDITS,
        description: "random edits of L1's table, by epochs: what L2 reads and writes and what L1 is told, beside Umbra's walker",
        trackers: &[],
        work: Work::Kvm(edits::run),
    },
    Scenario {
        name: "soak",
        description: "the guest writes while the controller harvests: a write may be reported late, never lost",
        trackers: &track::OF_KVM,
        work: Work::Kvm(soak::run),
    },
    Scenario {
        name: setup::VIOLATIONS,
        description: "what L1 is told of accesses that its table does not permit: KVM's nesting beside Umbra's walker",
        trackers: &[],
        work: Work::Kvm(violations::run),
    },
];

impl Scenario {
    /// Whether it needs a /dev/kvm.
    #[must_use]
    pub const fn needs_kvm(&self) -> bool {
        matches!(self.work, Work::Kvm(_) | Work::Roots)
    }
}

/// Runs what `args` ask for.
///
/// # Errors
/// [`Failure`]; a truth check that failed is not an error here but stands in the Record ([`Record::faults`]).
pub fn run(args: &RunArgs, ground: Ground, progress: &Progress) -> Result<Record, Failure> {
    let scenario = find(args)?;
    no_stray_options(args)?;
    match scenario.work {
        Work::Kvm(run) => on_kvm(args, ground, run, progress),
        Work::Roots if roots_l2::is_on_walker(args) => cures::run(args, ground, progress),
        Work::Roots => on_kvm(args, ground, roots::run, progress),
        Work::Model => model::run(args, ground, progress),
    }
}

fn on_kvm(
    args: &RunArgs,
    ground: Ground,
    run: fn(&Setup, &Progress) -> Result<Record, Failure>,
    progress: &Progress,
) -> Result<Record, Failure> {
    let setup = Setup::new(args, ground)?;
    // In the lab PID 1 has it: of each mapping that changes here, KVM would tell a second VM of this process too (390 instructions a call of userfaultfd).
    let _resident = if ground == Ground::Kvm { Some(Resident::new()?) } else { None };
    run(&setup, progress)
}

fn find(args: &RunArgs) -> Result<&'static Scenario, Failure> {
    ALL.iter().find(|scenario| scenario.name == args.scenario).ok_or_else(|| {
        let names: Vec<_> = ALL.iter().map(|scenario| scenario.name).collect();
        Failure::Input(format!("{}: there is no such scenario; there are {}", args.scenario, names.join(", ")))
    })
}

/// An option that would have no effect is refused.
fn no_stray_options(args: &RunArgs) -> Result<(), Failure> {
    let name = args.scenario.as_str();
    if name == MODEL && (args.guest_paging.is_some() || args.irqchip.is_some()) {
        return Err(Failure::Input("model: it runs no guest, so --guest-paging and --irqchip mean nothing".to_owned()));
    }
    if args.rate.is_some() && name != setup::DIRTY_RATE {
        return Err(Failure::Input(format!(
            "{name}: it touches as fast as it can, so --rate means nothing (dirty-rate has one)"
        )));
    }
    if name == COLLAPSE && args.vcpus != 1 {
        return Err(Failure::Input(format!(
            "--vcpus {}: collapse has one, since several would end in different rounds when it cancels",
            args.vcpus
        )));
    }
    let has_l2 = has_l2(name);
    let has_toggles = name == setup::ROOTS;
    if has_toggles {
        roots_l2::no_stray_options(args)?;
    } else if !has_l2 && args.nested != NestedArgs::default() {
        return Err(Failure::Input(format!(
            "{name}: it runs no L2, so --nesting, --accessed-dirty, --fill-batch, --remaps, --edits, --race, --mechanism and --fault-source mean nothing (nested does)"
        )));
    }
    if !has_toggles && args.role_log.is_some() {
        return Err(Failure::Input(format!("{name}: it logs no roots, so --role-log means nothing (roots does)")));
    }
    if !has_toggles && !args.toggle.is_empty() {
        return Err(Failure::Input(format!("{name}: it changes no mode, so --toggle means nothing (roots does)")));
    }
    if has_toggles && args.shadow != (ShadowArgs { roots: args.shadow.roots.clone(), ..ShadowArgs::default() }) {
        return Err(Failure::Input(
            "roots: of the shadow MMU's options it has --roots alone (model has the others)".into(),
        ));
    }
    if has_toggles && (!args.tracker.is_empty() || args.chunk.is_some()) {
        return Err(Failure::Input("roots: it tracks no page, so --tracker and --chunk mean nothing".into()));
    }
    let has_fault = |fault: &str| match fault {
        "break-smm" | "loop-smm" => has_toggles,
        "lose-edit" => name == setup::EDITS && !args.nested.race,
        "lose-invalidation" | "late-invalidation" | "lose-transfer" => args.nested.race,
        "lose-page" if args.nested.race => true,
        "stray-page" | "break-l1" => name == setup::HOSTILE,
        _ => !has_toggles && !has_edits(name),
    };
    if let Some(fault) = args.inject.as_deref().filter(|&fault| !has_fault(fault)) {
        return Err(Failure::Input(format!(
            "--inject {fault}: {name} has no such fault (lose-page and extra-page are of trackers, break-smm and loop-smm are of roots, lose-edit of edits, lose-page, lose-invalidation, late-invalidation and lose-transfer of edits --race, stray-page and break-l1 of hostile)"
        )));
    }
    if args.nested.edits.is_some() && !has_edits(name) {
        return Err(Failure::Input(format!(
            "{name}: it makes no random edits, so --edits means nothing (edits and hostile do)"
        )));
    }
    let ShadowArgs { split, collapse, roots, cache, .. } = args.shadow.clone();
    if has_l2 && (split, collapse, roots, cache) != (None, None, None, None) {
        return Err(Failure::Input(format!(
            "{name}: a running L2 has no --split, --collapse, --roots or --cache to choose (model has)"
        )));
    }
    if has_l2 || has_toggles || name == MODEL || args.shadow == ShadowArgs::default() {
        return Ok(());
    }
    if name == setup::DIRTY_RATE {
        if args.shadow == (ShadowArgs { strategy: args.shadow.strategy.clone(), ..ShadowArgs::default() }) {
            return Ok(());
        }
        return Err(Failure::Input(
            "dirty-rate: of the shadow MMU's options it has --strategy alone (model has the others)".into(),
        ));
    }
    Err(Failure::Input(format!(
        "{name}: it has no shadow MMU, so --strategy, --split, --format and their kin mean nothing (model has one)"
    )))
}

/// Checks `args` as far as that needs no KVM: what the lab does before it boots.
///
/// # Errors
/// [`Failure::Input`].
pub fn check(args: &RunArgs) -> Result<(), Failure> {
    match find(args)?.work {
        Work::Roots if roots_l2::is_on_walker(args) => no_stray_options(args).and_then(|()| cures::check(args)),
        Work::Kvm(_) | Work::Roots => no_stray_options(args).and_then(|()| Options::new(args)).map(|_| ()),
        Work::Model => no_stray_options(args).and_then(|()| model::check(args)),
    }
}
