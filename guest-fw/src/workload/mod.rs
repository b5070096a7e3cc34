//! The workload: executes the monitor's commands on one vCPU.

pub mod plan;

use crate::arch::l2::Extension;
use crate::arch::legacy::{self, Legacy};
use crate::arch::mailbox::LiveMailbox;
use crate::arch::paravirtual::Paravirtual;
use crate::arch::svm::Svm;
use crate::arch::tracked::{Executed, Tracked};
use crate::arch::vmx::Vmx;
use crate::arch::{modes, port, tsc, vcpu};
use crate::boot::Setup;
use crate::nested::Hypervisor;
use crate::{console, selftest};
use core::num::NonZeroU32;
use core::ops::Range;
use core::sync::atomic::Ordering::{Relaxed, Release};
use plan::Plan;
use umbra_shared::histogram::Histogram;
use umbra_shared::nested::{Nested, Way};
use umbra_shared::pattern::Pattern;
use umbra_shared::protocol::{Command, Doorbell};
use umbra_shared::role::Role;
use umbra_shared::toggle::Toggle;
use umbra_shared::violation::CASES;

/// Whether the workload does what it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conduct {
    /// It does.
    Exact,
    /// Every plan lacks its last write: what the checks of monitor and self-test have to notice.
    OneWriteShort,
}

/// What one vCPU's workload works with.
pub struct Worker {
    /// The pattern that rounds follow.
    pub pattern: Pattern,
    /// Where they go.
    pub tracked: Tracked,
    /// The same memory in a mode before long mode, where that is asked for.
    legacy: Option<Legacy>,
    /// The first tracked slot's physical address.
    first_slot: u64,
    /// TSC ticks between the accesses of a paced run.
    pace: u64,
    /// This vCPU's index, and how many take part.
    vcpu: u64,
    vcpus: u64,
    plan: Plan<'static>,
    /// The round of the plan.
    round: u64,
    histogram: &'static mut Histogram,
    mailbox: &'static LiveMailbox,
    conduct: Conduct,
}

impl Worker {
    /// Takes possession of this vCPU's plan and histogram; once on each vCPU, else it panics.
    #[must_use]
    pub fn new(setup: &Setup, tracked: Tracked, conduct: Conduct) -> Self {
        let index = vcpu::current();
        let (vcpu, vcpus) = (index as u64, setup.page.vcpus);
        assert!(vcpu < vcpus, "vCPU {vcpu} of {vcpus} was entered");
        let share = setup.pattern.share(vcpu, vcpus);
        let memory = vcpu::claim((setup.page.plans + share.start * 4, (share.end - share.start) as usize));
        Self {
            pattern: setup.pattern,
            tracked,
            legacy: Legacy::enter(setup.mode),
            first_slot: setup.slots().next().map_or(0, |slot| slot.base.address()),
            pace: setup.page.pace,
            vcpu,
            vcpus,
            plan: Plan::new(memory.plan),
            round: 0,
            histogram: memory.histogram,
            mailbox: LiveMailbox::of(index),
            conduct,
        }
    }

    /// What has been recorded.
    #[must_use]
    pub const fn histogram(&self) -> &Histogram {
        self.histogram
    }

    /// The plan.
    #[must_use]
    pub const fn plan(&self) -> &Plan<'static> {
        &self.plan
    }

    /// Executes one command. The mailbox holds `stop` and gets `rounds_done`.
    pub fn execute(&mut self, command: Command, argument: u64) -> Executed {
        match command {
            Command::Plan => {
                self.make_plan(argument);
                Executed::default()
            }
            Command::Timed => self.timed(),
            Command::Observed => self.observed(),
            Command::Populate => self.populate(self.pattern.populate_share(self.vcpu, self.vcpus), argument),
            Command::FreeRun => self.free_run(argument),
            Command::PacedRun => self.paced_run(argument),
            Command::ClearHistogram => {
                *self.histogram = Histogram::default();
                Executed::default()
            }
            Command::Touch => self.tracked.populate(0..argument & u64::from(u32::MAX), argument >> 32),
            Command::Toggle => {
                let all = NonZeroU32::new((argument >> 32) as u32).map(NonZeroU32::get);
                Executed { writes: 0, ticks: modes::toggle(toggle(argument), all) }
            }
            // What only a hypervisor does.
            Command::Enter
            | Command::Fill
            | Command::Edit
            | Command::Provoke
            | Command::Play
            | Command::Probe
            | Command::Renew
            | Command::Attack
            | Command::Role
            | Command::Race
            | Command::GoOn => Executed::default(),
            Command::Unpaged => self.touch_unpaged(argument),
        }
    }

    fn touch_unpaged(&self, argument: u64) -> Executed {
        let toggle = toggle(argument);
        let ticks = legacy::touch_unpaged(toggle, self.first_slot, self.pattern.pages, argument >> 32);
        Executed { writes: 2 * self.pattern.pages, ticks }
    }

    fn timed(&mut self) -> Executed {
        if let Some(legacy) = self.legacy {
            return legacy.timed(&mut self.plan, self.round);
        }
        self.tracked.timed(&self.plan, self.round)
    }

    fn observed(&mut self) -> Executed {
        if let Some(legacy) = self.legacy {
            return legacy.observed(&mut self.plan, self.round, self.histogram);
        }
        self.tracked.observed(&self.plan, self.round, self.histogram)
    }

    fn populate(&self, pages: Range<u64>, round: u64) -> Executed {
        if let Some(legacy) = self.legacy {
            return legacy.populate(pages, round);
        }
        self.tracked.populate(pages, round)
    }

    fn make_plan(&mut self, round: u64) {
        self.plan.fill(&self.pattern, round, self.pattern.share(self.vcpu, self.vcpus));
        self.round = self.pattern.written_as(round);
        if self.conduct == Conduct::OneWriteShort {
            self.plan.cut_last_write();
        }
        self.mailbox.accesses.store(self.plan.entries().len() as u64, Relaxed);
    }

    fn paced_run(&mut self, first: u64) -> Executed {
        let mut all = Executed::default();
        let (mailbox, pace, mut last, mut done) = (self.mailbox, self.pace, tsc::now(), 0_u64);
        mailbox.accesses_done.store(0, Release);
        let mut round = first;
        while mailbox.stop.load(Relaxed) == 0 {
            self.make_plan(round);
            let executed = self.tracked.paced(&self.plan, self.round, self.histogram, || {
                // All accesses before this one are made.
                mailbox.accesses_done.store(done, Release);
                let due = due(&mut last, pace, mailbox);
                done += u64::from(due);
                due
            });
            all.writes += executed.writes;
            all.ticks += executed.ticks;
            round += 1;
        }
        mailbox.accesses_done.store(done, Release);
        all
    }

    fn free_run(&mut self, first: u64) -> Executed {
        let mut all = Executed::default();
        let mut round = first;
        self.mailbox.rounds_done.store(round, Release);
        while self.mailbox.stop.load(Relaxed) == 0 {
            self.make_plan(round);
            let executed = self.timed();
            all.writes += executed.writes;
            all.ticks += executed.ticks;
            round += 1;
            self.mailbox.rounds_done.store(round, Release);
        }
        all
    }
}

/// Whether the next access of a paced run may be made: waits until `pace` ticks after the last one, or until the monitor ends the run. An
/// access that was late is not made up for: the guest lost that time.
fn due(last: &mut u64, pace: u64, mailbox: &LiveMailbox) -> bool {
    loop {
        if mailbox.stop.load(Relaxed) != 0 {
            return false;
        }
        let now = tsc::now();
        if now.wrapping_sub(*last) >= pace {
            // A little late is the loop's own grain; more is somebody else's work.
            *last = if now.wrapping_sub(*last) < 2 * pace { last.wrapping_add(pace) } else { now };
            return true;
        }
    }
}

/// Executes the monitor's commands, for ever: here, or in an L2 if the monitor wants one.
pub fn serve(tracked: Tracked, conduct: Conduct) -> ! {
    let setup = Setup::given();
    match setup.nested {
        Some(nested @ Nested { way: Way::Svm, .. }) => serve_nested::<Svm>(&setup, &nested, conduct),
        Some(nested @ Nested { way: Way::Vmx, .. }) => serve_nested::<Vmx>(&setup, &nested, conduct),
        Some(nested @ Nested { way: Way::Umbra, .. }) => serve_nested::<Paravirtual>(&setup, &nested, conduct),
        Some(Nested { way: Way::Plain, .. }) | None => {}
    }
    let mut worker = Worker::new(&setup, tracked, conduct);
    commands(worker.mailbox, |command, argument| worker.execute(command, argument))
}

fn serve_nested<E: Extension>(setup: &Setup, nested: &Nested, conduct: Conduct) -> ! {
    let mut hypervisor = match Hypervisor::<E>::new(setup, nested) {
        Ok(hypervisor) => hypervisor,
        Err(absent) => console::not_here(format_args!("{absent}")),
    };
    let mut worker = Worker::new(setup, hypervisor.tracked, conduct);
    commands(worker.mailbox, |command, argument| match command {
        Command::Enter => hypervisor.enter(argument),
        Command::Fill => hypervisor.fill(),
        Command::Edit => hypervisor.edit(nested, argument),
        Command::Toggle => {
            let toggle = toggle(argument);
            Executed { writes: 0, ticks: hypervisor.run(&mut || E::toggle(toggle)) }
        }
        Command::Role => {
            let Some(role) = Role::from_word(argument) else { panic!("there is no role {argument:#x}") };
            Executed { writes: 0, ticks: hypervisor.run(&mut || E::announce(role)) }
        }
        Command::Play => hypervisor.play(setup, nested, argument),
        Command::Probe => hypervisor.probe(),
        Command::Race => hypervisor.race(setup, nested, argument),
        Command::Renew => hypervisor.renew(setup, nested),
        Command::Attack => hypervisor.attack(setup, nested, argument),
        Command::Provoke => {
            let Some(case) = CASES.get(argument as usize) else { panic!("there is no case {argument}") };
            hypervisor.provoke(case);
            Executed::default()
        }
        _ => {
            let mut executed = Executed::default();
            hypervisor.run(&mut || executed = worker.execute(command, argument));
            executed
        }
    })
}

/// The toggle that the lower half of an argument names.
fn toggle(argument: u64) -> Toggle {
    let number = argument & u64::from(u32::MAX);
    Toggle::from_number(number).unwrap_or_else(|| panic!("there is no toggle {number}"))
}

fn commands(mailbox: &LiveMailbox, mut execute: impl FnMut(Command, u64) -> Executed) -> ! {
    loop {
        port::ring(Doorbell::Ready);
        let (number, argument) = (mailbox.command.load(Relaxed), mailbox.argument.load(Relaxed));
        let Some(command) = Command::from_number(number) else { panic!("there is no command {number}") };
        let executed = execute(command, argument);
        mailbox.writes.store(executed.writes, Relaxed);
        mailbox.ticks.store(executed.ticks, Relaxed);
    }
}

/// The workload as a payload: the monitor's commands, or the self-test if there is no monitor.
pub fn run(conduct: Conduct) -> ! {
    let tracked = crate::arch::space::enter();
    if console::has_monitor() { serve(tracked, conduct) } else { selftest::run(tracked, conduct) }
}
