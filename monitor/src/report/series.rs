//! Many Records in one table: a matrix, the history of a figure over kernels, the noise of shifted images.

use super::compare::{changes_a_slot, noise};
use super::record::{Record, Row, Rows};
use super::roots;
use super::table::{self, COLUMNS, Rounds, heading_cell, per, plain_table, right, smallest};
use crate::kvm::footprint;
use comfy_table::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// A line for each row of each Record: what varies, then the costs per page.
#[must_use]
pub fn matrix(records: &[Record]) -> String {
    let mut text = String::new();
    let scenarios: BTreeSet<&str> = records.iter().map(|record| record.scenario.as_str()).collect();
    for scenario in scenarios {
        let records: Vec<&Record> = records.iter().filter(|record| record.scenario == scenario).collect();
        text.push_str(&match scenario {
            "roots" => roots::series(&records),
            _ => one_scenario(scenario, &records),
        });
    }
    text
}

fn one_scenario(scenario: &str, records: &[&Record]) -> String {
    let mut places: Vec<BTreeMap<String, String>> = records.iter().map(|record| place(record)).collect();
    one_spelling(&mut places);
    let names: BTreeSet<&String> = places.iter().flat_map(BTreeMap::keys).collect();
    let (mut varying, mut fixed) = (Vec::new(), Vec::new());
    for name in names {
        let mut values: BTreeSet<Option<&String>> = places.iter().map(|place| place.get(name)).collect();
        if name.contains('.') && values.len() > 1 {
            // A parameter of a module that the other machine does not have says nothing by being absent.
            values.remove(&None);
        }
        match values.first() {
            Some(Some(value)) if values.len() == 1 => fixed.push(format!("{name} {value}")),
            // Which trackers a run had, its rows say.
            _ if name == "tracker" => {}
            _ => varying.push(name),
        }
    }
    let measured = || records.iter().flat_map(|record| record.measured());
    let shown: Vec<_> = COLUMNS
        .iter()
        .filter(|(_, phase, rounds, _)| measured().any(|row| smallest(row, phase, *rounds).is_some()))
        .collect();
    let stalls = measured().any(|row| row.stall.is_some());
    let mut table = plain_table();
    let mut header: Vec<Cell> = varying.iter().map(|name| Cell::new(name.trim_start_matches("kvm."))).collect();
    header.push(Cell::new("row"));
    header.extend(shown.iter().map(|(title, ..)| heading_cell(title)));
    if stalls {
        header.extend(["stall p50", "max"].map(heading_cell));
    }
    let counts = |name: &str| measured().any(|row| row.counters.contains_key(name));
    let counted: Vec<&str> = COUNTED
        .iter()
        .copied()
        .filter(|name| counts(name) && (!footprint::NAMES.contains(name) || counts(footprint::LISTS)))
        .collect();
    header.extend(counted.iter().map(|name| heading_cell(&lines(name))));
    let bytes = measured().any(|row| row.memory.is_some());
    if bytes {
        header.push(heading_cell("bytes"));
    }
    table.set_header(header);
    let (mut rest, mut unclean, mut failed, mut uncounted) = (String::new(), false, false, false);
    let mut last: Vec<String> = Vec::new();
    for (record, place) in records.iter().zip(&places) {
        let here: Vec<String> =
            varying.iter().map(|name| place.get(*name).cloned().unwrap_or_else(|| "-".to_owned())).collect();
        for row in &record.rows {
            match row {
                Rows::Measured(row) => {
                    let same = here == last;
                    let mut cells: Vec<Cell> =
                        here.iter().map(|value| Cell::new(if same { "" } else { value })).collect();
                    last.clone_from(&here);
                    cells.push(Cell::new(format!("{}{}", row.name, if row.failed() { " TRUTH FAILED" } else { "" })));
                    failed |= row.failed();
                    for (_, phase, rounds, _) in &shown {
                        let (cell, clean) = cost(record, row, phase, *rounds);
                        unclean |= !clean;
                        cells.push(right(cell));
                    }
                    if stalls {
                        let value = |of: fn(&super::record::Stall) -> u64| {
                            row.stall.as_ref().map_or_else(|| "-".to_owned(), |stall| table::scaled(of(stall)))
                        };
                        cells.extend([right(value(|stall| stall.p50)), right(value(|stall| stall.max))]);
                    }
                    let value =
                        |name: &str| row.counters.get(name).map_or_else(|| "-".to_owned(), |it| it.value.to_string());
                    uncounted |= counted.iter().any(|name| !row.counters.contains_key(*name));
                    cells.extend(counted.iter().map(|name| right(value(name))));
                    if bytes {
                        let bytes = row.memory.map(|bytes| table::scaled(bytes.total()));
                        cells.push(right(bytes.unwrap_or_else(|| "-".to_owned())));
                    }
                    table.add_row(cells);
                }
                Rows::NotHere { name, not_here } => {
                    let _ = writeln!(rest, "{}: {name}: not here: {not_here}", here.join(" "));
                }
            }
        }
    }
    let mut text = format!("{scenario}: {}\n\n{table}\n{rest}", fixed.join(", "));
    let clocks: BTreeSet<&str> = records.iter().map(|record| record.host.clock.as_str()).collect();
    let clocks = clocks.into_iter().collect::<Vec<_>>().join(" or ");
    let _ = writeln!(
        text,
        "Phases: {clocks} per page, per access for dirty and retouch; 2+: the cheapest of the later rounds."
    );
    if uncounted {
        text.push_str("-: this kernel, or this row, has no such counter.\n");
    }
    if unclean {
        text.push_str("* another task ran inside this window.\n");
    }
    if failed {
        text.push_str("TRUTH FAILED: pages were missed, or reported without a reason.\n");
    }
    text
}

/// Modules spell their switches as `Y` and `N` or as `1` and `0`, and some change that from kernel to kernel (`kvm_amd.npt`): the first where both occur.
fn one_spelling(places: &mut [BTreeMap<String, String>]) {
    let switches: BTreeSet<String> = places
        .iter()
        .flatten()
        .filter(|(name, value)| name.contains('.') && matches!(value.as_str(), "Y" | "N"))
        .map(|(name, _)| name.clone())
        .collect();
    for (_, value) in places.iter_mut().flatten().filter(|(name, _)| switches.contains(*name)) {
        match value.as_str() {
            "1" => "Y".clone_into(value),
            "0" => "N".clone_into(value),
            _ => {}
        }
    }
}

/// A counter's name as a heading: words, in lines of some twelve columns.
fn lines(name: &str) -> String {
    let mut text = String::new();
    let mut width = 0;
    for word in name.split('_') {
        if width > 0 {
            text.push(if width + word.len() < 13 { ' ' } else { '\n' });
            width = if text.ends_with('\n') { 0 } else { width + 1 };
        }
        text.push_str(word);
        width += word.len();
    }
    text
}

/// Counters that a scenario is about, shown where a row has them; and KVM's bytes (kvm/footprint.rs), where all of them are known because somebody asked
/// for them by the kernel's command line.
const COUNTED: &[&str] = &[
    "faults",
    "pages_2m_before",
    "pages_2m_logging",
    "pages_2m_after_disable",
    "pages_2m_after_retouch",
    "pf_retouch",
    "pf_settled",
    "kvm_table_bytes",
    "kvm_header_bytes",
    "kvm_pte_list_bytes",
    "kvm_sec_page_table_bytes",
];

fn cost(record: &Record, row: &Row, phase: &str, rounds: Rounds) -> (String, bool) {
    let count = if matches!(phase, "dirty" | "retouch" | "baseline" | "settled") {
        table::accesses(record)
    } else {
        table::pages(record)
    };
    match smallest(row, phase, rounds) {
        Some(phase) => (format!("{}{}", per(phase.value, count), if phase.clean { "" } else { "*" }), phase.clean),
        None => ("-".to_owned(), true),
    }
}

/// Everything that a run can differ in, by name.
fn place(record: &Record) -> BTreeMap<String, String> {
    let host = &record.host;
    let mut place: BTreeMap<String, String> =
        host.params.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
    place.insert("kernel".to_owned(), host.kernel_version().to_owned());
    place.insert("clock".to_owned(), host.clock.clone());
    place.insert("vendor".to_owned(), host.vendor.clone());
    for (name, value) in &record.config {
        let said = match value {
            serde_json::Value::String(text) => text.clone(),
            serde_json::Value::Number(bytes) if name == "memory" => {
                bytes.as_u64().map_or_else(|| bytes.to_string(), |bytes| format!("{}M", bytes >> 20))
            }
            other => other.to_string(),
        };
        place.insert(name.clone(), said);
    }
    place
}

/// What shifted images make of the same work: the smallest and the largest of each figure, and whether the spread is below what
/// [`noise`] claims.
#[must_use]
pub fn noise_of(records: &[Record]) -> (String, Vec<String>) {
    let mut table = plain_table();
    let header = ["", "", "smallest", "largest", "spread", "of it", "floor"];
    table.set_header(header.map(heading_cell));
    let (mut worst, mut of_slots, mut over) = (0.0_f64, 0.0_f64, Vec::new());
    let Some(first) = records.first() else { return (String::new(), over) };
    for row in first.measured() {
        let mut name = row.name.as_str();
        for &(title, phase, rounds, _) in COLUMNS {
            let rows = records.iter().flat_map(|record| record.measured().filter(|other| other.name == row.name));
            let values: Vec<u64> =
                rows.filter_map(|row| smallest(row, phase, rounds)).filter(|it| it.clean).map(|it| it.value).collect();
            let (Some(&least), Some(&most)) = (values.iter().min(), values.iter().max()) else { continue };
            #[allow(clippy::cast_precision_loss)] // Three digits are shown.
            let share = (most - least) as f64 / most.max(1) as f64 * 100.0;
            let floor = noise(phase, most);
            if most - least > floor {
                over.push(format!(
                    "{}: {title} varies by {} instructions, and the floor is {floor}",
                    row.name,
                    most - least
                ));
            }
            // What a short phase may always have says nothing about shares.
            if most - least > noise(phase, 0) {
                let worst = if changes_a_slot(phase) { &mut of_slots } else { &mut worst };
                *worst = worst.max(share);
            }
            let cells = [
                title.to_owned(),
                least.to_string(),
                most.to_string(),
                (most - least).to_string(),
                format!("{share:.3}%"),
                floor.to_string(),
            ];
            let mut line = vec![Cell::new(std::mem::take(&mut name))];
            line.extend(cells.map(right));
            table.add_row(line);
        }
    }
    let text = format!(
        "{}: {} images that are merely shifted, Linux {}\n\n{table}\nThe worst spread is {worst:.3}%, and {of_slots:.3}% in phases that allocate or change a memory slot, \
beside {} and {} instructions that a short phase may have.\n",
        first.scenario,
        records.len(),
        first.host.kernel,
        noise("", 0),
        noise("enable", 0),
    );
    (text, over)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Host;
    use crate::report::record::{Bytes, Counter, Phase, SCHEMA};

    fn record(kernel: &str, enable: u64) -> Record {
        let phase = Phase {
            phase: "first-touch".into(),
            round: 0,
            pass: "timed".into(),
            value: enable,
            unit: "instructions".into(),
            clean: true,
        };
        Record {
            schema: SCHEMA,
            scenario: "dirty-log".into(),
            host: Host { kernel: kernel.into(), clock: "instructions".into(), ..Host::default() },
            config: [("memory".to_owned(), 409_600.into()), ("backing".to_owned(), "thp".into())].into(),
            rows: vec![Rows::Measured(Box::new(Row { name: "clear".into(), phases: vec![phase], ..Row::default() }))],
        }
    }

    #[test]
    fn what_varies_is_a_column_and_what_does_not_stands_above() {
        let mut missing = record("5.10.0-46", 0);
        missing.rows = vec![Rows::NotHere { name: "all".into(), not_here: "gone".into() }];
        let text = matrix(&[missing, record("6.1.0-56", 100_000), record("6.12.111+deb12", 200_000)]);
        let first = text.lines().next().unwrap();
        assert!(first.contains("backing thp") && !first.contains("kernel"), "{text}");
        let words: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert!(
            words.contains(&vec!["6.1.0", "clear", "1000"]) && words.contains(&vec!["6.12.111", "clear", "2000"]),
            "{text}"
        );
        assert!(text.contains("5.10.0: all: not here: gone"), "{text}");
    }

    #[test]
    fn rows_of_the_shadow_mmu_say_their_faults_and_bytes() {
        let mut shadow = record("6.12", 100_000);
        shadow.scenario = "model".into();
        let Rows::Measured(row) = &mut shadow.rows[0] else { unreachable!() };
        row.memory = Some(Bytes { table_bytes: 4000, rmap_bytes: 300, cache_bytes: 99, track_bytes: 21 });
        let faults = Counter { value: 777, source: "umbra-mmu".into(), pass: "timed".into() };
        row.counters.insert("faults".into(), faults);
        let text = matrix(&[shadow]);
        assert!(text.contains("faults") && text.contains("bytes"), "{text}");
        assert!(text.contains(" 777 ") && text.contains(" 4321 "), "{text}");
        assert!(!matrix(&[record("6.12", 1)]).contains("bytes"), "a row of KVM's has none");
    }

    /// svm and vmx in one table: of Intel's parameters one varies and one does not, and svm has neither.
    #[test]
    fn a_parameter_of_one_machine_is_a_column_if_it_varies_there() {
        let on = |vendor: &str, params: &[(&str, &str)]| {
            let mut record = record("6.12.111+deb12", 200_000);
            record.host.vendor = vendor.to_owned();
            record.host.params = params.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
            record
        };
        let text = matrix(&[
            on("amd", &[("kvm_amd.npt", "Y")]),
            on("intel", &[("kvm_intel.ept", "Y"), ("kvm_intel.pml", "Y")]),
            on("intel", &[("kvm_intel.ept", "Y"), ("kvm_intel.pml", "N")]),
        ]);
        let first = text.lines().next().unwrap();
        assert!(first.contains("kvm_amd.npt Y") && first.contains("kvm_intel.ept Y"), "{text}");
        let words: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        for row in [["-", "amd"], ["Y", "intel"], ["N", "intel"]] {
            assert!(words.iter().any(|line| line.starts_with(&row)), "{row:?}: {text}");
        }
    }

    /// 5.10 says `kvm_amd.npt=1` where 6.1 says `Y`: the same.
    #[test]
    fn a_switch_is_the_same_however_it_is_spelt() {
        let spelt = |kernel: &str, npt: &str, nested: &str| {
            let mut record = record(kernel, 100_000);
            record.host.params = [("kvm_amd.npt", npt), ("kvm_amd.nested", nested)]
                .map(|(name, value)| (name.into(), value.into()))
                .into();
            record
        };
        let text = matrix(&[spelt("5.10.1", "1", "1"), spelt("6.1.1", "Y", "1")]);
        let first = text.lines().next().unwrap();
        assert!(first.contains("kvm_amd.npt Y") && first.contains("kvm_amd.nested 1"), "{text}");
        let text = matrix(&[spelt("5.10.1", "0", "1"), spelt("6.1.1", "Y", "0")]);
        let words: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert!(words.iter().any(|line| line.starts_with(&["5.10.1", "1", "N"])), "{text}");
    }

    #[test]
    fn kvms_bytes_are_shown_where_all_of_them_are_known() {
        let mut sums = record("6.12", 100_000);
        let Rows::Measured(row) = &mut sums.rows[0] else { unreachable!() };
        let count = |value| Counter { value, source: "slabinfo".into(), pass: "observed".into() };
        row.counters.insert(footprint::TABLES.into(), count(36_864));
        assert!(!matrix(&[sums.clone()]).contains("36864"));
        let Rows::Measured(row) = &mut sums.rows[0] else { unreachable!() };
        row.counters.insert(footprint::LISTS.into(), count(0));
        let text = matrix(&[sums.clone(), record("6.1", 100_000)]);
        assert!(text.contains("36864") && text.contains("-: this kernel, or this row, has no such counter"), "{text}");
        assert!(!matrix(&[sums]).contains("has no such counter"));
        assert_eq!(lines("pages_2m_after_disable"), "pages 2m\nafter disable");
        assert_eq!(lines("kvm_sec_page_table_bytes"), "kvm sec page\ntable bytes");
    }

    #[test]
    fn a_spread_above_the_floor_is_told() {
        let (text, over) = noise_of(&[record("k", 10_000_000), record("k", 10_001_000)]);
        assert!(over.is_empty() && text.contains("0.010%"), "{text}");
        let (_, over) = noise_of(&[record("k", 10_000_000), record("k", 10_010_000)]);
        assert_eq!(over, ["clear: first touch varies by 10000 instructions, and the floor is 3003"]);
    }
}
