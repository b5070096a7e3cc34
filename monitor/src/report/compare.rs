//! Two Records side by side: what it costs, what was counted, whether the truth held; and whether a difference is one.
//!
//! Under the instruction clock figures are exact: one image gives the same file twice. Another image (another kernel, a longer plan) shifts
//! what the timer interrupts fall into, so differences below [`noise`] say nothing and are marked. Wall-clock figures get a ratio, and
//! a line that says that it is none of this.

use super::record::{Phase, Record, Row, Rows};
use super::table::{COLUMNS, plain_table, right, smallest};
use crate::failure::Failure;
use comfy_table::{Cell, Table};
use std::fmt::Write as _;

/// The noise floor under the instruction clock, measured by `make noise` (eight images of 0 to 301 KiB more, 6.12 and 7.2): a figure's share in
/// millionths,
pub const NOISE_PPM: u64 = 300;
/// or instructions, for what is too short to have a share;
pub const NOISE_INSTRUCTIONS: u64 = 400;
/// and both for phases that change a memory slot, which waits for grace periods of RCU, whose threads wake a few times more or less, and for the
/// first write to every page, which has the host allocate them.
pub const NOISE_OF_SLOTS_PPM: u64 = 6000;
/// As above.
pub const NOISE_OF_SLOTS_INSTRUCTIONS: u64 = 6000;

/// Whether a phase changes a memory slot, or has the host allocate memory.
#[must_use]
pub fn changes_a_slot(phase: &str) -> bool {
    matches!(phase, "enable" | "disable" | "populate")
}

/// What the noise may make of a phase's figure under the instruction clock.
#[must_use]
pub fn noise(phase: &str, value: u64) -> u64 {
    let (share, least) = if changes_a_slot(phase) {
        (NOISE_OF_SLOTS_PPM, NOISE_OF_SLOTS_INSTRUCTIONS)
    } else {
        (NOISE_PPM, NOISE_INSTRUCTIONS)
    };
    (value / 1_000_000 * share + value % 1_000_000 * share / 1_000_000).max(least)
}

/// Two Records, or two lists of them, compared.
#[derive(Debug)]
pub struct Comparison {
    /// For the terminal.
    pub text: String,
    /// What is over the limit, and truth that did not hold, a line each.
    pub over: Vec<String>,
}

/// How two figures relate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Equal,
    Noise,
    Differs,
    /// Another task ran in one of the windows.
    Unclean,
}

/// Compares `b` with `a`. `limit` is what a phase of `b` may cost more, in percent.
///
/// # Errors
/// [`Failure::Input`] with the field that keeps them from being compared.
pub fn compare(a: &[Record], b: &[Record], limit: Option<f64>) -> Result<Comparison, Failure> {
    if a.len() != b.len() {
        return Err(refused(&format!("one file has {} Records and the other {}", a.len(), b.len())));
    }
    for (number, (a, b)) in (1..).zip(a.iter().zip(b)) {
        let place =
            if number == 1 && b.rows.len() == a.rows.len() { String::new() } else { format!("Record {number}: ") };
        comparable(a, b).map_err(|why| refused(&format!("{place}{why}")))?;
    }
    let mut comparison = Comparison { text: String::new(), over: Vec::new() };
    for (number, (a, b)) in a.iter().zip(b).enumerate() {
        if number > 0 {
            comparison.text.push('\n');
        }
        Pair { a, b, limit }.into(&mut comparison);
    }
    Ok(comparison)
}

fn refused(why: &str) -> Failure {
    Failure::Input(format!("the Records cannot be compared: {why}"))
}

/// The first field in which two Records differ that must agree.
fn comparable(a: &Record, b: &Record) -> Result<(), String> {
    let fields = [
        ("scenario", &a.scenario, &b.scenario),
        ("clock", &a.host.clock, &b.host.clock),
        ("ground", &a.host.ground, &b.host.ground),
    ];
    for (name, a, b) in fields {
        if a != b {
            return Err(format!("{name} is {a} in one and {b} in the other"));
        }
    }
    let names: std::collections::BTreeSet<_> = a.config.keys().chain(b.config.keys()).collect();
    for name in names {
        let said =
            |record: &Record| record.config.get(name).map_or_else(|| "not given".to_owned(), ToString::to_string);
        if a.config.get(name) != b.config.get(name) {
            return Err(format!("config {name} is {} in one and {} in the other", said(a), said(b)));
        }
    }
    Ok(())
}

struct Pair<'a> {
    a: &'a Record,
    b: &'a Record,
    limit: Option<f64>,
}

impl Pair<'_> {
    /// Instructions, or events where there is no clock: a second run gives the same figure.
    fn exact(&self) -> bool {
        self.a.host.clock != "nanoseconds"
    }

    /// Whether figures may differ although the work is the same: where timer interrupts are in them, in images that differ.
    fn noisy(&self) -> bool {
        self.a.host.clock == "instructions" && !self.one_image()
    }

    /// The same bytes booted: then even one instruction is a difference.
    fn one_image(&self) -> bool {
        self.a.host.image_sha256.is_some()
            && self.a.host.image_sha256 == self.b.host.image_sha256
            && self.a.host.kernel_package == self.b.host.kernel_package
            && self.a.host.params == self.b.host.params
    }

    fn into(self, out: &mut Comparison) {
        out.text.push_str(&self.heading());
        let mut table = plain_table();
        let phase = self.a.measured().find_map(|row| row.phases.first());
        let clock = phase.map_or("", |phase| phase.unit.as_str());
        let last = if self.exact() { ["B - A", ""] } else { ["B / A", ""] };
        table.set_header([clock, "", "A", "B", last[0], last[1]].map(|text| right(text.to_owned())));
        let (mut tally, mut rest) = (Tally::default(), String::new());
        for row in &self.a.rows {
            match (row, self.row(self.b, row.name())) {
                (Rows::Measured(a), Some(Rows::Measured(b))) => self.rows(a, b, &mut table, &mut tally, out),
                (Rows::NotHere { .. }, Some(Rows::NotHere { .. })) => {}
                (Rows::NotHere { name, not_here }, _) => {
                    let _ = writeln!(rest, "{name}: not in A: {not_here}");
                }
                (Rows::Measured(a), in_b) => {
                    let line = match in_b {
                        Some(Rows::NotHere { not_here, .. }) => format!("{}: not in B: {not_here}", a.name),
                        _ => format!("{}: only in A", a.name),
                    };
                    let _ = writeln!(rest, "{line}");
                    // What is not there keeps no limit.
                    out.over.extend(self.limit.map(|_| line));
                }
            }
        }
        for row in self.b.rows.iter().filter(|row| self.row(self.a, row.name()).is_none()) {
            let _ = writeln!(rest, "{}: only in B", row.name());
        }
        let _ = write!(out.text, "\n{table}\n{rest}{}", self.footnotes(&tally));
    }

    #[allow(clippy::unused_self)] // Reads as a question about the pair.
    fn row<'r>(&self, record: &'r Record, name: &str) -> Option<&'r Rows> {
        record.rows.iter().find(|row| row.name() == name)
    }

    fn heading(&self) -> String {
        let mut text = format!("{}: {}\n", self.a.scenario, options(self.a));
        for (letter, record) in [("A", self.a), ("B", self.b)] {
            let host = &record.host;
            if host.ground == "model" {
                let _ = writeln!(text, "  {letter}: Umbra's shadow MMU, umbra {}, no clock", host.umbra);
                continue;
            }
            let params: Vec<_> = host.params.iter().map(|(name, value)| format!("{name}={value}")).collect();
            let _ = writeln!(text, "  {letter}: Linux {}, KVM on {}; {}", host.kernel, host.vendor, params.join(" "));
        }
        let besides = [
            ("emulator", &self.a.host.emulator, &self.b.host.emulator),
            ("umbra", &Some(self.a.host.umbra.clone()), &Some(self.b.host.umbra.clone())),
            ("CPU", &Some(self.a.host.cpu_model.clone()), &Some(self.b.host.cpu_model.clone())),
            ("firmware", &Some(self.a.host.firmware_sha256.clone()), &Some(self.b.host.firmware_sha256.clone())),
        ];
        for (name, a, b) in besides {
            if a != b {
                let said = |value: &Option<String>| value.clone().unwrap_or_else(|| "none".to_owned());
                let _ = writeln!(text, "  they differ in more than the kernel: {name} is {} and {}", said(a), said(b));
            }
        }
        text
    }

    fn rows(&self, a: &Row, b: &Row, table: &mut Table, tally: &mut Tally, out: &mut Comparison) {
        let mut name = a.name.as_str();
        let mut line = |cells: [String; 5]| {
            let mut row = vec![Cell::new(std::mem::take(&mut name))];
            row.extend(cells.map(right));
            table.add_row(row);
        };
        for &(title, phase, rounds, _) in COLUMNS {
            let (Some(in_a), Some(in_b)) = (smallest(a, phase, rounds), smallest(b, phase, rounds)) else { continue };
            let verdict = self.verdict(in_a, in_b);
            tally.add(verdict);
            let mark = match verdict {
                Verdict::Unclean => "another task ran",
                Verdict::Noise => "noise",
                Verdict::Equal | Verdict::Differs => "",
            };
            line([
                title.to_owned(),
                in_a.value.to_string(),
                in_b.value.to_string(),
                self.change(in_a, in_b),
                mark.to_owned(),
            ]);
            if verdict == Verdict::Unclean && self.exact() && self.limit.is_some() {
                out.over.push(format!("{}: {title} cannot be judged, another task ran in its window", a.name));
            }
            if verdict == Verdict::Differs && self.limit.is_some_and(|limit| growth(in_a.value, in_b.value) > limit) {
                out.over.push(format!("{}: {title} costs {}", a.name, percent(in_a.value, in_b.value)));
            }
        }
        if let (Some(a), Some(b)) = (&a.stall, &b.stall) {
            for (name, a, b) in
                [("p50", a.p50, b.p50), ("p99", a.p99, b.p99), ("p99.9", a.p999, b.p999), ("max", a.max, b.max)]
            {
                line([format!("stall {name}"), a.to_string(), b.to_string(), difference(a, b), String::new()]);
            }
        }
        let names: std::collections::BTreeSet<_> = a.counters.keys().chain(b.counters.keys()).collect();
        for name in names {
            let value = |row: &Row| row.counters.get(name).map(|counter| counter.value);
            let said = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), |value| value.to_string());
            let (in_a, in_b) = (value(a), value(b));
            if in_a.unwrap_or(0) == 0 && in_b.unwrap_or(0) == 0 {
                continue;
            }
            let change = in_a.zip(in_b).map_or_else(String::new, |(a, b)| difference(a, b));
            line([name.clone(), said(in_a), said(in_b), change, String::new()]);
        }
        let pages = [a.truth.pages, b.truth.pages];
        let numbers = pages.map(|it| [it.written, it.reported, it.explained, it.missed, it.extra]);
        for (number, name) in ["written", "reported", "explained", "missed", "extra"].iter().enumerate() {
            let [a, b] = numbers.map(|it| it[number]);
            // What is 0 in both, as it has to be, is left out.
            if number < 2 || a + b > 0 {
                line([format!("pages {name}"), a.to_string(), b.to_string(), difference(a, b), String::new()]);
            }
        }
        for (letter, row) in [("A", a), ("B", b)] {
            if row.failed() {
                out.over.push(format!("{}: the truth did not hold in {letter}", row.name));
            }
        }
        if let (Some(a), Some(b)) = (a.memory, b.memory) {
            let bytes = [
                ("tables", a.table_bytes, b.table_bytes),
                ("rmaps", a.rmap_bytes, b.rmap_bytes),
                ("caches", a.cache_bytes, b.cache_bytes),
                ("tracking", a.track_bytes, b.track_bytes),
            ];
            for (name, a, b) in bytes {
                line([format!("{name}, bytes"), a.to_string(), b.to_string(), difference(a, b), String::new()]);
            }
        }
    }

    fn verdict(&self, a: &Phase, b: &Phase) -> Verdict {
        if a.value == b.value {
            Verdict::Equal
        } else if !(a.clean && b.clean) {
            Verdict::Unclean
        } else if self.noisy() && a.value.abs_diff(b.value) <= noise(&a.phase, a.value.max(b.value)) {
            Verdict::Noise
        } else {
            Verdict::Differs
        }
    }

    fn change(&self, a: &Phase, b: &Phase) -> String {
        if !self.exact() {
            #[allow(clippy::cast_precision_loss)] // Two digits are shown.
            let ratio = b.value as f64 / a.value.max(1) as f64;
            return format!("~{ratio:.2}");
        }
        if a.value == b.value {
            "=".to_owned()
        } else {
            format!("{} {}", difference(a.value, b.value), percent(a.value, b.value))
        }
    }

    fn footnotes(&self, tally: &Tally) -> String {
        let mut text = String::new();
        if !self.exact() {
            text.push_str("~ Wall-clock time: not exact, a ratio of two runs that other programs disturbed. `umbra lab` compares to the instruction.\n");
            return text;
        }
        let _ = writeln!(
            text,
            "{} figures of cost: {} equal, {} within the noise, {} differ{}.",
            tally.equal + tally.noise + tally.differ + tally.unclean,
            tally.equal,
            tally.noise,
            tally.differ,
            if tally.unclean > 0 { format!(", {} of unclean windows", tally.unclean) } else { String::new() }
        );
        let _ = if self.a.host.clock == "none" {
            writeln!(text, "Events, not time: they repeat exactly, so one more is a difference.")
        } else if self.one_image() {
            writeln!(text, "Both booted the same image: one instruction is a difference.")
        } else {
            writeln!(
                text,
                "noise: up to {}.{:02}% or {NOISE_INSTRUCTIONS} instructions ({}.{}% or {NOISE_OF_SLOTS_INSTRUCTIONS} in populate, enable and disable), which the same work shows in images that are merely shifted (`make noise`).",
                NOISE_PPM / 10_000,
                NOISE_PPM % 10_000 / 100,
                NOISE_OF_SLOTS_PPM / 10_000,
                NOISE_OF_SLOTS_PPM % 10_000 / 1000
            )
        };
        text
    }
}

#[derive(Default)]
struct Tally {
    equal: u64,
    noise: u64,
    differ: u64,
    unclean: u64,
}

impl Tally {
    fn add(&mut self, verdict: Verdict) {
        *match verdict {
            Verdict::Equal => &mut self.equal,
            Verdict::Noise => &mut self.noise,
            Verdict::Differs => &mut self.differ,
            Verdict::Unclean => &mut self.unclean,
        } += 1;
    }
}

/// The options of a run on one line.
fn options(record: &Record) -> String {
    let said = record.config.iter().map(|(name, value)| match value {
        serde_json::Value::String(text) => format!("{name} {text}"),
        other => format!("{name} {other}"),
    });
    said.collect::<Vec<_>>().join(", ")
}

/// By how many percent `b` is more than `a`; from nothing to something it is infinite.
#[allow(clippy::cast_precision_loss)] // Figures stay below 2^53.
fn growth(a: u64, b: u64) -> f64 {
    if a == b { 0.0 } else { (b as f64 - a as f64) / a as f64 * 100.0 }
}

fn percent(a: u64, b: u64) -> String {
    let growth = growth(a, b);
    if growth.is_finite() { format!("{growth:+.2}%") } else { "where there was none".to_owned() }
}

fn difference(a: u64, b: u64) -> String {
    match a.cmp(&b) {
        std::cmp::Ordering::Equal => "=".to_owned(),
        std::cmp::Ordering::Less => format!("+{}", b - a),
        std::cmp::Ordering::Greater => format!("-{}", a - b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Host;
    use crate::report::record::SCHEMA;

    fn record(image: &str, enable: u64) -> Record {
        let phase = |phase: &str, round, value| Phase {
            phase: phase.into(),
            round,
            pass: "timed".into(),
            value,
            unit: "instructions".into(),
            clean: true,
        };
        let phases = vec![phase("retouch", 0, enable), phase("get", 1, 3157), phase("dirty", 2, 26_000_000)];
        let host = Host {
            ground: "lab".into(),
            clock: "instructions".into(),
            image_sha256: Some(image.into()),
            ..Host::default()
        };
        Record {
            schema: SCHEMA,
            scenario: "dirty-log".into(),
            host,
            config: [("memory".to_owned(), 4096.into()), ("backing".to_owned(), "thp".into())].into(),
            rows: vec![Rows::Measured(Box::new(Row { name: "clear".into(), phases, ..Row::default() }))],
        }
    }

    fn one(a: &Record, b: &Record, limit: Option<f64>) -> Comparison {
        compare(std::slice::from_ref(a), std::slice::from_ref(b), limit).unwrap()
    }

    #[test]
    fn what_differs_in_more_than_the_kernel_is_refused_with_its_field() {
        let a = record("1", 10_000_000);
        let refusal = |change: &dyn Fn(&mut Record)| {
            let mut b = a.clone();
            change(&mut b);
            let failure = compare(std::slice::from_ref(&a), std::slice::from_ref(&b), None).unwrap_err();
            assert!(matches!(failure, Failure::Input(_)));
            failure.to_string()
        };
        let said = refusal(&|b| b.host.clock = "nanoseconds".into());
        assert!(said.contains("clock is instructions in one and nanoseconds"), "{said}");
        let said = refusal(&|b| b.scenario = "soak".into());
        assert!(said.contains("scenario is dirty-log"), "{said}");
        let said = refusal(&|b| drop(b.config.insert("backing".into(), "anonymous".into())));
        assert!(said.contains("config backing is \"thp\" in one and \"anonymous\" in the other"), "{said}");
        let said = refusal(&|b| drop(b.config.remove("memory")));
        assert!(said.contains("config memory is 4096 in one and not given in the other"), "{said}");
        let said = compare(std::slice::from_ref(&a), &[a.clone(), a.clone()], None).unwrap_err().to_string();
        assert!(said.contains("one file has 1 Records and the other 2"), "{said}");
    }

    #[test]
    fn a_shift_is_noise_and_a_thousandth_is_not() {
        let a = record("1", 10_000_000);
        let shifted = one(&a, &record("2", 10_002_900), Some(0.01));
        assert!(shifted.over.is_empty() && shifted.text.contains("noise"), "{}", shifted.text);
        let grown = one(&a, &record("2", 10_010_000), Some(0.05));
        assert_eq!(grown.over, ["clear: retouch costs +0.10%"]);
        // A limit above it lets it pass, and so does getting cheaper.
        assert!(one(&a, &record("2", 10_010_000), Some(0.2)).over.is_empty());
        assert!(one(&a, &record("2", 9_000_000), Some(0.05)).over.is_empty());
        assert!(one(&a, &record("2", 10_010_000), None).over.is_empty());
    }

    #[test]
    fn one_image_has_no_noise() {
        let a = record("1", 10_000_000);
        let same = one(&a, &a, Some(0.0));
        assert!(same.over.is_empty() && same.text.contains("3 figures of cost: 3 equal"), "{}", same.text);
        assert_eq!(one(&a, &record("1", 10_000_001), Some(0.0)).over.len(), 1);
    }

    #[test]
    fn short_phases_have_a_floor_of_their_own() {
        assert_eq!(noise("get", 3157), NOISE_INSTRUCTIONS);
        assert_eq!(noise("disable", 3157), NOISE_OF_SLOTS_INSTRUCTIONS);
        assert_eq!(noise("enable", 4_700_000), 28_200);
        assert_eq!(noise("dirty", 26_000_000), 7_800);
        assert_eq!(noise("dirty", u64::MAX) / 1_000_000, u64::MAX / 1_000_000 * NOISE_PPM / 1_000_000);
    }

    #[test]
    fn truth_that_did_not_hold_is_over_every_limit() {
        let a = record("1", 10_000_000);
        let mut b = record("2", 10_000_000);
        if let Rows::Measured(row) = &mut b.rows[0] {
            row.truth.pages.missed = 1;
        }
        assert_eq!(one(&a, &b, None).over, ["clear: the truth did not hold in B"]);
    }

    #[test]
    fn an_unclean_window_is_no_figure_and_a_missing_row_is_named() {
        let a = record("1", 10_000_000);
        let mut b = record("2", 20_000_000);
        if let Rows::Measured(row) = &mut b.rows[0] {
            row.phases[0].clean = false;
        }
        let unclean = one(&a, &b, None);
        assert!(unclean.over.is_empty() && unclean.text.contains("another task ran"), "{}", unclean.text);
        // Nobody who set a limit may take it for kept.
        assert_eq!(one(&a, &b, Some(1.0)).over, ["clear: retouch cannot be judged, another task ran in its window"]);
        b.rows = vec![Rows::NotHere { name: "clear".into(), not_here: "KVM_CAP_X".into() }];
        let missing = one(&a, &b, Some(1.0));
        assert!(missing.text.contains("clear: not in B: KVM_CAP_X"), "{}", missing.text);
        assert_eq!(missing.over, ["clear: not in B: KVM_CAP_X"]);
        assert!(one(&a, &b, None).over.is_empty());
    }

    #[test]
    fn wall_clock_is_a_ratio_with_a_mark() {
        let wall = |value| {
            let mut record = record("1", value);
            record.host.clock = "nanoseconds".into();
            record
        };
        let text = one(&wall(100_000), &wall(150_000), None).text;
        assert!(text.contains("~1.50") && text.contains("not exact"), "{text}");
    }

    #[test]
    fn events_without_a_clock_are_exact() {
        let events = |value| {
            let mut record = record("1", value);
            record.host.ground = "model".into();
            record.host.clock = "none".into();
            if let Rows::Measured(row) = &mut record.rows[0] {
                row.phases.iter_mut().for_each(|phase| phase.unit = "faults".into());
            }
            record
        };
        let more = one(&events(100_000), &events(100_001), Some(0.0));
        assert_eq!(more.over, ["clear: retouch costs +0.00%"]);
        assert!(more.text.contains("Events, not time") && more.text.contains("faults"), "{}", more.text);
        assert!(!more.text.contains("Wall-clock") && !more.text.contains("noise:"), "{}", more.text);
    }
}
