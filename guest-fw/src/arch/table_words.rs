//! The tables of an L2 and of its L1, word by word, at their physical addresses.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;
use umbra_shared::board::Words;
use umbra_shared::layout::{PLANS, SYSTEM_LIMIT};
use umbra_shared::protocol::BootPage;

/// The words of the pool that the boot page gives to nested tables. The processor, the host and L1's other vCPUs read and write them too.
#[derive(Clone, Copy, Debug)]
pub struct TableWords {
    start: u64,
    bytes: u64,
}

impl TableWords {
    /// Those of this machine. Panics if the pool is not in the system slot.
    #[must_use]
    pub fn of(page: &BootPage) -> Self {
        let (start, bytes) = (page.nested_tables, page.nested_table_bytes);
        let end = start.checked_add(bytes);
        assert!(
            start >= PLANS && end.is_some_and(|end| end <= SYSTEM_LIMIT),
            "no pool of {bytes:#x} bytes at {start:#x}"
        );
        Self { start, bytes }
    }

    fn word(&self, address: u64) -> &AtomicU64 {
        assert!(
            address.is_multiple_of(8) && address.wrapping_sub(self.start) < self.bytes,
            "no word of a table is at {address:#x}"
        );
        // SAFETY: the pool is mapped at its own address (layout.rs) and holds tables alone, whose words whoever shares them uses whole. The last
        // one is inside, since both ends are multiples of 8.
        unsafe { &*core::ptr::with_exposed_provenance(address as usize) }
    }
}

impl Words for TableWords {
    fn read(&self, address: u64) -> u64 {
        self.word(address).load(Relaxed)
    }

    fn write(&mut self, address: u64, value: u64) {
        self.word(address).store(value, Relaxed);
    }
}
