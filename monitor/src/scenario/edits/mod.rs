//! Random edits of L1's table, in epochs ([`umbra_shared::edits`]): after each, what L2 reads and writes and what L1 is told has to be what Umbra's
//! software walker says of the same table. On KVM's own nesting, and on Umbra's shadow MMU under each strategy, whose report of written
//! pages is checked as well.
//!
//! ```text
//! vCPU 0   edits ---|                    probes |
//! vCPU 1            | probes | edits ----|                 each waits where the other one's bar is
//! monitor  the same edits and probes on the walker, compared at each bar; harvest at every third
//! ```
//!
//! With `--race` nobody waits ([`race`]).

mod chronicle;
mod mirror;
mod race;

use super::Setup;
use super::l1_cpu::{EPT_VIOLATION, NESTED_PAGE_FAULT, caps_of};
use super::l2::Nesting;
use crate::failure::Failure;
use crate::guest::{Machine, Plan};
use crate::pages::PageSet;
use crate::progress::Progress;
use crate::report::Record;
use crate::report::record::{Counter, Row, Truth};
use crate::scenario::setup::Fault;
use crate::track::{Kind, Tracker};
use mirror::{Expected, Mirror};
use std::collections::BTreeMap;
use umbra_shared::PAGE_SIZE;
use umbra_shared::control;
use umbra_shared::nested::{L2_BASE, Nested, Way};
use umbra_shared::probe::{Answer, Probe};
use umbra_shared::protocol::Command;

/// Differences that are named one by one.
const NAMED: usize = 16;
/// Epochs from a harvest to the next: edits come between writes and their harvest, too.
const HARVEST: u64 = 3;
/// Epochs from a comparison of windows, EPT02 and the process's memory map to the next.
const AUDIT: u64 = 16;

/// Runs the scenario.
pub fn run(setup: &Setup, progress: &Progress) -> Result<Record, Failure> {
    let Some(l2) = &setup.l2 else { return Err(Failure::Input("edits: its options are missing".into())) };
    let mut rows = Vec::new();
    for nesting in l2.ways_here(crate::host::vendor()).into_iter().filter(|way| *way != Nesting::Plain) {
        let kinds: Vec<Option<Kind>> = match nesting {
            Nesting::Umbra => l2.means.iter().map(|&means| Some(Kind::Shadow(means))).collect(),
            _ => vec![None],
        };
        let plan = super::nested::plan(setup, l2, nesting);
        for kind in kinds {
            let name = kind.map_or_else(|| nesting.to_string(), |kind| format!("{nesting}:{kind}"));
            let row = match &plan {
                Ok(plan) if l2.race => race::row(setup, plan, kind, &name, progress),
                Ok(plan) => Game::new(setup, plan, kind, &name, progress).and_then(|game| game.finish(progress)),
                Err(Failure::NotHere(why)) => Err(Failure::NotHere(why.clone())),
                Err(other) => Err(Failure::Check(other.to_string())),
            };
            rows.push(Setup::or_not_here(&name, row)?);
        }
    }
    let measured = |row: &crate::report::record::Rows| matches!(row, crate::report::record::Rows::Measured(_));
    let has_umbra = rows.iter().any(|row| measured(row) && row.name().starts_with("umbra:"));
    setup.record_of(
        rows,
        |name| {
            if name.starts_with("umbra:") && has_umbra { l2.means_by_name } else { l2.named(name) }
        },
    )
}

/// A machine whose L1 has filled its table, each of its pages beginning with [`Mirror::word`], and what tracks its L2's writes, if something does.
struct Table {
    nested: Nested,
    tracker: Option<(Kind, Box<dyn Tracker>)>,
    machine: Machine,
}

impl Table {
    fn new(setup: &Setup, plan: &Plan, kind: Option<Kind>, name: &str, progress: &Progress) -> Result<Self, Failure> {
        let mut plan = plan.clone();
        if let Some(Kind::Shadow(means)) = kind {
            plan.shadow = super::nested::shadow(setup, &plan, means, progress)?;
        }
        let Some(nested) = plan.nested else { return Err(Failure::Check("edits: a plan without an L2".into())) };
        progress.step(&format!("{name}: boot"));
        let machine = Machine::new(&plan, None, |_| Ok(()))?;
        for slot in machine.vm().slots() {
            let first = slot.place.first_page;
            (0..slot.place.pages).for_each(|page| {
                let _ = slot.memory.set_first_word(page, Mirror::word(first + page));
            });
        }
        machine.untimed(0..machine.vcpus(), Command::Fill, 0)?;
        let tracker = kind.map(|kind| Ok::<_, Failure>((kind, kind.build(&machine, None)?))).transpose()?;
        Ok(Self { nested, tracker, machine })
    }

    /// How the windows differ from EPT02, or from what the process has mapped, if they do.
    fn audit(&self) -> Result<Option<String>, Failure> {
        let Some(l2) = self.machine.l2() else { return Ok(None) };
        let audited = l2.shadow()?.audit();
        Ok(audited.err())
    }
}

/// What differed from what had to be: the first few of it in words.
#[derive(Default)]
struct Differences {
    count: u64,
    named: Vec<String>,
}

impl Differences {
    fn add(&mut self, what: String) {
        self.count += 1;
        if self.named.len() < NAMED {
            self.named.push(what);
        }
    }

    /// Gives them to the row, together with what its pages add up to.
    fn tell(self, truth: &mut Truth) {
        let more = self.count - self.named.len() as u64;
        truth.faults.extend(self.named);
        if more > 0 {
            truth.faults.push(format!("and {more} more differences"));
        }
        let pages = truth.pages;
        if pages.missed + pages.extra > 0 {
            truth.faults.push(format!("{} pages missed, {} extra", pages.missed, pages.extra));
        }
    }
}

/// What a row counts, by name.
type Counts = BTreeMap<&'static str, u64>;

/// Puts counts into a row, and those of its tracker.
fn put_counts(row: &mut Row, counts: Counts, table: &Table) {
    let tracked = table.tracker.as_ref().map_or(Vec::new(), |(_, tracker)| tracker.counters(&table.machine));
    for (name, value) in counts.into_iter().chain(tracked) {
        let counter = Counter { value, source: "umbra".to_owned(), pass: "observed".to_owned() };
        row.counters.insert(name.to_owned(), counter);
    }
}

/// One row.
struct Game<'a> {
    setup: &'a Setup,
    table: Table,
    mirror: Mirror,
    row: Row,
    counts: Counts,
    differences: Differences,
    reported: PageSet,
}

impl<'a> Game<'a> {
    fn new(
        setup: &'a Setup,
        plan: &Plan,
        kind: Option<Kind>,
        name: &str,
        progress: &Progress,
    ) -> Result<Self, Failure> {
        let Some(nested) = plan.nested else { return Err(Failure::Check("edits: a plan without an L2".into())) };
        let mirror = Mirror::new(&nested, caps_of(nested.way)?)?;
        let table = Table::new(setup, plan, kind, name, progress)?;
        let reported = PageSet::new(mirror.pages());
        let row = Row { name: name.to_owned(), ..Row::default() };
        let counts = ["edits", "epochs", "due", "probes", "violations"].map(|name| (name, 0)).into();
        Ok(Self { setup, table, mirror, row, counts, differences: Differences::default(), reported })
    }

    fn finish(mut self, progress: &Progress) -> Result<Row, Failure> {
        let wanted = self.setup.l2.as_ref().map_or(0, |l2| l2.edits);
        progress.step(&format!("{}: {wanted} edits", self.row.name));
        let Table { tracker, machine, .. } = &mut self.table;
        if let Some((_, tracker)) = tracker {
            tracker.start(machine)?;
        }
        let mut number = 0;
        while self.counts["edits"] < wanted {
            number += 1;
            self.epoch(number)?;
            if number % HARVEST == 0 {
                self.harvest(number)?;
            }
            if number % AUDIT == 0 {
                self.audit(number)?;
            }
        }
        self.harvest(number)?;
        self.audit(number)?;
        self.compare_memory();
        self.count("different", self.differences.count);
        self.differences.tell(&mut self.row.truth);
        put_counts(&mut self.row, self.counts, &self.table);
        Ok(self.row)
    }

    fn count(&mut self, name: &'static str, more: u64) {
        *self.counts.entry(name).or_default() += more;
    }

    /// One vCPU edits while every L2 stands still; then the L2 of another probes, if there is another.
    fn epoch(&mut self, number: u64) -> Result<(), Failure> {
        let vcpus = self.table.machine.vcpus();
        let editor = usize::try_from(number).unwrap_or(0) % vcpus;
        let prober = (editor + 1) % vcpus;
        self.table.machine.untimed(editor..editor + 1, Command::Play, number)?;
        self.table.machine.untimed(prober..prober + 1, Command::Probe, 0)?;
        let answers = self.table.machine.answers(prober)?;
        let seed = self.table.nested.map.seed();
        // The fault: the walker plays another epoch.
        let lost = self.setup.inject == Some(Fault::LoseEdit) && number == 3;
        let epoch = self.mirror.play(seed, if lost { 0 } else { number });
        self.count("epochs", 1);
        self.count("edits", epoch.edits);
        self.count("due", epoch.due.into());
        if answers.count != epoch.probes().len() as u64 {
            self.differences.add(format!(
                "epoch {number}: L2 made {} probes of {}",
                answers.count,
                epoch.probes().len()
            ));
        }
        for ((index, &probe), answer) in epoch.probes().iter().enumerate().zip(&answers.probes) {
            let expected = self.mirror.probe(probe, Probe::stamp(number, index))?;
            self.count("probes", 1);
            self.count("violations", u64::from(answer.code != 0));
            if let Some(what) = difference(self.table.nested.way, probe, answer, expected) {
                self.differences.add(format!("epoch {number}, probe {index}: {what}"));
            }
        }
        Ok(())
    }

    /// Compares what the tracker reports with what was written since the last time.
    fn harvest(&mut self, number: u64) -> Result<(), Failure> {
        let Table { tracker: Some((kind, tracker)), machine, .. } = &mut self.table else { return Ok(()) };
        tracker.harvest(machine)?;
        if tracker.clears() {
            tracker.clear(machine)?;
        }
        self.reported.clear();
        tracker.report(machine, &mut self.reported);
        let written = &self.mirror.written;
        let missed = written.without(&self.reported).count();
        let unwritten = self.reported.without(written).count();
        let explained = if kind.initially_all_set() && number == HARVEST { unwritten } else { 0 };
        let pages = &mut self.row.truth.pages;
        pages.written += written.count();
        pages.reported += self.reported.count();
        pages.missed += missed;
        pages.extra += unwritten - explained;
        pages.explained += explained;
        self.mirror.written.clear();
        Ok(())
    }

    fn audit(&mut self, number: u64) -> Result<(), Failure> {
        if let Some(what) = self.table.audit()? {
            self.differences.add(format!("after epoch {number}: {what}"));
        }
        Ok(())
    }

    /// Every page of L1's memory ends as the walker's.
    fn compare_memory(&mut self) {
        for page in 0..self.mirror.pages() {
            let (found, expected) = (self.table.machine.vm().first_word(page), self.mirror.word_now(page));
            if found != Some(expected) {
                let found = found.unwrap_or(0);
                self.differences.add(format!("L1's page {page} begins with {found:#x} at the end, not {expected:#x}"));
            }
        }
    }
}

/// The code by which L1 is told of a violation, and to how many bytes the address is known. Umbra's fault sources know the page of an access, not always
/// the byte.
const fn exit_of(way: Way) -> (u64, u64) {
    match way {
        Way::Svm => (NESTED_PAGE_FAULT, 1),
        Way::Vmx => (EPT_VIOLATION, 1),
        Way::Umbra | Way::Plain => (control::Exit::Violation as u64, PAGE_SIZE),
    }
}

/// What is wrong with an answer, if something is.
fn difference(way: Way, probe: Probe, answer: &Answer, expected: Expected) -> Option<String> {
    let (code, bytes) = exit_of(way);
    let address = L2_BASE.plus(probe.page).address();
    let right = match expected {
        Expected::Done(value) => answer.code == 0 && answer.value == value,
        Expected::Told(bits) => {
            (answer.code, answer.qualification, answer.address / bytes) == (code, bits, address / bytes)
        }
    };
    let verb = if probe.write { "writes" } else { "reads" };
    (!right).then(|| format!("L2 {verb} page {}: {}, the walker says {expected:x?}", probe.page, describe(answer)))
}

fn describe(answer: &Answer) -> String {
    match answer.code {
        0 => format!("done, {:#x}", answer.value),
        code => format!("exit {code:#x} ({:#x}) at {:#x}", answer.qualification, answer.address),
    }
}
