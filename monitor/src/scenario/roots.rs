//! Which changes of mode cost a VM its page-table root: every page is touched, something is changed there and back, every page is touched again.
//! A row for each toggle.
//!
//! A change that makes KVM drop the root makes the guest fault every page in again: `refaults`. Each round is a toggle and a touch. The timed pass
//! has no counters; the observed one counts page faults by KVM's tracepoint, those on tracked pages alone, or, where there is no tracefs, by its
//! statistics.

use super::Setup;
use super::pass::{self, Pass};
use super::role_log::RoleLog;
use super::roots_l2::{self, OnL2};
use super::setup::Fault;
use super::toggles::{self, By, Change, Toggling};
use super::{replay, storm, unpaged};
use crate::failure::Failure;
use crate::guest::{Machine, Plan};
use crate::host;
use crate::kvm::exits::{Exits, Hits};
use crate::kvm::witness::Witness;
use crate::progress::Progress;
use crate::report::Record;
use crate::report::record::{Counter, Phase, Row};
use crate::truth::{Contents, Round, Translation};
use std::ops::Range;
use std::time::Duration;
use umbra_shared::Level;
use umbra_shared::layout::TRACKED_GPA;
use umbra_shared::nested::{AliasKind, Flags, Format, Map, Nested, Way};
use umbra_shared::protocol::Command;
use umbra_shared::smm::View;
use umbra_shared::toggle::Toggle;

/// The counter of the tracepoint.
const FAULTS: &str = "page_faults";

/// Page faults of a touch, so far or in it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// KVM's; `None` where nobody counts.
    pub kvm: Option<u64>,
    /// Tracked pages that the shadow MMU mapped; `None` where there is none.
    pub shadow: Option<u64>,
}

impl Faults {
    fn both(self, other: Self, of: impl Fn(u64, u64) -> u64) -> Self {
        let both =
            |one: Option<u64>, other: Option<u64>| one.zip(other).map(|(one, other)| of(one, other)).or(one).or(other);
        Self { kvm: both(self.kvm, other.kvm), shadow: both(self.shadow, other.shadow) }
    }

    /// What was counted since `before`.
    pub fn since(self, before: Self) -> Self {
        self.both(before, u64::wrapping_sub)
    }

    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        self.both(other, u64::wrapping_add)
    }

    /// The larger ones.
    pub fn most(self, other: Self) -> Self {
        self.both(other, u64::max)
    }

    /// Those that make a touch dear: the shadow MMU's, where there is one.
    pub fn refaults(self) -> Option<u64> {
        self.shadow.or(self.kvm)
    }
}

/// Between a toggle and the touch: what KVM has left to others by then (tables to free after a grace period) is done. In the lab idle time costs
/// nothing.
const REST: Duration = Duration::from_millis(20);

/// Runs the scenario.
pub fn run(setup: &Setup, progress: &Progress) -> Result<Record, Failure> {
    let Some(toggles) = &setup.toggles else { return Err(Failure::Input("roots: its toggles are missing".into())) };
    if toggles.by_name {
        for &toggling in &toggles.rows {
            // Said at once, not after minutes of other rows.
            check(setup, toggling).map_err(|error| setup.not_here(&format!("{toggling}: {error}")))?;
        }
    }
    let rows = toggles.rows.iter().map(|&toggling| {
        let row = check(setup, toggling).map_err(Failure::from).and_then(|()| match toggling.change {
            Change::SmiStorm => storm::row(setup, &toggling.to_string(), progress),
            _ => row(setup, toggling, progress),
        });
        Setup::or_not_here(&toggling.to_string(), row)
    });
    setup.record_of(rows.collect::<Result<Vec<_>, _>>()?, |_| toggles.by_name)
}

/// Whether this host can do it, as far as that can be known without a guest. An L2 of the monitor's only says which role it is in.
fn check(setup: &Setup, toggling: Toggling) -> Result<(), crate::kvm::Error> {
    match toggling.change {
        _ if setup.cure.is_some() => Ok(()),
        Change::Script => replay::check(setup),
        _ => toggling.check(),
    }
}

/// Both passes of one toggle.
fn row(setup: &Setup, toggling: Toggling, progress: &Progress) -> Result<Row, Failure> {
    let mut tries = pass::tries(setup.plan.timer.clock());
    let mut row = loop {
        let row = Run::new(setup, toggling, Pass::Timed, progress)?.finish()?;
        // The table shows the cheapest clean round: one of them is enough.
        let clean = |phase: &Phase| row.phases.iter().any(|other| other.phase == phase.phase && other.clean);
        if row.phases.iter().all(clean) || row.failed() || tries == 1 {
            break row;
        }
        progress.step(&format!("{toggling}: another task ran inside a window, the row runs again"));
        tries -= 1;
    };
    let observed = Run::new(setup, toggling, Pass::Observed, progress)?.finish()?;
    row.phases.extend(observed.phases);
    row.counters = observed.counters;
    row.roles = observed.roles;
    row.memory = observed.memory;
    row.truth.pages += observed.truth.pages;
    row.truth.faults.extend(observed.truth.faults);
    Ok(row)
}

/// An L2 whose pages are those of L1, in order; `None` if there cannot be so many.
fn nested(pages: u64) -> Option<Nested> {
    let map = Map::new(pages, Level::K4, 1, AliasKind::Contiguous, 1).ok()?;
    Some(Nested { way: Way::Svm, map, format: Format::Npt, flags: Flags::Preset, fill_batch: 0, remaps: 0 })
}

/// One pass of one row.
pub struct Run<'a> {
    /// The run's options.
    pub setup: &'a Setup,
    toggling: Toggling,
    /// Which pass.
    pub pass: Pass,
    progress: &'a Progress,
    /// The machine.
    pub machine: Machine,
    /// Who counts faults.
    pub counting: Counting,
    /// The L2 that makes the changes, with `--roots`.
    pub l2: Option<OnL2>,
    /// In the observed pass, where the kernel lets this user log.
    log: Option<RoleLog>,
    /// What it comes to.
    pub row: Row,
}

/// Where refaults are counted.
pub enum Counting {
    /// Nowhere, in the timed pass.
    Off,
    /// By the tracepoint: faults on tracked pages alone.
    Tracepoint(Exits),
    /// By KVM's statistics: all faults of the VM.
    Statistics,
}

impl Counting {
    /// Of KVM's statistics those of an L2's VMs are none of this machine's.
    fn of(machine: &Machine, pass: Pass) -> Self {
        if pass == Pass::Timed {
            return Self::Off;
        }
        let first = machine.vm().slots().first().map_or(TRACKED_GPA, |slot| slot.place.base.address());
        let tracked = format!("fault_address>={first}");
        let hits: [Hits; 1] = [(FAULTS, "kvm_page_fault", Some(&tracked))];
        // Not every user has tracefs and perf events.
        let otherwise = if machine.l2().is_some() { Self::Off } else { Self::Statistics };
        machine.count_hits(&hits).map_or(otherwise, Self::Tracepoint)
    }

    /// As the Record has it.
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
        let smm = match toggling.change {
            Change::Script => replay::smm(setup),
            _ => toggling.smm(),
        };
        let nested = (toggling.change == Change::Nested).then(|| nested(setup.plan.pattern.pages)).flatten();
        let plan = match setup.cure {
            Some(cure) => cure.plan(setup, pass, progress)?,
            None => Plan { nested, smm, ..setup.plan.clone() },
        };
        let plan = if matches!(toggling.change, Change::Unpaged(_)) { unpaged::plan(plan)? } else { plan };
        let logs = pass == Pass::Observed && setup.cure.is_none() && setup.role_log;
        let log = if logs { RoleLog::begin(plan.first_tracked()).ok() } else { None };
        let machine = Machine::new(&plan, None, |_| Ok(()))?;
        if let Some(code) = setup.inject.and_then(Fault::smm_code) {
            machine.break_smm(code)?;
        }
        let counting = Counting::of(&machine, pass);
        let row = Row { name: toggling.to_string(), ..Row::default() };
        let l2 = OnL2::begin(&machine)?;
        let mut run = Self { setup, toggling, pass, progress, machine, counting, l2, log, row };
        if nested.is_some() {
            // All of L1's table, so that L2's faults are KVM's alone.
            run.machine.command(Command::Fill, 0)?;
        }
        run.log("boot")?;
        Ok(run)
    }

    fn finish(mut self) -> Result<Row, Failure> {
        match self.toggling.change {
            Change::Script => replay::replay(&mut self)?,
            Change::TwelveRoles => roots_l2::twelve_roles(&mut self)?,
            Change::Unpaged(toggle) => unpaged::row(&mut self, toggle)?,
            _ => self.toggle_and_touch()?,
        }
        self.row.roles = self.log.take().map(RoleLog::finish).unwrap_or_default();
        if let Some(cure) = self.setup.cure {
            roots_l2::finish(&mut self, cure.policy)?;
        } else if self.toggling.smm().is_some() {
            self.check_smram()?;
        }
        Ok(self.row)
    }

    fn toggle_and_touch(&mut self) -> Result<(), Failure> {
        let map = self.setup.plan.map();
        let now = Translation::new(map);
        let mut contents = Contents::zeroes(&map, self.setup.plan.vcpus);
        self.step("populate", 0, self.setup.rounds);
        let window = self.machine.command(Command::Populate, 0)?;
        self.phase("populate", 0, window.length(), window.clean);
        contents.write(0, &Round::populating(&now));
        self.log("populate")?;
        self.look()?;
        let mut most: Option<Faults> = None;
        for round in 1..=self.setup.rounds {
            self.step("toggle", round, self.setup.rounds);
            self.machine.command(Command::Plan, round)?;
            self.about_to(&self.toggling.to_string())?;
            let (value, unit, clean) = self.change(self.toggling, round)?;
            self.log(&self.toggling.to_string())?;
            self.phase("toggle", round, value, clean);
            if let Some(phase) = self.row.phases.last_mut() {
                unit.clone_into(&mut phase.unit);
            }
            let before = self.faults()?;
            // The bare loop in both passes: what is observed here is KVM, not single writes.
            let window = self.machine.command(Command::Timed, 0)?;
            let faults = self.faults()?.since(before);
            self.phase("refault", round, window.length(), window.clean);
            let touched = Round::of(&self.setup.plan.pattern, &now, round);
            contents.write(round, &touched);
            self.row.truth.pages.written += touched.l1.written.count();
            self.log("touch")?;
            self.check_log(round, faults)?;
            self.look()?;
            most = Some(faults.most(most.unwrap_or_default()));
        }
        self.count_faults(most);
        self.check(&contents);
        Ok(())
    }

    /// Faults so far.
    pub fn faults(&self) -> Result<Faults, Failure> {
        let shadow = self.l2.as_ref().map(OnL2::mapped).transpose()?;
        Ok(Faults { kvm: self.counting.read(&self.machine)?, shadow })
    }

    /// Looks at what the shadow MMU takes, where there is one.
    pub fn look(&mut self) -> Result<(), Failure> {
        self.l2.as_mut().map_or(Ok(()), OnL2::look)
    }

    /// `cause` is being done from here on: what is logged as it happens.
    pub fn about_to(&self, cause: &str) -> Result<(), Failure> {
        self.l2.as_ref().map_or(Ok(()), |l2| l2.log(cause))
    }

    /// The vCPUs that make a change.
    fn vcpus(&self, toggling: Toggling) -> Range<usize> {
        0..if toggling.by == By::First { 1 } else { self.setup.plan.vcpus }
    }

    /// Makes a change there and back, and lets KVM come to rest: what it took, in which unit, and whether that is a figure.
    pub fn change(&self, toggling: Toggling, round: u64) -> Result<(u64, &'static str, bool), Failure> {
        let timer = self.setup.plan.timer;
        let slots = 0..self.machine.vm().slots().len();
        let by_monitor = |work: &dyn Fn() -> Result<(), crate::kvm::Error>| {
            let (done, window) = timer.window(Witness::of_controller(timer.clock()), work);
            done.map(|()| window)
        };
        let vcpus = self.vcpus(toggling);
        let window = match toggling.change {
            Change::Firmware(toggle) if toggling.by == By::Together => return self.change_together(toggle, round),
            Change::Firmware(toggle) => return self.change_by_firmware(Command::Toggle, toggle as u64, vcpus),
            Change::Nested => return self.change_by_firmware(Command::Enter, 1, vcpus),
            Change::Sregs => self.machine.work(vcpus, || Box::new(toggles::set_sregs))?,
            Change::Cpuid => self.machine.work(vcpus, || Box::new(toggles::set_cpuid))?,
            Change::SlotDelete => by_monitor(&|| {
                slots
                    .clone()
                    .try_for_each(|slot| self.machine.vm().delete_and_restore(slot))
                    .and_then(|()| self.replace_memory())
            })?,
            Change::SlotMove => by_monitor(&|| {
                slots
                    .clone()
                    .try_for_each(|slot| self.machine.vm().move_and_restore(slot))
                    .and_then(|()| self.replace_memory())
            })?,
            Change::SmiStorm | Change::Script | Change::TwelveRoles | Change::Unpaged(_) => {
                return Err(Failure::Check("it is no single change".to_owned()));
            }
        };
        std::thread::sleep(REST);
        Ok((window.length(), timer.clock().unit(), window.clean))
    }

    fn replace_memory(&self) -> Result<(), crate::kvm::Error> {
        self.l2.as_ref().map_or(Ok(()), OnL2::replace_memory)
    }

    /// The guest measures itself, so that the way to the monitor and back is left out. Several vCPUs go one after the other.
    fn change_by_firmware(
        &self,
        command: Command,
        argument: u64,
        vcpus: Range<usize>,
    ) -> Result<(u64, &'static str, bool), Failure> {
        let (mut ticks, mut clean) = (0, true);
        for vcpu in vcpus {
            clean &= self.machine.command_of(vcpu..vcpu + 1, command, argument)?.clean;
            ticks += self.machine.mailbox(vcpu)?.ticks;
        }
        let (unit, convert) = pass::ticks_to(self.setup.plan.timer.clock().unit(), self.machine.tsc_khz());
        std::thread::sleep(REST);
        Ok((convert(ticks), unit, clean))
    }

    /// All vCPUs at once, which wait for each other in between: what the slowest took, which has the others' part in it where they share a CPU.
    fn change_together(&self, toggle: Toggle, round: u64) -> Result<(u64, &'static str, bool), Failure> {
        let vcpus = self.setup.plan.vcpus;
        let window = self.machine.command(Command::Toggle, (round * vcpus as u64) << 32 | toggle as u64)?;
        let ticks = (0..vcpus).map(|vcpu| self.machine.mailbox(vcpu).map(|mailbox| mailbox.ticks));
        let slowest = ticks.collect::<Result<Vec<_>, _>>()?.into_iter().max().unwrap_or(0);
        let (unit, convert) = pass::ticks_to(self.setup.plan.timer.clock().unit(), self.machine.tsc_khz());
        std::thread::sleep(REST);
        Ok((convert(slowest), unit, window.clean))
    }

    /// Says how far it is.
    pub fn step(&self, phase: &str, round: u64, of: u64) {
        let round = if round == 0 { String::new() } else { format!(" {round} of {of}") };
        self.progress.step(&format!("{}, {} pass: {phase}{round}", self.toggling, self.pass.name()));
    }

    /// Adds a phase that the guest measured.
    pub fn phase_by_guest(&mut self, phase: &str, round: u64, ticks: u64, clean: bool) {
        let (unit, convert) = pass::ticks_to(self.setup.plan.timer.clock().unit(), self.machine.tsc_khz());
        self.phase(phase, round, convert(ticks), clean);
        if let Some(phase) = self.row.phases.last_mut() {
            unit.clone_into(&mut phase.unit);
        }
    }

    /// Adds a phase to the row.
    pub fn phase(&mut self, phase: &str, round: u64, value: u64, clean: bool) {
        self.row.phases.push(Phase {
            phase: phase.to_owned(),
            round,
            pass: self.pass.name().to_owned(),
            value,
            unit: self.setup.plan.timer.clock().unit().to_owned(),
            clean,
        });
    }

    /// Adds a counter to the row.
    pub fn count(&mut self, name: &str, value: u64, source: &str) {
        let counter = Counter { value, source: source.to_owned(), pass: self.pass.name().to_owned() };
        self.row.counters.insert(name.to_owned(), counter);
    }

    /// The refaults of a touch: the shadow MMU's, where there is one, and then KVM's apart.
    pub fn count_faults(&mut self, faults: Option<Faults>) {
        let Faults { kvm, shadow } = faults.unwrap_or_default();
        let source = self.counting.source();
        if let Some(shadow) = shadow {
            self.count("refaults", shadow, "umbra-mmu");
        }
        if let Some(kvm) = kvm {
            self.count(if shadow.is_some() { "kvm_faults" } else { "refaults" }, kvm, source);
        }
    }

    /// SMM has handled the SMIs that were sent, and nobody but SMM sees what it wrote, if its view is its own.
    fn check_smram(&mut self) -> Result<(), Failure> {
        let sent = self.setup.rounds;
        let mut faults = Vec::new();
        for vcpu in self.vcpus(self.toggling) {
            let handled = self.machine.smm_ledger(vcpu)?.handled;
            if handled != sent {
                faults.push(format!("vCPU {vcpu}'s SMRAM counts {handled} SMIs, and {sent} were sent"));
            }
            if self.toggling.smm() == Some(View::Own) && !self.machine.smram_is_closed(vcpu)? {
                faults.push(format!("vCPU {vcpu}'s SMRAM changed memory that is not SMM's"));
            }
        }
        let name = format!("toggle {}, {} pass", self.toggling, self.pass.name());
        self.row.truth.faults.extend(faults.iter().map(|fault| format!("{name}: {fault}")));
        Ok(())
    }

    /// Takes what the kernel logged while `cause` was being done.
    pub fn log(&mut self, cause: &str) -> Result<(), Failure> {
        self.log.as_mut().map_or(Ok(()), |log| log.during(cause)).map_err(Failure::from)
    }

    /// What was torn down so far is of no touch that is counted.
    pub fn check_log_begins(&mut self) {
        if let Some(log) = &mut self.log {
            log.torn_down();
        }
    }

    /// What the torn-down roots mapped is what was faulted in again: two counts of the same by different events. KVM's older MMU keeps the tables below
    /// a root that goes, and a nested guest's root has no tables of this VM's own.
    pub fn check_log(&mut self, round: u64, faults: Faults) -> Result<(), Failure> {
        let mapped = match (&mut self.log, &self.l2) {
            (_, Some(l2)) => l2.torn_down()?,
            (Some(log), None) if matches!(self.counting, Counting::Tracepoint(_)) => {
                let of_l1 = self.toggling.change != Change::Nested;
                log.torn_down().filter(|_| of_l1 && host::parameter("kvm", "tdp_mmu").as_deref() == Some("Y"))
            }
            _ => None,
        };
        if let (Some(mapped), Some(refaults)) = (mapped, faults.refaults())
            && mapped != refaults
        {
            self.row.truth.faults.push(format!(
                "toggle {}, round {round}: the roots torn down mapped {mapped} pages, and {refaults} were faulted in again",
                self.toggling
            ));
        }
        Ok(())
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
