//! A row for each way to run L2, on KVM's own nesting for each tracker, on Umbra's shadow MMU for each of its means.

use super::Setup;
use super::l2::{L2Options, Nesting};
use crate::failure::Failure;
use crate::guest::Plan;
use crate::progress::Progress;
use crate::report::Record;
use crate::report::record::{Row, Rows};
use crate::track::Kind;

/// The Record with a row for each of `ways`, as `make` makes it from plan, tracker and name; ways of KVM's have those of `trackers`, and plans of
/// Umbra's say how L2 runs by its means.
///
/// # Errors
/// What a row fails with, and what was asked for and is not here. A way that nobody asked for may be missing, and of umbra's means a host may have some
/// alone.
pub fn record<K: Copy + From<Kind> + Into<Option<Kind>>>(
    setup: &Setup,
    l2: &L2Options,
    ways: &[Nesting],
    trackers: &[K],
    progress: &Progress,
    make: impl Fn(&Plan, K, &str) -> Result<Row, Failure>,
) -> Result<Record, Failure> {
    let mut rows = Vec::new();
    for nesting in ways {
        let trackers = match nesting {
            Nesting::Umbra => l2.means.iter().map(|&means| Kind::Shadow(means).into()).collect(),
            _ => trackers.to_vec(),
        };
        let plan = super::nested::plan(setup, l2, *nesting);
        for tracker in trackers {
            let kind: Option<Kind> = tracker.into();
            let name = kind.map_or_else(|| nesting.to_string(), |kind| format!("{nesting}:{kind}"));
            let row = match &plan {
                Ok(plan) => by_means(setup, plan, kind, progress).and_then(|plan| make(&plan, tracker, &name)),
                Err(Failure::NotHere(why)) => Err(Failure::NotHere(why.clone())),
                Err(other) => Err(Failure::Check(other.to_string())),
            };
            rows.push(Setup::or_not_here(&name, row)?);
        }
    }
    let has_umbra = rows.iter().any(|row| matches!(row, Rows::Measured(row) if row.name.starts_with("umbra:")));
    setup.record_of(rows, |name| {
        let umbra = name.starts_with("umbra:");
        if umbra && has_umbra { l2.means_by_name } else { l2.named(name) || umbra && l2.means_by_name }
    })
}

/// `plan`, where L2 runs by the means that `kind` is.
fn by_means(setup: &Setup, plan: &Plan, kind: Option<Kind>, progress: &Progress) -> Result<Plan, Failure> {
    let shadow = match kind {
        Some(Kind::Shadow(means)) => super::nested::shadow(setup, plan, means, progress)?,
        _ => None,
    };
    Ok(Plan { shadow, ..plan.clone() })
}
