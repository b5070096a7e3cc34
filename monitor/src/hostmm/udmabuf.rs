//! udmabuf: pages from anywhere in memfds as one file, which one mapping can show in that order.
//!
//! Numbers and structures: Linux, include/uapi/linux/udmabuf.h. The driver pins the pages for as long as the file lives; a mapping keeps it alive. The
//! memfds must be sealed against shrinking. A mapping is `VM_PFNMAP`: userfaultfd cannot register it, and huge pages cannot be gathered.

use super::ioctls::{UDMABUF_CREATE_LIST, UdmabufHead, UdmabufItem};
use super::missing;
use crate::kvm::Error;
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use vmm_sys_util::ioctl::ioctl_with_ptr;

const DEVICE: &str = "/dev/udmabuf";
const FLAGS_CLOEXEC: u32 = 1;
/// Pieces that one file may have: the driver's default limit (`list_limit`) is 1024.
pub const PIECES: usize = 512;

/// `struct udmabuf_create_list`.
#[repr(C)]
struct List {
    head: UdmabufHead,
    items: [UdmabufItem; PIECES],
}

/// Some bytes of a file: whole pages.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// The memfd.
    pub file: BorrowedFd<'a>,
    /// Bytes before it.
    pub offset: u64,
    /// How long it is.
    pub bytes: u64,
}

/// The device.
pub struct Udmabuf {
    device: File,
    /// Room for what it is told.
    list: Box<List>,
}

impl Udmabuf {
    /// Opens it.
    ///
    /// # Errors
    /// [`Error::Capability`] if this host has none, or this user may not open it.
    pub fn open() -> Result<Self, Error> {
        let device = rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|error| {
            missing("udmabuf", &format!("{DEVICE}: {error} (CONFIG_UDMABUF, or the right to open it)"))
        })?;
        let head = UdmabufHead { flags: FLAGS_CLOEXEC, count: 0 };
        let list = Box::new(List { head, items: [UdmabufItem::default(); PIECES] });
        Ok(Self { device: device.into(), list })
    }

    /// One file of these pieces, in order; at most [`PIECES`].
    ///
    /// # Errors
    /// The system's: EINVAL for a memfd that is not sealed, or too many pieces.
    pub fn gather<'a>(&mut self, pieces: impl Iterator<Item = Piece<'a>>) -> io::Result<OwnedFd> {
        let list = &mut *self.list;
        list.head.count = 0;
        for piece in pieces {
            let at = usize::try_from(list.head.count).unwrap_or(PIECES);
            let item = list.items.get_mut(at).ok_or(io::ErrorKind::InvalidInput)?;
            let file = piece.file.as_raw_fd().unsigned_abs();
            *item = UdmabufItem { file, padding: 0, offset: piece.offset, bytes: piece.bytes };
            list.head.count += 1;
        }
        // SAFETY: the list holds as many items as it says, and the call reads no more.
        let fd =
            unsafe { ioctl_with_ptr(&self.device, UDMABUF_CREATE_LIST(), (&raw const *list).cast::<UdmabufHead>()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::Backing;
    use crate::kvm::memory::HostMemory;
    use std::os::fd::AsFd;
    use umbra_shared::PAGE_SIZE;

    #[test]
    fn the_layout_is_the_kernels() {
        assert_eq!((size_of::<UdmabufHead>(), size_of::<UdmabufItem>(), size_of::<List>()), (8, 24, 8 + 24 * PIECES));
    }

    #[test]
    fn pages_are_gathered_where_there_is_a_device() {
        let mut device = match Udmabuf::open() {
            Ok(device) => device,
            Err(error) => return assert!(matches!(error, Error::Capability { .. }), "{error}"),
        };
        let memory = HostMemory::new(4 * PAGE_SIZE, Backing::ShmemSmall).unwrap();
        memory.populate();
        let file = memory.file().unwrap().as_fd();
        let piece = |page: u64| Piece { file, offset: page * PAGE_SIZE, bytes: PAGE_SIZE };
        device.gather([3, 1, 3].into_iter().map(piece)).unwrap();
        assert!(device.gather(std::iter::once(piece(4))).is_err(), "beyond the end");
        assert!(device.gather((0..=PIECES as u64).map(|page| piece(page % 4))).is_err(), "too many");
    }
}
