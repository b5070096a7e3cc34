//! Which tracker for a snapshot: the phases of `dirty-log`, all trackers, for rounds in which no page is written, a few, some, and all.

use super::pass::Ending;
use super::{Setup, dirty_log};
use crate::failure::Failure;
use crate::progress::Progress;
use crate::report::Record;
use crate::report::record::Rows;
use crate::report::snapshot::PERCENTS;

/// Runs the scenario: a row for each tracker and share of writes, named `TRACKER SHARE%`.
pub fn run(setup: &Setup, progress: &Progress) -> Result<Record, Failure> {
    let mut rows = Vec::new();
    for &kind in setup.trackers() {
        for percent in PERCENTS {
            match dirty_log::row(
                &setup.writing(percent),
                kind,
                &format!("{kind} {percent}%"),
                Ending::Stopped,
                progress,
            ) {
                Ok(row) => {
                    rows.push(Rows::Measured(Box::new(row)));
                }
                Err(Failure::NotHere(reason)) => {
                    rows.push(Rows::NotHere { name: kind.to_string(), not_here: reason });
                    break;
                }
                Err(other) => return Err(other),
            }
        }
    }
    let mut record = setup.record(rows)?;
    // It is not the option's value that was in effect.
    record.config.remove("write-percent");
    Ok(record)
}
