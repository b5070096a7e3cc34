//! /proc/self/pagemap: `PAGEMAP_SCAN`, and the soft-dirty bit.
//!
//! Numbers and structures: Linux, include/uapi/linux/fs.h; semantics: Documentation/admin-guide/mm/pagemap.rst and soft-dirty.rst.

use super::ioctls::{PAGEMAP_SCAN, ScanArgument};
use super::{Hva, Stretch, missing};
use crate::kvm::Error;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use umbra_shared::PAGE_SIZE;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use zerocopy::IntoBytes as _;

const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
/// Documentation/admin-guide/mm/pagemap.rst: "Bit 55 pte is soft-dirty".
const SOFT_DIRTY: u64 = 1 << 55;
/// Documentation/admin-guide/mm/soft-dirty.rst: writing 4 to `/proc/PID/clear_refs` clears all soft-dirty bits of the process.
const CLEAR_SOFT_DIRTY: &[u8] = b"4";

/// A `struct page_region`: pages of the same categories, one behind the other.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// Regions that scans found.
#[derive(Debug)]
pub struct Regions {
    room: Vec<Region>,
    used: usize,
    calls: u64,
    short: u64,
}

impl Regions {
    /// Room for what a scan of `pages` pages finds at most: every other page. It is touched here.
    #[must_use]
    pub fn for_pages(pages: u64) -> Self {
        let most = usize::try_from(pages / 2 + 1).unwrap_or(usize::MAX);
        // Not zeros: memory of zeros would not be touched.
        Self { room: vec![Region { start: 1, end: 1, categories: 1 }; most], used: 0, calls: 0, short: 0 }
    }

    /// Forgets what was found.
    pub fn clear(&mut self) {
        self.used = 0;
    }

    /// What was found.
    pub fn iter(&self) -> impl Iterator<Item = Stretch> {
        self.room[..self.used].iter().map(|region| Stretch {
            start: Hva(region.start),
            pages: region.end.saturating_sub(region.start) / PAGE_SIZE,
        })
    }

    /// `PAGEMAP_SCAN` calls so far, and how many of them ended before their range did.
    #[must_use]
    pub const fn calls(&self) -> (u64, u64) {
        (self.calls, self.short)
    }
}

/// What a scan does beside finding the pages that were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scan {
    /// Nothing.
    Only,
    /// It protects them again in the same step: a write is either found by this scan or will be by the next.
    AndProtect,
}

/// This process's pagemap.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
}

impl Pagemap {
    /// Opens it.
    ///
    /// # Errors
    /// [`Error::Capability`] where it may not be opened; else the system's.
    pub fn open() -> Result<Self, Error> {
        match File::open("/proc/self/pagemap") {
            Ok(file) => Ok(Self { file }),
            Err(error) if matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound) => {
                Err(missing(
                    "/proc/self/pagemap",
                    "pagemap needs it, and it may not be opened (a /proc that is not mounted, or hides it)",
                ))
            }
            Err(error) => Err(Error::call("opening /proc/self/pagemap", error)),
        }
    }

    /// Adds to `regions` the pages of `stretch` that were written since they were last protected. The stretch must be registered with an asynchronous
    /// userfaultfd.
    ///
    /// The kernel may stop before the end, with `walk_end` before the last region that it returned (it keeps 512 regions between two walks). The
    /// scan goes on behind both: going on from `walk_end` would find pages twice. Whatever lies before either was looked at.
    ///
    /// # Errors
    /// The system's: EPERM for memory that is not registered, ENOTTY before Linux 6.7.
    pub fn scan(&self, stretch: Stretch, scan: Scan, regions: &mut Regions) -> Result<(), Error> {
        let flags = match scan {
            Scan::Only => PM_SCAN_CHECK_WPASYNC,
            Scan::AndProtect => PM_SCAN_CHECK_WPASYNC | PM_SCAN_WP_MATCHING,
        };
        let end = stretch.end().0;
        let mut start = stretch.start.0;
        while start < end {
            if regions.used == regions.room.len() {
                // Only stretches that a stop has cut in two bring it this far.
                regions.room.resize(regions.used * 2, Region { start: 1, end: 1, categories: 1 });
            }
            let room = &mut regions.room[regions.used..];
            let mut argument = ScanArgument {
                size: size_of::<ScanArgument>() as u64,
                flags,
                start,
                end,
                vec: room.as_mut_ptr() as u64,
                vec_len: room.len() as u64,
                category_mask: PAGE_IS_WRITTEN,
                return_mask: PAGE_IS_WRITTEN,
                ..ScanArgument::default()
            };
            // SAFETY: the structure has the layout and size that it says; the kernel writes at most `vec_len` regions to `vec`, which has that room.
            let found = unsafe { ioctl_with_mut_ref(&self.file, PAGEMAP_SCAN(), &mut argument) };
            let found = usize::try_from(found)
                .map_err(|_| Error::call("PAGEMAP_SCAN", io::Error::last_os_error()))?
                .min(room.len());
            regions.used += found;
            regions.calls += 1;
            if argument.walk_end < end {
                regions.short += 1;
            }
            let looked_at = found.checked_sub(1).map_or(0, |last| room[last].end).max(argument.walk_end);
            if looked_at <= start {
                let stuck = io::Error::other(format!("it stays at {start:#x}"));
                return Err(Error::call("PAGEMAP_SCAN", stuck));
            }
            start = looked_at;
        }
        Ok(())
    }

    /// Reads the entries of `stretch`, one for each page; entries beyond the shorter of the two stay as they are.
    ///
    /// # Errors
    /// The system's.
    pub fn entries(&self, stretch: Stretch, entries: &mut [u64]) -> Result<(), Error> {
        let most = entries.len().min(usize::try_from(stretch.pages).unwrap_or(usize::MAX));
        let place = stretch.start.0 / PAGE_SIZE * size_of::<u64>() as u64;
        self.file
            .read_exact_at(entries[..most].as_mut_bytes(), place)
            .map_err(|error| Error::call("reading /proc/self/pagemap", error))
    }
}

/// Whether an entry is of a page that was written since the soft-dirty bits were cleared.
#[must_use]
pub const fn is_soft_dirty(entry: u64) -> bool {
    entry & SOFT_DIRTY != 0
}

/// `/proc/self/clear_refs`.
#[derive(Debug)]
pub struct ClearRefs {
    file: File,
}

impl ClearRefs {
    /// Opens it.
    ///
    /// # Errors
    /// The system's.
    pub fn open() -> Result<Self, Error> {
        let file = File::options().write(true).open("/proc/self/clear_refs");
        Ok(Self { file: file.map_err(|error| Error::call("opening /proc/self/clear_refs", error))? })
    }

    /// Clears the soft-dirty bits of the whole process, and write-protects its memory. A kernel without them does nothing, and says nothing.
    ///
    /// # Errors
    /// The system's.
    pub fn clear_soft_dirty(&mut self) -> Result<(), Error> {
        self.file.write_all(CLEAR_SOFT_DIRTY).map_err(|error| Error::call("writing /proc/self/clear_refs", error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hostmm::userfault::{Mode, Userfault};
    use crate::kvm::Backing;
    use crate::kvm::memory::HostMemory;

    const PAGES: u64 = 4096;

    /// Every other page of 4096: 2048 regions, four times what the kernel keeps.
    #[test]
    fn a_scan_goes_on_where_the_kernel_stopped() {
        let Ok(userfault) = Userfault::open(Mode::Asynchronous) else { return };
        let memory = HostMemory::new(PAGES * PAGE_SIZE, Backing::Anonymous).unwrap();
        let stretch = Stretch { start: memory.hva(), pages: PAGES };
        let pagemap = Pagemap::open().unwrap();
        (0..PAGES).for_each(|page| assert!(memory.set_first_word(page, 1)));
        userfault.register(stretch).unwrap();
        userfault.protect(stretch, true).unwrap();
        let mut regions = Regions::for_pages(PAGES);
        // Whether a scan finds these pages, each once and in order.
        let mut finds = |how, expected: &[u64]| {
            regions.clear();
            pagemap.scan(stretch, how, &mut regions).unwrap();
            let addresses = regions.iter().flat_map(|found| (0..found.pages).map(move |page| found.start.plus(page)));
            addresses.filter_map(|address| stretch.page(address)).eq(expected.iter().copied())
        };
        assert!(finds(Scan::Only, &[]));
        let odd: Vec<u64> = (0..PAGES).filter(|page| page % 2 == 1).collect();
        for &page in &odd {
            assert!(memory.set_first_word(page, 2));
        }
        assert!(finds(Scan::Only, &odd));
        assert!(finds(Scan::AndProtect, &odd));
        assert!(finds(Scan::AndProtect, &[]));
        // Reads leave no mark.
        assert!((0..PAGES).all(|page| memory.first_word(page).is_some()));
        assert!(finds(Scan::Only, &[]));
    }

    #[test]
    fn memory_that_is_not_registered_is_refused() {
        let memory = HostMemory::new(PAGE_SIZE, Backing::Anonymous).unwrap();
        let stretch = Stretch { start: memory.hva(), pages: 1 };
        let mut regions = Regions::for_pages(1);
        let error = Pagemap::open().unwrap().scan(stretch, Scan::AndProtect, &mut regions).unwrap_err();
        assert!(error.to_string().contains("PAGEMAP_SCAN"), "{error}");
    }
}
