//! The source poison: exact, needs neither tracefs nor a thread, nor privileges but /dev/kvm.
//!
//! A closed page is one of an empty memfd that carries a userfaultfd's poison marker (`UFFDIO_POISON`, Linux 6.6). KVM takes an access to it for one
//! to broken memory: it sends SIGBUS with the address to the vCPU's thread, and tries the access again. The thread blocks that signal but
//! inside `KVM_RUN`, which it therefore ends with EINTR; the signal is taken from the queue, and says where L2 was.
//!
//! The kernel itself answers all faults on such pages, so a userfaultfd for user mode alone, which everybody may have, is enough. What the
//! signal does not say is whether L2 wrote, and a write to a page that is mapped read-only sends none.

use super::holes::{Hole, outside};
use super::{Closed, Fault, Mapped, Place, Source, Told, as_told, pages};
use crate::hostmm::userfault::{Mode, Userfault};
use crate::hostmm::{Hva, Stretch};
use crate::kvm::{Error, ioctls};
use crate::nested::memory::InFile;
use kvm_ioctls::VcpuFd;
use std::io;
use std::mem::MaybeUninit;
use std::sync::{Mutex, MutexGuard, PoisonError};
use umbra_shared::PAGE_SIZE;

/// The source.
pub struct Poison {
    userfault: Userfault,
    windows: Mutex<Vec<Hole>>,
}

impl Poison {
    /// Opens it.
    ///
    /// # Errors
    /// [`Error::Capability`] for what is missing; else the system's.
    pub fn open() -> Result<Self, Error> {
        Ok(Self { userfault: Userfault::open(Mode::Poison)?, windows: Mutex::default() })
    }

    fn windows(&self) -> MutexGuard<'_, Vec<Hole>> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Poison {
    fn drop(&mut self) {
        for window in self.windows().iter() {
            // Who can still reach a window has closed KVM's descriptors before.
            let _ = pages::unmap(window.window());
        }
    }
}

impl Source for Poison {
    fn closed(&self) -> Closed {
        Closed::Poisoned
    }

    fn adopt(&self, window: Stretch) -> Result<(), Error> {
        let hole = Hole::new(window)?;
        self.windows().push(hole);
        self.close(window).map_err(|error| Error::call("mapping a window of L2", error))
    }

    fn close(&self, stretch: Stretch) -> io::Result<()> {
        let windows = self.windows();
        let hole = windows.iter().find(|hole| hole.holds(stretch).is_some()).ok_or_else(|| outside(stretch))?;
        hole.close(stretch, || {
            self.userfault.register_missing(stretch).map_err(as_told)?;
            self.userfault.poison(stretch).map_err(as_told)
        })
    }

    fn map(&self, stretch: Stretch, file: InFile<'_>, how: Mapped) -> io::Result<()> {
        let register = |stretch| self.userfault.register(stretch).map_err(as_told);
        pages::map_part(stretch, file, (how.writable, how.tables), register)?;
        if how.alone { pages::set_apart(stretch) } else { Ok(()) }
    }

    fn protect(&self, stretch: Stretch, writable: bool) -> io::Result<()> {
        pages::allow_writes(stretch, writable)
    }

    fn enlist(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let blocked = block_sigbus().map_err(|error| Error::call("blocking SIGBUS on a vCPU's thread", error))?;
        ioctls::set_signal_mask(vcpu, blocked & !bit(libc::SIGBUS))
            .map_err(|error| Error::call("KVM_SET_SIGNAL_MASK", error))
    }

    fn interrupted(&self) -> Option<Fault> {
        let page = Hva(take_sigbus()? & !(PAGE_SIZE - 1));
        // Whoever wrote finds out at the next fault; what may be written is mapped so at once.
        Some(Fault { place: Place::Hva(page), write: false, table_walk: false })
    }

    fn told(&self) -> Told {
        // For a moment a page that is being closed may not be touched at all.
        Told::Again
    }

    fn silence(&self) -> &'static str {
        "KVM_RUN of L2 failed (EFAULT): L2 wrote to a page that EPT12 makes read-only, and the fault source poison is not told which (use --fault-source \
         userfaultfd or tracepoint)"
    }
}

/// The place of a signal in the kernel's sets of them.
const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// Blocks SIGBUS on the calling thread. Gives all signals that are blocked there now.
fn block_sigbus() -> io::Result<u64> {
    let mut bus = MaybeUninit::<libc::sigset_t>::uninit();
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset makes the set, sigaddset changes it, and the first pthread_sigmask reads it; the second writes the other set.
    let all = unsafe {
        libc::sigemptyset(bus.as_mut_ptr());
        libc::sigaddset(bus.as_mut_ptr(), libc::SIGBUS);
        let failed = |code: i32| if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) };
        failed(libc::pthread_sigmask(libc::SIG_BLOCK, bus.as_ptr(), std::ptr::null_mut()))?;
        failed(libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), all.as_mut_ptr()))?;
        all.assume_init()
    };
    // SAFETY: a set that the system has just written, and signals that there are.
    Ok((1..=64)
        .filter(|&signal| unsafe { libc::sigismember(&raw const all, signal) } == 1)
        .fold(0, |set, signal| set | bit(signal)))
}

/// The address of the SIGBUS that waits for the calling thread, if one does.
fn take_sigbus() -> Option<u64> {
    let mut bus = MaybeUninit::<libc::sigset_t>::uninit();
    let mut info = MaybeUninit::<libc::siginfo_t>::uninit();
    let at_once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: as above for the set; the call writes the information when it gives a signal, and SIGBUS has an address in it (sigaction(2)).
    unsafe {
        libc::sigemptyset(bus.as_mut_ptr());
        libc::sigaddset(bus.as_mut_ptr(), libc::SIGBUS);
        loop {
            match libc::sigtimedwait(bus.as_ptr(), info.as_mut_ptr(), &raw const at_once) {
                libc::SIGBUS => return Some(info.assume_init().si_addr().addr() as u64),
                _ if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
                _ => return None,
            }
        }
    }
}
