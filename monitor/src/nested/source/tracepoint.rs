//! The source tracepoint: closed pages are holes, read-only ones are mapped without the right to write. KVM's tracepoint `kvm_page_fault` names
//! the address; it is armed only to try a `KVM_RUN` again that has failed, so that no other fault pays for it.

use super::{Closed, Mapped, Source, Told, as_told, pages};
use crate::host;
use crate::hostmm::Stretch;
use crate::hostmm::userfault::{Mode, Userfault};
use crate::kvm::{Error, fault_trace};
use crate::nested::memory::InFile;
use std::io;
use std::sync::{Mutex, OnceLock, PoisonError};

/// The source.
pub struct Tracepoint {
    windows: Mutex<Vec<Stretch>>,
    /// Registers memory, and never protects any.
    userfault: OnceLock<Userfault>,
}

impl Tracepoint {
    /// Checks that this host has what it takes.
    ///
    /// # Errors
    /// [`Error::Capability`] for what is missing.
    pub fn open() -> Result<Self, Error> {
        if !host::two_dimensional_paging() {
            return Err(Error::Capability {
                capability: "two-dimensional paging",
                consequence: "without it KVM's tracepoint names linear addresses".into(),
            });
        }
        fault_trace::check()?;
        Ok(Self { windows: Mutex::default(), userfault: OnceLock::new() })
    }
}

impl Drop for Tracepoint {
    fn drop(&mut self) {
        for window in self.windows.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // Who can still reach a window has closed KVM's descriptors before.
            let _ = pages::unmap(window);
        }
    }
}

impl Source for Tracepoint {
    fn closed(&self) -> Closed {
        Closed::Hole
    }

    fn adopt(&self, window: Stretch) -> Result<(), Error> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner).push(window);
        Ok(())
    }

    fn close(&self, stretch: Stretch) -> io::Result<()> {
        pages::unmap(stretch)
    }

    fn map(&self, stretch: Stretch, file: InFile<'_>, how: Mapped) -> io::Result<()> {
        pages::map_part(stretch, file, (how.writable, how.tables), |stretch| {
            if self.userfault.get().is_none() {
                let opened = Userfault::open(Mode::Synchronous).map_err(as_told)?;
                self.userfault.get_or_init(|| opened);
            }
            self.userfault.get().map_or(Ok(()), |userfault| userfault.register(stretch).map_err(as_told))
        })?;
        if how.alone { pages::set_apart(stretch) } else { Ok(()) }
    }

    fn protect(&self, stretch: Stretch, writable: bool) -> io::Result<()> {
        pages::allow_writes(stretch, writable)
    }

    fn told(&self) -> Told {
        Told::Trace
    }
}
