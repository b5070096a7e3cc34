//! `uffd-wp`: synchronous write protection by userfaultfd. A thread takes each fault, notes the page, takes its protection off and wakes the vCPU.

use super::Tracker;
use super::area::{self, Area};
use crate::guest::Machine;
use crate::hostmm::userfault::{Event, Mode, Userfault};
use crate::kvm::Error;
use crate::pages::PageSet;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Events that one read fetches. There is one at most for each vCPU, and there are at most 8.
const BATCH: usize = 16;

/// The areas' writes by faults.
pub struct Faults {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// What the last harvest found.
    harvested: PageSet,
}

/// What the handler thread and the controller share.
struct Shared {
    userfault: Userfault,
    areas: Vec<Area>,
    /// Readable when the thread is to end.
    end: OwnedFd,
    /// Held while a fault is read, noted and answered. So a harvest sees a page only once its protection is off, and what [`Faults::protect`]
    /// protects then stays protected: an answer that came after it would leave the page open and in no set.
    noted: Mutex<Noted>,
}

struct Noted {
    pages: PageSet,
    faults: u64,
    /// Why the thread gave up. It then ended the registration, so that no vCPU sleeps for ever.
    error: Option<Error>,
}

impl Faults {
    /// A tracker of `areas`, with its thread.
    pub fn new(areas: Vec<Area>) -> Result<Self, Error> {
        let pages = area::pages(&areas);
        let shared = Arc::new(Shared {
            userfault: Userfault::open(Mode::Synchronous)?,
            areas,
            end: eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| Error::call("eventfd", error))?,
            noted: Mutex::new(Noted { pages: PageSet::new(pages), faults: 0, error: None }),
        });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("uffd-wp".into())
            .spawn(move || of_thread.serve())
            .map_err(|error| Error::call("starting the thread of userfaultfd", error))?;
        Ok(Self { shared, thread: Some(thread), harvested: PageSet::new(pages) })
    }

    fn begin(&self) -> Result<(), Error> {
        self.shared.areas.iter().try_for_each(|area| {
            self.shared.userfault.register(area.stretch)?;
            self.shared.userfault.protect(area.stretch, true)
        })
    }

    fn take(&mut self) -> Result<(), Error> {
        self.harvested.clear();
        let mut noted = self.shared.noted();
        std::mem::swap(&mut noted.pages, &mut self.harvested);
        noted.error.take().map_or(Ok(()), Err)
    }

    fn protect(&self) -> Result<(), Error> {
        area::stretches(&self.shared.areas, &self.harvested)
            .try_for_each(|stretch| self.shared.userfault.protect(stretch, true))
    }

    fn end(&self) -> Result<(), Error> {
        self.shared.areas.iter().try_for_each(|area| self.shared.userfault.unregister(area.stretch))
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        // An eventfd takes eight bytes, and blocks only at 2^64 - 1.
        let told = rustix::io::write(&self.shared.end, &1_u64.to_ne_bytes());
        debug_assert!(told.is_ok());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn noted(&self) -> MutexGuard<'_, Noted> {
        // The thread changes it by single steps, each of which leaves it whole.
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread.
    fn serve(&self) {
        let mut events = [Event::default(); BATCH];
        let error = loop {
            match self.userfault.wait(&self.end) {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => break Error::call("waiting for userfaultfd", error),
            }
            if let Err(error) = self.answer(&mut events) {
                break error;
            }
        };
        for area in &self.areas {
            // The first error is the one to tell.
            let _ = self.userfault.unregister(area.stretch);
        }
        self.noted().error = Some(error);
    }

    /// Notes the pages of all faults there are, takes their protection off and wakes who wrote.
    fn answer(&self, events: &mut [Event]) -> Result<(), Error> {
        let mut noted = self.noted();
        let events = self.userfault.read(events).map_err(|error| Error::call("reading userfaultfd", error))?;
        for address in events.iter().filter_map(Event::written) {
            if let Some(page) = area::page_at(&self.areas, address) {
                area::insert(&self.areas, page, &mut noted.pages);
                noted.faults += 1;
                self.userfault.protect(page, false)?;
            }
        }
        Ok(())
    }
}

impl Tracker for Faults {
    fn start(&mut self, _machine: &Machine) -> Result<(), Error> {
        self.begin()
    }

    fn harvest(&mut self, _machine: &Machine) -> Result<(), Error> {
        self.take()
    }

    fn clear(&mut self, _machine: &Machine) -> Result<(), Error> {
        self.protect()
    }

    fn clears(&self) -> bool {
        true
    }

    fn stop(&mut self, _machine: &Machine) -> Result<(), Error> {
        self.end()
    }

    fn report(&mut self, _machine: &Machine, into: &mut PageSet) {
        into.add(&self.harvested);
    }

    fn counters(&self, _machine: &Machine) -> Vec<(&'static str, u64)> {
        vec![("uffd_wp_faults", self.shared.noted().faults)]
    }
}

#[cfg(test)]
mod tests {
    use super::super::area::tests::{set, two, write};
    use super::*;
    use crate::kvm::Backing;

    #[test]
    fn each_write_is_reported_once() {
        for backing in [Backing::Anonymous, Backing::Thp, Backing::Shmem] {
            let (memory, areas) = two(backing);
            (0..12).for_each(|page| write(&memory, page, 1));
            let Ok(mut tracker) = Faults::new(areas) else { return };
            tracker.begin().unwrap();
            for pages in [&[0, 4, 5, 11][..], &[], &[2, 3]] {
                for &page in pages {
                    write(&memory, page, 2);
                }
                tracker.take().unwrap();
                tracker.protect().unwrap();
                assert_eq!(tracker.harvested, set(pages), "{backing}");
            }
            assert_eq!(tracker.shared.noted().faults, 6);
            tracker.end().unwrap();
            // No longer told, and nobody sleeps.
            write(&memory, 1, 3);
            tracker.take().unwrap();
            assert_eq!(tracker.harvested.count(), 0);
        }
    }
}
