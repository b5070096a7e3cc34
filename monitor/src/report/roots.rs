//! The table of scenario `roots`: what a toggle costs, and what it costs afterwards.

use super::boots;
use super::record::{Record, Row, Rows};
use super::table::{heading_cell, pages, plain_table, right, scaled};
use comfy_table::{Cell, Table};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// What the columns are, where an L2 on the shadow MMU makes the changes.
pub const L2_FOOTNOTES: &str = "\
toggle: L2 announces the roles that it passes through, by doorbells, and is back; by L1's clock, its entry into L2 and the exit included. Deleting a slot
is the monitor's. touch again: every page once, by L2. Each the cheapest of the rounds, timed pass. refaults: tracked pages that the shadow MMU mapped
again in that touch; KVM's faults: page faults of L2's VMs then, observed pass. shadow pages, bytes, VMs: at their most. A root that is kept has a VM.
";
/// What the columns are, on the software walker.
pub const WALKER_FOOTNOTES: &str = "\
toggle: the roots of the roles that it passes through are loaded, and those before let go. touch again: every page once. Each the cheapest of the rounds.
refaults: of the shadow MMU, in that touch. shadow pages, bytes: at their most. 12-roles: each of twelve touches all pages, in turn.
";
/// What the columns are.
pub const FOOTNOTES: &str = "\
toggle: there and back; of the firmware's by its own clock, of the monitor's around its system calls (what KVM does about them at the next entry is
in the touch). touch again: every page once. Each the cheapest of the rounds, timed pass. refaults: page faults of that touch, observed pass.
Roots by role: from the kernel's events in the observed passes of all rows, machines' ends left out; pages are tracked ones.
";

/// What stands under the table of many runs.
const SERIES_FOOTNOTES: &str = "\
The cheapest of the rounds. script: all of its toggles. L2 on umbra-mmu: the toggles that it announces; refaults are the shadow MMU's, behind the stroke
KVM's own. walker: the same without KVM. An empty cell: that one has no such toggle; @all: by each vCPU in turn; @once: by all of them at once, none of
which comes back before all have gone.
";

/// The cheapest of a phase's clean rounds in the timed pass; where none is clean, the cheapest of all.
fn cheapest(row: &Row, phase: &str) -> Option<(u64, bool)> {
    let rounds = row.phases.iter().filter(|it| it.pass == "timed" && it.phase == phase);
    rounds.min_by_key(|it| (!it.clean, it.value)).map(|it| (it.value, it.clean))
}

/// A cost as a cell: marked where another task ran in its window.
fn cost(row: &Row, phase: &str) -> String {
    cheapest(row, phase)
        .map_or_else(|| "-".to_owned(), |(value, clean)| format!("{}{}", scaled(value), if clean { "" } else { "*" }))
}

pub(super) fn count(row: &Row, name: &str) -> String {
    row.counters.get(name).map_or_else(|| "-".to_owned(), |counter| counter.value.to_string())
}

/// The refaults of a row, and behind a stroke KVM's own faults where they are counted apart.
pub(super) fn refaults(row: &Row) -> String {
    let of_kvm = row.counters.get("kvm_faults").map_or_else(String::new, |it| format!(" / {}", it.value));
    count(row, "refaults") + &of_kvm
}

/// A paragraph for each row that is a storm of SMIs, rather than a toggle.
#[must_use]
pub fn storms(record: &Record) -> String {
    let mut text = String::new();
    for row in record.measured().filter(|row| is_storm(row)) {
        let counted = |name: &str| row.counters.get(name).map_or(0, |counter| counter.value);
        let (smis, inside) = (counted("smis"), counted("smis_in_write_loop"));
        let rounds = || row.phases.iter().filter(|it| it.phase == "dirty");
        let calm = rounds().find(|it| it.round == 1).map_or(0, |it| it.value);
        let struck: u64 = rounds().filter(|it| it.round > 1).map(|it| it.value).sum();
        let others = rounds().filter(|it| it.round > 1).count() as u64;
        let each = struck.saturating_sub(calm * others) / smis.max(1);
        let _ = writeln!(
            text,
            "{}: {smis} SMIs in {others} rounds of dirty logging, {inside} of them inside the write loop; a round takes {} without, {} with {} SMIs: {} for each\n{}  pages written {}, missed {}, extra {}; SMM wrote {} pages of its own, and the log of its own view holds {}",
            row.name,
            scaled(calm),
            scaled(struck / others.max(1)),
            smis / others.max(1),
            scaled(each),
            if row.failed() { "  TRUTH FAILED" } else { "" },
            row.truth.pages.written,
            row.truth.pages.missed,
            row.truth.pages.extra,
            counted("smram_pages_written"),
            counted("smram_pages_logged"),
        );
        for (name, counter) in &row.counters {
            if let Some(place) = name.strip_prefix("smis_at ") {
                let _ = writeln!(text, "  {:>8} at {place}", counter.value);
            }
        }
    }
    text
}

/// What one role came to over all rows.
#[derive(Default)]
struct OfRole<'a> {
    made: u64,
    torn_down: u64,
    mapped: u64,
    shortest: Option<u64>,
    causes: BTreeMap<&'a str, u64>,
}

/// The role log, summed by role; `None` where nothing was logged.
#[must_use]
pub fn roles(record: &Record) -> Option<Table> {
    let mut roles: BTreeMap<&str, OfRole> = BTreeMap::new();
    for life in record.measured().flat_map(|row| &row.roles) {
        let role = roles.entry(&life.role).or_default();
        role.made += 1;
        if let Some(cause) = &life.ended_by {
            role.torn_down += 1;
            role.mapped += life.mapped;
            *role.causes.entry(cause).or_default() += 1;
        }
        if let Some(length) = life.life {
            role.shortest = Some(role.shortest.map_or(length, |shortest| shortest.min(length)));
        }
    }
    if roles.is_empty() {
        return None;
    }
    let mut table = plain_table();
    let titles = [
        "roots by role",
        "made",
        "torn\ndown",
        "pages mapped\nat teardown",
        "shortest\nlife",
        "torn down by (how often)",
    ];
    table.set_header(titles.map(heading_cell));
    for (name, role) in roles {
        let causes: Vec<_> = role.causes.iter().map(|(cause, times)| format!("{cause} {times}")).collect();
        let lines: Vec<_> = causes.chunks(6).map(|some| some.join(", ")).collect();
        let mut line = vec![Cell::new(name)];
        let shortest = role.shortest.map_or_else(|| "-".to_owned(), scaled);
        let numbers = [role.made.to_string(), role.torn_down.to_string(), role.mapped.to_string(), shortest];
        line.extend(numbers.map(right));
        line.push(Cell::new(lines.join("\n")));
        table.add_row(line);
    }
    Some(table)
}

/// A paragraph for each row that is a script: how often a root was torn down in it.
#[must_use]
pub fn scripts(record: &Record) -> String {
    let mut text = String::new();
    for row in record.measured() {
        let counted = |name: &str| row.counters.get(name).map(|counter| counter.value);
        if let (Some(changes), Some(teardowns), Some(refaults)) =
            (counted("changes"), counted("teardowns"), counted("refaults"))
        {
            let _ = writeln!(
                text,
                "{}: {changes} changes with memory growing alongside, every page so far touched after each: {teardowns} tore a root down, {refaults} refaults",
                row.name
            );
        }
    }
    text
}

fn is_storm(row: &Row) -> bool {
    row.counters.contains_key("smis")
}

/// A row for each toggle; `None` if there is none.
#[must_use]
pub fn table(record: &Record) -> Option<Table> {
    if record.measured().all(is_storm) {
        return None;
    }
    let mut table = plain_table();
    let unit = &record.host.clock;
    let refaults = format!("refaults\nof {} pages", pages(record));
    let unit = record.measured().flat_map(|row| &row.phases).next().map_or(unit.as_str(), |phase| &phase.unit);
    let (on_l2, on_shadow_mmu) = (is_on_l2(record), is_on_shadow_mmu(record));
    let mut titles = vec![unit, "populate", "toggle", "touch again", &refaults];
    if on_l2 {
        titles.push("KVM's\nfaults");
    }
    if on_shadow_mmu {
        titles.extend(["shadow\npages", "bytes of\ntables", "of rmaps"]);
    }
    if on_l2 {
        titles.push("VMs");
    }
    table.set_header(titles.into_iter().map(heading_cell));
    for row in record.measured().filter(|row| !is_storm(row)) {
        let cells = [cost(row, "populate"), cost(row, "toggle"), cost(row, "refault"), count(row, "refaults")];
        let mut line = vec![Cell::new(format!("{}{}", row.name, if row.failed() { " TRUTH FAILED" } else { "" }))];
        line.extend(cells.map(right));
        if on_l2 {
            line.push(right(count(row, "kvm_faults")));
        }
        if on_shadow_mmu {
            let bytes = row.memory.unwrap_or_default();
            let held = [bytes.table_bytes, bytes.rmap_bytes].map(|bytes| bytes.to_string());
            line.extend([count(row, "shadow_pages")].into_iter().chain(held).map(right));
        }
        if on_l2 {
            line.push(right(count(row, "vms")));
        }
        table.add_row(line);
    }
    Some(table)
}

/// Several runs side by side: a row for each toggle, a column for each run, in a cell what the toggle cost and the refaults after it.
#[must_use]
pub fn series(records: &[&Record]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for row in records.iter().flat_map(|record| &record.rows) {
        if !names.contains(&row.name()) {
            names.push(row.name());
        }
    }
    let mut table = plain_table();
    let mut header = vec![heading_cell("toggle there and back\nrefaults after it")];
    header.extend(records.iter().map(|record| heading_cell(&place(record))));
    table.set_header(header);
    let (mut failed, mut rest) = (false, String::new());
    for name in names {
        let mut line = vec![Cell::new(name)];
        for record in records {
            let row = record.rows.iter().find(|row| row.name() == name);
            let text = match row {
                Some(Rows::Measured(row)) => {
                    failed |= row.failed();
                    let mark = if row.failed() { " TRUTH FAILED" } else { "" };
                    if is_storm(row) {
                        format!("{} SMIs{mark}\n{} in the loop", count(row, "smis"), count(row, "smis_in_write_loop"))
                    } else {
                        format!("{}{mark}\n{}", cost(row, "toggle"), refaults(row))
                    }
                }
                Some(Rows::NotHere { not_here, .. }) => {
                    let _ = writeln!(rest, "{}: {name}: not here: {not_here}", place(record).replace('\n', ", "));
                    "not here".to_owned()
                }
                None => String::new(),
            };
            line.push(right(text));
        }
        table.add_row(line);
    }
    let sizes: BTreeSet<u64> = records.iter().map(|record| pages(record)).collect();
    let sizes: Vec<_> = sizes.iter().map(u64::to_string).collect();
    let mut text = format!(
        "roots: {} pages, every one of them touched before and after the toggle\n\n{table}\n{rest}",
        sizes.join(" and ")
    );
    for record in records.iter().filter(|record| is_on_shadow_mmu(record)) {
        let most = record
            .measured()
            .filter_map(|row| Some((row.memory?, count(row, "shadow_pages"))))
            .max_by_key(|it| it.0.table_bytes);
        if let Some((bytes, pages)) = most {
            let _ = writeln!(
                text,
                "{}: {pages} shadow pages at most, {} bytes of tables and {} of reverse maps",
                place(record).replace('\n', " "),
                bytes.table_bytes,
                bytes.rmap_bytes
            );
        }
    }
    text.push_str(SERIES_FOOTNOTES);
    text.push_str(&boots::table(records));
    if failed {
        text.push_str("TRUTH FAILED: memory or registers were not what they had to be.\n");
    }
    text
}

/// What tells a run from the others, in two lines.
pub(super) fn place(record: &Record) -> String {
    let host = &record.host;
    let kernel = host.kernel_version();
    if is_on_shadow_mmu(record) {
        let policy = record.config.get("roots").and_then(serde_json::Value::as_str).unwrap_or_default();
        return format!("{}\n{policy}", if is_on_l2(record) { "L2 on umbra-mmu" } else { "walker" });
    }
    let older = host.params.get("kvm.tdp_mmu").is_some_and(|value| value == "N");
    let vcpus = record.config.get("vcpus").and_then(serde_json::Value::as_u64).unwrap_or(1);
    let mmu = if older { "older MMU" } else { "TDP MMU" };
    format!("{kernel}\n{mmu}{}", if vcpus > 1 { format!(", {vcpus} vCPUs") } else { String::new() })
}

/// What stands under a table.
#[must_use]
pub fn footnotes(record: &Record) -> &'static str {
    match (is_on_l2(record), is_on_shadow_mmu(record)) {
        (true, _) => L2_FOOTNOTES,
        (_, true) => WALKER_FOOTNOTES,
        _ => FOOTNOTES,
    }
}

/// Whether the changes were made on Umbra's own shadow MMU.
#[must_use]
pub fn is_on_shadow_mmu(record: &Record) -> bool {
    record.config.contains_key("roots")
}

/// Whether an L2 on it made them.
#[must_use]
pub fn is_on_l2(record: &Record) -> bool {
    is_on_shadow_mmu(record) && record.config.get("mechanism").is_none_or(|value| value != "walker")
}

/// What a run on the shadow MMU was about.
#[must_use]
pub fn shadow_heading(record: &Record) -> String {
    let place = match record.host.ground.as_str() {
        "lab" => format!("in the lab, Linux {}", record.host.kernel),
        "kvm" => format!("this machine, Linux {}, KVM on {}", record.host.kernel, record.host.vendor),
        _ => "no clock".to_owned(),
    };
    let policy = record.config.get("roots").and_then(serde_json::Value::as_str).unwrap_or_default();
    let who = if is_on_l2(record) {
        "an L2 on Umbra's shadow MMU"
    } else {
        "Umbra's shadow MMU on the software walker, no KVM under L2"
    };
    format!("roots: {who} ({place}); root policy {policy}; {} pages\n", pages(record))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::record::{Counter, Phase, SCHEMA};

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
        let text = table(&record).unwrap().to_string();
        assert!(text.contains("of 4096 pages"), "{text}");
        let words: Vec<_> = text.lines().find(|line| line.contains("cr0.wp")).unwrap().split_whitespace().collect();
        assert_eq!(words, ["cr0.wp", "-", "500", "11.00M", "4096"], "{text}");
    }
}
