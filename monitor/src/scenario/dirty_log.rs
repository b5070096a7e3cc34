//! What dirty tracking costs, phase by phase, with every reported page checked.
//!
//! A row has two passes over machines of their own: the *timed* one runs the bare write loop and carries no counter or histogram;
//! the *observed* one repeats the same rounds with both. All figures of cost come from the timed pass, counters and stalls from the
//! observed one, truth from both.

use super::Setup;
use super::setup::Fault;
use crate::failure::Failure;
use crate::ground::Clock;
use crate::guest::{Machine, Plan};
use crate::host;
use crate::kvm::clock::Window;
use crate::kvm::exits::{self, Exits};
use crate::kvm::witness::Witness;
use crate::pages::PageSet;
use crate::progress::Progress;
use crate::report::Record;
use crate::report::record::{Counter, Phase, Row, Stall, TruthRound};
use crate::track::{self, Expectation, Kind, Tracker};
use crate::truth::{Contents, Round, Verdict};
use std::collections::BTreeMap;
use umbra_shared::histogram::Histogram;
use umbra_shared::protocol::Command;

/// How often a row whose windows were not clean is run at most. In the lab the second try is mostly clean; a machine that others use as well
/// would only take three times as long.
const fn tries(clock: Clock) -> u32 {
    match clock {
        Clock::Instructions => 3,
        Clock::Nanoseconds => 1,
    }
}
/// Faults of the truth check that a row names one by one; more are counted.
const NAMED_FAULTS: usize = 8;

/// Which of the two passes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    Timed,
    Observed,
}

impl Pass {
    const fn name(self) -> &'static str {
        match self {
            Self::Timed => "timed",
            Self::Observed => "observed",
        }
    }

    const fn command(self) -> Command {
        match self {
            Self::Timed => Command::Timed,
            Self::Observed => Command::Observed,
        }
    }
}

/// Runs the scenario: a row for each tracker.
pub fn run(setup: &Setup, progress: &Progress) -> Result<Record, Failure> {
    setup.rows(|kind| row(setup, kind, progress))
}

/// Both passes of one tracker.
pub(super) fn row(setup: &Setup, kind: Kind, progress: &Progress) -> Result<Row, Failure> {
    let mut tries = tries(setup.plan.timer.clock());
    let mut row = loop {
        let row = Run::new(setup, kind, Pass::Timed, progress)?.finish()?;
        // A fault is never run away from: another try might not repeat it.
        if row.phases.iter().all(|phase| phase.clean) || row.failed() || tries == 1 {
            break row;
        }
        progress.step(&format!("{kind}: another task ran inside a window, the row runs again"));
        tries -= 1;
    };
    let observed = Run::new(setup, kind, Pass::Observed, progress)?.finish()?;
    row.phases.extend(observed.phases);
    row.counters.extend(observed.counters);
    row.stall = observed.stall;
    row.truth.pages += observed.truth.pages;
    row.truth.rounds.extend(observed.truth.rounds);
    row.truth.faults.extend(observed.truth.faults);
    Ok(row)
}

/// One pass of one row, from the empty machine to its end.
struct Run<'a> {
    setup: &'a Setup,
    kind: Kind,
    pass: Pass,
    progress: &'a Progress,
    /// Before the machine: a tracker may hold the VM's descriptor, which is closed before the memory under it goes.
    tracker: Box<dyn Tracker>,
    machine: Machine,
    /// Where exits are rare and tell what the processor's log does, the observed pass counts them.
    exits: Option<Exits>,
    contents: Contents,
    reported: PageSet,
    row: Row,
}

impl<'a> Run<'a> {
    fn new(setup: &'a Setup, kind: Kind, pass: Pass, progress: &'a Progress) -> Result<Self, Failure> {
        progress.step(&format!("{kind}, {} pass: boot", pass.name()));
        let machine = Machine::new(&setup.plan, kind.ring_entries(), |vm| kind.prepare(vm))?;
        let exits = if pass == Pass::Observed && host::page_modification_logging() {
            // Not every user has tracefs and perf events.
            machine.count_exits(exits::PML).ok()
        } else {
            None
        };
        let tracker = kind.build(&machine, setup.chunk)?;
        let pages = setup.plan.pattern.pages;
        Ok(Self {
            setup,
            kind,
            pass,
            progress,
            machine,
            exits,
            tracker,
            contents: Contents::populated(pages),
            reported: PageSet::new(pages),
            row: Row { name: kind.to_string(), ..Row::default() },
        })
    }

    /// Runs all phases.
    fn finish(mut self) -> Result<Row, Failure> {
        let timer = self.setup.plan.timer;
        let witness = Witness::of_controller(timer.clock());
        let pattern = self.setup.plan.pattern;
        self.step("populate", 0);
        let window = self.machine.command(Command::Populate, 0)?;
        self.phase("populate", 0, window);
        let before = self.counters()?;
        let Plan { slots, backing, .. } = &self.setup.plan;
        let mut expectation = Expectation::new(self.kind, slots, *backing, track::Host::here());

        let (started, window) = timer.window(witness, || self.tracker.start(&self.machine));
        started?;
        self.phase("enable", 0, window);
        if self.pass == Pass::Observed {
            self.machine.command(Command::ClearHistogram, 0)?;
        }
        for round in 1..=self.setup.rounds {
            self.round(round, &mut expectation)?;
        }
        let after = self.counters()?;
        if self.pass == Pass::Observed {
            let stalls = self.machine.stalls()?;
            let (measured, writes) = (stalls.count, self.setup.rounds * pattern.writes());
            if measured != writes {
                self.fault(&format!("the firmware measured {measured} writes where the pattern has {writes}"));
            }
            self.row.stall = Some(stall(&stalls, self.machine.tsc_khz(), timer.clock().unit()));
            self.check_idle(&mut expectation)?;
        }
        if let Some(fault) = self.tracker.fault() {
            self.fault(&fault);
        }

        self.step("disable", 0);
        let (stopped, window) = timer.window(witness, || self.tracker.stop(&self.machine));
        stopped?;
        self.phase("disable", 0, window);
        let retouch = self.setup.rounds + 1;
        self.machine.command(Command::Plan, retouch)?;
        let stopped = self.counters()?;
        let window = self.machine.command(self.pass.command(), 0)?;
        self.phase("retouch", 0, window);
        self.contents.write(retouch, &Round::of(&pattern, retouch).written);
        let end = self.counters()?;
        self.count(&[before, after, stopped, end]);
        self.check_contents();
        Ok(self.row)
    }

    fn round(&mut self, round: u64, expectation: &mut Expectation) -> Result<(), Failure> {
        let timer = self.setup.plan.timer;
        let witness = Witness::of_controller(timer.clock());
        self.step("dirty", round);
        self.machine.command(Command::Plan, round)?;
        let window = self.machine.command(self.pass.command(), 0)?;
        self.phase("dirty", round, window);
        let (harvested, window) = timer.window(witness, || self.tracker.harvest(&self.machine));
        harvested?;
        self.phase("get", round, window);
        if self.tracker.clears() {
            let (cleared, window) = timer.window(witness, || self.tracker.clear(&self.machine));
            cleared?;
            self.phase("clear", round, window);
        }
        self.reported.clear();
        self.tracker.report(&self.machine, &mut self.reported);
        self.check(round, expectation)
    }

    /// Holds the report of `round` against the truth.
    fn check(&mut self, round: u64, expectation: &mut Expectation) -> Result<(), Failure> {
        let truth = Round::of(&self.setup.plan.pattern, round);
        let promised = expectation.promises_all();
        let explained = expectation.explained(&truth.written, &truth.read);
        if self.reported.count() < truth.written.capacity() && promised {
            self.fault(&format!("round {round}: initially all set promises every page, and not all were reported"));
        }
        self.inject(round, &truth, &explained);
        self.contents.write(round, &truth.written);
        let said = self.machine.writes()?;
        if said != truth.writes {
            self.fault(&format!(
                "round {round}: the firmware made {said} writes where the pattern has {}",
                truth.writes
            ));
        }
        let verdict = Verdict::of(&truth.written, &self.reported, &explained);
        for page in verdict.missed.iter() {
            let written = self.machine.vm().first_word(page) == self.contents.stamp(page);
            let blame = if written {
                "the page holds the written value: the tracker lost it"
            } else {
                "the page does not hold the value: the guest did not write it"
            };
            self.fault(&format!("round {round}: {} was not reported; {blame}", self.place(page)));
        }
        for page in verdict.extra.iter() {
            self.fault(&format!(
                "round {round}: {} was reported, but not written, and nothing explains it",
                self.place(page)
            ));
        }
        self.row.truth.pages += verdict.pages;
        self.row.truth.rounds.push(TruthRound { round, pass: self.pass.name().to_owned(), pages: verdict.pages });
        Ok(())
    }

    /// A harvest while the guest rests reports nothing but what the tracker reports whatever the guest does. Where every round writes every page, only this shows that clearing cleared: a bit that
    /// stays would hide a page that is lost later.
    fn check_idle(&mut self, expectation: &mut Expectation) -> Result<(), Failure> {
        self.tracker.harvest(&self.machine)?;
        self.reported.clear();
        self.tracker.report(&self.machine, &mut self.reported);
        let nothing = PageSet::new(self.reported.capacity());
        let explained = expectation.explained(&nothing, &nothing);
        let stale: Vec<_> = self.reported.without(&explained).iter().collect();
        self.row.truth.pages.extra += stale.len() as u64;
        for page in stale {
            self.fault(&format!(
                "after the last round: {} is still reported, although it was cleared",
                self.place(page)
            ));
        }
        Ok(())
    }

    fn inject(&mut self, round: u64, truth: &Round, explained: &PageSet) {
        if round != self.setup.rounds.min(2) || self.pass != Pass::Timed {
            return;
        }
        match self.setup.inject {
            Some(Fault::LosePage) => {
                let Some(page) = truth.written.iter().next() else {
                    return self.fault("--inject lose-page: the round wrote no page that could be lost");
                };
                self.reported.remove(page);
            }
            Some(Fault::ExtraPage) => {
                let pages = self.setup.plan.pattern.pages;
                let innocent = (0..pages).find(|&page| !truth.written.contains(page) && !explained.contains(page));
                let Some(page) = innocent else {
                    return self.fault(
                        "--inject extra-page: every page of the round is written or explained (take more --rounds)",
                    );
                };
                self.reported.insert(page);
            }
            None => {}
        }
    }

    /// Every page must hold what its last write left.
    fn check_contents(&mut self) {
        let vm = self.machine.vm();
        let wrong: Vec<_> = self.contents.wrong(|page| vm.first_word(page)).collect();
        for page in wrong {
            self.fault(&format!("at the end: {} does not hold what the pattern wrote there last", self.place(page)));
        }
    }

    /// A page as a message names it.
    fn place(&self, page: u64) -> String {
        match self.machine.vm().slot_of(page) {
            Some(slot) => {
                let offset = page - slot.place.first_page;
                let gpa = slot.place.base.plus(offset).address();
                format!("page {page} (slot {}, its page {offset}, GPA {gpa:#x})", slot.id)
            }
            None => format!("page {page}"),
        }
    }

    fn fault(&mut self, what: &str) {
        let faults = &mut self.row.truth.faults;
        if faults.len() < NAMED_FAULTS {
            faults.push(format!("tracker {}, {} pass, {what}", self.kind, self.pass.name()));
        }
    }

    fn step(&self, phase: &str, round: u64) {
        let round = if round == 0 { String::new() } else { format!(" {round} of {}", self.setup.rounds) };
        self.progress.step(&format!("{}, {} pass: {phase}{round}", self.kind, self.pass.name()));
    }

    fn phase(&mut self, phase: &str, round: u64, window: Window) {
        self.row.phases.push(Phase {
            phase: phase.to_owned(),
            round,
            pass: self.pass.name().to_owned(),
            value: window.length(),
            unit: self.setup.plan.timer.clock().unit().to_owned(),
            clean: window.clean,
        });
    }

    /// KVM's statistics and the counted exits; the timed pass does not look.
    fn counters(&self) -> Result<BTreeMap<String, u64>, Failure> {
        if self.pass == Pass::Timed {
            return Ok(BTreeMap::new());
        }
        let mut counters = self.machine.statistics()?;
        if let Some(exits) = &self.exits {
            counters.extend(exits.read()?);
        }
        Ok(counters)
    }

    /// Turns the statistics before enabling, after the rounds, after disabling and at the end into the row's counters.
    fn count(&mut self, [before, after, stopped, end]: &[BTreeMap<String, u64>; 4]) {
        let grown = |name: &str, from: &BTreeMap<String, u64>, to: &BTreeMap<String, u64>| {
            Some(to.get(name)?.wrapping_sub(*from.get(name)?))
        };
        // How many huge mappings there are now: that number may move the other way.
        let fallen = |name: &str, from: &BTreeMap<String, u64>, to: &BTreeMap<String, u64>| {
            Some(from.get(name)?.saturating_sub(*to.get(name)?))
        };
        let stats = [
            ("pf_taken", grown("pf_taken", before, after)),
            ("pf_fast", grown("pf_fast", before, after)),
            ("pf_fixed", grown("pf_fixed", before, after)),
            ("pages_2m_split", fallen("pages_2m", before, after)),
            ("pages_2m_remapped", fallen("pages_2m", end, after)),
            ("pages_2m_after_disable", stopped.get("pages_2m").copied()),
            ("remote_tlb_flush", grown("remote_tlb_flush", before, after)),
        ];
        let own = self.tracker.counters(&self.machine).into_iter().map(|(name, value)| (name, Some(value), "umbra"));
        let traced = exits::PML.iter().map(|&(name, _)| (name, grown(name, before, after), "tracepoint"));
        let all = stats.into_iter().map(|(name, value)| (name, value, "stats")).chain(traced).chain(own);
        for (name, value, source) in all {
            if let (Some(value), Pass::Observed) = (value, self.pass) {
                let counter = Counter { value, source: source.to_owned(), pass: self.pass.name().to_owned() };
                self.row.counters.insert(name.to_owned(), counter);
            }
        }
    }
}

/// The guest's histogram in the unit of the Record. The guest measures in TSC ticks: in the lab an instruction each.
fn stall(ticks: &Histogram, tsc_khz: u32, unit: &str) -> Stall {
    // Where KVM does not say how fast the TSC is, ticks stay ticks.
    let unit = if unit == "nanoseconds" && tsc_khz == 0 { "ticks" } else { unit };
    let convert = |value: u64| {
        if unit != "nanoseconds" {
            return value;
        }
        u64::try_from(u128::from(value) * 1_000_000 / u128::from(tsc_khz)).unwrap_or(u64::MAX)
    };
    Stall {
        unit: unit.to_owned(),
        count: ticks.count,
        p50: convert(ticks.quantile(500)),
        p99: convert(ticks.quantile(990)),
        p999: convert(ticks.quantile(999)),
        max: convert(ticks.max),
        total: convert(ticks.total),
    }
}
