//! What logging leaves behind: the phases of `dirty-log`, between a round before it and one long after it, once with logging stopped at rest and once
//! in the middle of a round, as in a migration that is given up. Whether the guest gets its huge mappings and its speed back, when, and at what cost.

use super::pass::Ending;
use super::{Setup, dirty_log};
use crate::failure::Failure;
use crate::progress::Progress;
use crate::report::Record;

/// Runs the scenario: two rows for each tracker, `TRACKER` and `TRACKER cancelled`.
pub fn run(setup: &Setup, progress: &Progress) -> Result<Record, Failure> {
    setup.check_named()?;
    let mut rows = Vec::new();
    for &kind in setup.trackers() {
        for (ending, name) in [(Ending::Watched, kind.to_string()), (Ending::Cancelled, format!("{kind} cancelled"))] {
            rows.push(Setup::or_not_here(&name, dirty_log::row(setup, kind, &name, ending, progress))?);
        }
    }
    setup.record(rows)
}
