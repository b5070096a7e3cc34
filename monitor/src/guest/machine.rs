//! A VM that runs the firmware, and the commands that the firmware takes.

use super::{Error, Image};
use crate::ground::Clock;
use crate::kvm::clock::{self, Timer, Window};
use crate::kvm::exits::{Exits, Hits};
use crate::kvm::registers::{LongMode, Table};
use crate::kvm::ring::Rings;
use crate::kvm::stats::Stats;
use crate::kvm::vcpu::{Below, Exit, Stop, Vcpu, VcpuThread, Work};
use crate::kvm::witness::Witness;
use crate::kvm::{self, Backing, Vm};
use crate::nested;
use crossbeam::channel::Receiver;
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, Msrs, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
};
use kvm_ioctls::{VcpuFd, VmFd};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use umbra_shared::histogram::Histogram;
use umbra_shared::layout::{self, Slot, vcpu_area};
use umbra_shared::nested::{Map, Nested, Report, WORDS};
use umbra_shared::paging::Mode;
use umbra_shared::pattern::Pattern;
use umbra_shared::protocol::{BOOT_MAGIC, BootPage, Command, Doorbell, ENTERED_BY_MONITOR, ExceptionReport, Mailbox};
use umbra_shared::{Level, PAGE_SIZE, smm};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

/// How long a guest may be silent inside one command. In the lab these are virtual seconds.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);

/// Between a machine's boot and its first phase: what the kernel has put off at the end of the machine before it (freeing its memory, on a
/// kworker) is done by then.
/// In the lab idle time costs nothing.
const fn rest(clock: Clock) -> Duration {
    match clock {
        Clock::Instructions => Duration::from_millis(500),
        Clock::Nanoseconds => Duration::from_millis(5),
    }
}

/// What a machine is made of.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What the guest does.
    pub pattern: Pattern,
    /// The tracked slots.
    pub slots: Vec<Slot>,
    /// 1 to 8.
    pub vcpus: usize,
    /// What backs the tracked slots.
    pub backing: Backing,
    /// Leaf size of the firmware's own tables, and of its L2's.
    pub guest_page: Level,
    /// Whether KVM has the interrupt controllers.
    pub irqchip: bool,
    /// The mode in which the firmware touches the tracked slots, which lie below 3 GiB if it is not long mode.
    pub mode: Mode,
    /// TSC ticks between the accesses of a paced run.
    pub pace: u64,
    /// What the pattern's pages are, if not the tracked pages themselves.
    pub nested: Option<Nested>,
    /// How the monitor runs L2, if it does.
    pub shadow: Option<nested::Options>,
    /// What SMM sees, if the machine has one.
    pub smm: Option<smm::View>,
    /// The firmware.
    pub image: Arc<Image>,
    /// The clock of windows.
    pub timer: Timer,
}

impl Plan {
    /// Which tracked page each of the pattern's is.
    #[must_use]
    pub fn map(&self) -> Map {
        self.nested.map_or_else(|| Map::identity(self.pattern.pages), |nested| nested.map)
    }
}

/// A running machine.
///
/// Field order matters: the vCPU threads end before the VM goes.
pub struct Machine {
    threads: Vec<VcpuThread>,
    stops: Receiver<Stop>,
    image: Arc<Image>,
    rings: Option<Arc<Mutex<Rings>>>,
    clock: Clock,
    /// Of the VM, then of each vCPU.
    stats: Vec<Stats>,
    tsc_khz: u32,
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

    fn unbooted(
        plan: &Plan,
        ring_entries: Option<u32>,
        prepare: impl FnOnce(&VmFd) -> Result<(), kvm::Error>,
    ) -> Result<Self, Error> {
        let kvm = kvm::vm::open()?;
        let place = SystemPlace::new(plan)?;
        // L2's VM maps all of L1's memory.
        let system = if plan.shadow.is_some() { plan.backing } else { Backing::Anonymous };
        let vm = Vm::new(&kvm, (place.bytes, system), plan.slots.iter().copied(), plan.backing, prepare)?;
        plan.image.write_to(vm.system())?;
        let l2 = plan.shadow.as_ref().map(|options| nested::Host::new(&kvm, &vm, options)).transpose()?;

        let rings = ring_entries.map(|entries| {
            let mut slots = vec![(0, 0)];
            slots.extend(plan.slots.iter().map(|slot| (slot.first_page, slot.pages)));
            (entries, Rings::new(Arc::clone(vm.fd()), slots, plan.map().l1_pages()))
        });
        let cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm::vm::failed("KVM_GET_SUPPORTED_CPUID"))?;
        if plan.irqchip {
            vm.fd().create_irq_chip().map_err(kvm::vm::failed("KVM_CREATE_IRQCHIP"))?;
        }
        let vcpus = (0..plan.vcpus)
            .map(|index| {
                let vcpu = vm.fd().create_vcpu(index as u64).map_err(kvm::vm::failed("KVM_CREATE_VCPU"))?;
                vcpu.set_cpuid2(&cpuid).map_err(kvm::vm::failed("KVM_SET_CPUID2"))?;
                set_registers(&vcpu, index, &plan.image)?;
                if plan.smm.is_some() {
                    set_smbase(&vcpu, index)?;
                }
                if plan.irqchip {
                    // All but the first would wait for a start-up IPI.
                    let running = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
                    vcpu.set_mp_state(running).map_err(kvm::vm::failed("KVM_SET_MP_STATE"))?;
                }
                Ok(vcpu)
            })
            .collect::<Result<Vec<_>, kvm::Error>>()?;
        // Kernels before 5.14 have no statistics; then there are no counters.
        let stats = Stats::open(&**vm.fd())
            .and_then(|stats| {
                vcpus.iter().map(Stats::open).try_fold(vec![stats], |mut all, next| {
                    all.push(next?);
                    Ok(all)
                })
            })
            .unwrap_or_default();
        let tsc_khz = vcpus.first().and_then(|vcpu| vcpu.get_tsc_khz().ok()).unwrap_or(0);
        let rings = rings
            .map(|(entries, mut rings)| {
                vcpus.iter().try_for_each(|vcpu| rings.add(vcpu, entries))?;
                Ok::<_, kvm::Error>(Arc::new(Mutex::new(rings)))
            })
            .transpose()?;
        write_boot_page(vm.system(), plan, &place, tsc_khz)?;

        let (report, stops) = crossbeam::channel::unbounded();
        let threads = vcpus
            .into_iter()
            .enumerate()
            .map(|(index, fd)| {
                let below = match &l2 {
                    Some(l2) => Some(Box::new(l2.vcpu(index, &cpuid)?) as Box<dyn Below>),
                    None => None,
                };
                VcpuThread::start(Vcpu { index, fd, timer: plan.timer, rings: rings.clone(), below }, report.clone())
            })
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            threads,
            stops,
            image: Arc::clone(&plan.image),
            rings,
            clock: plan.timer.clock(),
            stats,
            tsc_khz,
            l2,
            vm,
        })
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
        let mut before = Witness::beside_vcpus(self.clock).look();
        clock::behind_a_tick(self.clock);
        before.begin();
        self.begin_of(vcpus.clone(), command, argument)?;
        let mut window = self.finish(vcpus, name(command))?;
        window.clean = match self.clock {
            // A vCPU thread that was never switched away had the CPU for itself; else the other tasks' time decides.
            Clock::Instructions => window.clean || before.nobody_else_ran(),
            Clock::Nanoseconds => window.clean,
        };
        Ok(window)
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

    /// Eight bytes of one vCPU's SMRAM, `offset` from its SMBASE on.
    ///
    /// # Errors
    /// [`Error::Memory`] if they are not there.
    pub fn smram_word(&self, vcpu: usize, offset: u64) -> Result<u64, Error> {
        read(self.vm.smram(), smm::smbase(vcpu) + offset)
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
        while let Some(&first) = waiting.first() {
            let Ok(stop) = self.stops.recv_timeout(PATIENCE) else { return Err(self.silent(first, what)) };
            match stop.exit {
                Exit::Doorbell(Doorbell::Ready) | Exit::Worked => {
                    windows.push(stop.window);
                    waiting.retain(|&vcpu| vcpu != stop.vcpu);
                }
                Exit::Doorbell(Doorbell::Print) => {
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

    pub(super) fn silent(&self, vcpu: usize, command: &'static str) -> Error {
        let mut place = "an unknown place".to_owned();
        for _ in 0..100 {
            self.threads[vcpu].kick();
            if let Ok(Stop { exit: Exit::Kicked { rip }, .. }) = self.stops.recv_timeout(Duration::from_millis(10)) {
                place = self.image.place(rip);
                break;
            }
        }
        Error::Silent { vcpu, seconds: PATIENCE.as_secs(), command, place }
    }

    pub(super) fn broken(&self, vcpu: usize, exit: Exit) -> Error {
        let what = match exit {
            Exit::Doorbell(Doorbell::Exception) => match self.mailbox(vcpu) {
                Ok(mailbox) => self.exception(&mailbox.exception),
                Err(error) => return error,
            },
            Exit::Doorbell(Doorbell::Panic) => match self.text(vcpu) {
                Ok(text) => format!("the firmware panicked: {}", text.trim_end()),
                Err(error) => return error,
            },
            Exit::Doorbell(doorbell) => format!("it rang {doorbell:?} where Ready was expected"),
            Exit::Broken { what, rip } => format!("{what} at {}", self.image.place(rip)),
            Exit::Kicked { rip } => format!("it was stopped at {}", self.image.place(rip)),
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

    /// The mailbox of one vCPU as the guest left it.
    ///
    /// # Errors
    /// [`Error::Memory`] if it is not there.
    pub fn mailbox(&self, vcpu: usize) -> Result<Mailbox, Error> {
        read(self.vm.system(), vcpu_area(vcpu) + vcpu_area::MAILBOX)
    }

    /// One word of a vCPU's mailbox, read while the guest runs.
    ///
    /// # Errors
    /// [`Error::Memory`] if it is not there.
    pub fn rounds_done(&self, vcpu: usize) -> Result<u64, Error> {
        self.load_mailbox(vcpu, std::mem::offset_of!(Mailbox, rounds_done))
    }

    /// Accesses that a vCPU's paced run has made, read while the guest runs.
    ///
    /// # Errors
    /// [`Error::Memory`] if it is not there.
    pub fn accesses_done(&self, vcpu: usize) -> Result<u64, Error> {
        self.load_mailbox(vcpu, std::mem::offset_of!(Mailbox, accesses_done))
    }

    fn load_mailbox(&self, vcpu: usize, field: usize) -> Result<u64, Error> {
        let address = vcpu_area(vcpu) + vcpu_area::MAILBOX + field as u64;
        self.vm
            .system()
            .load(GuestAddress(address), std::sync::atomic::Ordering::Acquire)
            .map_err(|error| Error::Memory(error.to_string()))
    }

    fn write_mailbox(&self, vcpu: usize, field: usize, value: u64) -> Result<(), Error> {
        let address = vcpu_area(vcpu) + vcpu_area::MAILBOX + field as u64;
        self.vm
            .system()
            .store(value, GuestAddress(address), std::sync::atomic::Ordering::Release)
            .map_err(|error| Error::Memory(error.to_string()))
    }

    fn text(&self, vcpu: usize) -> Result<String, Error> {
        let mailbox = self.mailbox(vcpu)?;
        let length = usize::try_from(mailbox.text_bytes).unwrap_or(usize::MAX).min(mailbox.text.len());
        Ok(String::from_utf8_lossy(&mailbox.text[..length]).into_owned())
    }

    /// The stall histograms of all vCPUs together, in ticks of the guest's TSC.
    ///
    /// # Errors
    /// [`Error::Memory`] if they are not there.
    pub fn stalls(&self) -> Result<Histogram, Error> {
        let mut all = Histogram::default();
        for vcpu in 0..self.threads.len() {
            all.merge(&read(self.vm.system(), vcpu_area(vcpu) + vcpu_area::HISTOGRAM)?);
        }
        Ok(all)
    }

    /// What L1 reports about its L2s: the counts of all vCPUs together.
    ///
    /// # Errors
    /// [`Error::Memory`] if the reports are not there.
    pub fn nested_report(&self) -> Result<Report, Error> {
        (0..self.threads.len()).try_fold(Report::default(), |sum, vcpu| {
            let one: Report = read(self.vm.system(), vcpu_area(vcpu) + vcpu_area::NESTED_REPORT)?;
            Ok(Report {
                entries: sum.entries.saturating_add(one.entries),
                violations: sum.violations.saturating_add(one.violations),
                filled: sum.filled.saturating_add(one.filled),
                // All vCPUs have one table.
                table_pages: sum.table_pages.max(one.table_pages),
                ..one
            })
        })
    }

    /// What SMM's handler keeps for one vCPU.
    ///
    /// # Errors
    /// [`Error::Memory`] if it is not there.
    pub fn smm_ledger(&self, vcpu: usize) -> Result<smm::Ledger, Error> {
        read(self.vm.smram(), smm::smbase(vcpu) + smm::LEDGER)
    }

    /// Puts a HLT where every vCPU's handler begins.
    ///
    /// # Errors
    /// [`Error::Memory`] if there is no SMRAM.
    pub fn break_smm(&self) -> Result<(), Error> {
        (0..self.threads.len()).try_for_each(|vcpu| {
            let at = GuestAddress(smm::smbase(vcpu) + smm::ENTRY);
            self.vm.smram().write_slice(&[0xf4], at).map_err(|error| Error::Memory(error.to_string()))
        })
    }

    /// Whether everybody but SMM still finds what the monitor left in the place of one vCPU's SMRAM.
    ///
    /// # Errors
    /// [`Error::Memory`] if it is not there.
    pub fn smram_is_closed(&self, vcpu: usize) -> Result<bool, Error> {
        let (first, pages) = (smm::smbase(vcpu), smm::SMRAM_BYTES / PAGE_SIZE);
        (0..pages).try_fold(true, |closed, page| {
            let bytes: [u8; 1 << umbra_shared::PAGE_SHIFT] = read(self.vm.system(), first + page * PAGE_SIZE)?;
            Ok(closed && bytes.iter().all(|&byte| byte == kvm::vm::CLOSED_SMRAM))
        })
    }

    /// Writes that the guest says its last command made, over all vCPUs.
    ///
    /// # Errors
    /// [`Error::Memory`] if the mailboxes are not there.
    pub fn writes(&self) -> Result<u64, Error> {
        (0..self.threads.len()).try_fold(0_u64, |sum, vcpu| Ok(sum.saturating_add(self.mailbox(vcpu)?.writes)))
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
            let Ok(stop) = machine.stops.recv_timeout(PATIENCE) else { return Err(machine.silent(0, "its program")) };
            match stop.exit {
                Exit::Doorbell(Doorbell::Print) => output.push_str(&machine.text(0)?),
                Exit::Doorbell(Doorbell::Exit) => return Ok((output, machine.mailbox(0)?.exit_code)),
                Exit::Doorbell(Doorbell::Ready) => {}
                exit => return Err(machine.broken(0, exit)),
            }
        }
    }
}

/// What the system slot holds beyond its fixed part.
struct SystemPlace {
    bytes: u64,
    plan_entries: u64,
    tables: u64,
    table_bytes: u64,
    nested_tables: u64,
    nested_table_bytes: u64,
    legacy_tables: u64,
    legacy_table_bytes: u64,
}

impl SystemPlace {
    fn new(plan: &Plan) -> Result<Self, Error> {
        let (pages, plan_entries) = (plan.pattern.pages, plan.pattern.accesses());
        let tables = (layout::PLANS + 4 * plan_entries).next_multiple_of(PAGE_SIZE);
        let table_bytes = layout::table_bytes(pages, plan.guest_page);
        let nested_tables = tables + table_bytes;
        let nested_table_bytes = plan.nested.map_or(0, |nested| nested.table_bytes(plan.guest_page));
        let legacy_tables = nested_tables + nested_table_bytes;
        let legacy_table_bytes = layout::legacy_table_bytes(pages, plan.guest_page, plan.mode);
        let bytes = (legacy_tables + legacy_table_bytes).next_multiple_of(Level::M2.bytes());
        if bytes > layout::SYSTEM_LIMIT {
            return Err(Error::Memory(format!(
                "{pages} pages with {plan_entries} accesses a round need {bytes} bytes of tables and plans, and there is room for {} (ask for less memory or --guest-page 2m)",
                layout::SYSTEM_LIMIT
            )));
        }
        Ok(Self {
            bytes,
            plan_entries,
            tables,
            table_bytes,
            nested_tables,
            nested_table_bytes,
            legacy_tables,
            legacy_table_bytes,
        })
    }
}

fn write_boot_page(memory: &GuestMemoryMmap, plan: &Plan, place: &SystemPlace, tsc_khz: u32) -> Result<(), Error> {
    let mut page = BootPage {
        magic: BOOT_MAGIC,
        vcpus: plan.vcpus as u64,
        pages: plan.map().l1_pages(),
        guest_page_level: plan.guest_page.number().into(),
        tsc_khz: tsc_khz.into(),
        plans: layout::PLANS,
        plan_entries: place.plan_entries,
        tables: place.tables,
        table_bytes: place.table_bytes,
        pattern: plan.pattern.encode(),
        nested: plan.nested.map_or([0; WORDS], |nested| nested.encode()),
        nested_tables: place.nested_tables,
        nested_table_bytes: place.nested_table_bytes,
        guest_paging: plan.mode as u64,
        legacy_tables: place.legacy_tables,
        legacy_table_bytes: place.legacy_table_bytes,
        pace: plan.pace,
        smram: plan.smm.is_some().into(),
        slot_count: plan.slots.len() as u64,
        ..BootPage::default()
    };
    for (entry, slot) in page.slots.iter_mut().zip(&plan.slots) {
        *entry = [slot.base.0, slot.pages];
    }
    memory
        .write_slice(page.as_bytes(), GuestAddress(layout::BOOT_PAGE))
        .map_err(|error| Error::Memory(error.to_string()))
}

fn read<T: FromBytes>(memory: &GuestMemoryMmap, address: u64) -> Result<T, Error> {
    let mut bytes = vec![0; size_of::<T>()];
    memory.read_slice(&mut bytes, GuestAddress(address)).map_err(|error| Error::Memory(error.to_string()))?;
    T::read_from_bytes(&bytes).map_err(|_| Error::Memory("a report has the wrong size".into()))
}

/// The state in which the firmware expects to be entered: ring 0, on the image's own page tables.
fn set_registers(vcpu: &VcpuFd, index: usize, image: &Image) -> Result<(), kvm::Error> {
    let registers = kvm_regs {
        rip: image.entry,
        rdi: ENTERED_BY_MONITOR,
        rsi: index as u64,
        rsp: vcpu_area(index) + vcpu_area::STACK_TOP,
        // Bit 1 is always set (SDM 1, 3.4.3).
        rflags: 2,
        ..kvm_regs::default()
    };
    let state = LongMode {
        cr3: image.boot_tables,
        ring: 0,
        selectors: [0x8, 0x10, 0],
        task: Table { base: 0, limit: 0x67 },
        gdt: None,
        idt: None,
        registers,
    };
    state.load(vcpu)
}

/// SMBASE, where a firmware's own relocation would leave it (Intel SDM 3C, 32.11; the register is the host's to write alone).
fn set_smbase(vcpu: &VcpuFd, index: usize) -> Result<(), kvm::Error> {
    const MSR_IA32_SMBASE: u32 = 0x9e;
    let entry = kvm_msr_entry { index: MSR_IA32_SMBASE, data: smm::smbase(index), ..kvm_msr_entry::default() };
    let refused = || kvm::Error::Memory("one register does not fit a list of registers".into());
    let msrs = Msrs::from_entries(&[entry]).map_err(|_| refused())?;
    match vcpu.set_msrs(&msrs).map_err(kvm::vm::failed("KVM_SET_MSRS"))? {
        1 => Ok(()),
        _ => Err(kvm::Error::Capability {
            capability: "MSR_IA32_SMBASE",
            consequence: "each vCPU needs an SMRAM of its own".into(),
        }),
    }
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
        Command::Provoke => "provoking a violation",
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
