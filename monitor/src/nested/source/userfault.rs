//! The source userfaultfd: exact, needs no tracefs, and works on a host without hardware virtualization.
//!
//! A closed page is a hole of an empty memfd that a userfaultfd watches, a read-only page one that it write-protects. L2's access puts the vCPU
//! thread to sleep inside `KVM_RUN`. A thread of the source notes the address, takes all rights from the page (`PROT_NONE`) and wakes the
//! sleeper: the access is tried again, fails, and `KVM_RUN` returns EFAULT with L2 as it was before the instruction. When the monitor has dealt
//! with the fault, the rights come back.

use super::holes::{Hole, outside};
use super::{Closed, Fault, Mapped, Place, Source, Told, as_told, pages};
use crate::hostmm::userfault::{Event, Mode, Userfault};
use crate::hostmm::{Hva, Stretch};
use crate::kvm::Error;
use crate::nested::memory::InFile;
use rustix::event::{EventfdFlags, eventfd};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use umbra_shared::PAGE_SIZE;

/// What a page of a window is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    Closed,
    ReadOnly,
    Writable,
}

struct Window {
    pages: Vec<Page>,
    hole: Hole,
}

#[derive(Default)]
struct State {
    windows: Vec<Window>,
    /// Pages without rights, until their fault is settled.
    blocked: BTreeSet<Hva>,
    /// Windows without rights, where the process had no room for the mapping that one page takes.
    whole: Vec<Stretch>,
    /// What each thread is about to fail with: a fault on a page that was blocked for it and has been since. Once the page is not, its access goes on,
    /// and the next one that fails there is another.
    faults: BTreeMap<u64, Fault>,
    /// What ended the thread.
    failed: Option<String>,
}

impl State {
    /// The window that `stretch` begins in, and the number of its first page there.
    fn window(&mut self, stretch: Stretch) -> io::Result<(&mut Window, u64)> {
        let found = self.windows.iter_mut().find_map(|window| {
            let page = window.hole.holds(stretch)?;
            Some((window, page))
        });
        found.ok_or_else(|| outside(stretch))
    }

    /// Takes a page's rights away, so that the access that waits there fails.
    fn block(&mut self, page: Stretch) -> io::Result<()> {
        if !self.blocked.insert(page.start) {
            return Ok(());
        }
        match pages::admit(page, false) {
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => {
                let (window, _) = self.window(page)?;
                let all = window.hole.window();
                self.whole.push(all);
                pages::admit(all, false)
            }
            other => other,
        }
    }

    /// These pages are blocked no longer.
    fn forget(&mut self, stretch: Stretch) {
        self.blocked.retain(|page| stretch.page(*page).is_none());
        self.faults.retain(|_, fault| !matches!(fault.place, Place::Hva(page) if stretch.page(page).is_some()));
    }

    /// Gives what is blocked its rights back.
    fn release(&mut self) -> io::Result<()> {
        self.faults.clear();
        std::mem::take(&mut self.whole).into_iter().try_for_each(|window| pages::admit(window, true))?;
        std::mem::take(&mut self.blocked)
            .into_iter()
            .try_for_each(|start| pages::admit(Stretch { start, pages: 1 }, true))
    }

    fn page(&mut self, at: Hva) -> Option<Page> {
        let (window, page) = self.window(Stretch { start: at, pages: 1 }).ok()?;
        window.pages.get(usize::try_from(page).ok()?).copied()
    }
}

fn set(window: &mut Window, first: u64, count: u64, page: Page) {
    let first = usize::try_from(first).unwrap_or(usize::MAX);
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    if let Some(pages) = window.pages.get_mut(first..first.saturating_add(count)) {
        pages.fill(page);
    }
}

struct Shared {
    userfault: Userfault,
    state: Mutex<State>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Deals with one access that sleeps.
    fn answer(&self, event: &Event) -> Result<(), Error> {
        let Some((address, write, thread)) = event.fault() else { return Ok(()) };
        let page = Stretch { start: Hva(address.0 & !(PAGE_SIZE - 1)), pages: 1 };
        let mut state = self.state();
        let refused = match state.page(page.start) {
            Some(Page::Closed) => true,
            Some(Page::ReadOnly) => write,
            // It was opened since.
            Some(Page::Writable) | None => false,
        };
        if refused {
            let fault = Fault { place: Place::Hva(page.start), write, table_walk: false };
            state.faults.insert(thread, fault);
            state.block(page).map_err(|error| Error::call("mprotect of a page that L2 touched", error))?;
        }
        drop(state);
        self.userfault.wake(page)
    }

    fn serve(&self, end: &OwnedFd) -> Result<(), Error> {
        let mut room = [Event::default(); 16];
        loop {
            if self.userfault.wait(end).map_err(|error| Error::call("poll of a userfaultfd", error))? {
                return Ok(());
            }
            let events = self.userfault.read(&mut room).map_err(|error| Error::call("reading a userfaultfd", error))?;
            events.iter().try_for_each(|event| self.answer(event))?;
        }
    }
}

/// The source.
pub struct Userfaults {
    shared: Arc<Shared>,
    end: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Userfaults {
    /// Opens it, and starts its thread.
    ///
    /// # Errors
    /// [`Error::Capability`] for what is missing; else the system's.
    pub fn open() -> Result<Self, Error> {
        let userfault = Userfault::open(Mode::Everything)?;
        let shared = Arc::new(Shared { userfault, state: Mutex::default() });
        let end = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| Error::call("eventfd", error))?);
        let (served, until) = (Arc::clone(&shared), Arc::clone(&end));
        let thread = std::thread::Builder::new()
            .name("l2 faults".to_owned())
            .spawn(move || {
                if let Err(error) = served.serve(&until) {
                    served.state().failed = Some(error.to_string());
                }
            })
            .map_err(|error| Error::call("starting the thread of a fault source", error))?;
        Ok(Self { shared, end, thread: Some(thread) })
    }
}

impl Drop for Userfaults {
    fn drop(&mut self) {
        // Eight bytes that are not zero make it readable. It has room for them.
        let _ = rustix::io::write(&*self.end, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        for window in &self.shared.state().windows {
            // Who can still reach a window has closed KVM's descriptors before.
            let _ = pages::unmap(window.hole.window());
        }
    }
}

impl Source for Userfaults {
    fn closed(&self) -> Closed {
        Closed::Empty
    }

    fn adopt(&self, window: Stretch) -> Result<(), Error> {
        let hole = Hole::new(window)?;
        let pages = usize::try_from(window.pages).unwrap_or(usize::MAX);
        self.shared.state().windows.push(Window { pages: vec![Page::Closed; pages], hole });
        self.close(window).map_err(|error| Error::call("mapping a window of L2", error))
    }

    fn close(&self, stretch: Stretch) -> io::Result<()> {
        let mut state = self.shared.state();
        let (window, first) = state.window(stretch)?;
        window.hole.close(stretch, || self.shared.userfault.register_missing(stretch).map_err(as_told))?;
        set(window, first, stretch.pages, Page::Closed);
        state.forget(stretch);
        Ok(())
    }

    fn map(&self, stretch: Stretch, file: InFile<'_>, how: Mapped) -> io::Result<()> {
        let mut state = self.shared.state();
        let (window, first) = state.window(stretch)?;
        let register = |stretch| self.shared.userfault.register(stretch).map_err(as_told);
        // What is read-only here is so by the userfaultfd: its mapping has all rights, and no vCPU may use it before.
        let page = if how.writable {
            pages::map_part(stretch, file, (true, how.tables), register)?;
            Page::Writable
        } else {
            pages::map_guarded(stretch, file, how.tables, || self.write_protect(stretch, true))?;
            Page::ReadOnly
        };
        if how.alone {
            pages::set_apart(stretch)?;
        }
        set(window, first, stretch.pages, page);
        state.forget(stretch);
        Ok(())
    }

    fn protect(&self, stretch: Stretch, writable: bool) -> io::Result<()> {
        let mut state = self.shared.state();
        let (window, first) = state.window(stretch)?;
        self.write_protect(stretch, !writable)?;
        set(window, first, stretch.pages, if writable { Page::Writable } else { Page::ReadOnly });
        Ok(())
    }

    fn interrupted(&self) -> Option<Fault> {
        // L2 may never come back to what it was about.
        self.shared.state().faults.remove(&this_thread());
        None
    }

    fn told(&self) -> Told {
        let thread = this_thread();
        let mut state = self.shared.state();
        if state.failed.is_some() {
            return Told::Nothing;
        }
        let Some(fault) = state.faults.remove(&thread) else {
            // The page was blocked for another vCPU, or for an access of this one that a signal ended before its failure was seen: nobody may come
            // back for it. Whoever touches it next is told anew.
            return if state.release().is_ok() { Told::Again } else { Told::Nothing };
        };
        Told::At(fault)
    }

    fn settled(&self, fault: &Fault) -> io::Result<()> {
        let Place::Hva(start) = fault.place else { return Ok(()) };
        let mut state = self.shared.state();
        if !state.whole.is_empty() {
            return state.release();
        }
        if !state.blocked.contains(&start) {
            return Ok(());
        }
        let page = Stretch { start, pages: 1 };
        state.forget(page);
        pages::admit(page, true)
    }
}

impl Userfaults {
    fn write_protect(&self, stretch: Stretch, on: bool) -> io::Result<()> {
        if on {
            self.shared.userfault.register(stretch).map_err(as_told)?;
        }
        self.shared.userfault.protect(stretch, on).map_err(as_told)
    }
}

/// The calling thread, as userfaultfd names it.
fn this_thread() -> u64 {
    u64::from(rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs())
}
