//! A vCPU of L2. It runs on the thread of the L1 vCPU that owns it, while that one waits in its doorbell.

use super::Host;
use super::shadow::Handled;
use super::source::{Fault, Place, Told};
use crate::kvm::carry::{carry, finish_exit};
use crate::kvm::fault_trace::{FaultTrace, Traced};
use crate::kvm::registers::{LongMode, Table};
use crate::kvm::vcpu::{Below, Exit};
use crate::kvm::{Error, ioctls, ring, vm};
use kvm_bindings::{CpuId, kvm_regs, kvm_vcpu_events};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use umbra_shared::control::{self, ControlPage, State};
use umbra_shared::layout::vcpu_area;
use umbra_shared::protocol::{DOORBELL_PORT, Doorbell};
use umbra_shared::{L2Gfn, PAGE_SIZE};
use zerocopy::FromBytes;

/// A fault that comes back so often, and nobody else's was handled meanwhile, will always come back.
const PATIENCE: u32 = 10_000;

/// A vCPU of L2.
pub struct L2Vcpu {
    host: Arc<Host>,
    index: usize,
    cpuid: CpuId,
    /// One for each place that it was on, in the order of their numbers.
    fds: Vec<VcpuFd>,
    /// The place that it is on.
    at: usize,
    /// L1 waits for it.
    inside: bool,
    /// Places whose fault source knows its thread.
    enlisted: usize,
    /// Entries that failed one after the other.
    failed: u32,
    /// Where L2 did something outside of all windows that `KVM_RUN` has yet to complete.
    pending: Option<u64>,
    /// Opened when it is needed, on this vCPU's thread.
    trace: Option<FaultTrace>,
    /// Whether that records.
    armed: bool,
    /// The address that L1 was asked about last.
    asked: Option<u64>,
    /// Counts vCPUs that are in KVM.
    in_kvm: Arc<AtomicUsize>,
}

/// Why `KVM_RUN` of L2's VM returned.
enum Left {
    /// L2 rang a doorbell.
    Rang(u32),
    /// L2 touched what no window holds.
    Beyond { gpa: u64, write: bool },
    /// L2 touched a closed page.
    Fault,
    /// The dirty ring is full.
    RingFull,
    /// A signal.
    Interrupted,
    /// L2 cannot go on.
    Ended(String),
    /// The monitor cannot.
    Broken(String),
}

/// What becomes of an exit of L2's VM.
enum Next {
    /// L2 goes on.
    L2,
    /// L1 goes on: why, the address, and the qualification.
    L1(control::Exit, u64, u64),
    /// The order ends, with L2 where it is.
    Stop(Exit),
}

impl L2Vcpu {
    pub(super) fn new(host: Arc<Host>, index: usize, cpuid: &CpuId) -> Result<Self, Error> {
        let fds = vec![host.vcpu_at(0, index, cpuid)?];
        let in_kvm = Arc::clone(host.shadow()?.places.in_kvm());
        Ok(Self {
            host,
            index,
            cpuid: cpuid.clone(),
            fds,
            at: 0,
            inside: false,
            enlisted: 0,
            failed: 0,
            pending: None,
            trace: None,
            armed: false,
            asked: None,
            in_kvm,
        })
    }

    /// Goes where its root is: L2's state moves to the vCPU of that VM.
    fn follow(&mut self) -> Result<(), Error> {
        let place = self.host.shadow()?.places.number();
        while self.fds.len() <= place {
            let fd = self.host.vcpu_at(self.fds.len(), self.index, &self.cpuid)?;
            self.fds.push(fd);
        }
        for (place, fd) in self.host.shadow()?.places.all().iter().zip(&self.fds).skip(self.enlisted) {
            place.source().enlist(fd)?;
            self.enlisted += 1;
        }
        if let Ok([from, to]) = self.fds.get_disjoint_mut([self.at, place]) {
            carry(from, to)?;
        }
        self.at = place;
        Ok(())
    }

    /// L2 is in another role.
    fn change_role(&mut self) -> Result<Next, Error> {
        let page = self.read_control()?;
        let refused = match page.check() {
            Err(refusal) => Some(refusal.to_string()),
            Ok(entry) if self.host.shadow()?.change_role(entry.role)? => None,
            Ok(_) => Some("another vCPU is in L2 as well, and the shadow MMU has one root loaded".to_owned()),
        };
        if let Some(why) = refused {
            return self.next(Left::Ended(format!("L2 announced role {:#x}: {why}", page.role)));
        }
        self.follow()?;
        Ok(Next::L2)
    }

    /// A word of L1's control page.
    fn control(&self, offset: usize) -> Result<&std::sync::atomic::AtomicU64, Error> {
        let address = vcpu_area(self.index) + vcpu_area::CONTROL_BLOCK + offset as u64;
        self.host.memory().word(address).ok_or_else(|| Error::Memory(format!("L1 has no memory at {address:#x}")))
    }

    fn read_control(&self) -> Result<ControlPage, Error> {
        const WORDS: usize = size_of::<ControlPage>() / 8;
        let address = vcpu_area(self.index) + vcpu_area::CONTROL_BLOCK;
        let page = self.host.memory().words(address, WORDS);
        let page = page.ok_or_else(|| Error::Memory(format!("L1 has no memory at {address:#x}")))?;
        let mut bytes = [0; size_of::<ControlPage>()];
        for (word, from) in bytes.chunks_exact_mut(8).zip(page) {
            word.copy_from_slice(&from.load(Ordering::Acquire).to_le_bytes());
        }
        ControlPage::read_from_bytes(&bytes).map_err(|_| Error::Memory("a control page has the wrong size".into()))
    }

    fn tell(&self, exit: control::Exit, address: u64, qualification: u64) -> Result<(), Error> {
        self.control(offset_of!(ControlPage, address))?.store(address, Ordering::Relaxed);
        self.control(offset_of!(ControlPage, qualification))?.store(qualification, Ordering::Relaxed);
        self.control(offset_of!(ControlPage, exit))?.store(exit as u64, Ordering::Release);
        Ok(())
    }

    /// L1 wants L2 to run.
    fn enter(&mut self) -> Result<(), Error> {
        let Ok(entry) = self.read_control()?.check() else { return self.tell(control::Exit::Refused, 0, 0) };
        if let Some(state) = &entry.start
            && (self.complete().is_err() || load(&self.fds[self.at], state).is_err())
        {
            // KVM knows which states a processor cannot be in.
            return self.tell(control::Exit::Refused, 0, 1);
        }
        let mut shadow = self.host.shadow()?;
        if !shadow.enter(&entry)? {
            drop(shadow);
            return self.tell(control::Exit::Refused, 0, 2);
        }
        if let (Some(address), None) = (self.asked.take(), &entry.start) {
            // Most likely L1 has made it possible meanwhile; L2 does it again first of all.
            shadow.answered(address)?;
        }
        drop(shadow);
        (self.inside, self.failed) = (true, 0);
        self.follow()
    }

    /// Lets KVM complete an access outside of all windows, after which other registers can be loaded (Documentation/virt/kvm/api.rst, 5, "The `kvm_run`
    /// structure": pending operations are completed by an entry with `immediate_exit`).
    fn complete(&mut self) -> Result<(), Error> {
        if self.pending.take().is_some() {
            finish_exit(&mut self.fds[self.at])?;
        }
        Ok(())
    }

    /// Runs L2 until L1 or the controller has to do something.
    fn run_l2(&mut self, kicked: &AtomicBool) -> Result<Option<Exit>, Error> {
        while self.inside {
            self.prepare()?;
            let left = self.run_once();
            if !matches!(left, Left::Fault | Left::Interrupted) {
                self.disarm()?;
            }
            match self.next(left)? {
                Next::L2 => {}
                Next::L1(exit, address, qualification) => self.leave(exit, address, qualification)?,
                Next::Stop(exit) => return Ok(Some(exit)),
            }
            if kicked.swap(false, Ordering::AcqRel) {
                if !self.host.expelled.swap(false, Ordering::AcqRel) {
                    return Ok(Some(Exit::Kicked { rip: self.rip(), mode: String::new() }));
                }
                if self.inside {
                    self.leave(control::Exit::Ended, 0, 0)?;
                }
            }
        }
        Ok(None)
    }

    /// L1 goes on.
    fn leave(&mut self, exit: control::Exit, address: u64, qualification: u64) -> Result<(), Error> {
        self.inside = false;
        self.host.shadow()?.leave();
        self.tell(exit, address, qualification)
    }

    /// One `KVM_RUN`. The vCPU counts as in KVM already.
    fn run_once(&mut self) -> Left {
        let ran = self.fds[self.at].run();
        self.in_kvm.fetch_sub(1, Ordering::Release);
        match ran {
            Ok(VcpuExit::IoOut(DOORBELL_PORT, data)) => Left::Rang(data.try_into().map_or(0, u32::from_le_bytes)),
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                data.fill(0);
                Left::Beyond { gpa, write: false }
            }
            Ok(VcpuExit::MmioWrite(gpa, _)) => Left::Beyond { gpa, write: true },
            Ok(VcpuExit::Shutdown) => Left::Ended("L2 triple-faulted (KVM_EXIT_SHUTDOWN)".to_owned()),
            Ok(VcpuExit::Hlt) => Left::Ended("L2 halted (KVM_EXIT_HLT), and nothing would wake it".to_owned()),
            Ok(VcpuExit::InternalError) => {
                Left::Ended("KVM cannot emulate what L2 did (KVM_EXIT_INTERNAL_ERROR)".to_owned())
            }
            Ok(VcpuExit::Intr) => Left::Interrupted,
            Ok(VcpuExit::Unsupported(ring::EXIT_FULL)) => Left::RingFull,
            Ok(other) => Left::Ended(format!("unexpected exit {other:?} of L2")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Left::Interrupted,
            Err(error) if error.errno() == libc::EFAULT => Left::Fault,
            Err(error) => Left::Broken(vm::failed("KVM_RUN of L2")(error).to_string()),
        }
    }

    /// What becomes of it.
    fn next(&mut self, left: Left) -> Result<Next, Error> {
        let what = match left {
            Left::Interrupted => return self.interrupted(),
            Left::Fault => return self.fault(),
            Left::RingFull => {
                self.host.shadow()?.places.here_mut().empty_rings()?;
                return Ok(Next::L2);
            }
            Left::Beyond { gpa, write } => {
                self.pending = Some(gpa);
                return self.emulated(gpa, write);
            }
            Left::Rang(number) => match Doorbell::from_number(number) {
                Some(Doorbell::ChangeRole) => return self.change_role(),
                Some(Doorbell::Yield) => return Ok(Next::L1(control::Exit::Yield, 0, 0)),
                Some(Doorbell::Wait) => {
                    std::thread::yield_now();
                    return Ok(Next::L2);
                }
                Some(doorbell) if doorbell.is_of_any_guest() => return self.ended(Exit::Doorbell(doorbell)),
                _ => format!("L2 rang doorbell {number:#x}, which is none of its own"),
            },
            Left::Ended(what) => what,
            Left::Broken(what) => return Ok(Next::Stop(Exit::Failed { what, rip: self.rip() })),
        };
        let rip = self.rip();
        self.ended(Exit::Broken { what, rip })
    }

    /// KVM emulated an access of L2's that no mapping would bear, and has done with it. In a window EPT12 may have said no: then L1 hears of that. All else
    /// is a violation.
    fn emulated(&mut self, gpa: u64, write: bool) -> Result<Next, Error> {
        let in_window = self.host.shadow()?.places.here().page(L2Gfn::containing(gpa)).is_some();
        if in_window
            && let Next::L1(exit, address, qualification) =
                self.handle(&Fault { place: Place::Gpa(gpa), write, table_walk: false })?
        {
            return Ok(Next::L1(exit, address, qualification));
        }
        Ok(Next::L1(control::Exit::Violation, gpa, u64::from(write) << 1))
    }

    /// L2 has come to its end: L1 is told if it wants to be, else the machine stops.
    fn ended(&self, exit: Exit) -> Result<Next, Error> {
        let intercepted = self.control(offset_of!(ControlPage, intercept))?.load(Ordering::Acquire) != 0;
        let printed = matches!(exit, Exit::Doorbell(Doorbell::Print));
        Ok(if intercepted && !printed { Next::L1(control::Exit::Ended, 0, 0) } else { Next::Stop(exit) })
    }

    /// A signal ended `KVM_RUN`: a fault of L2's that is told so, or somebody wants the thread.
    fn interrupted(&mut self) -> Result<Next, Error> {
        let fault = self.host.shadow()?.places.here().source().interrupted();
        fault.map_or(Ok(Next::L2), |fault| self.handle(&fault))
    }

    /// `KVM_RUN` failed: L2 touched a page that it may not, or not yet.
    fn fault(&mut self) -> Result<Next, Error> {
        let recorded = self.trace.as_ref().filter(|_| self.armed).and_then(FaultTrace::last);
        let shadow = self.host.shadow()?;
        let told = shadow.places.here().source().told();
        if told == Told::Trace && recorded.is_none() {
            // It will be tried again. Under the lock, so that nobody counts while slots are replaced.
            self.in_kvm.fetch_add(1, Ordering::AcqRel);
        }
        drop(shadow);
        match told {
            Told::At(fault) => self.handle(&fault),
            Told::Trace => self.traced(recorded),
            Told::Again => self.again(),
            Told::Nothing => self.unknown(),
        }
    }

    /// The source may know more the next time.
    fn again(&mut self) -> Result<Next, Error> {
        if self.failed >= PATIENCE {
            return self.unknown();
        }
        self.failed += 1;
        std::thread::yield_now();
        Ok(Next::L2)
    }

    /// `KVM_RUN` failed, and the source knows nothing about it.
    fn unknown(&mut self) -> Result<Next, Error> {
        let silence = self.host.shadow()?.places.here().source().silence();
        self.next(Left::Broken(silence.to_owned()))
    }

    /// Where it was, by KVM's tracepoint: as the entry that failed has `recorded` it, or the one that tries again with the tracepoint armed. That
    /// stays armed until L2 comes out for another reason. Who faults once mostly faults again, and to try again costs ten times what a fault pays
    /// for being recorded.
    fn traced(&mut self, recorded: Option<Traced>) -> Result<Next, Error> {
        let traced = if let Some(traced) = recorded {
            traced
        } else {
            self.arm()?;
            let left = self.run_once();
            match (left, self.trace.as_ref().and_then(FaultTrace::last)) {
                (Left::Fault, Some(traced)) => traced,
                // Another vCPU had settled that fault, and L2 went on to so many that KVM resolved that the record had no room for this one.
                (Left::Fault, None) => return self.again(),
                // Another vCPU has settled the same fault meanwhile.
                (left, _) => {
                    self.disarm()?;
                    return self.next(left);
                }
            }
        };
        let Traced { address, write, table_walk } = traced;
        self.handle(&Fault { place: Place::Gpa(address), write, table_walk })
    }

    fn arm(&mut self) -> Result<(), Error> {
        let trace = match self.trace.take() {
            Some(trace) => trace,
            None => FaultTrace::open()?,
        };
        let armed = trace.arm();
        self.trace = Some(trace);
        armed.map_err(|error| Error::call("tracing a fault of L2", error))?;
        self.armed = true;
        Ok(())
    }

    fn disarm(&mut self) -> Result<(), Error> {
        if std::mem::take(&mut self.armed)
            && let Some(trace) = &self.trace
        {
            trace.disarm().map_err(|error| Error::call("tracing a fault of L2", error))?;
        }
        Ok(())
    }

    fn handle(&mut self, fault: &Fault) -> Result<Next, Error> {
        let handled = self.host.shadow()?.handle(fault)?;
        self.failed = 0;
        match handled {
            Some(Handled::Resume) => Ok(Next::L2),
            Some(Handled::ToL1(exit, address, qualification)) => {
                self.asked = Some(address);
                Ok(Next::L1(exit, address, qualification))
            }
            None => self.next(Left::Broken(format!("L2 touched {:?}, which is in no window", fault.place))),
        }
    }

    /// Makes ready for an entry. KVM maps what was mapped lately, rather than that L2 faults on each page. Not while KVM logs: all would count
    /// as written. Then L2's faults are many, and none is to pay for being recorded.
    fn prepare(&mut self) -> Result<(), Error> {
        let mut shadow = self.host.shadow()?;
        let here = shadow.places.here_mut();
        if here.log.is_some() {
            here.fresh.clear();
            self.in_kvm.fetch_add(1, Ordering::AcqRel);
            drop(shadow);
            return self.disarm();
        }
        // Under the lock, so that nobody closes what KVM is about to map: over a poisoned page the call would not end.
        for (start, frames) in here.fresh.drain(..) {
            // It is a hint: what it does not do, a fault will.
            let _ = ioctls::pre_fault_memory(&self.fds[self.at], start.address(), frames * PAGE_SIZE);
        }
        if let Some(trace) = self.trace.as_ref().filter(|_| self.armed) {
            trace.forget();
        }
        self.in_kvm.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    fn rip(&self) -> u64 {
        self.fds[self.at].get_regs().map_or(0, |registers| registers.rip)
    }
}

impl Below for L2Vcpu {
    fn answer(&mut self, doorbell: Doorbell) -> Result<(), Error> {
        match doorbell {
            Doorbell::EnterL2 => self.enter(),
            Doorbell::Invalidate => self.host.shadow()?.invalidate(),
            _ => Ok(()),
        }
    }

    fn run(&mut self, kicked: &AtomicBool) -> Option<Exit> {
        match self.run_l2(kicked) {
            Ok(exit) => exit,
            Err(error) => Some(Exit::Failed { what: error.to_string(), rip: self.rip() }),
        }
    }
}

/// L2 begins: 64-bit mode at ring 3, and nothing is left of an exception that was on its way when it was left.
fn load(fd: &VcpuFd, state: &State) -> Result<(), Error> {
    fd.set_vcpu_events(&kvm_vcpu_events::default()).map_err(vm::failed("KVM_SET_VCPU_EVENTS"))?;
    #[allow(clippy::cast_possible_truncation)] // A selector has 16 bits and a limit 32, whatever L1 writes.
    let (selector, table) = (|value: u64| value as u16, |[base, limit]: [u64; 2]| Table { base, limit: limit as u32 });
    let registers = kvm_regs { rip: state.rip, rsp: state.rsp, rflags: state.rflags | 2, ..kvm_regs::default() };
    let mode = LongMode {
        cr3: state.cr3,
        ring: 3,
        selectors: state.selectors.map(selector),
        task: table(state.task),
        gdt: Some(table(state.gdt)),
        idt: Some(table(state.idt)),
        registers,
    };
    mode.load(fd)
}
