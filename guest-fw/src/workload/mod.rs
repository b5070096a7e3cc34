//! The workload: executes the monitor's commands on one vCPU.

pub mod plan;

use crate::arch::l2::Extension;
use crate::arch::mailbox::LiveMailbox;
use crate::arch::svm::Svm;
use crate::arch::tracked::{Executed, Tracked};
use crate::arch::vmx::Vmx;
use crate::arch::{port, vcpu};
use crate::boot::Setup;
use crate::nested::Hypervisor;
use crate::{console, selftest};
use core::sync::atomic::Ordering::{Relaxed, Release};
use plan::Plan;
use umbra_shared::histogram::Histogram;
use umbra_shared::nested::{Nested, Way};
use umbra_shared::pattern::Pattern;
use umbra_shared::protocol::{Command, Doorbell};
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
            Command::Timed => self.tracked.timed(&self.plan, self.round),
            Command::Observed => self.tracked.observed(&self.plan, self.round, self.histogram),
            Command::Populate => self.tracked.populate(self.pattern.populate_share(self.vcpu, self.vcpus), argument),
            Command::FreeRun => self.free_run(argument),
            Command::ClearHistogram => {
                *self.histogram = Histogram::default();
                Executed::default()
            }
            // What only a hypervisor does.
            Command::Enter | Command::Fill | Command::Provoke => Executed::default(),
        }
    }

    fn make_plan(&mut self, round: u64) {
        self.plan.fill(&self.pattern, round, self.pattern.share(self.vcpu, self.vcpus));
        self.round = round;
        if self.conduct == Conduct::OneWriteShort {
            self.plan.cut_last_write();
        }
        self.mailbox.accesses.store(self.plan.entries().len() as u64, Relaxed);
    }

    fn free_run(&mut self, first: u64) -> Executed {
        let mut all = Executed::default();
        let mut round = first;
        self.mailbox.rounds_done.store(round, Release);
        while self.mailbox.stop.load(Relaxed) == 0 {
            self.make_plan(round);
            let executed = self.tracked.timed(&self.plan, round);
            all.writes += executed.writes;
            all.ticks += executed.ticks;
            round += 1;
            self.mailbox.rounds_done.store(round, Release);
        }
        all
    }
}

/// Executes the monitor's commands, for ever: here, or in an L2 if the monitor wants one.
pub fn serve(tracked: Tracked, conduct: Conduct) -> ! {
    let setup = Setup::given();
    match setup.nested {
        Some(nested @ Nested { way: Way::Svm, .. }) => serve_nested::<Svm>(&setup, &nested, conduct),
        Some(nested @ Nested { way: Way::Vmx, .. }) => serve_nested::<Vmx>(&setup, &nested, conduct),
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
