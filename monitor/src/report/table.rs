//! A Record as a table on the terminal.

use super::record::{Pages, Phase, Record, Row, Rows, Stall};
use super::{counters, rate, roots, snapshot};
use comfy_table::{Cell, CellAlignment, ContentArrangement, LineStyle, Table, TableStyle};
use std::fmt::Write as _;

/// The text that a user reads: what ran where, the costs, the checks, and what the numbers leave out.
#[must_use]
pub fn render(record: &Record) -> String {
    let mut text = heading(record);
    let measured: Vec<_> = record.measured().collect();
    if record.scenario == "snapshot" {
        let _ = write!(text, "\n{}\n", snapshot::table(record, pages(record)));
        text.push_str(&missing(record));
        text.push_str(snapshot::FOOTNOTES);
        let about = about_clock(record, &text);
        return text + &about;
    }
    if measured.iter().any(|row| row.rate.is_some()) {
        let _ = write!(text, "\n{}\n", rate::table(&measured));
    }
    if record.scenario == "roots" {
        if let Some(table) = roots::table(record) {
            let _ = write!(text, "\n{table}\n");
        }
        if let Some(table) = roots::roles(record) {
            let _ = write!(text, "\n{table}\n");
        }
        let _ = write!(text, "{}{}", roots::scripts(record), roots::storms(record));
        text.push_str(&missing(record));
        text.push_str(roots::footnotes(record));
        let about = about_clock(record, &text);
        return text + &about;
    }
    if measured.iter().any(|row| !row.phases.is_empty()) {
        let _ = write!(text, "\n{}\n", costs(record, &measured));
    }
    let checked: Vec<_> = measured.iter().copied().filter(|row| is_tracked(row)).collect();
    if !checked.is_empty() {
        let _ = write!(text, "\n{}\n", checks(&checked));
    }
    for table in counters::tables(&measured) {
        let _ = write!(text, "\n{table}\n");
    }
    text.push_str(&missing(record));
    text.push_str(&footnotes(record, &measured));
    let about = about_clock(record, &text);
    text + &about
}

/// What this host cannot do: a line for each reason, with the rows that it keeps away.
fn missing(record: &Record) -> String {
    let mut reasons: Vec<(&str, Vec<&str>)> = Vec::new();
    for row in &record.rows {
        let Rows::NotHere { name, not_here } = row else { continue };
        match reasons.iter_mut().find(|(reason, _)| reason == not_here) {
            Some((_, names)) => names.push(name),
            None => reasons.push((not_here, vec![name])),
        }
    }
    reasons.iter().fold(String::new(), |mut text, (reason, names)| {
        let _ = writeln!(text, "{}: not here: {reason}", names.join(", "));
        text
    })
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

pub(super) fn pages(record: &Record) -> u64 {
    number(record, "memory") / 4096
}

/// Pages of the pattern: those of an L2 where there is one.
fn pattern_pages(record: &Record) -> u64 {
    pages(record) * aliases(record)
}

/// Accesses of one round, which the firmware executes and the table divides by.
pub(super) fn accesses(record: &Record) -> u64 {
    let pages = pattern_pages(record);
    if words(record, "pattern") == "empty" { 0 } else { pages * number(record, "accesses-per-page") }
}

fn heading(record: &Record) -> String {
    let host = &record.host;
    if record.scenario == "model" {
        return model_heading(record);
    }
    if record.scenario == "roots" && roots::is_on_shadow_mmu(record) {
        return roots::shadow_heading(record);
    }
    let place = match host.ground.as_str() {
        "lab" => format!("the lab ({}), ", host.emulator.as_deref().unwrap_or("emulator unknown")),
        _ => "this machine, ".to_owned(),
    };
    format!(
        "{}: {place}Linux {}, KVM on {}\n{} pages ({} MiB) in {} slot{}, {}; {} vCPU{}; {}\n",
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
        work(record),
    ) + &about_l2(record)
}

/// What the guest does.
fn work(record: &Record) -> String {
    let (seed, edits) = (words(record, "seed"), number(record, "edits"));
    match record.scenario.as_str() {
        "edits" if record.config.contains_key("race") => {
            return format!("seed {seed}: {edits} random edits of L1's table, beside an L2 that runs");
        }
        "edits" => return format!("seed {seed}: {edits} random edits of L1's table"),
        "hostile" => return format!("seed {seed}: {edits} cases of a malicious L1"),
        _ => {}
    }
    let accesses = accesses(record);
    let writes = match record.config.get("write-percent").and_then(serde_json::Value::as_u64) {
        Some(percent) => format!("{} of {accesses} accesses a round write ({percent}%)", accesses * percent / 100),
        None => format!("{accesses} accesses a round"),
    };
    format!("pattern {}, seed {seed}: {writes}", words(record, "pattern"))
}

/// What L2 is, where there is one.
fn about_l2(record: &Record) -> String {
    if !["nested", "edits", "hostile"].contains(&record.scenario.as_str()) {
        return String::new();
    }
    let filled = match number(record, "fill-batch") {
        0 => "all before it starts".to_owned(),
        batch => format!("{batch} at a violation"),
    };
    let flags = match words(record, "accessed-dirty").as_str() {
        "" => String::new(),
        given => format!(" with A and D {given}"),
    };
    format!(
        "L2: {} pages, {} of them for each of L1's ({}); L1 maps them by {} leaves{flags}, {filled}\n",
        pattern_pages(record),
        aliases(record),
        words(record, "alias-kind"),
        words(record, "leaf"),
    )
}

/// What a run of the shadow MMU was about.
fn model_heading(record: &Record) -> String {
    let place = match record.host.ground.as_str() {
        "lab" => format!("in the lab, Linux {}", record.host.kernel),
        _ => "no clock".to_owned(),
    };
    let or = |option: &str, default: &str| match words(record, option) {
        given if given.is_empty() => default.to_owned(),
        given => given,
    };
    format!(
        "model: Umbra's shadow MMU on the software walker, {place}\n\
         {} L1 pages ({} MiB), L2 GPAs of each: {} ({}); EPT12: {}, leaves {}; split {}, collapse {}\n\
         pattern {}, {}% of {} accesses a round write\n",
        pages(record),
        number(record, "memory") >> 20,
        aliases(record),
        or("alias-kind", "contiguous"),
        or("format", "ept"),
        or("leaf", "4k"),
        or("split", "lazy"),
        or("collapse", "none"),
        words(record, "pattern"),
        number(record, "write-percent"),
        accesses(record),
    )
}

/// L2 GPAs for each tracked page: 1 where there is no L2.
fn aliases(record: &Record) -> u64 {
    number(record, "alias").max(1)
}

/// Up to four significant digits: 987, 19.95k, 4.701M, 135.9M.
pub(super) fn scaled(value: u64) -> String {
    let (unit, suffix) = match value {
        0..10_000 => return value.to_string(),
        10_000..1_000_000 => (1000, "k"),
        1_000_000..1_000_000_000 => (1_000_000, "M"),
        _ => (1_000_000_000, "G"),
    };
    let digits = match value / unit {
        0..10 => 3,
        10..100 => 2,
        100..1000 => 1,
        _ => 0,
    };
    #[allow(clippy::cast_precision_loss)] // Four digits are shown.
    let number = value as f64 / unit as f64;
    format!("{number:.digits$}{suffix}")
}

/// `value / count`, rounded, with a digit behind the point below ten.
pub(super) fn per(value: u64, count: u64) -> String {
    if count == 0 {
        return "-".to_owned();
    }
    let tenths = value.saturating_mul(10).saturating_add(count / 2) / count;
    if tenths < 100 {
        format!("{}.{}", tenths / 10, tenths % 10)
    } else {
        (value.saturating_add(count / 2) / count).to_string()
    }
}

/// Of which rounds a column is: of none, of the first, of the later ones.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Rounds {
    None,
    First,
    Later,
}

/// What a column's cost is divided by.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Share {
    /// Nothing: it is the cost of one.
    One,
    /// Tracked pages.
    Pages,
    /// The pattern's pages.
    PatternPages,
    /// Accesses of a round.
    Accesses,
}

/// The columns of the cost table: heading, phase, rounds, share.
pub(super) const COLUMNS: &[(&str, &str, Rounds, Share)] = &[
    ("populate", "populate", Rounds::None, Share::Pages),
    ("enter", "enter", Rounds::None, Share::One),
    ("fill", "fill", Rounds::None, Share::PatternPages),
    ("first touch", "first-touch", Rounds::None, Share::PatternPages),
    ("second touch", "second-touch", Rounds::None, Share::PatternPages),
    ("baseline", "baseline", Rounds::None, Share::Accesses),
    ("enable", "enable", Rounds::None, Share::Pages),
    ("dirty 1", "dirty", Rounds::First, Share::Accesses),
    ("edit 1", "edit", Rounds::First, Share::One),
    ("get 1", "get", Rounds::First, Share::Pages),
    ("clear 1", "clear", Rounds::First, Share::Pages),
    ("dirty 2+", "dirty", Rounds::Later, Share::Accesses),
    ("edit 2+", "edit", Rounds::Later, Share::One),
    ("get 2+", "get", Rounds::Later, Share::Pages),
    ("clear 2+", "clear", Rounds::Later, Share::Pages),
    ("disable", "disable", Rounds::None, Share::Pages),
    ("retouch", "retouch", Rounds::None, Share::Accesses),
    ("settled", "settled", Rounds::None, Share::Accesses),
];

/// The smallest value of a column's phases in the timed pass: the minimum over later rounds is what repeats.
pub(super) fn smallest<'a>(row: &'a Row, phase: &str, rounds: Rounds) -> Option<&'a Phase> {
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
pub(super) fn plain_table() -> Table {
    let line = LineStyle::none().fill('─').junction('─');
    let style = TableStyle::new().top_border(line).header_separator(line).bottom_border(line);
    let mut table = Table::new();
    table.load_style(style).set_content_arrangement(ContentArrangement::Disabled);
    table
}

pub(super) fn heading_cell(text: &str) -> Cell {
    Cell::new(text).set_alignment(CellAlignment::Right)
}

fn costs(record: &Record, rows: &[&Row]) -> Table {
    let unit = rows.iter().find_map(|row| row.phases.first()).map_or("", |phase| phase.unit.as_str());
    let mut table = plain_table();
    let shown: Vec<_> = COLUMNS
        .iter()
        .filter(|(_, phase, rounds, _)| rows.iter().any(|row| smallest(row, phase, *rounds).is_some()))
        .collect();
    let mut header = vec![heading_cell(&format!("{unit}\nper page\nin all"))];
    header.extend(shown.iter().map(|(title, ..)| heading_cell(title)));
    table.set_header(header);
    for row in rows {
        let mut cells = vec![Cell::new(&row.name)];
        for (_, phase, rounds, share) in &shown {
            let count = match share {
                Share::One => 1,
                Share::Pages => pages(record),
                Share::PatternPages => pattern_pages(record),
                Share::Accesses => accesses(record),
            };
            let text = smallest(row, phase, *rounds).map_or_else(
                || "-".to_owned(),
                |p| format!("{}{}\n{}", per(p.value, count), if p.clean { "" } else { "*" }, scaled(p.value)),
            );
            cells.push(Cell::new(text).set_alignment(CellAlignment::Right));
        }
        table.add_row(cells);
    }
    table
}

pub(super) fn right(text: String) -> Cell {
    Cell::new(text).set_alignment(CellAlignment::Right)
}

/// Whether something was tracked in that row; one without phases says it by its pages alone.
fn is_tracked(row: &Row) -> bool {
    !row.phases.is_empty() || row.truth.pages != Pages::default()
}

/// Truth and stalls, a row for each row of the Record, and one more for those that have an L2: the same by L2's pages.
fn checks(rows: &[&Row]) -> Table {
    let mut table = plain_table();
    let unchanged = rows.iter().any(|row| row.truth.pages.unchanged > 0);
    let numbers = |truth: &Pages| {
        let same = unchanged.then_some(truth.unchanged);
        let all = [truth.written, truth.reported, truth.explained, truth.missed, truth.extra];
        all.into_iter().chain(same).map(|n| right(n.to_string())).collect::<Vec<_>>()
    };
    let stalls = rows.iter().any(|row| row.stall.is_some());
    let unit = rows.iter().find_map(|row| row.stall.as_ref()).map(|stall| format!("\nstalls: {}", stall.unit));
    let mut header = vec![heading_cell(&format!("pages, in all rounds{}", unit.unwrap_or_default()))];
    header.extend(["written", "reported", "explained", "missed", "extra"].map(heading_cell));
    if unchanged {
        header.push(heading_cell("unchanged"));
    }
    // Under nesting one way's longest stall pays for what its others save.
    let mean = rows.iter().any(|row| row.truth.l2.is_some());
    let stall_cells = |stall: &Stall| {
        let mean = mean.then(|| stall.total / stall.count.max(1));
        [stall.p50, stall.p99, stall.p999].into_iter().chain(mean).chain([stall.max]).collect::<Vec<_>>()
    };
    let stall_columns = if stalls { stall_cells(&Stall::default()).len() } else { 0 };
    if stalls {
        header.extend(["stall p50", "p99", "p99.9"].map(heading_cell));
        header.extend(mean.then(|| heading_cell("mean")));
        header.push(heading_cell("max"));
    }
    let memory = rows.iter().any(|row| row.memory.is_some());
    if memory {
        header.extend(["tables, bytes", "rmaps", "in caches", "tracking"].map(heading_cell));
    }
    table.set_header(header);
    for row in rows {
        let mut cells = vec![Cell::new(&row.name)];
        cells.extend(numbers(&row.truth.pages));
        match &row.stall {
            Some(stall) => cells.extend(stall_cells(stall).into_iter().map(|value| right(scaled(value)))),
            None => cells.extend((0..stall_columns).map(|_| right("-".to_owned()))),
        }
        if let Some(bytes) = &row.memory {
            let bytes = [bytes.table_bytes, bytes.rmap_bytes, bytes.cache_bytes, bytes.track_bytes];
            cells.extend(bytes.map(|value| right(scaled(value))));
        }
        table.add_row(cells);
        if let Some(l2) = &row.truth.l2 {
            let mut cells = vec![Cell::new("  of L2")];
            cells.extend(numbers(&l2.pages));
            cells.extend((0..stall_columns).map(|_| Cell::new("")));
            table.add_row(cells);
        }
    }
    table
}

fn footnotes(record: &Record, rows: &[&Row]) -> String {
    let mut text = String::new();
    if rows.iter().any(|row| !row.phases.is_empty()) {
        text.push_str("dirty and retouch: per access; all other phases: per tracked page. 2+: the cheapest of the later rounds.\n");
    }
    if record.scenario == "dirty-rate" {
        text.push_str(
            "written: for certain between the tool's two looks, to while it looked as well. error: against the middle. The guest touches one page each `pace` at most;\n\
             its rate while the tool ran and afterwards is against that before, and what a write took is by its own clock.\n",
        );
    }
    if record.scenario == "collapse" {
        text.push_str("baseline, retouch, settled: a round before logging, right after it, and the one after that.\n");
    }
    if record.scenario == "nested" {
        text.push_str("enter: one entry into L2 and the hypercall that ends it, by the guest's clock. fill (L1's table), first and second touch: per page of L2.\n");
        if number(record, "remaps") > 0 {
            text.push_str(
                "edit: L1's exchanges in a round, from its first store to the end of what it says about them.\n",
            );
        }
    }
    if rows.iter().any(|row| row.stall.is_some()) {
        text.push_str(
            "Costs: timed pass. Stalls (one write, guest's clock) and counters: observed pass. Pages: both passes.\n",
        );
    }
    text
}

/// What the clock's figures are, and what a mark in the table that is `shown` says.
fn about_clock(record: &Record, shown: &str) -> String {
    let mut text = String::new();
    text.push_str(match (record.scenario.as_str(), record.host.clock.as_str()) {
        ("model", "instructions") => {
            "Instructions of the shadow MMU and of the walker that executes L2; a real L2 pays an exit for each fault besides.\n"
        }
        ("roots", "none") => {
            "Faults and bytes, no time: in the lab (`umbra lab roots --roots ...`) the same run gives instructions.\n"
        }
        ("model", _) => "Faults and bytes, no time: `umbra lab model` gives instructions for the same run.\n",
        (_, "instructions") => {
            "Instructions of guest, kernel and monitor together; they leave out what a world switch, a TLB or cache miss costs on hardware.\n"
        }
        _ => "Wall-clock time on a machine that others may share: compare ratios, not single figures.\n",
    });
    if shown.contains('*') {
        text.push_str("* another task ran inside this window.\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        let shown = [(999, "999"), (9999, "9999"), (19_951, "19.95k"), (4_700_858, "4.701M"), (135_856_051, "135.9M")];
        for (value, text) in shown {
            assert_eq!(scaled(value), text);
        }
        assert_eq!(per(47, 10), "4.7");
        // A GET of 3157 for 16384 pages: 0.193 is nearer to 0.2.
        assert_eq!(per(3157, 16_384), "0.2");
        assert_eq!(per(9_960, 1000), "10");
        assert_eq!(per(16_000, 10), "1600");
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
