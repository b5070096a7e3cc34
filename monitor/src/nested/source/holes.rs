//! Closed pages that a userfaultfd looks after: those of a file that has none.

use super::{Closed, pages};
use crate::hostmm::Stretch;
use crate::kvm::Error;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::io;
use std::os::fd::OwnedFd;
use umbra_shared::PAGE_SIZE;

/// A window's file: as long as the window, and empty.
#[derive(Debug)]
pub struct Hole {
    window: Stretch,
    file: OwnedFd,
}

impl Hole {
    /// For `window`, in which nothing is closed by it yet.
    ///
    /// # Errors
    /// The system's.
    pub fn new(window: Stretch) -> Result<Self, Error> {
        let failed = |error: rustix::io::Errno| Error::call("making a memfd without pages", error);
        let file = memfd_create(Closed::NAME, MemfdFlags::CLOEXEC).map_err(failed)?;
        ftruncate(&file, window.bytes()).map_err(failed)?;
        Ok(Self { window, file })
    }

    /// The window.
    pub const fn window(&self) -> Stretch {
        self.window
    }

    /// The number of the first page of `stretch`, if all of it lies in the window.
    pub fn holds(&self, stretch: Stretch) -> Option<u64> {
        self.window.page(stretch.start).filter(|first| stretch.pages <= self.window.pages - first)
    }

    /// `stretch` is closed from now on. `watch` makes each access to it fail; until that is done nobody may touch it, or the file would get a page.
    ///
    /// # Errors
    /// The system's, and `InvalidInput` for what is not in the window.
    pub fn close(&self, stretch: Stretch, watch: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let first = self.holds(stretch).ok_or_else(|| outside(stretch))?;
        pages::map_untouchable(stretch, &self.file, first * PAGE_SIZE)?;
        watch()?;
        pages::admit(stretch, true)
    }
}

/// No window holds `stretch`.
pub fn outside(stretch: Stretch) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("{} pages at {} are in no window", stretch.pages, stretch.start),
    )
}
