//! What a guest's guest costs: the same pattern over the same pages, executed by L1 itself (`plain`), by an L2 on KVM's own nesting (`svm`,
//! `vmx`) and by one on Umbra's shadow MMU (`umbra`).
//! A row for each way and tracker. The rounds are those of `dirty-log`; before them come the monitor's populating of L1's memory (so that a first
//! touch is KVM's work alone), an entry into L2 and back, L1's filling of its table, and L2's first and second touch of every page (or, with
//! `--first-touch logged`, the first round is the first touch).
//!
//! The trackers track L1's pages, as a VMM does that migrates a guest hypervisor.

use super::Setup;
use super::each_way;
use super::l2::{self, FirstTouch, L2Options, Nesting};
use super::pass::{self, Case, Ending, ExplainedBy, Run};
use crate::failure::Failure;
use crate::guest::Plan;
use crate::host;
use crate::hostmm::udmabuf::Udmabuf;
use crate::kvm::{self, capabilities};
use crate::nested::{Means, Options};
use crate::progress::Progress;
use crate::report::Record;
use crate::report::record::Row;
use crate::track::Kind;
use umbra_shared::Level;
use umbra_shared::nested::{AliasKind, Flags, Format, Way};
use umbra_shared::protocol::Command;

/// The first entry maps what every entry needs; this one is warm.
const ENTRIES: u64 = 3;

/// Runs the scenario.
pub fn run(setup: &Setup, progress: &Progress) -> Result<Record, Failure> {
    let Some(l2) = &setup.l2 else { return Err(Failure::Input("nested: its options are missing".into())) };
    setup.check_named()?;
    let ways = l2.ways_here(host::vendor());
    if ways.contains(&Nesting::Umbra)
        && l2.map.kind() == AliasKind::Scattered
        && let Err(error) = Udmabuf::open()
    {
        progress.step(&format!("umbra: leaves that are scattered over L1's memory take a mapping each: {error}"));
    }
    each_way::record(setup, l2, &ways, setup.trackers(), progress, |plan, kind, name| {
        row(setup, plan, kind, name, progress)
    })
}

/// The machine of a way to run L2, if the firmware and this host can. Umbra's rows differ in their means.
pub(super) fn plan(setup: &Setup, l2: &L2Options, nesting: Nesting) -> Result<Plan, Failure> {
    let way = match nesting {
        Nesting::Plain => Way::Plain,
        Nesting::Svm => Way::Svm,
        Nesting::Vmx => Way::Vmx,
        Nesting::Umbra => Way::Umbra,
    };
    let nested = l2.nested(way);
    let plan = Plan { nested: Some(nested), ..setup.plan.clone() };
    match (nesting, nested.format) {
        (Nesting::Plain, _) if nested.remaps > 0 => {
            return Err(not_here("L1's table", "plain has none that --remaps could edit"));
        }
        (Nesting::Svm, Format::Npt) => {
            capabilities::nested_svm()?;
            if nested.flags == Flags::Unused {
                return Err(not_here("NPT without A and D", "they are always in use there"));
            }
        }
        (Nesting::Svm, _) => {
            return Err(not_here("NPT", "it follows L1's own mode, which is 64-bit: svm has the format npt alone"));
        }
        (Nesting::Vmx, Format::Ept) => {
            let offered = capabilities::nested_vmx()?;
            if l2.map.leaf() == Level::G1 && !offered.giant_pages {
                return Err(not_here("leaves of 1 GiB", "KVM offers guests EPT without them (--leaf 2m is there)"));
            }
        }
        (Nesting::Vmx, _) => return Err(not_here("EPT", "it is the one format that vmx has")),
        (Nesting::Umbra, Format::Pae | Format::ThirtyTwoBit) => {
            return Err(not_here("an L2 below 4 GiB", "pae and 32bit cannot name its pages, which begin there"));
        }
        (Nesting::Umbra, Format::Npt) if nested.flags == Flags::Unused => {
            return Err(not_here("NPT without A and D", "they are always in use there"));
        }
        _ => {}
    }
    Ok(plan)
}

/// How L2 runs by `means`.
pub(super) fn shadow(
    setup: &Setup,
    plan: &Plan,
    means: Means,
    progress: &Progress,
) -> Result<Option<Options>, Failure> {
    let (Some(given), Some(nested)) = (&setup.l2, plan.nested) else { return Ok(None) };
    let read_only = if means.traps() {
        Some("the strategy closes pages to writes")
    } else if nested.flags == Flags::Clear {
        Some("all are until L1's dirty flag is set (--accessed-dirty preset sets it)")
    } else if given.edits > 0 {
        Some("L1 takes rights away")
    } else {
        None
    };
    let source =
        l2::choose_source(given.source, means.mechanism.sources(), read_only, &format!("umbra:{means}: "), progress)?;
    Ok(Some(given.options(means, source, plan.backing)))
}

fn not_here(capability: &'static str, consequence: &str) -> Failure {
    kvm::Error::Capability { capability, consequence: consequence.to_owned() }.into()
}

fn row(setup: &Setup, plan: &Plan, kind: Kind, name: &str, progress: &Progress) -> Result<Row, Failure> {
    let (begin, explained_by): (fn(&mut Run) -> _, _) = match plan.nested.map(|nested| nested.way) {
        Some(Way::Umbra) => (begin_nested, ExplainedBy::L1),
        Some(Way::Svm | Way::Vmx) => (begin_nested, ExplainedBy::L2),
        Some(Way::Plain) | None => (begin_plain, ExplainedBy::L1),
    };
    let case = Case { setup, plan, name: name.to_owned(), kind, explained_by, begin, ending: Ending::Stopped };
    pass::row(&case, progress)
}

fn begin_plain(run: &mut Run) -> Result<(), Failure> {
    run.populate();
    touch(run, "first-touch")
}

fn begin_nested(run: &mut Run) -> Result<(), Failure> {
    run.populate();
    run.command_by_guest("enter", Command::Enter, ENTRIES)?;
    if run.nested().is_some_and(|nested| nested.fill_batch > 0) {
        // L2's first touch of a page is a violation, for which L1 fills its table.
        return touch(run, "fill");
    }
    run.command_by_guest("fill", Command::Fill, 0)?;
    touch(run, "first-touch")
}

/// Every page is written for the first time in the phase `first`, and once more when all of them are warm; or all that is left to the first round.
fn touch(run: &mut Run, first: &str) -> Result<(), Failure> {
    if run.l2().is_some_and(|l2| l2.first_touch == FirstTouch::Logged) {
        run.leave_untouched();
        return Ok(());
    }
    run.command(first, Command::Populate, 0)?;
    run.command("second-touch", Command::Populate, 0)
}
