//! mincore(2): which pages are in memory.

use super::Stretch;
use crate::kvm::Error;
use std::io;

/// Writes a byte for each page of `stretch` into `pages`: bit 0 says that it is resident. Other bits are undefined. Pages beyond the shorter of the two
/// are left out.
///
/// # Errors
/// The system's: ENOMEM for memory that is not mapped.
pub fn read(stretch: Stretch, pages: &mut [u8]) -> Result<(), Error> {
    let most = u64::try_from(pages.len()).unwrap_or(u64::MAX);
    let part = stretch.part(0, most);
    let bytes = usize::try_from(part.bytes()).unwrap_or(usize::MAX);
    let start = std::ptr::without_provenance_mut(usize::try_from(part.start.0).unwrap_or(usize::MAX));
    // SAFETY: the kernel writes a byte for each page of the part, and `pages` has as many; the memory itself is not touched.
    if unsafe { libc::mincore(start, bytes, pages.as_mut_ptr()) } < 0 {
        return Err(Error::call("mincore", io::Error::last_os_error()));
    }
    Ok(())
}

/// Whether a byte of [`read`] is that of a resident page.
#[must_use]
pub const fn is_resident(byte: u8) -> bool {
    byte & 1 != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::Backing;
    use crate::kvm::memory::HostMemory;
    use umbra_shared::PAGE_SIZE;

    #[test]
    fn resident_is_what_was_touched() {
        for backing in [Backing::Anonymous, Backing::Shmem] {
            let memory = HostMemory::new(4 * PAGE_SIZE, backing).unwrap();
            assert!(memory.set_first_word(1, 1) && memory.set_first_word(3, 1));
            let mut pages = [0; 4];
            read(Stretch { start: memory.hva(), pages: 4 }, &mut pages).unwrap();
            assert_eq!(pages.map(is_resident), [false, true, false, true], "{backing}");
        }
    }
}
