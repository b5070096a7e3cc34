//! The passes of a row: what every scenario has in common that enables a tracker, lets the guest write in rounds, and checks what is reported.
//!
//! A row has two passes over machines of their own: the *timed* one runs the bare write loop and carries no counter or histogram;
//! the *observed* one repeats the same rounds with both. All figures of cost come from the timed pass, counters and stalls from the
//! observed one, truth from both.

use super::Setup;
use super::check::Check;
use super::l2::L2Options;
use crate::failure::Failure;
use crate::ground::Clock;
use crate::guest::{Machine, Plan};
use crate::host;
use crate::kvm;
use crate::kvm::exits::{self, Exits};
use crate::kvm::footprint;
use crate::kvm::witness::{self, Witness};
use crate::pages::PageSet;
use crate::progress::Progress;
use crate::report::record::{Bytes, Counter, Phase, Row, Stall};
use crate::track::{Kind, Tracker};
use std::collections::BTreeMap;
use std::time::Duration;
use umbra_shared::histogram::Histogram;
use umbra_shared::nested::{Nested, Way};
use umbra_shared::pattern::Pattern;
use umbra_shared::protocol::Command;

/// How often a row whose windows were not clean is run at most, until each phase was clean once. In the lab that is mostly the second try; a machine
/// that others use as well would only take three times as long.
pub const fn tries(clock: Clock) -> u32 {
    match clock {
        Clock::Instructions => 3,
        Clock::Nanoseconds => 1,
    }
}
/// Which of the two passes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// The bare write loop; its windows are the figures.
    Timed,
    /// The same rounds with counters and stalls.
    Observed,
}

impl Pass {
    /// As the Record has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Timed => "timed",
            Self::Observed => "observed",
        }
    }

    /// What the guest is told to execute its plan.
    const fn command(self) -> Command {
        match self {
            Self::Timed => Command::Timed,
            Self::Observed => Command::Observed,
        }
    }
}

/// What a row measures. What it has beside the phases that all rows have comes first: [`Case::begin`].
pub struct Case<'a> {
    /// The run's options.
    pub setup: &'a Setup,
    /// The machine.
    pub plan: &'a Plan,
    /// The row's name.
    pub name: String,
    /// The tracker.
    pub kind: Kind,
    /// Over-reports that the guest's mappings explain.
    pub explained_by: ExplainedBy,
    /// The phases from the booted machine until every page of the pattern was written once, in ascending order; or up to there
    /// ([`Run::leave_untouched`]).
    pub begin: fn(&mut Run) -> Result<(), Failure>,
    /// How logging ends.
    pub ending: Ending,
}

/// How logging ends, and what is looked at then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The tracker stops, and one round shows what it has left behind.
    Stopped,
    /// The same, between a round before logging (`baseline`) and one more at the end (`settled`).
    Watched,
    /// The same, and the tracker stops in the middle of a round that the guest makes, as in a migration that is given up.
    Cancelled,
}

/// How often the controller looks whether the guest is in the middle of its round, and for how long.
const LOOK: Duration = Duration::from_micros(100);
const LOOKS: u32 = 100_000;

/// Whose mappings may be dropped, so that a read maps them again and KVM counts it as a write.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum ExplainedBy {
    /// L1's.
    L1,
    /// L2's, which KVM shadows.
    L2,
}

/// A row that was run again: where a window was clean before, that one counts. Both are the same work, but a second try finds the slabs filled that the
/// first one had to fill (12,000 instructions), and which rows have a second try is chance.
fn with_clean_windows_of(mut row: Row, before: Row) -> Row {
    for (phase, earlier) in row.phases.iter_mut().zip(before.phases) {
        if earlier.clean && (&phase.phase, phase.round) == (&earlier.phase, earlier.round) {
            *phase = earlier;
        }
    }
    row
}

/// Measures a row, and again where a window was not clean.
///
/// # Errors
/// Those of `measure`.
pub fn until_clean(
    clock: Clock,
    name: &str,
    progress: &Progress,
    measure: impl Fn() -> Result<Row, Failure>,
) -> Result<Row, Failure> {
    let mut row = measure()?;
    for _ in 1..tries(clock) {
        let unclean =
            row.phases.iter().filter(|phase| !phase.clean).map(|phase| format!("{} {}", phase.phase, phase.round));
        let (phases, who) = (unclean.collect::<Vec<_>>().join(", "), witness::intruder());
        // A fault is never run away from: another try might not repeat it.
        if phases.is_empty() || row.failed() {
            break;
        }
        progress.step(&format!("{name}: another task ran inside a window ({phases}: {who}), the row runs again"));
        row = with_clean_windows_of(measure()?, row);
    }
    Ok(row)
}

/// Both passes of a row.
///
/// # Errors
/// Those of the machine and the tracker. What the truth check finds stands in the row.
pub fn row(case: &Case, progress: &Progress) -> Result<Row, Failure> {
    let timed = || Run::new(case, Pass::Timed, progress)?.finish();
    let mut row = until_clean(case.setup.plan.timer.clock(), &case.name, progress, timed)?;
    let observed = Run::new(case, Pass::Observed, progress)?.finish()?;
    row.phases.extend(observed.phases);
    row.counters.extend(observed.counters);
    row.stall = observed.stall;
    row.memory = observed.memory;
    row.truth.pages += observed.truth.pages;
    row.truth.rounds.extend(observed.truth.rounds);
    row.truth.faults.extend(observed.truth.faults);
    if let (Some(l2), Some(observed)) = (&mut row.truth.l2, observed.truth.l2) {
        l2.pages += observed.pages;
        l2.rounds.extend(observed.rounds);
    }
    Ok(row)
}

/// One pass of one row, from the empty machine to its end.
pub struct Run<'a> {
    case: &'a Case<'a>,
    pass: Pass,
    progress: &'a Progress,
    /// Before the machine: a tracker may hold the VM's descriptor, which is closed before the memory under it goes.
    tracker: Box<dyn Tracker>,
    machine: Machine,
    /// Where exits are rare and tell what the processor's log does, the observed pass counts them.
    exits: Option<Exits>,
    check: Check,
    row: Row,
    /// Whether the guest has touched the pattern's pages.
    touched: bool,
}

impl<'a> Run<'a> {
    fn new(case: &'a Case<'a>, pass: Pass, progress: &'a Progress) -> Result<Self, Failure> {
        let (plan, kind) = (case.plan, case.kind);
        progress.step(&format!("{}, {} pass: boot", case.name, pass.name()));
        let machine = Machine::new(plan, kind.ring_entries(), |vm| kind.prepare(vm))?;
        let exits = if pass == Pass::Observed && host::page_modification_logging() {
            // Not every user has tracefs and perf events.
            machine.count_hits(exits::PML).ok()
        } else {
            None
        };
        let tracker = kind.build(&machine, case.setup.chunk)?;
        let check = Check::new(case, pass);
        let row = Row { name: case.name.clone(), ..Row::default() };
        Ok(Self { case, pass, progress, tracker, machine, exits, check, row, touched: true })
    }

    /// Runs all phases.
    fn finish(mut self) -> Result<Row, Failure> {
        let booted = self.counters()?;
        (self.case.begin)(&mut self)?;
        if self.touched {
            self.check.populated();
        }
        let rounds = self.case.setup.rounds;
        if self.case.ending != Ending::Stopped {
            self.lone_round("baseline", rounds + 2)?;
        }
        let before = self.counters()?;

        self.window("enable", 0, |tracker, machine| tracker.start(machine))?;
        if self.pass == Pass::Observed {
            self.machine.command(Command::ClearHistogram, 0)?;
        }
        let mut reported = PageSet::new(self.case.plan.map().l1_pages());
        for round in 1..=rounds {
            self.round(round, &mut reported)?;
        }
        let after = self.counters()?;
        if self.pass == Pass::Observed {
            let stalls = self.machine.stalls()?;
            self.check.measured(stalls.count, rounds);
            self.row.stall = Some(stall(&stalls, self.machine.tsc_khz(), self.case.plan.timer.clock().unit()));
            self.tracker.harvest(&self.machine)?;
            reported.clear();
            self.tracker.report(&self.machine, &mut reported);
            self.check.at_rest(&reported, &self.machine);
        }
        if let Some(fault) = self.tracker.fault() {
            self.check.fault(&fault);
        }

        self.step("disable", 0);
        if self.case.ending == Ending::Cancelled {
            self.cancel(rounds + 4)?;
        } else {
            self.window("disable", 0, |tracker, machine| tracker.stop(machine))?;
        }
        let stopped = self.counters()?;
        self.lone_round("retouch", rounds + 1)?;
        let end = self.counters()?;
        let settled = if self.case.ending == Ending::Stopped {
            None
        } else {
            self.lone_round("settled", rounds + 3)?;
            Some(self.counters()?)
        };
        self.count(&Statistics { booted, before, after, stopped, end, settled })?;
        if let Some(l2) = self.machine.l2()
            && let Err(difference) = l2.shadow()?.audit()
        {
            self.check.fault(&format!("at the end: {difference}"));
        }
        self.row.truth = self.check.finish(&self.machine);
        Ok(self.row)
    }

    /// A round outside of logging: number `round` of the pattern.
    fn lone_round(&mut self, phase: &str, round: u64) -> Result<(), Failure> {
        self.machine.command(Command::Plan, round)?;
        let window = self.machine.command(self.pass.command(), 0)?;
        self.phase(phase, 0, window.length(), window.clean);
        self.check.executed(round);
        Ok(())
    }

    /// The guest makes round `first` and goes on; the tracker stops in the middle of that round, and the guest at the end of the one that it is in
    /// then. On one CPU the guest's work is in the figure too, as far as the tracker waits.
    fn cancel(&mut self, first: u64) -> Result<(), Failure> {
        let (timer, machine) = (self.case.plan.timer, &self.machine);
        machine.begin(Command::FreeRun, first)?;
        // A quarter of the round is done when the first write behind that quarter is there.
        let pattern = self.case.plan.pattern;
        let behind = (pattern.accesses() / 4..pattern.accesses()).map(|index| pattern.access(first, index));
        if let Some(page) = behind.filter(|access| access.write).map(|access| access.page).next() {
            // Later rounds have larger stamps.
            let written = || machine.vm().first_word(page) >= Some(Pattern::stamp(pattern.written_as(first), page));
            if !(0..LOOKS).any(|_| {
                written() || {
                    std::thread::sleep(LOOK);
                    false
                }
            }) {
                return Err(Failure::Check("the guest did not get into its round".to_owned()));
            }
        }
        let before = Witness::beside_vcpus(timer.clock()).look();
        let begin = timer.now();
        self.tracker.stop(machine)?;
        let length = timer.now() - begin;
        let clean = before.nobody_else_ran(length);
        machine.stop_free_run()?;
        machine.finish_all(Command::FreeRun)?;
        let next = machine.rounds_done(0)?;
        self.phase("disable", 0, length, clean);
        (first..next).for_each(|round| self.check.executed(round));
        Ok(())
    }

    fn round(&mut self, round: u64, reported: &mut PageSet) -> Result<(), Failure> {
        self.step("dirty", round);
        self.machine.command(Command::Plan, round)?;
        let window = self.machine.command(self.pass.command(), 0)?;
        if self.touched {
            self.phase("dirty", round, window.length(), window.clean);
        } else {
            self.phase("first-touch", 0, window.length(), window.clean);
            self.touched = true;
        }
        let writes = self.machine.writes()?;
        let edits = self.nested().is_some_and(|nested| nested.remaps > 0);
        if edits {
            self.step("edit", round);
            let window = self.machine.command(Command::Edit, round)?;
            self.phase("edit", round, window.length(), window.clean);
        }
        self.window("get", round, |tracker, machine| tracker.harvest(machine))?;
        if self.tracker.clears() {
            self.window("clear", round, |tracker, machine| tracker.clear(machine))?;
        }
        reported.clear();
        self.tracker.report(&self.machine, reported);
        self.check.reported(round, writes, reported, &self.machine);
        if edits {
            self.check.edited(round);
        }
        Ok(())
    }

    /// The pages of the pattern are untouched when [`Case::begin`] ends: the first round's touch is the first.
    pub const fn leave_untouched(&mut self) {
        self.touched = false;
    }

    /// A phase that is the guest's: it executes `command`.
    pub fn command(&mut self, phase: &str, command: Command, argument: u64) -> Result<(), Failure> {
        self.step(phase, 0);
        let window = self.machine.command(command, argument)?;
        self.phase(phase, 0, window.length(), window.clean);
        Ok(())
    }

    /// A phase that the guest measures itself: what lies between is left out, the way to the monitor and back.
    pub fn command_by_guest(&mut self, phase: &str, command: Command, argument: u64) -> Result<(), Failure> {
        self.step(phase, 0);
        let window = self.machine.command(command, argument)?;
        let (unit, convert) = ticks_to(self.case.plan.timer.clock().unit(), self.machine.tsc_khz());
        let value = convert(self.machine.mailbox(0)?.ticks);
        self.phase(phase, 0, value, window.clean);
        if let Some(phase) = self.row.phases.last_mut() {
            unit.clone_into(&mut phase.unit);
        }
        Ok(())
    }

    /// A phase in which the monitor gives all tracked pages their host memory, so that the guest's first touch is KVM's work alone.
    pub fn populate(&mut self) {
        self.step("populate", 0);
        let timer = self.case.plan.timer;
        let ((), window) = timer.window(Witness::of_controller(timer.clock()), || self.machine.vm().populate());
        self.phase("populate", 0, window.length(), window.clean);
    }

    /// What L2 is; `None` where there is none.
    pub const fn nested(&self) -> Option<Nested> {
        self.case.plan.nested
    }

    /// The options of an L2.
    pub const fn l2(&self) -> Option<&L2Options> {
        self.case.setup.l2.as_ref()
    }

    /// A phase that is the tracker's.
    fn window(
        &mut self,
        phase: &str,
        round: u64,
        work: impl FnOnce(&mut dyn Tracker, &Machine) -> Result<(), kvm::Error>,
    ) -> Result<(), Failure> {
        let timer = self.case.plan.timer;
        let witness = Witness::of_controller(timer.clock());
        let (tracker, machine) = (&mut *self.tracker, &self.machine);
        let (done, window) = timer.window(witness, || work(tracker, machine));
        done?;
        self.phase(phase, round, window.length(), window.clean);
        Ok(())
    }

    fn step(&self, phase: &str, round: u64) {
        let round = if round == 0 { String::new() } else { format!(" {round} of {}", self.case.setup.rounds) };
        self.progress.step(&format!("{}, {} pass: {phase}{round}", self.case.name, self.pass.name()));
    }

    fn phase(&mut self, phase: &str, round: u64, value: u64, clean: bool) {
        self.row.phases.push(Phase {
            phase: phase.to_owned(),
            round,
            pass: self.pass.name().to_owned(),
            value,
            unit: self.case.plan.timer.clock().unit().to_owned(),
            clean,
        });
    }

    /// KVM's statistics; the timed pass does not look.
    fn counters(&self) -> Result<BTreeMap<String, u64>, Failure> {
        if self.pass == Pass::Timed {
            return Ok(BTreeMap::new());
        }
        let mut counters = self.machine.statistics()?;
        if let Some(exits) = &self.exits {
            counters.extend(exits.read()?);
        }
        counters.extend(footprint::read());
        Ok(counters)
    }

    /// Turns what was counted into the row's counters.
    fn count(&mut self, statistics: &Statistics) -> Result<(), Failure> {
        if self.pass == Pass::Timed {
            return Ok(());
        }
        let mut stats = statistics.of_rounds();
        stats.extend(statistics.of_collapse());
        let mut own = self.tracker.counters(&self.machine);
        if let Some(nested) = self.nested() {
            stats.extend(statistics.of_nesting());
            if nested.way != Way::Plain {
                let report = self.machine.nested_report()?;
                own.extend([
                    ("l2_entries", report.entries),
                    ("l2_violations", report.violations),
                    ("ept12_entries", report.filled),
                    ("ept12_pages", report.table_pages),
                ]);
            }
        }
        if let Some(l2) = self.machine.l2() {
            let memory = l2.shadow()?.memory();
            self.row.memory = Some(Bytes {
                table_bytes: memory.table_bytes,
                rmap_bytes: memory.rmap_bytes,
                cache_bytes: memory.cache_bytes,
                track_bytes: memory.track_bytes,
            });
        }
        let own = own.into_iter().map(|(name, value)| (name, Some(value), "umbra"));
        let slabs = statistics.of_memory().into_iter().map(|(name, value)| (name, value, footprint::source(name)));
        let traced = statistics.of_exits().into_iter().map(|(name, value)| (name, value, "tracepoint"));
        let all = stats.into_iter().map(|(name, value)| (name, value, "stats")).chain(traced).chain(slabs).chain(own);
        for (name, value, source) in all {
            if let Some(value) = value {
                let counter = Counter { value, source: source.to_owned(), pass: self.pass.name().to_owned() };
                self.row.counters.insert(name.to_owned(), counter);
            }
        }
        Ok(())
    }
}

/// KVM's statistics when the machine was booted, before enabling, after the rounds, after disabling and at the end.
struct Statistics {
    booted: BTreeMap<String, u64>,
    before: BTreeMap<String, u64>,
    after: BTreeMap<String, u64>,
    stopped: BTreeMap<String, u64>,
    end: BTreeMap<String, u64>,
    /// After one more round, where there is one.
    settled: Option<BTreeMap<String, u64>>,
}

impl Statistics {
    fn of_rounds(&self) -> Vec<(&'static str, Option<u64>)> {
        let Self { before, after, stopped, end, .. } = self;
        vec![
            ("pf_taken", grown("pf_taken", before, after)),
            ("pf_fast", grown("pf_fast", before, after)),
            ("pf_fixed", grown("pf_fixed", before, after)),
            ("pages_2m_split", fallen("pages_2m", before, after)),
            ("pages_2m_remapped", fallen("pages_2m", end, after)),
            ("pages_2m_after_disable", stopped.get("pages_2m").copied()),
            ("remote_tlb_flush", grown("remote_tlb_flush", before, after)),
        ]
    }

    /// What KVM's MMU has taken for the tracked pages when all rounds are done, beyond what it took for the system slot.
    fn of_memory(&self) -> Vec<(&'static str, Option<u64>)> {
        let grown = |name: &str| Some(self.after.get(name)?.saturating_sub(*self.booted.get(name)?));
        footprint::NAMES.into_iter().map(|name| (name, grown(name))).collect()
    }

    /// Huge mappings from before logging to the end, and the faults of the rounds after it.
    fn of_collapse(&self) -> Vec<(&'static str, Option<u64>)> {
        let Self { before, after, stopped, end, settled, .. } = self;
        let Some(settled) = settled else { return Vec::new() };
        let huge = |at: &BTreeMap<String, u64>| at.get("pages_2m").copied();
        // Before Linux 5.14 only those faults are counted that mapped a page, which after logging all of them do but those on small pages.
        let faults = |from, to| grown("pf_taken", from, to).or_else(|| grown("pf_fixed", from, to));
        vec![
            ("pages_2m_before", huge(before)),
            ("pages_2m_logging", huge(after)),
            ("pages_2m_after_retouch", huge(end)),
            ("pages_2m_settled", huge(settled)),
            ("pf_retouch", faults(stopped, end)),
            ("pf_settled", faults(end, settled)),
        ]
    }

    fn of_exits(&self) -> Vec<(&'static str, Option<u64>)> {
        exits::PML.iter().map(|&(name, ..)| (name, grown(name, &self.before, &self.after))).collect()
    }

    /// What the first touch and its fills came to, and what KVM did to its shadow pages in all.
    fn of_nesting(&self) -> Vec<(&'static str, Option<u64>)> {
        let Self { booted, before, end, .. } = self;
        vec![
            ("first_touch_pf_taken", grown("pf_taken", booted, before)),
            ("nested_run", grown("nested_run", booted, end)),
            ("mmu_shadow_zapped", grown("mmu_shadow_zapped", booted, end)),
            ("mmu_pte_write", grown("mmu_pte_write", booted, end)),
        ]
    }
}

fn grown(name: &str, from: &BTreeMap<String, u64>, to: &BTreeMap<String, u64>) -> Option<u64> {
    Some(to.get(name)?.wrapping_sub(*from.get(name)?))
}

/// How many fewer there are: the number of huge mappings that there are now may move the other way.
fn fallen(name: &str, from: &BTreeMap<String, u64>, to: &BTreeMap<String, u64>) -> Option<u64> {
    Some(from.get(name)?.saturating_sub(*to.get(name)?))
}

/// Ticks of the guest's TSC in the unit of the Record, and the unit's name: in the lab a tick is an instruction.
pub fn ticks_to(unit: &'static str, tsc_khz: u32) -> (&'static str, impl Fn(u64) -> u64) {
    // Where KVM does not say how fast the TSC is, ticks stay ticks.
    let unit = if unit == "nanoseconds" && tsc_khz == 0 { "ticks" } else { unit };
    let convert = move |ticks: u64| {
        if unit != "nanoseconds" {
            return ticks;
        }
        u64::try_from(u128::from(ticks) * 1_000_000 / u128::from(tsc_khz)).unwrap_or(u64::MAX)
    };
    (unit, convert)
}

/// The guest's histogram in the unit of the Record.
fn stall(ticks: &Histogram, tsc_khz: u32, unit: &'static str) -> Stall {
    let (unit, convert) = ticks_to(unit, tsc_khz);
    Stall::of(ticks, unit, convert)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_window_counts_from_the_first_try_in_which_it_was_clean() {
        let row = |windows: [(u64, bool); 3]| {
            let phase = |(round, (value, clean))| Phase {
                phase: "dirty".to_owned(),
                round,
                pass: "timed".to_owned(),
                value,
                unit: "instructions".to_owned(),
                clean,
            };
            Row { phases: (1..).zip(windows).map(phase).collect(), ..Row::default() }
        };
        let (first, again) = ([(10, true), (29, false), (39, false)], [(11, true), (20, true), (38, false)]);
        let joined = with_clean_windows_of(row(again), row(first));
        assert_eq!(joined, row([(10, true), (20, true), (38, false)]));
    }

    /// Two windows of which one more is clean in each try: a clean one counts from its first.
    #[test]
    fn a_row_runs_again_until_each_window_was_clean() {
        let tried = std::cell::Cell::new(0);
        let measure = || {
            tried.set(tried.get() + 1);
            let phase = |name: &str, clean_from| Phase {
                phase: name.into(),
                round: 0,
                pass: "timed".into(),
                value: tried.get(),
                unit: "instructions".into(),
                clean: tried.get() >= clean_from,
            };
            Ok(Row { name: "row".into(), phases: vec![phase("enable", 1), phase("disable", 2)], ..Row::default() })
        };
        let values = |row: Row| row.phases.iter().map(|phase| (phase.value, phase.clean)).collect::<Vec<_>>();
        let row = until_clean(Clock::Instructions, "row", &Progress::Silent, measure).unwrap();
        assert_eq!(values(row), [(1, true), (2, true)]);
        assert_eq!(tried.replace(0), 2);
        let row = until_clean(Clock::Nanoseconds, "row", &Progress::Silent, measure).unwrap();
        assert_eq!(values(row), [(1, true), (1, false)], "a machine that others use as well is not waited for");
    }
}
