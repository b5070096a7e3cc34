//! Host memory behind the guest's slots.

use super::Error;
use super::copies::{By, PageWords};
use crate::hostmm::Hva;
use rustix::mm::{self, Advice, MapFlags, MprotectFlags, ProtFlags};
use std::ffi::c_void;
use std::fmt;
use std::os::fd::OwnedFd;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use umbra_shared::{Level, PAGE_SIZE};

/// What backs the tracked memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory with `MADV_NOHUGEPAGE`: 4 KiB pages whatever the system's default.
    Anonymous,
    /// Private anonymous memory with `MADV_HUGEPAGE`.
    Thp,
    /// Anonymous 2 MiB pages of hugetlbfs.
    Hugetlb,
    /// A memfd, 4 KiB pages unless the system's shmem default says otherwise.
    Shmem,
    /// A memfd with `MADV_HUGEPAGE`: what `thp` means where others must be able to map the memory too ([`Backing::shared`]).
    ShmemHuge,
    /// A memfd with `MADV_NOHUGEPAGE`: what `anonymous` means there.
    ShmemSmall,
}

/// The kernel's word about huge pages of memfds.
const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

impl Backing {
    /// All that have a name of their own.
    pub const ALL: [Self; 4] = [Self::Anonymous, Self::Thp, Self::Hugetlb, Self::Shmem];

    /// The name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Anonymous | Self::ShmemSmall => "anonymous",
            Self::Thp | Self::ShmemHuge => "thp",
            Self::Hugetlb => "hugetlb",
            Self::Shmem => "shmem",
        }
    }

    /// Whether KVM can map it by 2 MiB leaves.
    #[must_use]
    pub const fn is_huge(self) -> bool {
        matches!(self, Self::Thp | Self::ShmemHuge | Self::Hugetlb)
    }

    /// The memfd that stands for private memory: the same size of pages, and others can map it.
    #[must_use]
    pub const fn shared(self) -> Self {
        match self {
            Self::Thp => Self::ShmemHuge,
            Self::Anonymous => Self::ShmemSmall,
            other => other,
        }
    }

    /// Why this host cannot give `bytes` of it, if it can be known beforehand.
    ///
    /// # Errors
    /// [`Error::Memory`] with what to do about it.
    pub fn check(self, bytes: u64) -> Result<(), Error> {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        match self {
            Self::Hugetlb => {
                let needed = bytes.div_ceil(Level::M2.bytes());
                let free: u64 =
                    read("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").trim().parse().unwrap_or(0);
                if free < needed {
                    return Err(Error::Memory(format!(
                        "--backing hugetlb: {needed} free huge pages of 2 MiB are needed and {free} are there (write {needed} to /proc/sys/vm/nr_hugepages)"
                    )));
                }
            }
            Self::Thp => {
                let modes = read("/sys/kernel/mm/transparent_hugepage/enabled");
                if modes.is_empty() || modes.contains("[never]") {
                    return Err(Error::Memory(
                        "--backing thp: transparent huge pages are off (write madvise to /sys/kernel/mm/transparent_hugepage/enabled)".into(),
                    ));
                }
            }
            Self::ShmemHuge => {
                let modes = read(SHMEM_ENABLED);
                if !["[advise]", "[within_size]", "[always]", "[force]"].iter().any(|mode| modes.contains(mode)) {
                    return Err(Error::Memory(format!(
                        "--backing thp: here it takes huge pages in memfds, which are off (write advise to {SHMEM_ENABLED}, or use --backing anonymous)"
                    )));
                }
            }
            Self::Anonymous | Self::Shmem | Self::ShmemSmall => {}
        }
        Ok(())
    }
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Backing {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|backing| backing.name() == text).ok_or(())
    }
}

/// Host memory, aligned to 2 MiB, unmapped when dropped.
#[derive(Debug)]
pub struct HostMemory {
    address: *mut u8,
    bytes: usize,
    backing: Backing,
    /// The memfd, if it is one.
    file: Option<OwnedFd>,
}

// SAFETY: the memory belongs to this value and is reached only by KVM, through volatile accesses (below) and through vm-memory, whose own are
// volatile or atomic.
unsafe impl Send for HostMemory {}
// SAFETY: as above; concurrent volatile accesses race only with the guest, which they must bear anyway.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Maps `bytes` (rounded up to whole pages of the backing).
    ///
    /// # Errors
    /// [`Error::Memory`] when the host has no such memory.
    pub fn new(bytes: u64, backing: Backing) -> Result<Self, Error> {
        let granule = if backing == Backing::Hugetlb { Level::M2.bytes() } else { PAGE_SIZE };
        let too_large =
            || Error::Memory(format!("{bytes} bytes of {backing} memory do not fit this host's address space"));
        let length =
            bytes.checked_next_multiple_of(granule).and_then(|n| usize::try_from(n).ok()).ok_or_else(too_large)?;
        let failed = |error: rustix::io::Errno| {
            Error::Memory(format!(
                "{length} bytes of {backing} memory: {} (ask for less, or free some)",
                std::io::Error::from(error)
            ))
        };
        let align = 1_usize << Level::M2.shift();
        let reserve = length.checked_add(align).ok_or_else(too_large)?;
        // SAFETY: a new reservation where the kernel likes; it replaces nothing.
        let base = unsafe {
            mm::mmap_anonymous(
                std::ptr::null_mut(),
                reserve,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(failed)?;
        let head = base.cast::<u8>().align_offset(align);
        let address = base.cast::<u8>().wrapping_add(head);
        // The reservation's parts before and behind the aligned stretch go back.
        for (start, bytes) in [(base.cast::<u8>(), head), (address.wrapping_add(length), align - head)] {
            if bytes > 0 {
                // SAFETY: both parts lie in the reservation made above and nobody has seen them yet.
                unsafe { mm::munmap(start.cast(), bytes) }.map_err(failed)?;
            }
        }
        let mut memory = Self { address, bytes: length, backing, file: None };
        memory.file = memory.back(backing).map_err(failed)?;
        Ok(memory)
    }

    /// Puts the backing into the reservation. Gives the memfd, if it is one.
    fn back(&self, backing: Backing) -> rustix::io::Result<Option<OwnedFd>> {
        let address = self.address.cast::<c_void>();
        let rw = ProtFlags::READ | ProtFlags::WRITE;
        match backing {
            Backing::Anonymous | Backing::Thp => {
                let advice = if backing == Backing::Thp { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
                // SAFETY: the whole reservation is ours.
                unsafe {
                    mm::mprotect(address, self.bytes, MprotectFlags::READ | MprotectFlags::WRITE)?;
                    mm::madvise(address, self.bytes, advice)?;
                }
                Ok(None)
            }
            Backing::Hugetlb => {
                let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::HUGETLB | MapFlags::HUGE_2MB;
                // SAFETY: replaces our own reservation, exactly.
                unsafe { mm::mmap_anonymous(address, self.bytes, rw, flags) }.map(|_| None)
            }
            Backing::Shmem | Backing::ShmemHuge | Backing::ShmemSmall => {
                let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
                let file = rustix::fs::memfd_create("umbra", flags)?;
                rustix::fs::ftruncate(&file, self.bytes as u64)?;
                // udmabuf takes pages of nothing that could lose them.
                rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::SHRINK)?;
                let flags = MapFlags::SHARED | MapFlags::FIXED;
                // SAFETY: replaces our own reservation, exactly.
                unsafe { mm::mmap(address, self.bytes, rw, flags, &file, 0) }?;
                let advice = match backing {
                    Backing::ShmemHuge => Advice::LinuxHugepage,
                    Backing::ShmemSmall => Advice::LinuxNoHugepage,
                    _ => return Ok(Some(file)),
                };
                // SAFETY: our own mapping.
                unsafe { mm::madvise(address, self.bytes, advice) }?;
                Ok(Some(file))
            }
        }
    }

    /// Where it begins, for KVM and vm-memory.
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.address
    }

    /// Where it begins, for Linux's own interfaces to memory.
    #[must_use]
    pub fn hva(&self) -> Hva {
        Hva(self.address as u64)
    }

    /// What backs it.
    #[must_use]
    pub const fn backing(&self) -> Backing {
        self.backing
    }

    /// The memfd behind it, for who maps it a second time; `None` if it is private.
    #[must_use]
    pub const fn file(&self) -> Option<&OwnedFd> {
        self.file.as_ref()
    }

    /// Bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.bytes
    }

    /// Gives every page its host memory: writes a zero to it. Only for memory that no guest has written yet.
    pub fn populate(&self) {
        for offset in (0..self.bytes).step_by(1 << umbra_shared::PAGE_SHIFT) {
            // SAFETY: the byte lies inside the mapping.
            unsafe { self.address.add(offset).write_volatile(0) };
        }
    }

    /// Whether it is empty: never.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The address of the word at byte `within` of page `index`, inside the mapping and aligned. `None` beyond the end.
    fn word_in(&self, index: u64, within: u64) -> Option<*mut u64> {
        let offset = usize::try_from(index.checked_mul(PAGE_SIZE)?.checked_add(within)?).ok()?;
        if offset.checked_add(8)? > self.bytes || !within.is_multiple_of(8) {
            return None;
        }
        #[allow(clippy::cast_ptr_alignment)] // The mapping and the offset are multiples of a page.
        Some(self.address.wrapping_add(offset).cast())
    }

    /// The address of page `index`'s first word.
    fn word_at(&self, index: u64) -> Option<*mut u64> {
        self.word_in(index, 0)
    }

    /// The word at byte `within` of page `index` as an atomic. `None` beyond the end, and between words.
    #[must_use]
    pub fn word(&self, index: u64, within: u64) -> Option<&AtomicU64> {
        let word = self.word_in(index, within)?;
        // SAFETY: the eight bytes lie inside the mapping, which lives as long as this, and are aligned. Others, the guest among them, may
        // change them at any moment, which an atomic allows.
        Some(unsafe { AtomicU64::from_ptr(word) })
    }

    /// The `count` words from byte `within` of page `index` on. `None` if they leave the page or the memory, and between words.
    #[must_use]
    pub fn words(&self, index: u64, within: u64, count: usize) -> Option<&[AtomicU64]> {
        let first = self.word_in(index, within)?;
        if within.checked_add(8 * count as u64)? > PAGE_SIZE {
            return None;
        }
        self.word_in(index, within + 8 * count as u64 - 8)?;
        // SAFETY: as in `word`; all of them lie in one page, whose last word the mapping holds. An AtomicU64 is laid out as a u64.
        Some(unsafe { std::slice::from_raw_parts(first.cast::<AtomicU64>(), count) })
    }

    /// Copies page `index` into `page`, word by word. Returns false, and changes nothing, beyond the end.
    #[must_use]
    pub fn copy_page(&self, index: u64, page: &mut [u64; 512]) -> bool {
        let Some(words) = self.words(index, 0, page.len()) else { return false };
        page.iter_mut().zip(words).for_each(|(word, from)| *word = from.load(Ordering::Relaxed));
        true
    }

    /// The address of page `index`, behind which `pages` pages are mapped. `None` beyond the end.
    fn whole_pages(&self, index: u64, pages: usize) -> Option<*const u64> {
        let last = index.checked_add(u64::try_from(pages).ok()?.checked_sub(1)?)?;
        self.word_in(last, PAGE_SIZE - 8)?;
        self.word_at(index).map(<*mut u64>::cast_const)
    }

    /// Copies pages from `index` on, as many as `into` has room for, while the guest may write them. Returns false, and changes nothing, if they
    /// do not all lie in the memory.
    #[must_use]
    pub fn copy_pages(&self, index: u64, into: &mut [PageWords], by: By) -> bool {
        let Some(first) = self.whole_pages(index, into.len()) else { return false };
        for (page, into) in into.iter_mut().enumerate() {
            // SAFETY: this page is one of those that lie in the mapping, which begins at a page's boundary; see `By::here`.
            unsafe { by.copy(first.add(page * into.len()), into) };
        }
        true
    }

    /// A bit for each page from `index` on that differs from its copy, at most 512 of them. `None` if they do not all lie in the memory.
    #[must_use]
    pub fn changed_since(&self, index: u64, copies: &[PageWords], by: By) -> Option<[u64; 8]> {
        let first = self.whole_pages(index, copies.len())?;
        let mut changed = [0; 8];
        for (page, copy) in copies.iter().enumerate() {
            // SAFETY: as in `copy_pages`.
            let differs = unsafe { by.differs(first.add(page * copy.len()), copy) };
            if let Some(word) = changed.get_mut(page / 64) {
                *word |= u64::from(differs) << (page % 64);
            }
        }
        Some(changed)
    }

    /// The first word of page `index`, which the guest may be writing at this moment. `None` beyond the end.
    #[must_use]
    pub fn first_word(&self, index: u64) -> Option<u64> {
        let word = self.word_at(index)?;
        // SAFETY: the eight bytes lie inside the mapping and are aligned; volatile, since the guest may write them.
        Some(unsafe { word.read_volatile() })
    }

    /// A hash of page `index`, which the guest may be writing at this moment (FNV-1a by words). `None` beyond the end.
    #[must_use]
    pub fn hash(&self, index: u64) -> Option<u64> {
        let first = self.word_at(index)?;
        let words = usize::try_from(PAGE_SIZE).unwrap_or(0) / size_of::<u64>();
        Some((0..words).fold(0xcbf2_9ce4_8422_2325, |hash, at| {
            // SAFETY: a whole page lies inside the mapping, and this word in that page; volatile, since the guest may write it.
            let word = unsafe { first.add(at).read_volatile() };
            (hash ^ word).wrapping_mul(0x0100_0000_01b3)
        }))
    }

    /// Writes the first word of page `index`, as a guest would. Returns false, and changes nothing, beyond the end.
    #[must_use]
    pub fn set_first_word(&self, index: u64, value: u64) -> bool {
        let Some(word) = self.word_at(index) else { return false };
        // SAFETY: as above; nobody has a reference to the memory.
        unsafe { word.write_volatile(value) };
        true
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: our mapping; the VM that used it is dropped before it (see `Vm`).
        let result = unsafe { mm::munmap(self.address.cast(), self.bytes) };
        debug_assert!(result.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_zeroed_and_bounded() {
        for backing in [Backing::Anonymous, Backing::Thp, Backing::Shmem] {
            let memory = HostMemory::new(3 * PAGE_SIZE, backing).unwrap();
            assert_eq!(memory.as_ptr().align_offset(2 << 20), 0, "{backing}");
            assert_eq!(memory.first_word(2), Some(0));
            assert_eq!(memory.first_word(3), None);
            assert_eq!(memory.first_word(u64::MAX), None);
            assert!(memory.set_first_word(2, 7) && !memory.set_first_word(3, 7));
            assert_eq!((memory.first_word(2), memory.first_word(1)), (Some(7), Some(0)));
        }
    }

    #[test]
    fn too_much_is_refused_in_words() {
        let error = HostMemory::new(u64::MAX - 4096, Backing::Anonymous).unwrap_err();
        assert!(matches!(error, Error::Memory(_)), "{error}");
        let error = Backing::Hugetlb.check(1 << 60).unwrap_err().to_string();
        assert!(error.contains("nr_hugepages"), "{error}");
    }

    #[test]
    fn names_parse() {
        for backing in Backing::ALL {
            assert_eq!(backing.name().parse(), Ok(backing));
        }
        assert_eq!("floppy".parse::<Backing>(), Err(()));
    }
}
