//! userfaultfd: write protection, and pages that are missing.
//!
//! Numbers and structures: Linux, include/uapi/linux/userfaultfd.h; semantics: Documentation/admin-guide/mm/userfaultfd.rst and
//! `ioctl_userfaultfd(2)`.
//!
//! *Synchronous*: whoever writes to a protected page sleeps until the page's protection is taken off, and the descriptor delivers its address.
//! *Asynchronous*: the kernel takes it off itself, and pagemap tells afterwards.
//! *Missing*: whoever touches a page that is not there sleeps as well, until he is woken.

use super::ioctls::{
    Api, Poison, Range, Register, UFFDIO_API, UFFDIO_POISON, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE,
    UFFDIO_WRITEPROTECT, USERFAULTFD_IOC_NEW, WriteProtect,
};
use super::{Hva, Stretch, missing};
use crate::kvm::Error;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode as FileMode, OFlags};
use rustix::io::Errno;
use rustix::mm::UserfaultfdFlags;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_val};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

const UFFD_API: u64 = 0xaa;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const FEATURE_THREAD_ID: u64 = 1 << 8;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_POISON: u64 = 1 << 14;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_MISSING: u64 = 1 << 0;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const EVENT_PAGEFAULT: u8 = 0x12;
const PAGEFAULT_FLAG_WRITE: u64 = 1 << 0;
const PAGEFAULT_FLAG_WP: u64 = 1 << 1;

/// How writes to protected pages are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// By an event, while the writer sleeps.
    Synchronous,
    /// By pagemap, afterwards.
    Asynchronous,
    /// By an event, as accesses to missing pages are, and each event names the thread.
    Everything,
    /// By pagemap, afterwards, where the kernel has that; and accesses to poisoned pages are errors of memory.
    Poison,
}

/// `UFFD_USER_MODE_ONLY`: faults of kernel code are refused rather than told.
const USER_MODE_ONLY: UserfaultfdFlags = UserfaultfdFlags::from_bits_retain(1);

impl Mode {
    /// Features without which the mode is of no use: each with its name, and since when it is there.
    const fn needs(self) -> &'static [(u64, &'static str, &'static str)] {
        match self {
            Self::Synchronous => {
                &[(FEATURE_PAGEFAULT_FLAG_WP, "UFFD_FEATURE_PAGEFAULT_FLAG_WP", "uffd-wp needs Linux 5.7 or later")]
            }
            Self::Everything => &[
                (
                    FEATURE_THREAD_ID,
                    "UFFD_FEATURE_THREAD_ID",
                    "userfaultfd as a fault source needs Linux 4.14 or later",
                ),
                (FEATURE_MISSING_SHMEM, "UFFD_FEATURE_MISSING_SHMEM", "it needs Linux 4.11 or later"),
                (FEATURE_WP_HUGETLBFS_SHMEM, "UFFD_FEATURE_WP_HUGETLBFS_SHMEM", "it needs Linux 5.19 or later"),
            ],
            Self::Poison => &[
                (FEATURE_POISON, "UFFD_FEATURE_POISON", "the fault source poison needs Linux 6.6 or later"),
                (FEATURE_MISSING_SHMEM, "UFFD_FEATURE_MISSING_SHMEM", "it needs Linux 4.11 or later"),
            ],
            Self::Asynchronous => &[(FEATURE_WP_ASYNC, "UFFD_FEATURE_WP_ASYNC", "pagemap needs Linux 6.7 or later")],
        }
    }

    /// Whether the kernel answers all faults by itself, so that nobody has to be told of those of kernel code.
    const fn is_answered_by_kernel(self) -> bool {
        matches!(self, Self::Asynchronous | Self::Poison)
    }
}

/// A `uffd_msg` of 32 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Event {
    kind: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

impl Event {
    /// The address of a write to a protected page; `None` for any other event.
    #[must_use]
    pub fn written(&self) -> Option<Hva> {
        (self.kind == EVENT_PAGEFAULT && self.flags & PAGEFAULT_FLAG_WP != 0).then_some(Hva(self.address))
    }

    /// The address of an access that sleeps, whether it is a write, and the id of its thread; `None` for any other event.
    #[must_use]
    pub fn fault(&self) -> Option<(Hva, bool, u64)> {
        let write = self.flags & (PAGEFAULT_FLAG_WRITE | PAGEFAULT_FLAG_WP) != 0;
        // The id takes half of the word (`uffd_msg.arg.pagefault.feat.ptid`).
        (self.kind == EVENT_PAGEFAULT).then_some((Hva(self.address), write, self.thread & u64::from(u32::MAX)))
    }
}

/// A userfaultfd. When it is dropped, what was registered is so no longer, and who slept wakes.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A descriptor that also takes the faults of kernel code, KVM's among them: for root, or for whom /dev/userfaultfd (Linux 6.1) is open. Where the
/// kernel answers all faults by itself, one that takes none of them will do, which everybody may have (Linux 5.11).
fn descriptor(mode: Mode) -> Result<OwnedFd, Error> {
    let all = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    let tries = if mode.is_answered_by_kernel() { &[all, all | USER_MODE_ONLY][..] } else { &[all][..] };
    for &flags in tries {
        // SAFETY: the flags are valid, and the descriptor is new.
        match unsafe { rustix::mm::userfaultfd(flags) } {
            Ok(fd) => return Ok(fd),
            Err(Errno::NOSYS) => return Err(missing("userfaultfd", "the kernel has none (CONFIG_USERFAULTFD)")),
            Err(Errno::PERM) => {}
            Err(error) => return Err(Error::call("userfaultfd", error)),
        }
    }
    let refused = "vm.unprivileged_userfaultfd is 0, and this user is not root and may not open /dev/userfaultfd";
    let device = rustix::fs::open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, FileMode::empty())
        .map_err(|_| missing("userfaultfd", refused))?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the call takes flags by value.
    let fd = unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags.unsigned_abs().into()) };
    check(fd).map_err(|error| Error::call("USERFAULTFD_IOC_NEW", error))?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `UFFDIO_API` on a fresh descriptor: asks for `features`, answers what the kernel has.
fn handshake(fd: &OwnedFd, features: u64) -> io::Result<u64> {
    let mut api = Api { version: UFFD_API, features, ioctls: 0 };
    // SAFETY: the structure has the layout that the call reads and writes.
    check(unsafe { ioctl_with_mut_ref(fd, UFFDIO_API(), &mut api) })?;
    Ok(api.features)
}

impl Userfault {
    /// Opens one. What helps beyond the mode's needs is switched on where the kernel has it: protection of shmem and hugetlb (Linux 5.19) and of pages
    /// that are not there yet (6.4).
    ///
    /// # Errors
    /// [`Error::Capability`] for what is missing; else the system's.
    pub fn open(mode: Mode) -> Result<Self, Error> {
        let failed = |error| Error::call("UFFDIO_API", error);
        let offered = handshake(&descriptor(mode)?, 0).map_err(failed)?;
        let mut wanted = (FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED) & offered;
        if mode == Mode::Poison {
            wanted |= FEATURE_WP_ASYNC & offered;
        }
        for &(feature, name, since) in mode.needs() {
            if offered & feature == 0 {
                return Err(missing(name, since));
            }
            wanted |= feature;
        }
        let fd = descriptor(mode)?;
        handshake(&fd, wanted).map_err(failed)?;
        Ok(Self { fd })
    }

    /// Registers memory for write protection. Nothing is protected yet.
    ///
    /// # Errors
    /// [`Error::Capability`] if the kernel cannot protect memory of that kind.
    pub fn register(&self, stretch: Stretch) -> Result<(), Error> {
        self.register_mode(stretch, REGISTER_MODE_WP)
    }

    /// Registers memory whose missing pages are told by events.
    ///
    /// # Errors
    /// [`Error::Capability`] if the kernel cannot do that with memory of that kind.
    pub fn register_missing(&self, stretch: Stretch) -> Result<(), Error> {
        self.register_mode(stretch, REGISTER_MODE_MISSING)
    }

    fn register_mode(&self, stretch: Stretch, mode: u64) -> Result<(), Error> {
        let mut register = Register { range: range(stretch), mode, ioctls: 0 };
        // SAFETY: the structure has the layout that the call reads and writes; the call changes how faults are handled, not memory.
        check(unsafe { ioctl_with_mut_ref(&self.fd, UFFDIO_REGISTER(), &mut register) }).map_err(|error| {
            if error.raw_os_error() == Some(libc::EINVAL) {
                return missing("UFFD_FEATURE_WP_HUGETLBFS_SHMEM", "this memory is protected by Linux 5.19 or later");
            }
            Error::call("UFFDIO_REGISTER", error)
        })
    }

    /// Ends the registration: protection goes, and who slept wakes. The kernel itself wakes those alone who wait for a missing page
    /// (`userfaultfd_unregister`); who writes in this moment to a protected one would sleep for ever.
    ///
    /// # Errors
    /// The system's.
    pub fn unregister(&self, stretch: Stretch) -> Result<(), Error> {
        let mut range = range(stretch);
        // SAFETY: as above.
        check(unsafe { ioctl_with_mut_ref(&self.fd, UFFDIO_UNREGISTER(), &mut range) })
            .map_err(|error| Error::call("UFFDIO_UNREGISTER", error))?;
        // SAFETY: as above.
        check(unsafe { ioctl_with_mut_ref(&self.fd, UFFDIO_WAKE(), &mut range) })
            .map_err(|error| Error::call("UFFDIO_WAKE", error))
    }

    /// Protects pages, or takes their protection off and wakes who slept on them. Huge pages of hugetlb must be covered whole.
    ///
    /// # Errors
    /// The system's: ENOENT for memory that is not registered, EINVAL for a piece of a hugetlb page.
    pub fn protect(&self, stretch: Stretch, on: bool) -> Result<(), Error> {
        let mode = if on { WRITEPROTECT_MODE_WP } else { 0 };
        let mut protect = WriteProtect { range: range(stretch), mode };
        loop {
            // SAFETY: as above.
            match check(unsafe { ioctl_with_mut_ref(&self.fd, UFFDIO_WRITEPROTECT(), &mut protect) }) {
                // Mappings are being changed at this moment, the manual page says: try again.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                other => return other.map_err(|error| Error::call("UFFDIO_WRITEPROTECT", error)),
            }
        }
    }

    /// Poisons pages that are not there: each access to them is an error of memory until something else is mapped over them. The stretch must be
    /// registered, and lie in one mapping.
    ///
    /// # Errors
    /// The system's: EEXIST for a page that is there, or poisoned already.
    pub fn poison(&self, stretch: Stretch) -> Result<(), Error> {
        let mut poison = Poison { range: range(stretch), mode: 0, updated: 0 };
        loop {
            // SAFETY: the structure has the layout that the call reads and writes; it changes what accesses to pages do that nobody uses yet.
            match check(unsafe { ioctl_with_mut_ref(&self.fd, UFFDIO_POISON(), &mut poison) }) {
                // Mappings are being changed at this moment: it did a part.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                    let done = u64::try_from(poison.updated).unwrap_or(0).min(poison.range.len);
                    poison.range.start += done;
                    poison.range.len -= done;
                    if poison.range.len == 0 {
                        return Ok(());
                    }
                }
                other => return other.map_err(|error| Error::call("UFFDIO_POISON", error)),
            }
        }
    }

    /// Wakes who sleeps on these pages; they try again.
    ///
    /// # Errors
    /// The system's.
    pub fn wake(&self, stretch: Stretch) -> Result<(), Error> {
        let mut range = range(stretch);
        // SAFETY: as above.
        check(unsafe { ioctl_with_mut_ref(&self.fd, UFFDIO_WAKE(), &mut range) })
            .map_err(|error| Error::call("UFFDIO_WAKE", error))
    }

    /// Sleeps until there is an event, or `wake` can be read. Says whether it was `wake`.
    ///
    /// # Errors
    /// The system's.
    pub fn wait(&self, wake: &impl AsFd) -> io::Result<bool> {
        loop {
            let mut both = [PollFd::new(&self.fd, PollFlags::IN), PollFd::new(wake, PollFlags::IN)];
            match poll(&mut both, None) {
                Ok(_) => return Ok(!both[1].revents().is_empty()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Fetches events, as many as there are and have room; none if there are none.
    ///
    /// # Errors
    /// The system's.
    pub fn read<'a>(&self, events: &'a mut [Event]) -> io::Result<&'a [Event]> {
        let bytes = match rustix::io::read(&self.fd, events.as_mut_bytes()) {
            Ok(bytes) => bytes,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        Ok(&events[..bytes / size_of::<Event>()])
    }
}

impl AsRawFd for Userfault {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }
}

const fn range(stretch: Stretch) -> Range {
    Range { start: stretch.start.0, len: stretch.bytes() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_writes_to_protected_pages_count() {
        let event = |kind, flags| Event { kind, flags, address: 0x5000, ..Event::default() };
        assert_eq!(event(EVENT_PAGEFAULT, 3).written(), Some(Hva(0x5000)));
        assert_eq!(event(EVENT_PAGEFAULT, 1).written(), None);
        assert_eq!(event(0x13, 3).written(), None);
    }
}
