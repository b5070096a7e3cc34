//! The calls that change what a window's pages are. All of them replace what was there, and only there.

use super::Tables;
use crate::hostmm::{Hva, Stretch};
use crate::nested::memory::InFile;
use rustix::io::Errno;
use rustix::mm::{self, Advice, MapFlags, MprotectFlags, ProtFlags};
use std::ffi::c_void;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};

fn at(stretch: Stretch) -> (*mut c_void, usize) {
    let length = usize::try_from(stretch.bytes()).unwrap_or(usize::MAX);
    (std::ptr::with_exposed_provenance_mut(usize::try_from(stretch.start.0).unwrap_or(usize::MAX)), length)
}

/// What a mapping may be used for, and whether the host's page tables are filled with it.
#[derive(Clone, Copy, Debug)]
pub struct Rights {
    /// Writes are permitted.
    pub write: bool,
    /// They are filled.
    pub populate: bool,
}

/// The stretch is `file` from `offset` on.
pub fn map(stretch: Stretch, file: &OwnedFd, offset: u64, rights: Rights) -> io::Result<()> {
    let (address, length) = at(stretch);
    let protection = if rights.write { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
    let mut flags = MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE;
    if rights.populate {
        flags |= MapFlags::POPULATE;
    }
    // SAFETY: a stretch of a window: addresses that were reserved for it, which no reference leads to (reserve.rs).
    unsafe { mm::mmap(address, length, protection, flags, file, offset) }?;
    Ok(())
}

/// The stretch is `file` from `offset` on, and nobody may touch it until [`admit`] says so.
pub fn map_untouchable(stretch: Stretch, file: &OwnedFd, offset: u64) -> io::Result<()> {
    let (address, length) = at(stretch);
    let flags = MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE;
    // SAFETY: as in `map`.
    let map = || unsafe { mm::mmap(address, length, ProtFlags::empty(), flags, file, offset) };
    match map() {
        Err(Errno::NOMEM) => {
            // Who has one mapping more than can be gets none, not even in place of others (`do_mmap` in `mm/mmap.c`): those go first.
            unmap(stretch)?;
            map()?;
        }
        other => {
            other?;
        }
    }
    Ok(())
}

/// The stretch is a part of L1's memory. Where writes are to be told apart, `register` is called before the host's page tables are filled.
pub fn map_part(
    stretch: Stretch,
    part: InFile<'_>,
    (write, tables): (bool, Tables),
    register: impl FnOnce(Stretch) -> io::Result<()>,
) -> io::Result<()> {
    if part.pages < stretch.pages {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // Who reads before `register` must not be given the right to write.
    let hold_back = write && tables == Tables::ToldApart { raced: true };
    map(stretch, part.file, part.offset, Rights { write: write && !hold_back, populate: tables == Tables::Filled })?;
    if let Tables::ToldApart { .. } = tables {
        register(stretch)?;
        if hold_back {
            allow_writes(stretch, true)?;
        }
        // It is a hint: what it does not do, a fault will.
        let _ = populate(stretch);
    }
    Ok(())
}

/// The same for memory that nobody may touch before `guard` is done with it.
pub fn map_guarded(
    stretch: Stretch,
    part: InFile<'_>,
    tables: Tables,
    guard: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    if part.pages < stretch.pages {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    map_untouchable(stretch, part.file, part.offset)?;
    guard()?;
    admit(stretch, true)?;
    if tables != Tables::Left {
        let _ = populate(stretch);
    }
    Ok(())
}

/// The host's page tables are filled for the stretch, as by reads.
pub fn populate(stretch: Stretch) -> io::Result<()> {
    advise(stretch, Advice::LinuxPopulateRead)
}

fn advise(stretch: Stretch, advice: Advice) -> io::Result<()> {
    let (address, length) = at(stretch);
    // SAFETY: as above. None of the advices that are given here changes a byte.
    unsafe { mm::madvise(address, length, advice) }?;
    Ok(())
}

/// The stretch does not become one mapping with a neighbour for which this was not called. The advice itself, not to be copied by fork(2), means
/// nothing here: nobody forks.
pub fn set_apart(stretch: Stretch) -> io::Result<()> {
    // Where there is no room for one mapping more it says EAGAIN (madvise(2)), where the others say ENOMEM.
    advise(stretch, Advice::LinuxDontFork).map_err(|error| match error.raw_os_error() {
        Some(libc::EAGAIN) => io::Error::from_raw_os_error(libc::ENOMEM),
        _ => error,
    })
}

/// What is mapped in the stretch may be read and written, or not be touched at all.
pub fn admit(stretch: Stretch, admit: bool) -> io::Result<()> {
    let (address, length) = at(stretch);
    let rights = if admit { MprotectFlags::READ | MprotectFlags::WRITE } else { MprotectFlags::empty() };
    // SAFETY: as above.
    unsafe { mm::mprotect(address, length, rights) }?;
    Ok(())
}

/// What is mapped in the stretch may be read, and written or not.
pub fn allow_writes(stretch: Stretch, writable: bool) -> io::Result<()> {
    let (address, length) = at(stretch);
    let rights = if writable { MprotectFlags::READ | MprotectFlags::WRITE } else { MprotectFlags::READ };
    // SAFETY: as above.
    unsafe { mm::mprotect(address, length, rights) }?;
    Ok(())
}

/// Nothing is there.
pub fn unmap(stretch: Stretch) -> io::Result<()> {
    let (address, length) = at(stretch);
    // SAFETY: as above.
    unsafe { mm::munmap(address, length) }?;
    Ok(())
}

/// Whether the page of a window at `page`, which is mapped, begins with `word`: what is done to that is seen here. Nobody may write the word meanwhile.
pub fn begins_with(page: Hva, word: &AtomicU64) -> bool {
    const BIT: u64 = 1 << 63;
    let (address, _) = at(Stretch { start: page, pages: 1 });
    // SAFETY: the caller has seen a mapping there that can be read and written; a page is aligned. Others change it as atomics can be.
    let here = unsafe { AtomicU64::from_ptr(address.cast()) };
    let before = here.load(Ordering::Acquire);
    word.fetch_xor(BIT, Ordering::AcqRel);
    let then = here.load(Ordering::Acquire);
    word.fetch_xor(BIT, Ordering::AcqRel);
    then == before ^ BIT
}
