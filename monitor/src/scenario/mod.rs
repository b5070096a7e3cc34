//! Scenarios: set up, run, check against the truth, return a Record. One file each.

mod check;
mod dirty_log;
mod l2;
mod nested;
mod pass;
mod setup;
mod soak;

pub use setup::{Options, Setup};

use crate::cli::RunArgs;
use crate::failure::Failure;
use crate::ground::Ground;
use crate::progress::Progress;
use crate::report::Record;

/// A scenario.
pub struct Scenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it does, in one line.
    pub description: &'static str,
    run: fn(&Setup, &Progress) -> Result<Record, Failure>,
}

/// All scenarios.
pub const ALL: &[Scenario] = &[
    Scenario {
        name: "dirty-log",
        description: "what KVM's dirty tracking costs: populate, enable, rounds of dirty/get/clear, disable, retouch",
        run: dirty_log::run,
    },
    Scenario {
        name: setup::NESTED,
        description: "the same for a guest's guest: what its writes cost under KVM's own nesting, and without (plain)",
        run: nested::run,
    },
    Scenario {
        name: "soak",
        description: "the guest writes while the controller harvests: a write may be reported late, never lost",
        run: soak::run,
    },
];

/// Runs what `args` ask for.
///
/// # Errors
/// [`Failure`]; a truth check that failed is not an error here but stands in the Record ([`Record::faults`]).
pub fn run(args: &RunArgs, ground: Ground, progress: &Progress) -> Result<Record, Failure> {
    let scenario = find(args)?;
    let setup = Setup::new(args, ground)?;
    (scenario.run)(&setup, progress)
}

fn find(args: &RunArgs) -> Result<&'static Scenario, Failure> {
    ALL.iter().find(|scenario| scenario.name == args.scenario).ok_or_else(|| {
        let names: Vec<_> = ALL.iter().map(|scenario| scenario.name).collect();
        Failure::Input(format!("{}: there is no such scenario; there are {}", args.scenario, names.join(", ")))
    })
}

/// Checks `args` as far as that needs no KVM: what the lab does before it boots.
///
/// # Errors
/// [`Failure::Input`].
pub fn check(args: &RunArgs) -> Result<(), Failure> {
    find(args)?;
    Options::new(args).map(|_| ())
}
