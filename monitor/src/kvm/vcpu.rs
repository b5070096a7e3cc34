//! A vCPU on its own thread. Between orders the thread sleeps; an order runs the guest until it rings a doorbell.

use super::Error;
use super::bus::EmptyBus;
use super::clock::{Timer, Window};
use super::ring::{self, Rings};
use super::vm::failed;
use super::witness::Witness;
use crossbeam::channel::{Receiver, Sender};
use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use rustix::process::Pid;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use umbra_shared::protocol::{DOORBELL_PORT, Doorbell};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// Why an order ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Exit {
    /// The guest rang.
    Doorbell(Doorbell),
    /// The guest cannot go on: what happened, and RIP at that moment.
    Broken {
        /// In words.
        what: String,
        /// The instruction pointer.
        rip: u64,
    },
    /// The monitor cannot go on with it, whatever the guest did: what failed, and the guest's RIP at that moment.
    Failed {
        /// In words.
        what: String,
        /// The instruction pointer.
        rip: u64,
    },
    /// It got the SMI of [`VcpuThread::smi`]. The order goes on.
    Interrupted(Box<Interrupted>),
    /// The work of [`VcpuThread::work`] is done.
    Worked,
    /// That work is none that this host can do.
    NotHere {
        /// What is missing.
        what: String,
    },
    /// [`VcpuThread::kick`] ended the order.
    Kicked {
        /// The instruction pointer.
        rip: u64,
        /// In words, if it is in system management mode; else empty.
        mode: String,
    },
}

/// A vCPU as an SMI found it.
#[derive(Clone, Debug, PartialEq)]
pub struct Interrupted {
    /// Its general registers.
    pub registers: kvm_regs,
    /// Its system registers.
    pub system: kvm_sregs,
}

/// The end of an order.
#[derive(Clone, Debug)]
pub struct Stop {
    /// Which vCPU.
    pub vcpu: usize,
    /// Why.
    pub exit: Exit,
    /// From the entry into the guest to its exit.
    pub window: Window,
}

/// Work on a vCPU that only its own thread may do: KVM's calls wait for each other, and a vCPU's descriptor is not shared.
pub type Work = Box<dyn FnOnce(&VcpuFd) -> Result<(), Error> + Send>;

/// What the thread is told.
enum Order {
    /// Run the guest.
    Run,
    /// Do this instead.
    Work(Work),
}

/// What others want of a vCPU that runs.
#[derive(Default)]
struct Wishes {
    /// It shall stop.
    kicked: AtomicBool,
    /// It shall get an SMI.
    smi: AtomicBool,
}

/// A vCPU's thread.
pub struct VcpuThread {
    orders: Option<Sender<Order>>,
    wishes: Arc<Wishes>,
    id: Pid,
    thread: Option<JoinHandle<()>>,
}

/// What the thread works with.
pub struct Vcpu {
    /// Its number.
    pub index: usize,
    /// Its descriptor, registers set.
    pub fd: VcpuFd,
    /// The clock of windows.
    pub timer: Timer,
    /// Where a full ring is emptied.
    pub rings: Option<Arc<Mutex<Rings>>>,
    /// Who runs this vCPU's L2, if the monitor does.
    pub below: Option<Box<dyn Below>>,
    /// What answers accesses beyond all slots; without it they end the order.
    pub bus: Option<Arc<EmptyBus>>,
}

/// An L2 that the monitor runs on the thread of the L1 vCPU that owns it.
pub trait Below: Send {
    /// L1 rang a doorbell that is about its L2.
    ///
    /// # Errors
    /// Those that end the order.
    fn answer(&mut self, doorbell: Doorbell) -> Result<(), Error>;

    /// Runs L2 until L1 goes on: at once, if it is L1's turn. Else says what ends the order.
    fn run(&mut self, kicked: &AtomicBool) -> Option<Exit>;
}

extern "C" fn interrupt_only(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // KVM_RUN returns EINTR because a signal came at all.
}

impl VcpuThread {
    /// Starts the thread. It reports the end of each order to `stops`.
    ///
    /// # Errors
    /// The system's.
    pub fn start(vcpu: Vcpu, stops: Sender<Stop>) -> Result<Self, Error> {
        // Kept, so that no thread is ever started without the handler: the signal's default action would end the process.
        static HANDLER: OnceLock<vmm_sys_util::errno::Result<()>> = OnceLock::new();
        HANDLER
            .get_or_init(|| register_signal_handler(SIGRTMIN(), interrupt_only))
            .map_err(|error| Error::call("sigaction", std::io::Error::from_raw_os_error(error.errno())))?;
        let (orders, inbox) = crossbeam::channel::bounded(1);
        let wishes = Arc::new(Wishes::default());
        let heard = Arc::clone(&wishes);
        let (tell, told) = crossbeam::channel::bounded(1);
        let failed = |source| Error::Call { what: "starting a vCPU thread", source };
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{}", vcpu.index))
            .spawn(move || {
                // Nobody listens only if `start` is gone.
                let _ = tell.send(rustix::thread::gettid());
                serve(vcpu, &heard, &inbox, &stops);
            })
            .map_err(failed)?;
        let id = told.recv().map_err(|error| failed(std::io::Error::other(error)))?;
        Ok(Self { orders: Some(orders), wishes, id, thread: Some(thread) })
    }

    /// The thread's id in the kernel.
    #[must_use]
    pub const fn id(&self) -> Pid {
        self.id
    }

    /// Orders the guest to run until its next doorbell.
    pub fn run(&self) {
        self.order(Order::Run);
    }

    /// Orders `work`, which ends with [`Exit::Worked`], [`Exit::NotHere`], or [`Exit::Failed`] with the error.
    pub fn work(&self, work: Work) {
        self.order(Order::Work(work));
    }

    fn order(&self, order: Order) {
        if let Some(orders) = &self.orders {
            // A thread that is gone has reported why; the report, not this send, ends the run.
            let _ = orders.send(order);
        }
    }

    /// Ends the current order, if there is one: the guest leaves `KVM_RUN`. May have to be repeated, as a signal that comes before
    /// `KVM_RUN` is lost.
    pub fn kick(&self) {
        self.wishes.kicked.store(true, Ordering::Release);
        self.signal();
    }

    /// Takes back a kick that nobody has answered: the order was at its end.
    pub fn withdraw_kick(&self) {
        self.wishes.kicked.store(false, Ordering::Release);
    }

    /// Kicks the guest out of `KVM_RUN`, sends it an SMI and lets it go on; what it was is reported as [`Exit::Interrupted`]. A guest that stops
    /// before gets none. As with [`Self::kick`], a signal may be lost: called again before the SMI is sent, this only repeats it and returns false.
    #[must_use]
    pub fn smi(&self) -> bool {
        let new = !self.wishes.smi.swap(true, Ordering::AcqRel);
        self.signal();
        new
    }

    fn signal(&self) {
        if let Some(thread) = &self.thread {
            let _ = thread.kill(SIGRTMIN());
        }
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.orders = None;
        while self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            self.kick();
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(mut vcpu: Vcpu, wishes: &Wishes, orders: &Receiver<Order>, stops: &Sender<Stop>) {
    while let Ok(order) = orders.recv() {
        let timer = vcpu.timer;
        let (exit, window) = timer.window(Witness::of_vcpu(timer.clock()), || match order {
            Order::Run => run(&mut vcpu, wishes, stops),
            Order::Work(work) => match work(&vcpu.fd) {
                Ok(()) => Exit::Worked,
                Err(error @ Error::Capability { .. }) => Exit::NotHere { what: error.to_string() },
                Err(error) => Exit::Failed { what: error.to_string(), rip: rip(&vcpu.fd) },
            },
        });
        if stops.send(Stop { vcpu: vcpu.index, exit, window }).is_err() {
            return;
        }
    }
}

/// Sends the vCPU, which is not in `KVM_RUN`, an SMI, and reports what it was.
fn interrupt(vcpu: &Vcpu, stops: &Sender<Stop>) -> Result<(), Error> {
    let registers = vcpu.fd.get_regs().map_err(failed("KVM_GET_REGS"))?;
    let system = vcpu.fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    vcpu.fd.smi().map_err(failed("KVM_SMI"))?;
    let exit = Exit::Interrupted(Box::new(Interrupted { registers, system }));
    let now = vcpu.timer.now();
    // Nobody listens only if the machine is gone.
    let _ = stops.send(Stop { vcpu: vcpu.index, exit, window: Window { begin: now, end: now, clean: true } });
    Ok(())
}

/// Runs the guest until it rings, breaks or is kicked.
fn run(vcpu: &mut Vcpu, wishes: &Wishes, stops: &Sender<Stop>) -> Exit {
    let exit = run_through_smis(vcpu, wishes, stops);
    // One that comes too late is none.
    wishes.smi.store(false, Ordering::Release);
    exit
}

fn run_through_smis(vcpu: &mut Vcpu, wishes: &Wishes, stops: &Sender<Stop>) -> Exit {
    let what = loop {
        if let Some(exit) = vcpu.below.as_mut().and_then(|below| below.run(&wishes.kicked)) {
            return exit;
        }
        match vcpu.fd.run() {
            Ok(VcpuExit::IoOut(DOORBELL_PORT, data)) => {
                let number = data.try_into().map_or(0, u32::from_le_bytes);
                match Doorbell::from_number(number) {
                    Some(Doorbell::Smi) => {
                        // Between two KVM_RUNs: the call waits for the end of one.
                        if let Err(error) = vcpu.fd.smi() {
                            break failed("KVM_SMI")(error).to_string();
                        }
                    }
                    Some(Doorbell::Wait) => std::thread::yield_now(),
                    Some(doorbell @ (Doorbell::EnterL2 | Doorbell::Invalidate | Doorbell::Yield)) => {
                        let Some(below) = &mut vcpu.below else { break format!("it rang {doorbell:?}, and has no L2") };
                        if let Err(error) = below.answer(doorbell) {
                            return Exit::Failed { what: error.to_string(), rip: rip(&vcpu.fd) };
                        }
                    }
                    Some(doorbell) => return Exit::Doorbell(doorbell),
                    None => break format!("it rang an unknown doorbell, {number:#x}"),
                }
            }
            Ok(VcpuExit::Unsupported(ring::EXIT_FULL)) => {
                let Some(rings) = &vcpu.rings else { break "its ring is full, but it has none".to_owned() };
                let emptied = match rings.lock() {
                    Ok(mut rings) => rings.emptied_by(vcpu.index),
                    Err(_) => break "the dirty rings are lost with the thread that held them".to_owned(),
                };
                if let Err(error) = emptied {
                    break error.to_string();
                }
            }
            Ok(VcpuExit::IoOut(port, _)) => break format!("it wrote to port {port:#x}, where nothing is"),
            Ok(VcpuExit::IoIn(port, _)) => break format!("it read from port {port:#x}, where nothing is"),
            Ok(VcpuExit::MmioRead(gpa, data)) => match &vcpu.bus {
                Some(bus) => bus.read(gpa, data),
                None => break format!("it read guest physical address {gpa:#x}, which no slot holds"),
            },
            Ok(VcpuExit::MmioWrite(gpa, data)) => match &vcpu.bus {
                Some(bus) => bus.write(gpa, data),
                None => break format!("it wrote guest physical address {gpa:#x}, which no slot holds"),
            },
            Ok(VcpuExit::Shutdown) => break "it triple-faulted (KVM_EXIT_SHUTDOWN)".to_owned(),
            Ok(VcpuExit::Hlt) => break "it halted (KVM_EXIT_HLT), and nothing would wake it".to_owned(),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                break format!("the CPU refused to enter it (KVM_EXIT_FAIL_ENTRY, {reason:#x})");
            }
            Ok(VcpuExit::InternalError) => break "KVM cannot emulate what it did (KVM_EXIT_INTERNAL_ERROR)".to_owned(),
            Ok(VcpuExit::Intr) => {}
            Ok(other) => break format!("unexpected exit {other:?}"),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => break failed("KVM_RUN")(error).to_string(),
        }
        // One that comes while SMM handles another would wait for that one's end: it would interrupt another place than this.
        if wishes.smi.load(Ordering::Acquire)
            && !is_in_smm(&vcpu.fd)
            && wishes.smi.swap(false, Ordering::AcqRel)
            && let Err(error) = interrupt(vcpu, stops)
        {
            break error.to_string();
        }
        if wishes.kicked.swap(false, Ordering::AcqRel) {
            return Exit::Kicked { rip: rip(&vcpu.fd), mode: in_smm(&vcpu.fd) };
        }
    };
    Exit::Broken { what: what + &in_smm(&vcpu.fd), rip: rip(&vcpu.fd) }
}

/// That a vCPU is in system management mode, in words, and where its SMRAM is; nothing if it is not.
fn in_smm(vcpu: &VcpuFd) -> String {
    match vcpu.get_sregs() {
        Ok(system) if is_in_smm(vcpu) => {
            format!(" in system management mode (CS base {:#x}, CR0 {:#x})", system.cs.base, system.cr0)
        }
        _ => String::new(),
    }
}

fn is_in_smm(vcpu: &VcpuFd) -> bool {
    vcpu.get_vcpu_events().is_ok_and(|events| events.smi.smm != 0)
}

fn rip(vcpu: &VcpuFd) -> u64 {
    vcpu.get_regs().map_or(0, |registers| registers.rip)
}
