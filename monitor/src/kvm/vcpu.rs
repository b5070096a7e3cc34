//! A vCPU on its own thread. Between orders the thread sleeps; an order runs the guest until it rings a doorbell.

use super::Error;
use super::clock::{Timer, Window};
use super::ring::Rings;
use super::vm::failed;
use super::witness::Witness;
use crossbeam::channel::{Receiver, Sender};
use kvm_ioctls::{VcpuExit, VcpuFd};
use rustix::process::Pid;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use umbra_shared::protocol::{DOORBELL_PORT, Doorbell};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// `KVM_EXIT_DIRTY_RING_FULL` (include/uapi/linux/kvm.h), which kvm-ioctls leaves to its callers.
const EXIT_DIRTY_RING_FULL: u32 = 31;

/// Why an order ended.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    },
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

/// A vCPU's thread.
pub struct VcpuThread {
    orders: Option<Sender<Order>>,
    kicked: Arc<AtomicBool>,
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
        let kicked = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&kicked);
        let (tell, told) = crossbeam::channel::bounded(1);
        let failed = |source| Error::Call { what: "starting a vCPU thread", source };
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{}", vcpu.index))
            .spawn(move || {
                // Nobody listens only if `start` is gone.
                let _ = tell.send(rustix::thread::gettid());
                serve(vcpu, &flag, &inbox, &stops);
            })
            .map_err(failed)?;
        let id = told.recv().map_err(|error| failed(std::io::Error::other(error)))?;
        Ok(Self { orders: Some(orders), kicked, id, thread: Some(thread) })
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

    /// Orders `work`, which ends with [`Exit::Worked`], [`Exit::NotHere`], or [`Exit::Broken`] with the error.
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
        self.kicked.store(true, Ordering::Release);
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

fn serve(mut vcpu: Vcpu, kicked: &AtomicBool, orders: &Receiver<Order>, stops: &Sender<Stop>) {
    while let Ok(order) = orders.recv() {
        let timer = vcpu.timer;
        let (exit, window) = timer.window(Witness::of_vcpu(timer.clock()), || match order {
            Order::Run => run(&mut vcpu, kicked),
            Order::Work(work) => match work(&vcpu.fd) {
                Ok(()) => Exit::Worked,
                Err(error @ Error::Capability { .. }) => Exit::NotHere { what: error.to_string() },
                Err(error) => Exit::Broken { what: error.to_string(), rip: rip(&vcpu.fd) },
            },
        });
        if stops.send(Stop { vcpu: vcpu.index, exit, window }).is_err() {
            return;
        }
    }
}

/// Runs the guest until it rings, breaks or is kicked.
fn run(vcpu: &mut Vcpu, kicked: &AtomicBool) -> Exit {
    let what = loop {
        match vcpu.fd.run() {
            Ok(VcpuExit::IoOut(DOORBELL_PORT, data)) => {
                let number = data.try_into().map_or(0, u32::from_le_bytes);
                match Doorbell::from_number(number) {
                    Some(doorbell) => return Exit::Doorbell(doorbell),
                    None => break format!("it rang an unknown doorbell, {number:#x}"),
                }
            }
            Ok(VcpuExit::Unsupported(EXIT_DIRTY_RING_FULL)) => {
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
            Ok(VcpuExit::MmioRead(gpa, _)) => {
                break format!("it read guest physical address {gpa:#x}, which no slot holds");
            }
            Ok(VcpuExit::MmioWrite(gpa, _)) => {
                break format!("it wrote guest physical address {gpa:#x}, which no slot holds");
            }
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
        if kicked.swap(false, Ordering::AcqRel) {
            return Exit::Kicked { rip: rip(&vcpu.fd) };
        }
    };
    Exit::Broken { what, rip: rip(&vcpu.fd) }
}

fn rip(vcpu: &VcpuFd) -> u64 {
    vcpu.get_regs().map_or(0, |registers| registers.rip)
}
