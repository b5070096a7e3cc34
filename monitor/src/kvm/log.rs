//! KVM's dirty bitmap of one slot (api.rst, 4.8 and 4.117).

use super::{Error, ioctls};
use kvm_ioctls::VmFd;

/// The largest `num_pages` of a CLEAR that is a multiple of 64: whole slots in one call.
pub const WHOLE_SLOT: u64 = u32::MAX as u64 & !63;

/// The bitmap that KVM fills, as long as the slot.
#[derive(Debug)]
pub struct SlotBitmap {
    slot: u32,
    pages: u64,
    words: Vec<u64>,
}

impl SlotBitmap {
    /// A bitmap for slot `slot` of `pages` pages; its memory is touched here, not inside a window.
    #[must_use]
    pub fn new(slot: u32, pages: u64) -> Self {
        let mut words = vec![u64::MAX; ioctls::bitmap_words(pages)];
        words.fill(0);
        Self { slot, pages, words }
    }

    /// Fills the bitmap from KVM's log. Without manual protection this also clears the log and protects the pages again.
    ///
    /// # Errors
    /// The system's.
    pub fn get(&mut self, vm: &VmFd) -> Result<(), Error> {
        ioctls::get_dirty_log(vm, self.slot, self.pages, &mut self.words)
            .map_err(|source| Error::Call { what: "KVM_GET_DIRTY_LOG", source })
    }

    /// Clears in KVM's log what this bitmap holds, `chunk` pages a call (a multiple of 64).
    ///
    /// # Errors
    /// The system's.
    pub fn clear(&self, vm: &VmFd, chunk: u64) -> Result<(), Error> {
        let mut first = 0;
        for words in self.words.chunks(ioctls::bitmap_words(chunk).max(1)) {
            let pages = (words.len() as u64 * 64).min(self.pages - first);
            let count = u32::try_from(pages).unwrap_or(u32::MAX);
            ioctls::clear_dirty_log(vm, self.slot, first, count, words)
                .map_err(|source| Error::Call { what: "KVM_CLEAR_DIRTY_LOG", source })?;
            first += pages;
        }
        Ok(())
    }

    /// Clears these pages, in ascending order, in KVM's log and here.
    ///
    /// # Errors
    /// The system's.
    pub fn clear_pages(&mut self, vm: &VmFd, pages: &[u64]) -> Result<(), Error> {
        let (Some(&first), Some(&last)) = (pages.first(), pages.last()) else { return Ok(()) };
        let start = first & !63;
        let count = (last + 1).next_multiple_of(64).min(self.pages) - start;
        let mut words = vec![0_u64; ioctls::bitmap_words(count)];
        for page in pages {
            let (word, bit) = (ioctls::bitmap_words(page + 1) - 1, 1 << (page % 64));
            if let (Some(mine), Some(theirs)) =
                (self.words.get_mut(word), words.get_mut(word - ioctls::bitmap_words(start)))
            {
                *mine &= !bit;
                *theirs |= bit;
            }
        }
        ioctls::clear_dirty_log(vm, self.slot, start, u32::try_from(count).unwrap_or(u32::MAX), &words)
            .map_err(|source| Error::Call { what: "KVM_CLEAR_DIRTY_LOG", source })
    }

    /// Whether page `page` has its bit here.
    #[must_use]
    pub fn is_set(&self, page: u64) -> bool {
        self.words.get(ioctls::bitmap_words(page + 1) - 1).is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    /// Takes all bits away, here alone.
    pub fn forget(&mut self) {
        self.words.fill(0);
    }

    /// Whether no page has one.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Pages of the slot.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// The bits, the first page of the slot in the lowest.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }
}
