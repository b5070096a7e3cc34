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
use super::each_way;
use crate::failure::Failure;
use crate::guest::{Machine, Plan};
use crate::pages::PageSet;
use crate::progress::Progress;
use crate::report::Record;
use crate::report::record::{Counter, Row};
use crate::track::{Kind, Tracker};
use mirror::Mirror;
use std::collections::BTreeMap;
use umbra_shared::edits::Epoch;
use umbra_shared::nested::Nested;
use umbra_shared::probe::Answer;
use umbra_shared::protocol::Command;

/// Differences that are named one by one.
const NAMED: usize = 16;

/// Runs the scenario.
pub fn run(setup: &Setup, progress: &Progress) -> Result<Record, Failure> {
    let Some(l2) = &setup.l2 else { return Err(Failure::Input("edits: its options are missing".into())) };
    each_way::record(setup, l2, &l2.nested_ways_here(crate::host::vendor()), &[None], progress, |plan, kind, name| {
        row(setup, plan, kind, name, progress)
    })
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
        let Some(nested) = plan.nested else { return Err(Failure::Check("a plan without an L2".into())) };
        progress.step(&format!("{name}: boot"));
        let machine = Machine::new(plan, None, |_| Ok(()))?;
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

    /// Begins to track; what is reported because it was there before is harvested at once.
    fn start(&mut self) -> Result<(), Failure> {
        let Some((kind, tracker)) = &mut self.tracker else { return Ok(()) };
        let all = kind.initially_all_set();
        tracker.start(&self.machine)?;
        if all { self.harvest() } else { Ok(()) }
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

fn describe(answer: &Answer) -> String {
    match answer.code {
        0 => format!("done, {:#x}", answer.value),
        code => format!("exit {code:#x} ({:#x}) at {:#x}", answer.qualification, answer.address),
    }
}
