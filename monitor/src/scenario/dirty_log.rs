//! What dirty tracking costs, phase by phase, with every reported page checked: a row for each tracker.

use super::Setup;
use super::pass::{self, Case, Ending, ExplainedBy, Run};
use crate::failure::Failure;
use crate::progress::Progress;
use crate::report::Record;
use crate::report::record::Row;
use crate::track::Kind;
use umbra_shared::protocol::Command;

/// Runs the scenario.
pub fn run(setup: &Setup, progress: &Progress) -> Result<Record, Failure> {
    setup.rows(|kind| row(setup, kind, &kind.to_string(), Ending::Stopped, progress))
}

/// Both passes of one tracker.
pub(super) fn row(setup: &Setup, kind: Kind, name: &str, ending: Ending, progress: &Progress) -> Result<Row, Failure> {
    let (plan, name) = (&setup.plan, name.to_owned());
    pass::row(&Case { setup, plan, name, kind, explained_by: ExplainedBy::L1, begin, ending }, progress)
}

/// The guest writes every page for the first time.
fn begin(run: &mut Run) -> Result<(), Failure> {
    run.command("populate", Command::Populate, 0)
}
