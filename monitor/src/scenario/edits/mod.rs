//! Random edits of L1's table, in epochs ([`umbra_shared::edits`]): after each, what L2 reads and writes and what L1 is told has to be what Umbra's
//! software walker says of the same table. On KVM's own nesting, and on Umbra's shadow MMU under each strategy, whose report of written
//! pages is checked as well.
//!
//! L2 looks at them when L1 is done ([`turns`]); with `--race` nobody waits ([`race`]).

mod chronicle;
mod mirror;
mod race;
mod turns;

use super::Setup;
use super::l1_cpu::{EPT_VIOLATION, NESTED_PAGE_FAULT};
use super::l2::Nesting;
use crate::failure::Failure;
use crate::guest::{Machine, Plan};
use crate::pages::PageSet;
use crate::progress::Progress;
use crate::report::Record;
use crate::report::record::{Counter, Row};
use crate::track::{Kind, Tracker};
use mirror::Mirror;
use std::collections::BTreeMap;
use umbra_shared::PAGE_SIZE;
use umbra_shared::control;
use umbra_shared::edits::Epoch;
use umbra_shared::nested::{Nested, Way};
use umbra_shared::probe::Answer;
use umbra_shared::protocol::Command;

/// Differences that are named one by one.
const NAMED: usize = 16;

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
                Ok(plan) => row(setup, plan, kind, &name, progress),
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

fn row(setup: &Setup, plan: &Plan, kind: Option<Kind>, name: &str, progress: &Progress) -> Result<Row, Failure> {
    let races = setup.l2.as_ref().is_some_and(|l2| l2.race);
    let trial = Trial::new(setup, &Plan { journals: races, ..plan.clone() }, kind, name, progress)?;
    if races { race::row(trial) } else { turns::row(trial) }
}

/// What makes a row: a machine whose L1 has filled its table, each of its pages beginning with [`Mirror::word`]; what tracks its L2's writes, if
/// something does; and what was found so far.
struct Trial<'a> {
    setup: &'a Setup,
    nested: Nested,
    tracker: Option<(Kind, Box<dyn Tracker>)>,
    machine: Machine,
    row: Row,
    counts: BTreeMap<&'static str, u64>,
    differences: Differences,
    /// What the last harvest reported.
    reported: PageSet,
}

impl<'a> Trial<'a> {
    fn new(
        setup: &'a Setup,
        plan: &Plan,
        kind: Option<Kind>,
        name: &str,
        progress: &Progress,
    ) -> Result<Self, Failure> {
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
        progress.step(&format!("{name}: {} edits", wanted(setup)));
        Ok(Self {
            setup,
            nested,
            tracker,
            machine,
            row: Row { name: name.to_owned(), ..Row::default() },
            counts: BTreeMap::new(),
            differences: Differences::default(),
            reported: PageSet::new(nested.map.l1_pages()),
        })
    }

    /// Edits that are to be made yet.
    fn missing(&self) -> u64 {
        wanted(self.setup).saturating_sub(self.counts.get("edits").copied().unwrap_or(0))
    }

    fn count(&mut self, name: &'static str, more: u64) {
        *self.counts.entry(name).or_default() += more;
    }

    /// Counts an epoch that was played.
    fn count_epoch(&mut self, epoch: &Epoch) {
        self.count("epochs", 1);
        self.count("edits", epoch.edits);
        self.count("due", epoch.due.into());
    }

    fn start(&mut self) -> Result<(), Failure> {
        let Some((_, tracker)) = &mut self.tracker else { return Ok(()) };
        Ok(tracker.start(&self.machine)?)
    }

    /// Asks for what was written, and clears it.
    fn harvest(&mut self) -> Result<(), Failure> {
        let Self { tracker: Some((_, tracker)), machine, reported, .. } = self else { return Ok(()) };
        tracker.harvest(machine)?;
        if tracker.clears() {
            tracker.clear(machine)?;
        }
        reported.clear();
        tracker.report(machine, reported);
        Ok(())
    }

    /// Compares the windows with EPT02, and with what the process has mapped, as they are after epoch `number`.
    fn audit(&mut self, number: u64) -> Result<(), Failure> {
        let Some(l2) = self.machine.l2() else { return Ok(()) };
        let audited = l2.shadow()?.audit();
        if let Err(what) = audited {
            self.differences.add(format!("after epoch {number}: {what}"));
        }
        Ok(())
    }

    /// The row, with all that was found and counted.
    fn finish(mut self) -> Row {
        self.count("different", self.differences.count);
        self.differences.tell(&mut self.row);
        let tracked = self.tracker.as_ref().map_or(Vec::new(), |(_, tracker)| tracker.counters(&self.machine));
        for (name, value) in self.counts.into_iter().chain(tracked) {
            let counter = Counter { value, source: "umbra".to_owned(), pass: "observed".to_owned() };
            self.row.counters.insert(name.to_owned(), counter);
        }
        self.row
    }
}

/// How many edits are to be made.
fn wanted(setup: &Setup) -> u64 {
    setup.l2.as_ref().map_or(0, |l2| l2.edits)
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

    /// Gives them to the row.
    fn tell(self, row: &mut Row) {
        let more = self.count - self.named.len() as u64;
        let last = (more > 0).then(|| format!("and {more} more differences"));
        row.truth.faults = self.named.into_iter().chain(last).map(|what| format!("{}: {what}", row.name)).collect();
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

fn describe(answer: &Answer) -> String {
    match answer.code {
        0 => format!("done, {:#x}", answer.value),
        code => format!("exit {code:#x} ({:#x}) at {:#x}", answer.qualification, answer.address),
    }
}
