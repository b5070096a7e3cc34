//! Figures of the same work from elsewhere: another tool on the same ground, or earlier measurements. A run is held against them, and where it differs
//! by more than it may, the difference has to be what named counters account for.

use super::record::{Phase, Record, Row};
use super::table::{accesses, heading_cell, pages, plain_table, right};
use comfy_table::Cell;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::RangeInclusive;

/// How much of a difference may stay without an account, in percent of it.
const OPEN: f64 = 10.0;

/// Instructions by which a phase that changes a memory slot may differ, short as it may be: a thread of RCU's wakes once more or once less.
const GRACE_PERIOD: f64 = 1600.0;

/// What is known of one run.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Known {
    /// Whose figures they are.
    source: String,
    /// By how many percent a figure may differ, beside what it was rounded by.
    within: f64,
    /// What a figure is for.
    per: Per,
    /// By the row's name and the phase: `enable`, `dirty 2` (of that round), `dirty 2+` (the cheapest from that round on).
    figures: BTreeMap<String, BTreeMap<String, toml::Value>>,
    /// What the others do besides.
    #[serde(default)]
    more: Vec<More>,
}

/// The unit of the figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Per {
    /// Instructions for each page, or access.
    Page,
    /// Thousands of instructions for the whole phase: microseconds of the lab's clock.
    Phase,
}

/// Work that the others do and Umbra does not: so many events, each of so many instructions.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct More {
    /// Named as in the figures.
    phases: Vec<String>,
    /// A counter of the row, or `accesses`.
    counter: String,
    /// In how many rounds the counter counted, so that a round's share is known.
    #[serde(default = "one")]
    rounds: u64,
    /// Instructions for each.
    each: f64,
    /// Rows that it concerns; none for all.
    #[serde(default)]
    rows: Vec<String>,
    /// What it is.
    why: String,
}

const fn one() -> u64 {
    1
}

impl Known {
    /// Whether every figure names a column and is a number.
    ///
    /// # Errors
    /// The figure that does not, in one line.
    pub fn check(&self) -> Result<(), String> {
        let titles =
            self.figures.values().flat_map(BTreeMap::keys).chain(self.more.iter().flat_map(|more| &more.phases));
        for title in titles {
            if rounds(title).is_none() {
                return Err(format!(
                    "known: {title}: not a phase; write enable, dirty 2, or dirty 2+ for the cheapest from round 2 on"
                ));
            }
        }
        for (title, value) in self.figures.values().flatten() {
            figure(value).ok_or_else(|| format!("known: {title}: it is no figure"))?;
        }
        if self.more.iter().any(|more| more.rounds == 0) {
            return Err("known: rounds = 0: a counter counts in one round at least".into());
        }
        Ok(())
    }
}

/// The phase that a title names, and its rounds: 0 where it has none.
fn rounds(title: &str) -> Option<(&str, RangeInclusive<u64>)> {
    let Some((phase, round)) = title.split_once(' ') else { return Some((title, 0..=0)) };
    let first: u64 = round.trim_end_matches('+').parse().ok()?;
    Some((phase, first..=if round.ends_with('+') { u64::MAX } else { first }))
}

/// The phase of a row that a title names, in the timed pass.
fn find<'a>(row: &'a Row, title: &str) -> Option<&'a Phase> {
    let (name, rounds) = rounds(title)?;
    let phases = row.phases.iter().filter(|phase| phase.pass == "timed" && phase.phase == name);
    phases.filter(|phase| rounds.contains(&phase.round)).min_by_key(|phase| phase.value)
}

/// A figure, and what it was rounded by at most.
fn figure(value: &toml::Value) -> Option<(f64, f64)> {
    match value {
        #[allow(clippy::cast_precision_loss)] // Figures stay below 2^53.
        toml::Value::Integer(number) => Some((*number as f64, 0.5)),
        toml::Value::Float(number) => {
            let digits = number.to_string().split_once('.').map_or(0, |(_, digits)| digits.len());
            Some((*number, 0.5 / 10_f64.powi(i32::try_from(digits).ok()?)))
        }
        _ => None,
    }
}

/// One figure beside what was measured. All in instructions for the whole phase.
struct Line<'a> {
    known: &'a Known,
    /// Instructions in a unit of the figures.
    scale: f64,
    figure: f64,
    /// What neither of the two is worth.
    rounded: f64,
    value: f64,
    accounted: f64,
    why: Vec<&'a str>,
}

impl<'a> Line<'a> {
    fn new(
        record: &Record,
        row: &Row,
        known: &'a Known,
        title: &str,
        phase: &Phase,
        (figure, rounded): (f64, f64),
    ) -> Self {
        #[allow(clippy::cast_precision_loss)] // Figures stay below 2^53.
        let count = |number: u64| number as f64;
        let scale = match known.per {
            Per::Phase => 1000.0,
            Per::Page if matches!(phase.phase.as_str(), "dirty" | "retouch") => count(accesses(record)),
            Per::Page => count(pages(record)),
        };
        let (figure, rounded, value) = (figure * scale, rounded * scale, count(phase.value));
        let mut line = Self { known, scale, figure, rounded, value, accounted: 0.0, why: Vec::new() };
        for more in &known.more {
            if !more.phases.iter().any(|phase| phase == title)
                || !(more.rows.is_empty() || more.rows.contains(&row.name))
            {
                continue;
            }
            let events = match more.counter.as_str() {
                "accesses" => count(accesses(record)),
                name => count(row.counters.get(name).map_or(0, |counter| counter.value)) / count(more.rounds),
            };
            line.accounted += events * more.each;
            line.why.push(&more.why);
        }
        line.rounded =
            line.rounded.max(if matches!(phase.phase.as_str(), "enable" | "disable") { GRACE_PERIOD } else { 0.0 });
        line
    }

    fn gap(&self) -> f64 {
        self.figure - self.value
    }

    fn near(&self) -> bool {
        self.gap().abs() <= self.figure * self.known.within / 100.0 + self.rounded
    }

    /// Whether what the counters account for closes the gap.
    fn closed(&self) -> bool {
        !self.why.is_empty() && (self.gap() - self.accounted).abs() <= self.gap().abs() * OPEN / 100.0 + self.rounded
    }
}

/// The runs beside what is known of them, and what neither agrees nor is accounted for. `known` has an entry for each Record; figures hold for
/// kernel packages of the versions in `pinned`.
#[must_use]
pub fn table(records: &[Record], known: &[Option<Known>], pinned: &[String]) -> (String, Vec<String>) {
    let (mut over, mut notes) = (Vec::new(), String::new());
    if known.iter().all(Option::is_none) || known.len() != records.len() {
        return (String::new(), over);
    }
    let mut table = plain_table();
    let header = ["run", "row", "phase", "known", "here", "differs by", "accounted for", "left of the gap"];
    table.set_header(header.map(heading_cell));
    for (record, known) in records.iter().zip(known) {
        let Some(known) = known else { continue };
        let mut place = place(record);
        if let Some(other) = not_pinned(record, pinned) {
            let _ = writeln!(notes, "{place}: {other}, so its figures are not held against those of {}", known.source);
            continue;
        }
        for (name, figures) in &known.figures {
            let Some(row) = record.measured().find(|row| row.name == *name) else {
                over.push(format!("{place}: {name}: it was not measured"));
                continue;
            };
            let mut shown = name.as_str();
            for (title, value) in figures {
                let (Some(figure), Some(phase)) = (figure(value), find(row, title)) else {
                    over.push(format!("{}, {name}: it has no phase {title}", self::place(record)));
                    continue;
                };
                let line = Line::new(record, row, known, title, phase, figure);
                let cells = cells(&line, title);
                let mut all = vec![Cell::new(std::mem::take(&mut place)), Cell::new(std::mem::take(&mut shown))];
                all.extend(cells.into_iter().map(right));
                table.add_row(all);
                let said = || format!("{}, {name}: {title}", self::place(record));
                if !phase.clean {
                    over.push(format!("{}: another task ran in its window", said()));
                } else if !line.near() && !line.closed() {
                    let away = 100.0 * (line.value / line.figure - 1.0);
                    over.push(format!(
                        "{} is {away:+.1}% of what {} has, and nothing accounts for it",
                        said(),
                        known.source
                    ));
                }
            }
        }
    }
    (format!("\n{table}\n{notes}{}", footnotes(known)), over)
}

fn cells(line: &Line, title: &str) -> [String; 6] {
    let unit = if line.known.per == Per::Phase { "k" } else { "" };
    let scaled = |value: f64| format!("{:.1}{unit}", value / line.scale);
    // A gap that is small enough needs no account.
    let (accounted, left) = if line.near() || line.why.is_empty() {
        (String::new(), String::new())
    } else {
        let left = (line.gap() - line.accounted) / line.gap() * 100.0;
        (scaled(line.accounted), format!("{left:.1}%"))
    };
    let away = format!("{:+.2}%", 100.0 * (line.value / line.figure - 1.0));
    [title.to_owned(), scaled(line.figure), scaled(line.value), away, accounted, left]
}

/// What tells this run from the others of its spec: the kernel, and the parameters that were not left as they are.
fn place(record: &Record) -> String {
    let host = &record.host;
    let kernel = host.kernel_version();
    let off = host.params.iter().filter(|(name, value)| {
        matches!((name.as_str(), value.as_str()), ("kvm.tdp_mmu" | "kvm.eager_page_split" | "kvm_amd.npt", "N" | "0"))
    });
    let mut words = vec![kernel.to_owned()];
    words.extend(off.map(|(name, value)| format!("{}={value}", name.rsplit('.').next().unwrap_or_default())));
    words.join(" ")
}

/// The kernel's package, where it is another one than the shelf has pinned.
fn not_pinned(record: &Record, pinned: &[String]) -> Option<String> {
    let package = record.host.kernel_package.as_deref()?;
    (!pinned.iter().any(|version| package.contains(&format!(" {version} "))))
        .then(|| format!("its kernel is {}", package.split(' ').take(2).collect::<Vec<_>>().join(" ")))
}

fn footnotes(known: &[Option<Known>]) -> String {
    let mut text = String::new();
    let mut sources: Vec<&Known> = known.iter().flatten().collect();
    sources.dedup_by(|a, b| a.source == b.source);
    for known in &sources {
        let unit = match known.per {
            Per::Page => "a page, or an access",
            Per::Phase => "a phase, in thousands",
        };
        let _ = writeln!(text, "known: {}; instructions {unit}; to agree within {}%", known.source, known.within);
    }
    let mut said: Vec<(&str, String)> = Vec::new();
    for more in known.iter().flatten().flat_map(|known| &known.more) {
        let line = format!("{}: {} more for each of `{}`", more.why, more.each, more.counter);
        if !said.iter().any(|(_, other)| *other == line) {
            said.push((&more.why, line));
        }
    }
    if !said.is_empty() {
        let _ =
            writeln!(text, "accounted for, where a figure differs by more (at most {OPEN}% of the gap may stay open):");
    }
    for (_, line) in said {
        let _ = writeln!(text, "  {line}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Host;
    use crate::report::record::{Counter, Phase, Rows, SCHEMA};

    fn record(dirty: u64, clean: bool) -> Record {
        let phase = Phase {
            phase: "dirty".into(),
            round: 2,
            pass: "timed".into(),
            value: dirty,
            unit: "instructions".into(),
            clean,
        };
        let mut row = Row { name: "bitmap".into(), phases: vec![phase], ..Row::default() };
        row.counters.insert("pf_taken".into(), Counter { value: 300, source: "stats".into(), pass: "observed".into() });
        Record {
            schema: SCHEMA,
            scenario: "dirty-log".into(),
            host: Host { kernel: "6.12.111+x".into(), clock: "instructions".into(), ..Host::default() },
            config: [("memory".to_owned(), 409_600.into()), ("accesses-per-page".to_owned(), 1.into())].into(),
            rows: vec![Rows::Measured(Box::new(row))],
        }
    }

    fn known(more: &str) -> Vec<Option<Known>> {
        let text =
            format!("source = \"them\"\nwithin = 3\nper = \"phase\"\n[figures.bitmap]\n\"dirty 2+\" = 100\n{more}");
        let known: Known = toml::from_str(&text).unwrap();
        known.check().unwrap();
        vec![Some(known)]
    }

    #[test]
    fn a_figure_agrees_or_is_accounted_for_or_is_told() {
        let over = |record: Record, more: &str| table(&[record], &known(more), &[]).1;
        assert!(over(record(103_400, true), "").is_empty(), "3% and what it was rounded by");
        assert!(over(record(96_600, true), "").is_empty());
        assert_eq!(
            over(record(90_000, true), ""),
            ["6.12.111, bitmap: dirty 2+ is -10.0% of what them has, and nothing accounts for it"]
        );
        assert_eq!(over(record(100_000, false), ""), ["6.12.111, bitmap: dirty 2+: another task ran in its window"]);
        // 100 of the 300 faults are this round's.
        let more = |each| {
            format!("[[more]]\nphases = [\"dirty 2+\"]\ncounter = \"pf_taken\"\nrounds = 3\neach = {each}\nwhy = \"x\"")
        };
        assert!(over(record(90_000, true), &more(95.0)).is_empty());
        assert_eq!(over(record(90_000, true), &more(80.0)).len(), 1);
        let text = table(&[record(90_000, true)], &known(&more(95.0)), &[]).0;
        assert!(text.contains("-10.00%") && text.contains("9.5k") && text.contains("5.0%"), "{text}");
    }

    /// 100 pages, one access each.
    #[test]
    fn a_figure_is_shown_in_the_unit_that_it_is_known_in() {
        let mut known = known("");
        let text = table(&[record(103_400, true)], &known, &[]).0;
        assert!(text.contains("103.4k") && text.contains("a phase, in thousands"), "{text}");
        known[0].as_mut().unwrap().per = Per::Page;
        let text = table(&[record(10_140, true)], &known, &[]).0;
        assert!(text.contains(" 101.4 ") && text.contains("+1.40%") && text.contains("a page, or an access"), "{text}");
    }

    #[test]
    fn figures_that_are_missing_are_told() {
        let mut other = record(100_000, true);
        other.rows.clear();
        assert_eq!(table(&[other], &known(""), &[]).1, ["6.12.111: bitmap: it was not measured"]);
        assert_eq!(table(&[record(100_000, true)], &[None], &[]), (String::new(), Vec::new()));
    }

    #[test]
    fn another_package_is_not_held_against_them() {
        let mut other = record(1, true);
        other.host.kernel_package = Some("linux-image 6.12.117-1 00".into());
        let (text, over) = table(&[other], &known(""), &["6.12.111-1".to_owned()]);
        assert!(over.is_empty() && text.contains("its kernel is linux-image 6.12.117-1"), "{text}");
    }
}
