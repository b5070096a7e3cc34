//! A Record as a table on the terminal.

use super::record::{Phase, Record, Row, Rows};
use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};
use std::fmt::Write as _;

/// The text that a user reads: what ran where, the costs, the checks, and what the numbers leave out.
#[must_use]
pub fn render(record: &Record) -> String {
    let mut text = heading(record);
    let measured: Vec<_> = record.measured().collect();
    if measured.iter().any(|row| !row.phases.is_empty()) {
        let _ = write!(text, "\n{}\n", costs(record, &measured));
    }
    let _ = write!(text, "\n{}\n", checks(&measured));
    for row in &record.rows {
        if let Rows::NotHere { name, not_here } = row {
            let _ = writeln!(text, "{name}: not here: {not_here}");
        }
    }
    text.push_str(&footnotes(record, &measured));
    text
}

fn number(record: &Record, option: &str) -> u64 {
    record.config.get(option).and_then(serde_json::Value::as_u64).unwrap_or(0)
}

fn words(record: &Record, option: &str) -> String {
    match record.config.get(option) {
        Some(serde_json::Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => String::new(),
    }
}

fn pages(record: &Record) -> u64 {
    number(record, "memory") / 4096
}

/// Accesses of one round, which the firmware executes and the table divides by.
fn accesses(record: &Record) -> u64 {
    if words(record, "pattern") == "empty" { 0 } else { pages(record) * number(record, "accesses-per-page") }
}

fn heading(record: &Record) -> String {
    let host = &record.host;
    let place = match host.ground.as_str() {
        "lab" => format!("the lab ({}), ", host.emulator.as_deref().unwrap_or("emulator unknown")),
        _ => "this machine, ".to_owned(),
    };
    let accesses = accesses(record);
    let percent = number(record, "write-percent");
    format!(
        "{}: {place}Linux {}, KVM on {}\n{} pages ({} MiB) in {} slot{}, {}; {} vCPU{}; pattern {}, seed {}: {} of {accesses} accesses a round write ({percent}%)\n",
        record.scenario,
        host.kernel,
        host.vendor,
        pages(record),
        number(record, "memory") >> 20,
        number(record, "slots"),
        if number(record, "slots") == 1 { "" } else { "s" },
        words(record, "backing"),
        number(record, "vcpus"),
        if number(record, "vcpus") == 1 { "" } else { "s" },
        words(record, "pattern"),
        words(record, "seed"),
        accesses * percent / 100,
    )
}

/// A group of digits every three.
fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `value / count` with a digit behind the point below ten.
fn per(value: u64, count: u64) -> String {
    if count == 0 {
        return "-".to_owned();
    }
    let tenths = value.saturating_mul(10) / count;
    if tenths < 100 { format!("{}.{}", tenths / 10, tenths % 10) } else { grouped((value + count / 2) / count) }
}

/// The columns of the cost table: heading, phase, whether it is of the first round, of the later ones, or of none.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rounds {
    None,
    First,
    Later,
}

const COLUMNS: &[(&str, &str, Rounds)] = &[
    ("populate", "populate", Rounds::None),
    ("enable", "enable", Rounds::None),
    ("dirty 1", "dirty", Rounds::First),
    ("get 1", "get", Rounds::First),
    ("clear 1", "clear", Rounds::First),
    ("dirty 2+", "dirty", Rounds::Later),
    ("get 2+", "get", Rounds::Later),
    ("clear 2+", "clear", Rounds::Later),
    ("disable", "disable", Rounds::None),
    ("retouch", "retouch", Rounds::None),
];

/// The smallest value of a column's phases in the timed pass: the minimum over later rounds is what repeats.
fn smallest<'a>(row: &'a Row, phase: &str, rounds: Rounds) -> Option<&'a Phase> {
    row.phases
        .iter()
        .filter(|p| p.pass == "timed" && p.phase == phase)
        .filter(|p| match rounds {
            Rounds::None => p.round == 0,
            Rounds::First => p.round == 1,
            Rounds::Later => p.round > 1,
        })
        .min_by_key(|p| p.value)
}

/// A table of plain text: no colours, so `NO_COLOR` has nothing to forbid.
fn plain_table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Disabled);
    table
}

fn heading_cell(text: &str) -> Cell {
    Cell::new(text).set_alignment(CellAlignment::Right)
}

fn costs(record: &Record, rows: &[&Row]) -> Table {
    let unit = &record.host.clock;
    let mut table = plain_table();
    let shown: Vec<_> = COLUMNS
        .iter()
        .filter(|(_, phase, rounds)| rows.iter().any(|row| smallest(row, phase, *rounds).is_some()))
        .collect();
    let mut header = vec![heading_cell(&format!("{unit}\nper page\nin all"))];
    header.extend(shown.iter().map(|(title, ..)| heading_cell(title)));
    table.set_header(header);
    for row in rows {
        let mut cells = vec![Cell::new(&row.name)];
        for (_, phase, rounds) in &shown {
            let count = if matches!(*phase, "dirty" | "retouch") { accesses(record) } else { pages(record) };
            let text = smallest(row, phase, *rounds).map_or_else(
                || "-".to_owned(),
                |p| format!("{}{}\n{}", per(p.value, count), if p.clean { "" } else { "*" }, grouped(p.value)),
            );
            cells.push(Cell::new(text).set_alignment(CellAlignment::Right));
        }
        table.add_row(cells);
    }
    table
}

fn checks(rows: &[&Row]) -> Table {
    let mut table = plain_table();
    let stalls = rows.iter().any(|row| row.stall.is_some());
    let counters: Vec<_> = {
        let mut names: Vec<_> = rows.iter().flat_map(|row| row.counters.keys()).collect();
        names.sort();
        names.dedup();
        names
    };
    let mut header = vec![heading_cell("")];
    if stalls {
        header.extend(["stall p50", "p99", "max"].map(heading_cell));
    }
    header.extend(counters.iter().map(|name| heading_cell(&name.replace('_', "\n"))));
    header.extend(["written", "reported", "explained", "missed", "extra"].map(heading_cell));
    table.set_header(header);
    for row in rows {
        let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        let mut cells = vec![Cell::new(&row.name)];
        if stalls {
            let all = row.stall.as_ref().map(|stall| [stall.p50, stall.p99, stall.max]);
            cells
                .extend((0..3).map(|index| right(all.map_or_else(|| "-".to_owned(), |values| grouped(values[index])))));
        }
        cells.extend(
            counters
                .iter()
                .map(|name| right(row.counters.get(*name).map_or_else(|| "-".to_owned(), |c| grouped(c.value)))),
        );
        let truth = row.truth.pages;
        let sums = [truth.written, truth.reported, truth.explained, truth.missed, truth.extra];
        cells.extend(sums.map(|sum| right(grouped(sum))));
        table.add_row(cells);
    }
    table
}

fn footnotes(record: &Record, rows: &[&Row]) -> String {
    let mut text = String::new();
    if rows.iter().any(|row| !row.phases.is_empty()) {
        text.push_str("dirty and retouch: per access; all other phases: per tracked page. 2+: the cheapest of the later rounds.\n");
        text.push_str(
            "Costs: timed pass. Stalls (one access, guest's clock) and counters: observed pass. Pages: both passes.\n",
        );
    }
    let unit = record.host.clock.as_str();
    text.push_str(match unit {
        "instructions" => {
            "Instructions of guest, kernel and monitor together; they leave out what a world switch, a TLB or cache miss costs on hardware.\n"
        }
        _ => "Wall-clock time on a machine that others may share: compare ratios, not single figures.\n",
    });
    if rows.iter().flat_map(|row| &row.phases).any(|phase| !phase.clean && phase.pass == "timed") {
        text.push_str("* another task ran inside this window.\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(grouped(999), "999");
        assert_eq!(per(47, 10), "4.7");
        assert_eq!(per(16_000, 10), "1,600");
        assert_eq!(per(5, 0), "-");
    }

    #[test]
    fn an_unclean_window_is_marked_and_a_missing_row_named() {
        let phase = |clean| Phase {
            phase: "enable".into(),
            round: 0,
            pass: "timed".into(),
            value: 1000,
            unit: "instructions".into(),
            clean,
        };
        let row = Row { name: "clear".into(), phases: vec![phase(false)], ..Row::default() };
        let record = Record {
            schema: 1,
            scenario: "dirty-log".into(),
            host: super::super::Host { clock: "instructions".into(), ..Default::default() },
            config: [("memory".to_owned(), 409_600.into())].into(),
            rows: vec![
                Rows::Measured(Box::new(row)),
                Rows::NotHere { name: "ring".into(), not_here: "KVM_CAP_DIRTY_LOG_RING is missing".into() },
            ],
        };
        let text = render(&record);
        assert!(text.contains("10*"), "{text}");
        assert!(text.contains("ring: not here: KVM_CAP_DIRTY_LOG_RING"), "{text}");
        assert!(text.contains("another task ran"), "{text}");
    }
}
