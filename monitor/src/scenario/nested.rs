//! What a guest's guest costs: the same pattern over the same pages, executed by L1 itself (`plain`) and by an L2 on KVM's own nesting (`svm`,
//! `vmx`).
//! A row for each way and tracker. The rounds are those of `dirty-log`; before them come the monitor's populating of L1's memory (so that a first
//! touch is KVM's work alone), an entry into L2 and back, L1's filling of its table, and L2's first touch of every page.
//!
//! The trackers track L1's pages, as a VMM does that migrates a guest hypervisor.

use super::Setup;
use super::l2::{Format, L2Options, Nesting};
use super::pass::{self, Case, Ending, ExplainedBy, Run};
use crate::failure::Failure;
use crate::guest::Plan;
use crate::host;
use crate::kvm::{self, capabilities};
use crate::progress::Progress;
use crate::report::Record;
use crate::report::record::Row;
use crate::track::Kind;
use umbra_shared::Level;
use umbra_shared::nested::Way;
use umbra_shared::protocol::Command;

/// The first entry maps what every entry needs; this one is warm.
const ENTRIES: u64 = 3;

/// Runs the scenario.
pub fn run(setup: &Setup, progress: &Progress) -> Result<Record, Failure> {
    let Some(l2) = &setup.l2 else { return Err(Failure::Input("nested: its options are missing".into())) };
    setup.check_named()?;
    let mut rows = Vec::new();
    for nesting in l2.ways_here(host::vendor()) {
        for &kind in setup.trackers() {
            let name = format!("{nesting}:{kind}");
            rows.push(Setup::or_not_here(&name, row(setup, l2, nesting, kind, &name, progress))?);
        }
    }
    // A way that nobody asked for may be missing; the trackers that were asked for are there.
    setup.record_of(rows, |name| l2.named(name))
}

/// How the firmware runs L2 that way, if it and this host can.
fn way(l2: &L2Options, nesting: Nesting) -> Result<Way, Failure> {
    match nesting {
        Nesting::Plain => Ok(Way::Plain),
        Nesting::Svm => {
            capabilities::nested_svm()?;
            match l2.format {
                None | Some(Format::Npt) => Ok(Way::Svm),
                Some(_) => {
                    Err(not_here("NPT", "it follows L1's own mode, which is 64-bit: svm has the format npt alone"))
                }
            }
        }
        Nesting::Vmx => {
            let offered = capabilities::nested_vmx()?;
            if l2.map.leaf() == Level::G1 && !offered.giant_pages {
                return Err(not_here("leaves of 1 GiB", "KVM offers guests EPT without them (--leaf 2m is there)"));
            }
            match l2.format {
                None | Some(Format::Ept) => Ok(Way::Vmx),
                Some(_) => Err(not_here("EPT", "it is the one format that vmx has")),
            }
        }
        Nesting::Umbra => Err(not_here("Umbra's shadow MMU", "it does not run an L2 yet")),
    }
}

fn not_here(capability: &'static str, consequence: &str) -> Failure {
    kvm::Error::Capability { capability, consequence: consequence.to_owned() }.into()
}

fn row(
    setup: &Setup,
    l2: &L2Options,
    nesting: Nesting,
    kind: Kind,
    name: &str,
    progress: &Progress,
) -> Result<Row, Failure> {
    let way = way(l2, nesting)?;
    let (begin, explained_by): (fn(&mut Run) -> _, _) = match way {
        Way::Plain => (begin_plain, ExplainedBy::L1),
        Way::Svm | Way::Vmx => (begin_nested, ExplainedBy::L2),
    };
    let plan = Plan { nested: Some(l2.nested(way)), ..setup.plan.clone() };
    pass::row(
        &Case { setup, plan: &plan, name: name.to_owned(), kind, explained_by, begin, ending: Ending::Stopped },
        progress,
    )
}

fn begin_plain(run: &mut Run) -> Result<(), Failure> {
    run.populate();
    run.command("first-touch", Command::Populate, 0)
}

fn begin_nested(run: &mut Run) -> Result<(), Failure> {
    run.populate();
    run.command_by_guest("enter", Command::Enter, ENTRIES)?;
    if run.nested().is_some_and(|nested| nested.fill_batch > 0) {
        // L2's first touch of a page is a violation, for which L1 fills its table.
        return run.command("fill", Command::Populate, 0);
    }
    run.command_by_guest("fill", Command::Fill, 0)?;
    run.command("first-touch", Command::Populate, 0)
}
