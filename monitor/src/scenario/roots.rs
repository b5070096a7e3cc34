//! Which changes of mode cost a VM its page-table root: every page is touched, something is changed there and back, every page is touched again.
//! A row for each toggle.
//!
//! A change that makes KVM drop the root makes the guest fault every page in again: `refaults`. Each round is a toggle and a touch. The timed pass
//! has no counters; the observed one counts page faults by KVM's tracepoint, those on tracked pages alone, or, where there is no tracefs, by its
//! statistics.

use super::Setup;
use super::pass::{self, Pass};
use super::toggles::{self, Change, Toggling};
use crate::failure::Failure;
use crate::guest::Machine;
use crate::kvm::exits::{Exits, Hits};
use crate::kvm::witness::Witness;
use crate::progress::Progress;
use crate::report::Record;
use crate::report::record::{Counter, Phase, Row};
use crate::truth::{Contents, Round};
use std::ops::Range;
use std::time::Duration;
use umbra_shared::layout::TRACKED_GPA;
use umbra_shared::protocol::Command;
use umbra_shared::toggle::Toggle;

/// The counter of the tracepoint.
const FAULTS: &str = "page_faults";

/// Between a toggle and the touch: what KVM has left to others by then (tables to free after a grace period) is done. In the lab idle time costs
/// nothing.
const REST: Duration = Duration::from_millis(20);

/// Runs the scenario.
pub fn run(setup: &Setup, progress: &Progress) -> Result<Record, Failure> {
    let Some(toggles) = &setup.toggles else { return Err(Failure::Input("roots: its toggles are missing".into())) };
    if toggles.by_name {
        for &toggling in &toggles.rows {
            // Said at once, not after minutes of other rows.
            toggling.check().map_err(|error| setup.not_here(&format!("{toggling}: {error}")))?;
        }
    }
    let rows = toggles.rows.iter().map(|&toggling| {
        let row = toggling.check().map_err(Failure::from).and_then(|()| row(setup, toggling, progress));
        Setup::or_not_here(&toggling.to_string(), row)
    });
    setup.record_of(rows.collect::<Result<Vec<_>, _>>()?, |_| toggles.by_name)
}

/// Both passes of one toggle.
fn row(setup: &Setup, toggling: Toggling, progress: &Progress) -> Result<Row, Failure> {
    let mut tries = pass::tries(setup.plan.timer.clock());
    let mut row = loop {
        let row = Run::new(setup, toggling, Pass::Timed, progress)?.finish()?;
        if row.phases.iter().all(|phase| phase.clean) || row.failed() || tries == 1 {
            break row;
        }
        progress.step(&format!("{toggling}: another task ran inside a window, the row runs again"));
        tries -= 1;
    };
    let observed = Run::new(setup, toggling, Pass::Observed, progress)?.finish()?;
    row.phases.extend(observed.phases);
    row.counters = observed.counters;
    row.truth.pages += observed.truth.pages;
    row.truth.faults.extend(observed.truth.faults);
    Ok(row)
}

/// One pass of one row.
struct Run<'a> {
    setup: &'a Setup,
    toggling: Toggling,
    pass: Pass,
    progress: &'a Progress,
    machine: Machine,
    counting: Counting,
    row: Row,
}

/// Where refaults are counted.
enum Counting {
    /// Nowhere, in the timed pass.
    Off,
    /// By the tracepoint: faults on tracked pages alone.
    Tracepoint(Exits),
    /// By KVM's statistics: all faults of the VM.
    Statistics,
}

impl Counting {
    fn of(machine: &Machine, pass: Pass) -> Self {
        if pass == Pass::Timed {
            return Self::Off;
        }
        let tracked = format!("fault_address>={TRACKED_GPA}");
        let hits: [Hits; 1] = [(FAULTS, "kvm_page_fault", Some(&tracked))];
        // Not every user has tracefs and perf events.
        machine.count_hits(&hits).map_or(Self::Statistics, Self::Tracepoint)
    }

    const fn source(&self) -> &'static str {
        match self {
            Self::Off => "",
            Self::Tracepoint(_) => "tracepoint",
            Self::Statistics => "stats",
        }
    }

    /// Faults so far; `None` where nobody counts.
    fn read(&self, machine: &Machine) -> Result<Option<u64>, Failure> {
        Ok(match self {
            Self::Off => None,
            Self::Tracepoint(exits) => exits.read()?.get(FAULTS).copied(),
            Self::Statistics => machine.statistics()?.get("pf_taken").copied(),
        })
    }
}

impl<'a> Run<'a> {
    fn new(setup: &'a Setup, toggling: Toggling, pass: Pass, progress: &'a Progress) -> Result<Self, Failure> {
        progress.step(&format!("{toggling}, {} pass: boot", pass.name()));
        let machine = Machine::new(&setup.plan, None, |_| Ok(()))?;
        let counting = Counting::of(&machine, pass);
        let row = Row { name: toggling.to_string(), ..Row::default() };
        Ok(Self { setup, toggling, pass, progress, machine, counting, row })
    }

    fn finish(mut self) -> Result<Row, Failure> {
        let map = self.setup.plan.map();
        let mut contents = Contents::zeroes(&map, self.setup.plan.vcpus);
        self.step("populate", 0);
        let window = self.machine.command(Command::Populate, 0)?;
        self.phase("populate", 0, window.length(), window.clean);
        contents.write(0, &Round::populating(&map));
        let mut most = None;
        for round in 1..=self.setup.rounds {
            self.step("toggle", round);
            self.machine.command(Command::Plan, round)?;
            self.toggle(round)?;
            std::thread::sleep(REST);
            let before = self.counting.read(&self.machine)?;
            let window = self.machine.command(self.touch(), 0)?;
            let after = self.counting.read(&self.machine)?;
            self.phase("refault", round, window.length(), window.clean);
            let touched = Round::of(&self.setup.plan.pattern, &map, round);
            contents.write(round, &touched);
            self.row.truth.pages.written += touched.l1.written.count();
            most = most.max(after.zip(before).map(|(after, before)| after.wrapping_sub(before)));
        }
        self.count("refaults", most);
        self.check(&contents);
        Ok(self.row)
    }

    /// The bare loop in both passes: what is observed here is KVM, not single writes.
    const fn touch(&self) -> Command {
        Command::Timed
    }

    /// The vCPUs that make the change.
    fn vcpus(&self) -> Range<usize> {
        0..if self.toggling.by_all { self.setup.plan.vcpus } else { 1 }
    }

    fn toggle(&mut self, round: u64) -> Result<(), Failure> {
        let timer = self.setup.plan.timer;
        let slots = 0..self.machine.vm().slots().len();
        let by_monitor = |work: &dyn Fn() -> Result<(), crate::kvm::Error>| {
            let (done, window) = timer.window(Witness::of_controller(timer.clock()), work);
            done.map(|()| window)
        };
        let window = match self.toggling.change {
            Change::Firmware(toggle) => return self.toggle_by_firmware(toggle, round),
            Change::Sregs => self.machine.work(self.vcpus(), || Box::new(toggles::set_sregs))?,
            Change::Cpuid => self.machine.work(self.vcpus(), || Box::new(toggles::set_cpuid))?,
            Change::SlotDelete => {
                by_monitor(&|| slots.clone().try_for_each(|slot| self.machine.vm().delete_and_restore(slot)))?
            }
            Change::SlotMove => {
                by_monitor(&|| slots.clone().try_for_each(|slot| self.machine.vm().move_and_restore(slot)))?
            }
        };
        self.phase("toggle", round, window.length(), window.clean);
        Ok(())
    }

    /// The guest measures itself, so that the way to the monitor and back is left out. Several vCPUs go one after the other.
    fn toggle_by_firmware(&mut self, toggle: Toggle, round: u64) -> Result<(), Failure> {
        let (mut ticks, mut clean) = (0, true);
        for vcpu in self.vcpus() {
            clean &= self.machine.command_of(vcpu..vcpu + 1, Command::Toggle, toggle as u64)?.clean;
            ticks += self.machine.mailbox(vcpu)?.ticks;
        }
        let (unit, convert) = pass::ticks_to(self.setup.plan.timer.clock().unit(), self.machine.tsc_khz());
        self.phase("toggle", round, convert(ticks), clean);
        if let Some(phase) = self.row.phases.last_mut() {
            unit.clone_into(&mut phase.unit);
        }
        Ok(())
    }

    fn step(&self, phase: &str, round: u64) {
        let round = if round == 0 { String::new() } else { format!(" {round} of {}", self.setup.rounds) };
        self.progress.step(&format!("{}, {} pass: {phase}{round}", self.toggling, self.pass.name()));
    }

    fn phase(&mut self, phase: &str, round: u64, value: u64, clean: bool) {
        self.row.phases.push(Phase {
            phase: phase.to_owned(),
            round,
            pass: self.pass.name().to_owned(),
            value,
            unit: self.setup.plan.timer.clock().unit().to_owned(),
            clean,
        });
    }

    fn count(&mut self, name: &str, value: Option<u64>) {
        if let Some(value) = value {
            let source = self.counting.source().to_owned();
            let counter = Counter { value, source, pass: self.pass.name().to_owned() };
            self.row.counters.insert(name.to_owned(), counter);
        }
    }

    /// Every page must hold what was written there last, whatever became of its mappings.
    fn check(&mut self, contents: &Contents) {
        let vm = self.machine.vm();
        let wrong: Vec<_> = contents.wrong(|page| vm.first_word(page)).collect();
        if let Some(first) = wrong.first() {
            self.row.truth.faults.push(format!(
                "toggle {}, {} pass: {} pages do not hold what was written there last, page {first} the first of them",
                self.toggling,
                self.pass.name(),
                wrong.len()
            ));
        }
    }
}
