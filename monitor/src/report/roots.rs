//! The table of scenario `roots`: what a toggle costs, and what it costs afterwards.

use super::record::{Record, Row};
use super::table::{heading_cell, pages, plain_table, right, scaled};
use comfy_table::{Cell, Table};

/// What the columns are.
pub const FOOTNOTES: &str = "\
toggle: there and back; of the firmware's by its own clock, of the monitor's around its system calls (what KVM does about them at the next entry is
in the touch). touch again: every page once. Each the cheapest of the rounds, timed pass. refaults: page faults of that touch, observed pass.
";

/// The cheapest of a phase's rounds in the timed pass.
fn cheapest(row: &Row, phase: &str) -> Option<(u64, bool)> {
    let rounds = row.phases.iter().filter(|it| it.pass == "timed" && it.phase == phase);
    rounds.map(|it| (it.value, it.clean)).min()
}

/// A cost as a cell: marked where another task ran in its window.
fn cost(row: &Row, phase: &str) -> String {
    cheapest(row, phase)
        .map_or_else(|| "-".to_owned(), |(value, clean)| format!("{}{}", scaled(value), if clean { "" } else { "*" }))
}

fn count(row: &Row, name: &str) -> String {
    row.counters.get(name).map_or_else(|| "-".to_owned(), |counter| counter.value.to_string())
}

/// A row for each toggle.
#[must_use]
pub fn table(record: &Record) -> Table {
    let mut table = plain_table();
    let unit = &record.host.clock;
    let refaults = format!("refaults\nof {} pages", pages(record));
    let titles = [unit, "populate", "toggle", "touch again", &refaults];
    table.set_header(titles.map(heading_cell));
    for row in record.measured() {
        let cells = [cost(row, "populate"), cost(row, "toggle"), cost(row, "refault"), count(row, "refaults")];
        let mut line = vec![Cell::new(format!("{}{}", row.name, if row.failed() { " TRUTH FAILED" } else { "" }))];
        line.extend(cells.map(right));
        table.add_row(line);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::record::{Counter, Phase, Rows, SCHEMA};

    #[test]
    fn a_row_has_the_cheapest_round_and_the_counted_faults() {
        let phase = |phase: &str, round, value, pass: &str| Phase {
            phase: phase.into(),
            round,
            pass: pass.into(),
            value,
            unit: "instructions".into(),
            clean: round != 2,
        };
        let row = Row {
            name: "cr0.wp".into(),
            phases: vec![
                phase("toggle", 1, 500, "timed"),
                phase("toggle", 2, 400, "timed"),
                phase("toggle", 1, 300, "observed"),
                phase("refault", 1, 11_000_000, "timed"),
            ],
            counters: [(
                "refaults".into(),
                Counter { value: 4096, source: "tracepoint".into(), pass: "observed".into() },
            )]
            .into(),
            ..Row::default()
        };
        let record = Record {
            schema: SCHEMA,
            scenario: "roots".into(),
            host: super::super::Host { clock: "instructions".into(), ..Default::default() },
            config: [("memory".to_owned(), (16 << 20).into())].into(),
            rows: vec![Rows::Measured(Box::new(row))],
        };
        let text = table(&record).to_string();
        assert!(text.contains("of 4096 pages"), "{text}");
        let words: Vec<_> = text.lines().find(|line| line.contains("cr0.wp")).unwrap().split_whitespace().collect();
        assert_eq!(words, ["cr0.wp", "-", "400*", "11.00M", "4096"], "{text}");
    }
}
