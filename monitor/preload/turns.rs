//! Preloaded into QEMU under the instruction clock, so that its main loop and its CPUs take turns.
//!
//! A CPU that halts says so some hundred instructions of QEMU's before it says how many of its own it has executed (QEMU 7.2: `do_hlt` in
//! target/i386/tcg, `icount_process_data` in accel/tcg). If the main loop looks in between, it takes all CPUs for idle and skips idle time
//! (`icount_start_warp_timer`) from a time that is behind: the machine's clock gains some nanoseconds, and runs differ from there on. It looks when it
//! was woken, and each skip wakes it once more, while the CPU runs again. On a quiet machine it is done long before the CPU halts; on a busy one,
//! one in four boots of five minutes went wrong.
//!
//! So the main loop, when it has been woken, waits until the thread that executes all CPUs waits as well; or for [`PATIENCE`]: where the CPUs are busy for so
//! long it goes on, once, and what is left of the danger is that a CPU halts in that very moment. build.rs makes a shared library of this file alone.

#![no_std]

use core::arch::asm;
use core::ffi::{CStr, c_char, c_int, c_void};
use core::mem::transmute;
use core::ptr::null_mut;
use core::sync::atomic::Ordering::SeqCst;
use core::sync::atomic::{AtomicPtr, AtomicU32};

/// The main loop waits no longer for a turn, in host time. Firmware polls a drive whose answer is the main loop's; and a main loop that polls while it holds
/// QEMU's lock waits in vain, since the thread of the CPUs wants that.
static PATIENCE: Time = Time { seconds: 0, nanoseconds: 100_000_000 };

/// Not known yet: before the thread of the CPUs has waited for the first time nobody waits for it.
const BEFORE: u32 = 0;
/// The thread of the CPUs runs, or has been told to.
const RUNS: u32 = 1;
/// It waits and nobody has told it to go on.
const WAITS: u32 = 2;
/// What the thread of the CPUs does: a futex.
static CPUS: AtomicU32 = AtomicU32::new(BEFORE);
/// The condition that it waits for.
static CONDITION: AtomicPtr<c_void> = AtomicPtr::new(null_mut());
/// Its thread number: of the first thread but the main one that waits for a condition without a limit of time.
static THREAD: AtomicU32 = AtomicU32::new(0);

/// `struct timespec`.
#[repr(C)]
struct Time {
    seconds: i64,
    nanoseconds: i64,
}

unsafe extern "C" {
    fn dlvsym(handle: *mut c_void, symbol: *const c_char, version: *const c_char) -> *mut c_void;
}

// Linux: arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/linux/futex.h.
const GETPID: usize = 39;
const GETTID: usize = 186;
const FUTEX: usize = 202;
const EXIT_GROUP: usize = 231;
const FAILED: usize = 1;
const FUTEX_WAIT_PRIVATE: usize = 128;
const FUTEX_WAKE_PRIVATE: usize = 129;
const TIMED_OUT: isize = -110;

/// A system call with four arguments; glibc's would change `errno`.
///
/// # Safety
/// As the call demands.
unsafe fn syscall(number: usize, arguments: [usize; 4]) -> isize {
    let [first, second, third, fourth] = arguments;
    let result;
    // SAFETY: the kernel's calling convention; what the call itself does, the caller answers for.
    unsafe {
        asm!(
            "syscall", inlateout("rax") number => result, in("rdi") first, in("rsi") second, in("rdx") third, in("r10") fourth,
            lateout("rcx") _, lateout("r11") _, options(nostack)
        );
    }
    result
}

type Poll = unsafe extern "C" fn(*mut c_void, u64, *const c_void, *const c_void) -> c_int;
type Wait = unsafe extern "C" fn(*mut c_void, *mut c_void) -> c_int;
type Wake = unsafe extern "C" fn(*mut c_void) -> c_int;

/// A function of glibc's whose place one of ours took; looked up once.
struct Real {
    name: &'static CStr,
    /// Conditions have an older form of the same names.
    version: &'static CStr,
    found: AtomicPtr<c_void>,
}

impl Real {
    const fn new(name: &'static CStr, version: &'static CStr) -> Self {
        Self { name, version, found: AtomicPtr::new(null_mut()) }
    }

    fn get(&self) -> *mut c_void {
        /// The next object after the caller's.
        const RTLD_NEXT: *mut c_void = usize::MAX as *mut c_void;
        let found = self.found.load(SeqCst);
        if !found.is_null() {
            return found;
        }
        // SAFETY: both are C strings.
        let found = unsafe { dlvsym(RTLD_NEXT, self.name.as_ptr(), self.version.as_ptr()) };
        if found.is_null() {
            // SAFETY: it takes no pointer. QEMU ends, rather than a null pointer is called.
            unsafe { syscall(EXIT_GROUP, [FAILED, 0, 0, 0]) };
        }
        self.found.store(found, SeqCst);
        found
    }
}

static POLL: Real = Real::new(c"ppoll", c"GLIBC_2.4");
static WAIT: Real = Real::new(c"pthread_cond_wait", c"GLIBC_2.3.2");
static SIGNAL: Real = Real::new(c"pthread_cond_signal", c"GLIBC_2.3.2");
static BROADCAST: Real = Real::new(c"pthread_cond_broadcast", c"GLIBC_2.3.2");

fn is_main() -> bool {
    // SAFETY: neither takes a pointer.
    unsafe { syscall(GETTID, [0; 4]) == syscall(GETPID, [0; 4]) }
}

/// Whether this is the thread of the CPUs.
fn has_cpus() -> bool {
    if is_main() {
        return false;
    }
    // SAFETY: it takes no pointer.
    let thread = unsafe { syscall(GETTID, [0; 4]) } as u32;
    THREAD.compare_exchange(0, thread, SeqCst, SeqCst).is_ok() || THREAD.load(SeqCst) == thread
}

/// Until the thread of the CPUs waits, or patience ends.
fn take_turn() {
    while CPUS.load(SeqCst) == RUNS {
        let arguments = [CPUS.as_ptr() as usize, FUTEX_WAIT_PRIVATE, RUNS as usize, &raw const PATIENCE as usize];
        // SAFETY: the futex lives as long as the program, and so does the time.
        if unsafe { syscall(FUTEX, arguments) } == TIMED_OUT {
            return;
        }
    }
}

/// The main loop waits here for what happens.
// SAFETY: the name is meant to take the place of glibc's, whose signature this is.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ppoll(files: *mut c_void, count: u64, limit: *const c_void, mask: *const c_void) -> c_int {
    // SAFETY: it is glibc's function of this name and version.
    let real: Poll = unsafe { transmute(POLL.get()) };
    // SAFETY: what the caller answers for.
    let ready = unsafe { real(files, count, limit, mask) };
    if is_main() {
        take_turn();
    }
    ready
}

/// The thread of the CPUs waits here when all are idle, and before they run for the first time.
// SAFETY: as above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pthread_cond_wait(condition: *mut c_void, mutex: *mut c_void) -> c_int {
    // SAFETY: it is glibc's function of this name and version.
    let real: Wait = unsafe { transmute(WAIT.get()) };
    let ours = has_cpus();
    if ours {
        CONDITION.store(condition, SeqCst);
        // The lock is still held that the main loop needs next, so it cannot be too early.
        CPUS.store(WAITS, SeqCst);
        // SAFETY: the futex lives as long as the program.
        unsafe { syscall(FUTEX, [CPUS.as_ptr() as usize, FUTEX_WAKE_PRIVATE, 1, 0]) };
    }
    // SAFETY: what the caller answers for.
    let result = unsafe { real(condition, mutex) };
    if ours {
        CPUS.store(RUNS, SeqCst);
    }
    result
}

/// From now on the CPUs run, although their thread needs a while to begin.
fn told(condition: *mut c_void) {
    if CONDITION.load(SeqCst) == condition {
        CPUS.store(RUNS, SeqCst);
    }
}

// SAFETY: as above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pthread_cond_signal(condition: *mut c_void) -> c_int {
    // SAFETY: it is glibc's function of this name and version.
    let real: Wake = unsafe { transmute(SIGNAL.get()) };
    told(condition);
    // SAFETY: what the caller answers for.
    unsafe { real(condition) }
}

// SAFETY: as above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pthread_cond_broadcast(condition: *mut c_void) -> c_int {
    // SAFETY: it is glibc's function of this name and version.
    let real: Wake = unsafe { transmute(BROADCAST.get()) };
    told(condition);
    // SAFETY: what the caller answers for.
    unsafe { real(condition) }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // Nothing here panics.
    loop {}
}
