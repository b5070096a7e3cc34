//! A VM that runs the firmware, and the commands that the firmware takes.

mod build;
mod reports;

use super::{Error, Image, Plan};
use crate::ground::Clock;
use crate::kvm::clock::{self, Window};
use crate::kvm::exits::{Exits, Hits};
use crate::kvm::ring::Rings;
use crate::kvm::stats::Stats;
use crate::kvm::vcpu::{Exit, Stop, VcpuThread, Work};
use crate::kvm::witness::Witness;
use crate::kvm::{self, Vm};
use crate::nested;
use crossbeam::channel::Receiver;
use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VmFd;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use umbra_shared::protocol::{Command, Doorbell, ExceptionReport, Mailbox};
use umbra_shared::smm;

/// Between a machine's boot and its first phase: what the kernel has put off at the end of the machine before it (freeing its memory, on a
/// kworker) is done by then.
/// In the lab idle time costs nothing.
const fn rest(clock: Clock) -> Duration {
    match clock {
        Clock::Instructions => Duration::from_millis(500),
        Clock::Nanoseconds => Duration::from_millis(5),
    }
}

/// Texts that a guest may print within one command.
const TEXTS: u32 = 10_000;

/// A running machine.
///
/// Field order matters: the vCPU threads end before the VM goes.
pub struct Machine {
    threads: Vec<VcpuThread>,
    stops: Receiver<Stop>,
    image: Arc<Image>,
    rings: Option<Arc<Mutex<Rings>>>,
    clock: Clock,
    pub(super) patience: Duration,
    /// Of the VM, then of each vCPU.
    stats: Vec<Stats>,
    tsc_khz: u32,
    /// Where the first journal is; 0 if there are none.
    journals: u64,
    /// L2, if the monitor runs it.
    l2: Option<Arc<nested::Host>>,
    vm: Vm,
}

impl Machine {
    /// Makes the VM, loads the firmware and boots it up to its first [`Doorbell::Ready`] on every vCPU. With `ring_entries` each vCPU has
    /// a dirty ring, whose capability `prepare` must enable.
    ///
    /// # Errors
    /// Those of KVM, the image and the guest.
    pub fn new(
        plan: &Plan,
        ring_entries: Option<u32>,
        prepare: impl FnOnce(&VmFd) -> Result<(), kvm::Error>,
    ) -> Result<Self, Error> {
        let mut machine = Self::unbooted(plan, ring_entries, prepare)?;
        // The first vCPU builds the page tables that the others load.
        machine.run(0..1, "boot")?;
        machine.run(1..plan.vcpus, "boot")?;
        if let Some(view) = plan.smm {
            machine.vm.close_smram(view, smm::SMRAM_BYTES * plan.vcpus as u64)?;
        }
        std::thread::sleep(rest(plan.timer.clock()));
        Ok(machine)
    }

    /// Gives all vCPUs one command and waits until all have done it.
    ///
    /// # Errors
    /// [`Error::Broken`] and [`Error::Silent`].
    pub fn command(&self, command: Command, argument: u64) -> Result<Window, Error> {
        self.command_of(0..self.threads.len(), command, argument)
    }

    /// The same for some of the vCPUs, while the others wait where they are.
    ///
    /// # Errors
    /// [`Error::Broken`] and [`Error::Silent`].
    pub fn command_of(&self, vcpus: Range<usize>, command: Command, argument: u64) -> Result<Window, Error> {
        std::thread::sleep(clock::settle(self.clock));
        let before = Witness::beside_vcpus(self.clock).look();
        clock::behind_a_tick(self.clock);
        self.begin_of(vcpus.clone(), command, argument)?;
        let mut window = self.finish(vcpus, name(command))?;
        window.clean = match self.clock {
            // A vCPU thread that was never switched away had the CPU for itself; else the other tasks' time decides.
            Clock::Instructions => window.clean || before.nobody_else_ran(window.length()),
            Clock::Nanoseconds => window.clean,
        };
        Ok(window)
    }

    /// The same where nothing is timed, so that nothing need settle.
    ///
    /// # Errors
    /// [`Error::Broken`] and [`Error::Silent`].
    pub fn untimed(&self, vcpus: Range<usize>, command: Command, argument: u64) -> Result<(), Error> {
        self.begin_of(vcpus.clone(), command, argument)?;
        self.finish(vcpus, name(command)).map(|_| ())
    }

    /// The same for a command in which one vCPU's L2 may never come to an end: after `patience` it is given back to its L1. Says how often.
    ///
    /// # Errors
    /// [`Error::Broken`] and [`Error::Silent`]; the latter after `patience` where it is not the monitor who runs L2, and nobody can give it back.
    pub fn untimed_within(
        &self,
        vcpu: usize,
        command: Command,
        argument: u64,
        patience: Duration,
    ) -> Result<u64, Error> {
        const PAUSE: Duration = Duration::from_millis(20);
        self.begin_of(vcpu..vcpu + 1, command, argument)?;
        let (mut expelled, mut waited) = (0, Duration::ZERO);
        loop {
            let wait = if expelled == 0 { patience } else { PAUSE };
            match self.stops.recv_timeout(wait) {
                Ok(Stop { exit: Exit::Doorbell(Doorbell::Ready), .. }) => {
                    self.threads[vcpu].withdraw_kick();
                    return Ok(expelled);
                }
                // A kick that came when L2 had just been left.
                Ok(Stop { exit: Exit::Kicked { .. }, .. }) => self.threads[vcpu].run(),
                Ok(stop) => return Err(self.broken(stop.vcpu, stop.exit)),
                Err(_) if waited > self.patience => return Err(self.silent(vcpu, name(command), waited)),
                Err(_) => {
                    waited += wait;
                    expelled += 1;
                    let Some(l2) = &self.l2 else { return Err(self.silent(vcpu, name(command), waited)) };
                    l2.expel();
                    self.threads[vcpu].kick();
                }
            }
        }
    }

    /// Gives all vCPUs a command and does not wait. [`Self::finish_all`] waits.
    ///
    /// # Errors
    /// [`Error::Memory`] if the mailboxes are not there.
    pub fn begin(&self, command: Command, argument: u64) -> Result<(), Error> {
        self.begin_of(0..self.threads.len(), command, argument)
    }

    fn begin_of(&self, vcpus: Range<usize>, command: Command, argument: u64) -> Result<(), Error> {
        for vcpu in vcpus.clone() {
            self.write_mailbox(vcpu, std::mem::offset_of!(Mailbox, command), command as u64)?;
            self.write_mailbox(vcpu, std::mem::offset_of!(Mailbox, argument), argument)?;
            self.write_mailbox(vcpu, std::mem::offset_of!(Mailbox, stop), 0)?;
        }
        self.threads[vcpus].iter().for_each(VcpuThread::run);
        Ok(())
    }

    /// How many vCPUs there are.
    #[must_use]
    pub const fn vcpus(&self) -> usize {
        self.threads.len()
    }

    /// The next stop of any vCPU, if one comes in that time.
    pub(super) fn stop_within(&self, time: Duration) -> Option<Stop> {
        self.stops.recv_timeout(time).ok()
    }

    /// Kicks a vCPU and sends it an SMI; false if one was on its way already, which is kicked again.
    pub(super) fn send_smi(&self, vcpu: usize) -> bool {
        self.threads[vcpu].smi()
    }

    /// The symbol at `rip`, without what it is called by its crate's hash, or the bare number.
    #[must_use]
    pub fn symbol(&self, rip: u64) -> String {
        let place = self.image.place(rip);
        place
            .split_once('(')
            .and_then(|(_, rest)| rest.split_once('+'))
            .map_or(place.clone(), |(name, _)| name.to_owned())
    }

    /// Every vCPU's registers. All of them wait at a doorbell.
    ///
    /// # Errors
    /// The system's.
    pub fn registers(&self) -> Result<Vec<(kvm_regs, kvm_sregs)>, Error> {
        let (tell, told) = crossbeam::channel::unbounded();
        for vcpu in 0..self.threads.len() {
            let tell = tell.clone();
            self.work(vcpu..vcpu + 1, move || {
                let tell = tell.clone();
                Box::new(move |vcpu| {
                    let registers = vcpu.get_regs().map_err(kvm::vm::failed("KVM_GET_REGS"))?;
                    let system = vcpu.get_sregs().map_err(kvm::vm::failed("KVM_GET_SREGS"))?;
                    // The receiver lives until the end of this function.
                    let _ = tell.send((registers, system));
                    Ok(())
                })
            })?;
        }
        Ok(told.try_iter().collect())
    }

    /// The unit of windows.
    #[must_use]
    pub const fn unit(&self) -> &'static str {
        self.clock.unit()
    }

    /// Lets each of `vcpus`, which wait at a doorbell, do the work that `work` makes for it on its own thread.
    ///
    /// # Errors
    /// [`Error::Broken`] with the error of the work.
    pub fn work(&self, vcpus: Range<usize>, work: impl Fn() -> Work) -> Result<Window, Error> {
        self.threads[vcpus.clone()].iter().for_each(|thread| thread.work(work()));
        self.finish(vcpus, "work of the monitor's")
    }

    /// Waits until all vCPUs have done what [`Self::begin`] told them.
    ///
    /// # Errors
    /// [`Error::Broken`] and [`Error::Silent`].
    pub fn finish_all(&self, command: Command) -> Result<Window, Error> {
        self.finish(0..self.threads.len(), name(command))
    }

    /// Asks all vCPUs to end [`Command::FreeRun`].
    ///
    /// # Errors
    /// [`Error::Memory`] if the mailboxes are not there.
    pub fn stop_free_run(&self) -> Result<(), Error> {
        (0..self.threads.len()).try_for_each(|vcpu| self.write_mailbox(vcpu, std::mem::offset_of!(Mailbox, stop), 1))
    }

    fn run(&self, vcpus: Range<usize>, what: &'static str) -> Result<(), Error> {
        if vcpus.is_empty() {
            return Ok(());
        }
        self.threads[vcpus.clone()].iter().for_each(VcpuThread::run);
        self.finish(vcpus, what).map(|_| ())
    }

    /// Collects one stop from each of `vcpus`. Output that the guest prints on the way goes to stderr.
    fn finish(&self, vcpus: Range<usize>, what: &'static str) -> Result<Window, Error> {
        let mut windows = Vec::with_capacity(vcpus.len());
        let mut waiting: Vec<usize> = vcpus.collect();
        let mut texts = 0;
        while let Some(&first) = waiting.first() {
            let Ok(stop) = self.stops.recv_timeout(self.patience) else {
                return Err(self.silent(first, what, self.patience));
            };
            match stop.exit {
                Exit::Doorbell(Doorbell::Ready) | Exit::Worked => {
                    windows.push(stop.window);
                    waiting.retain(|&vcpu| vcpu != stop.vcpu);
                }
                Exit::Doorbell(Doorbell::Print) if texts < TEXTS => {
                    texts += 1;
                    eprint!("{}", self.text(stop.vcpu)?);
                    self.threads[stop.vcpu].run();
                }
                Exit::NotHere { what } => return Err(Error::NotHere(what)),
                Exit::Doorbell(Doorbell::NotHere) => return Err(Error::NotHere(self.text(stop.vcpu)?)),
                exit => return Err(self.broken(stop.vcpu, exit)),
            }
        }
        // At least one vCPU was waited for, so there is a window.
        Ok(Window::around(windows).unwrap_or(Window { begin: 0, end: 0, clean: true }))
    }

    pub(super) fn silent(&self, vcpu: usize, command: &'static str, after: Duration) -> Error {
        let mut place = "an unknown place".to_owned();
        for _ in 0..100 {
            self.threads[vcpu].kick();
            if let Ok(Stop { exit: Exit::Kicked { rip, mode }, .. }) =
                self.stops.recv_timeout(Duration::from_millis(10))
            {
                place = self.image.place(rip) + &mode;
                break;
            }
        }
        Error::Silent { vcpu, after, command, place }
    }

    pub(super) fn broken(&self, vcpu: usize, exit: Exit) -> Error {
        let what = match exit {
            Exit::Doorbell(Doorbell::Exception) => match self.mailbox(vcpu) {
                Ok(mailbox) => self.exception(&mailbox.exception),
                Err(error) => return error,
            },
            Exit::Doorbell(Doorbell::Panic) => match self.text(vcpu) {
                Ok(text) => format!("the firmware panicked: {}", one_line(&text)),
                Err(error) => return error,
            },
            Exit::Doorbell(doorbell) => format!("it rang {doorbell:?} where Ready was expected"),
            Exit::Broken { what, rip } => format!("{what} at {}", self.image.place(rip)),
            Exit::Failed { what, rip } => {
                return Error::Failed { vcpu, what: format!("{what} (the guest was at {})", self.image.place(rip)) };
            }
            Exit::Kicked { rip, mode } => format!("it was stopped at {}{mode}", self.image.place(rip)),
            Exit::NotHere { what } => what,
            Exit::Interrupted(_) => "it got an SMI that nobody sent".to_owned(),
            Exit::Worked => "it was not asked to work".to_owned(),
        };
        Error::Broken { vcpu, what }
    }

    fn exception(&self, report: &ExceptionReport) -> String {
        let address = if report.vector == 14 { format!(", CR2 {:#x}", report.cr2) } else { String::new() };
        format!(
            "exception {} ({}), error code {:#x}, RIP {}{address}, RSP {:#x}, ring {}",
            report.vector,
            exception_name(report.vector),
            report.error_code,
            self.image.place(report.rip),
            report.rsp,
            report.cs & 3
        )
    }

    /// KVM's statistics by name, those of all vCPUs added up. Empty where KVM has none.
    ///
    /// # Errors
    /// The system's.
    pub fn statistics(&self) -> Result<BTreeMap<String, u64>, Error> {
        let mut sums = BTreeMap::new();
        for stats in &self.stats {
            for (name, value) in stats.read()? {
                let sum: &mut u64 = sums.entry(name).or_default();
                *sum = sum.wrapping_add(value);
            }
        }
        Ok(sums)
    }

    /// Begins to count what the vCPUs hit, which makes each hit some hundred instructions longer.
    ///
    /// # Errors
    /// As [`Exits::count`].
    pub fn count_hits(&self, what: &[Hits]) -> Result<Exits, kvm::Error> {
        Exits::count(&self.threads.iter().map(VcpuThread::id).collect::<Vec<_>>(), what)
    }

    /// The VM.
    #[must_use]
    pub const fn vm(&self) -> &Vm {
        &self.vm
    }

    /// L2, if the monitor runs it.
    #[must_use]
    pub const fn l2(&self) -> Option<&Arc<nested::Host>> {
        self.l2.as_ref()
    }

    /// The rings, if the machine was prepared with them.
    #[must_use]
    pub const fn rings(&self) -> Option<&Arc<Mutex<Rings>>> {
        self.rings.as_ref()
    }

    /// Frequency of the guest's TSC in kHz; 0 if KVM does not say.
    #[must_use]
    pub const fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// Runs a program that rings Print and Exit instead of taking commands: its output and exit code.
    ///
    /// # Errors
    /// [`Error::Broken`] and [`Error::Silent`].
    pub fn run_program(plan: &Plan) -> Result<(String, u64), Error> {
        let mut output = String::new();
        let machine = Self::unbooted(plan, None, |_| Ok(()))?;
        loop {
            machine.threads[0].run();
            let Ok(stop) = machine.stops.recv_timeout(machine.patience) else {
                return Err(machine.silent(0, "its program", machine.patience));
            };
            match stop.exit {
                Exit::Doorbell(Doorbell::Print) => output.push_str(&machine.text(0)?),
                Exit::Doorbell(Doorbell::Exit) => return Ok((output, machine.mailbox(0)?.exit_code)),
                Exit::Doorbell(Doorbell::Ready) => {}
                exit => return Err(machine.broken(0, exit)),
            }
        }
    }
}

/// Words of a guest's as one line: nothing in them moves a terminal's cursor.
fn one_line(text: &str) -> String {
    let clear = |letter: char| match letter {
        '\n' => " ".to_owned(),
        _ if letter.is_control() => letter.escape_default().to_string(),
        _ => letter.to_string(),
    };
    text.trim_end().chars().map(clear).collect()
}

const fn name(command: Command) -> &'static str {
    match command {
        Command::Plan => "planning a round",
        Command::Timed => "a timed round",
        Command::Observed => "an observed round",
        Command::Populate => "populating",
        Command::FreeRun => "a free run",
        Command::PacedRun => "a paced run",
        Command::ClearHistogram => "clearing the histogram",
        Command::Enter => "entering L2",
        Command::Fill => "filling L1's table",
        Command::Edit => "editing L1's table",
        Command::Toggle => "a toggle",
        Command::Touch => "touching pages",
        Command::Unpaged | Command::GoOn => "touching pages without paging",
        Command::Role => "announcing a role",
        Command::Provoke => "provoking a violation",
        Command::Play => "random edits of L1's table",
        Command::Probe => "probing what they came to",
        Command::Renew => "building L1's table anew",
        Command::Attack => "an attack of L1's",
        Command::Race => "edits that race L2",
    }
}

/// Intel SDM 3A, table 6-1.
const fn exception_name(vector: u64) -> &'static str {
    match vector {
        0 => "#DE divide error",
        1 => "#DB debug",
        2 => "NMI",
        3 => "#BP breakpoint",
        4 => "#OF overflow",
        5 => "#BR bound range",
        6 => "#UD invalid opcode",
        7 => "#NM no device",
        8 => "#DF double fault",
        10 => "#TS invalid TSS",
        11 => "#NP segment not present",
        12 => "#SS stack segment",
        13 => "#GP general protection",
        14 => "#PF page fault",
        16 => "#MF x87 error",
        17 => "#AC alignment check",
        18 => "#MC machine check",
        19 => "#XM SIMD error",
        20 => "#VE virtualization",
        21 => "#CP control protection",
        _ => "no exception of the manual",
    }
}
