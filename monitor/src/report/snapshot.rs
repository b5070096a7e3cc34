//! The table of scenario `snapshot`: what a page that was written costs under each tracker, and what a page that was not.

use super::record::{Phase, Record, Row};
use super::table::{heading_cell, per, plain_table, right, scaled};
use comfy_table::{Cell, Table};
use std::collections::BTreeMap;

/// The shares of writes, in percent of the accesses. The first one has none, so that its figures are those of clean pages.
pub const PERCENTS: [u64; 4] = [0, 1, 10, 100];

/// What the columns are.
pub const FOOTNOTES: &str = "\
Guest above: a round's time, faults included; monitor below: get and clear. start: per tracked page, and in all.
clean: a page that is only read, in rounds without writes. 1%, 10%, 100%: a page that is written, when so many are; what clean pages cost has been
taken off, so that what makes those dearer than in rounds without writes (they fault in again, and by 4 KiB) is in it. -: lost in the noise.
stall: one write, at 100% (p50), and the longest of all. reported: in the last round of 1% and of 10%. lost: written, and never reported.
";

/// What a round costs at one share of writes.
struct Round {
    guest: u64,
    monitor: u64,
    /// Whether nobody else ran meanwhile, in the guest's round and in the monitor's work.
    clean: [bool; 2],
    written: u64,
    reported: u64,
}

/// The cheapest of the later rounds, each phase by itself; the only one if there is no later one.
fn round(row: &Row) -> Option<Round> {
    let phase = |name: &str| {
        let timed =
            || row.phases.iter().filter(|phase| phase.pass == "timed" && phase.phase == name && phase.round > 0);
        let least = |phase: &&Phase| phase.value;
        timed().filter(|phase| phase.round > 1).min_by_key(least).or(timed().min_by_key(least))
    };
    let last = row.truth.rounds.last()?.pages;
    let (guest, get, clear) = (phase("dirty")?, phase("get")?, phase("clear"));
    Some(Round {
        guest: guest.value,
        monitor: get.value + clear.map_or(0, |clear| clear.value),
        clean: [guest.clean, get.clean && clear.is_none_or(|clear| clear.clean)],
        written: last.written,
        reported: last.reported,
    })
}

/// What each of `written` pages cost, when `all` pages without a write cost `clean`. `None` if there is nothing left for them, as on a noisy clock.
fn each(cost: u64, clean: u64, written: u64, all: u64) -> Option<u64> {
    let others = u128::from(clean) * u128::from(all.saturating_sub(written)) / u128::from(all.max(1));
    cost.checked_sub(u64::try_from(others).unwrap_or(u64::MAX))?.checked_div(written)
}

/// A row of the table for each tracker that has a row of the Record for each share.
#[must_use]
pub fn table(record: &Record, pages: u64) -> Table {
    let mut trackers: Vec<(&str, BTreeMap<u64, &Row>)> = Vec::new();
    for row in record.measured() {
        let Some((name, percent)) = row.name.split_once(' ') else { continue };
        let Some(percent) = percent.strip_suffix('%').and_then(|percent| percent.parse().ok()) else { continue };
        if trackers.last().is_none_or(|(last, _)| *last != name) {
            trackers.push((name, BTreeMap::new()));
        }
        if let Some((_, rows)) = trackers.last_mut() {
            rows.insert(percent, row);
        }
    }
    let mut table = plain_table();
    let titles = [
        &format!("{}\nguest\nmonitor", record.host.clock),
        "start",
        "clean\npage",
        "1%\npage",
        "10%\npage",
        "100%\npage",
        "stall\np50",
        "\nmax",
        "reported\n1%",
        "\n10%",
        "lost",
    ];
    table.set_header(titles.map(heading_cell));
    for (name, rows) in trackers {
        if let Some(cells) = cells(name, &rows, pages) {
            table.add_row(cells);
        }
    }
    table
}

fn cells(name: &str, rows: &BTreeMap<u64, &Row>, pages: u64) -> Option<Vec<Cell>> {
    let rounds = PERCENTS.iter().map(|percent| round(rows.get(percent)?)).collect::<Option<Vec<_>>>()?;
    let (clean, dirty) = rounds.split_first()?;
    let start =
        rows.values().flat_map(|row| &row.phases).filter(|phase| phase.pass == "timed" && phase.phase == "enable");
    let start = start.min_by_key(|phase| phase.value)?;
    let marked = |text: String, clean: bool| if clean { text } else { text + "*" };
    let both = |guest: String, monitor: String, clean: [bool; 2]| {
        right(format!("{}\n{}", marked(guest, clean[0]), marked(monitor, clean[1])))
    };
    let mut cells = vec![
        Cell::new(name),
        both(per(start.value, pages), scaled(start.value), [start.clean; 2]),
        both(per(clean.guest, pages), per(clean.monitor, pages), clean.clean),
    ];
    for round in dirty {
        let guest = each(round.guest, clean.guest, round.written, pages);
        let monitor = each(round.monitor, clean.monitor, round.written, pages);
        let [guest, monitor] = [guest, monitor].map(|cost| cost.map_or_else(|| "-".to_owned(), scaled));
        cells.push(both(guest, monitor, round.clean));
    }
    let stalls = || rows.values().filter_map(|row| row.stall.as_ref());
    cells.push(right(scaled(rows.get(&100)?.stall.as_ref()?.p50)));
    cells.push(right(scaled(stalls().map(|stall| stall.max).max()?)));
    let lost: u64 = rows.values().map(|row| row.truth.pages.missed).sum();
    cells.extend(dirty.iter().take(2).map(|round| right(format!("{}\nof {}", round.reported, round.written))));
    cells.push(right(lost.to_string()));
    Some(cells)
}

#[cfg(test)]
mod tests {
    use super::super::record::{Host, Pages, Rows, Stall, Truth, TruthRound};
    use super::*;

    /// A tracker that costs the guest 10 a clean page and 100 a dirty one, and the monitor 1 and 7.
    fn row(percent: u64) -> Rows {
        let written = 1000 * percent / 100;
        let phase = |phase: &str, round, value| Phase {
            phase: phase.into(),
            round,
            pass: "timed".into(),
            value,
            unit: "instructions".into(),
            clean: true,
        };
        let cost = |clean, dirty| clean * (1000 - written) + dirty * written;
        let mut phases = vec![phase("enable", 0, 3000)];
        // The first round costs more, and does not count.
        for round in 1..=3 {
            let more = if round == 1 { 50_000 } else { round };
            phases.push(phase("dirty", round, cost(10, 100) + more - 2));
            phases.push(phase("get", round, cost(1, 5)));
            phases.push(phase("clear", round, cost(0, 2)));
        }
        let pages = Pages { written, reported: written + 3, ..Pages::default() };
        let truth =
            Truth { pages, rounds: vec![TruthRound { round: 3, pass: "timed".into(), pages }], ..Truth::default() };
        let stall = Some(Stall { p50: 90 + percent, max: 7000 + percent, ..Stall::default() });
        Rows::Measured(Box::new(Row { name: format!("clear {percent}%"), phases, truth, stall, ..Row::default() }))
    }

    #[test]
    fn clean_and_dirty_pages_are_told_apart() {
        let mut record = Record {
            schema: 1,
            scenario: "snapshot".into(),
            host: Host::default(),
            config: BTreeMap::new(),
            rows: PERCENTS.map(row).to_vec(),
        };
        let text = table(&record, 1000).to_string();
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        let guest = ["clear", "3.0", "10", "100", "100", "100", "190", "7100", "13", "103", "0"];
        let monitor = ["3000", "1.0", "7", "7", "7", "of", "10", "of", "100"];
        assert!(lines.iter().any(|line| *line == guest) && lines.iter().any(|line| *line == monitor), "{text}");
        assert!(!text.contains('*'), "{text}");
        // Somebody else ran in the cheapest GET of 10%.
        let Rows::Measured(ten) = &mut record.rows[2] else { unreachable!() };
        let get = ten.phases.iter_mut().find(|phase| phase.phase == "get" && phase.round == 2).unwrap();
        (get.clean, get.value) = (false, get.value - 1);
        let text = table(&record, 1000).to_string();
        assert!(text.contains(" 6* ") && text.matches('*').count() == 1, "{text}");
        // Without one of its shares a tracker has no row.
        record.rows.pop();
        assert!(!table(&record, 1000).to_string().contains("clear"));
    }

    #[test]
    fn noise_below_the_clean_pages_is_nothing() {
        assert_eq!(each(900, 1000, 10, 1000), None);
        assert_eq!(each(1000, 0, 10, 1000), Some(100));
        assert_eq!(each(5, 5, 0, 0), None);
    }
}
