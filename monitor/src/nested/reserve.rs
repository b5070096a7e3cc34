//! Host addresses for the windows.
//!
//! A page of a window that nothing is mapped to is a hole in this process's address space, so nothing else may ever be mapped there: L2 would
//! see it. The kernel hands out addresses from the top down (or, with an unlimited stack, from a third of the address space up), and takes the
//! first gap that fits. Windows lie far below, where no such search arrives while there is room above; and Umbra itself hands each address out once.

use crate::hostmm::{Hva, Stretch};
use crate::kvm::Error;
use std::collections::BTreeMap;
use std::sync::Mutex;
use umbra_shared::{Level, PAGE_SIZE};

/// From 16 TiB on: above any program and its heap, far below a third of the 128 TiB that a process has.
const FIRST: u64 = 16 << 40;
const END: u64 = 32 << 40;

/// What is handed out: end by start.
static TAKEN: Mutex<BTreeMap<u64, u64>> = Mutex::new(BTreeMap::new());

/// Addresses that nobody else gets while this lives.
#[derive(Debug)]
pub struct Reserved {
    start: u64,
    stretch: Stretch,
}

impl Reserved {
    /// Addresses of `pages` pages, the first of which lies in its 2 MiB where `like` (a page number) lies in its own.
    ///
    /// # Errors
    /// [`Error::Memory`] if there is no room, or somebody else has mapped something there.
    pub fn new(pages: u64, like: u64) -> Result<Self, Error> {
        let full = || Error::Memory(format!("no room for L2 windows of {pages} pages in this process's addresses"));
        let offset = like % Level::M2.frames() * PAGE_SIZE;
        let bytes = pages
            .checked_mul(PAGE_SIZE)
            .and_then(|bytes| bytes.checked_add(offset + Level::G1.bytes()))
            .and_then(|bytes| bytes.checked_next_multiple_of(Level::G1.bytes()))
            .ok_or_else(full)?;
        let mut taken = TAKEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut start = FIRST;
        for (&other, &end) in &*taken {
            if start + bytes <= other {
                break;
            }
            start = end;
        }
        if start + bytes > END {
            return Err(full());
        }
        taken.insert(start, start + bytes);
        Ok(Self { start, stretch: Stretch { start: Hva(start + offset), pages } })
    }

    /// Where they are.
    #[must_use]
    pub const fn stretch(&self) -> Stretch {
        self.stretch
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut taken = TAKEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        taken.remove(&self.start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_aligned_alike_and_handed_out_once() {
        let one = Reserved::new(1000, 0x10_0003).unwrap();
        let two = Reserved::new(1000, 0x10_0200).unwrap();
        assert_eq!(one.stretch().start.0 % Level::M2.bytes(), 3 * PAGE_SIZE);
        assert_eq!(two.stretch().start.0 % Level::M2.bytes(), 0);
        assert!(one.stretch().end() <= two.stretch().start || two.stretch().end() <= one.stretch().start);
        assert!(Reserved::new(u64::MAX, 0).is_err() && Reserved::new(END / PAGE_SIZE, 0).is_err());
    }
}
