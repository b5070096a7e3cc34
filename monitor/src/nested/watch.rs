//! What pages of a window tell of writes by themselves: userfaultfd protects them, the kernel takes a page's protection off at the first write to
//! it, and `PAGEMAP_SCAN` finds the pages without. KVM logs nothing; it takes a fault of the host's where it wants to write.
//!
//! A harvest scans, a clear protects what the scan found and nothing else: `track::pagemap` says why no write is lost in between. What a page's
//! protection says goes with its mapping, so a page is scanned before it is closed, when nobody can write it any more.

use super::source::populate;
use crate::hostmm::Stretch;
use crate::hostmm::pagemap::{Pagemap, Regions, Scan};
use crate::hostmm::userfault::{Mode, Userfault};
use crate::kvm::Error;

/// Watched pages.
#[derive(Debug)]
pub struct Watch {
    userfault: Userfault,
    pagemap: Pagemap,
    /// What the last harvest found.
    found: Regions,
    /// What was found in pages that are about to be closed.
    closing: Regions,
    /// What was closed since the last harvest.
    closed: Vec<Stretch>,
    protections: u64,
}

impl Watch {
    /// Whether this host has what it takes.
    ///
    /// # Errors
    /// [`Error::Capability`] for what is missing.
    pub fn check() -> Result<(), Error> {
        Userfault::open(Mode::Asynchronous)?;
        Pagemap::open().map(|_| ())
    }

    /// One with room for what a harvest of `pages` pages finds.
    ///
    /// # Errors
    /// As [`Watch::check`].
    pub fn open(pages: u64) -> Result<Self, Error> {
        Ok(Self {
            userfault: Userfault::open(Mode::Asynchronous)?,
            pagemap: Pagemap::open()?,
            found: Regions::for_pages(pages),
            closing: Regions::for_pages(1),
            closed: Vec::new(),
            protections: 0,
        })
    }

    /// Pages are watched from now on: no write before this is told. Those of huge pages are small from now on.
    ///
    /// A page counts as written that the kernel has not mapped, though nobody touched it (`pagemap_scan_pmd_entry` in `fs/proc/task_mmu.c` looks at no
    /// more than its protection). So all of them are mapped here, after the protection, which may take a huge page's mapping away.
    ///
    /// # Errors
    /// The system's.
    pub fn begin(&self, stretch: Stretch) -> Result<(), Error> {
        self.userfault.register(stretch)?;
        self.userfault.protect(stretch, true)?;
        populate(stretch).map_err(|error| Error::call("MADV_POPULATE_READ", error))
    }

    /// They are watched no longer.
    ///
    /// # Errors
    /// The system's.
    pub fn end(&self, stretch: Stretch) -> Result<(), Error> {
        self.userfault.unregister(stretch)
    }

    /// A harvest: calls `with` for what was written in `stretches` since it was protected.
    ///
    /// # Errors
    /// The system's.
    pub fn harvest(
        &mut self,
        mut stretches: impl Iterator<Item = Stretch>,
        with: impl FnMut(Stretch),
    ) -> Result<(), Error> {
        self.found.clear();
        self.closed.clear();
        stretches.try_for_each(|stretch| self.pagemap.scan(stretch, Scan::Only, &mut self.found))?;
        self.found.iter().for_each(with);
        Ok(())
    }

    /// Protects what the last harvest found, but for what was closed since: whatever is mapped there now was protected then.
    ///
    /// # Errors
    /// The system's.
    pub fn clear(&mut self) -> Result<(), Error> {
        for found in self.found.iter() {
            let touched = |closed: &Stretch| closed.start < found.end() && found.start < closed.end();
            if !self.closed.iter().any(touched) {
                self.userfault.protect(found, true)?;
                self.protections += 1;
                continue;
            }
            for page in (0..found.pages).map(|page| found.part(page, 1)) {
                if !self.closed.iter().any(|closed| closed.page(page.start).is_some()) {
                    self.userfault.protect(page, true)?;
                    self.protections += 1;
                }
            }
        }
        self.found.clear();
        self.closed.clear();
        Ok(())
    }

    /// `stretch`, which nobody can write any more, is about to be closed: calls `with` for what was written there since it was protected.
    ///
    /// # Errors
    /// The system's.
    pub fn close(&mut self, stretch: Stretch, with: impl FnMut(Stretch)) -> Result<(), Error> {
        self.closing.clear();
        self.pagemap.scan(stretch, Scan::Only, &mut self.closing)?;
        self.closing.iter().for_each(with);
        self.closed.push(stretch);
        Ok(())
    }

    /// `PAGEMAP_SCAN` calls, and calls that protected what those of harvests had found.
    #[must_use]
    pub const fn calls(&self) -> (u64, u64) {
        (self.found.calls().0 + self.closing.calls().0, self.protections)
    }
}
