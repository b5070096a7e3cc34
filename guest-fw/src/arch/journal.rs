//! A vCPU's journal of a race, live: L2 and its L1 fill it, the monitor reads it.

use core::mem::offset_of;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;
use umbra_shared::layout::{MAX_VCPUS, PLANS, SYSTEM_LIMIT};
use umbra_shared::probe::{Answer, Probe};
use umbra_shared::protocol::BootPage;
use umbra_shared::race::{self, Access, JOURNAL_BYTES, Journal, ROOM};

/// [`Journal`] word for word.
#[repr(C)]
pub struct LiveJournal {
    count: AtomicU64,
    accesses: [[AtomicU64; 7]; ROOM],
}

const _: () = {
    assert!(size_of::<LiveJournal>() == size_of::<Journal>());
    assert!(offset_of!(LiveJournal, accesses) == offset_of!(Journal, accesses));
    assert!(size_of::<Access>() == 7 * 8);
    assert!(offset_of!(Access, returned) == 8 && offset_of!(Access, begun) == 16 && offset_of!(Access, answer) == 24);
};

impl LiveJournal {
    /// That of vCPU `vcpu`. Panics if the monitor gave no room for it.
    #[must_use]
    pub fn of(page: &BootPage, vcpu: usize) -> &'static Self {
        assert!((1..MAX_VCPUS).contains(&vcpu), "vCPU {vcpu} has no journal");
        let address = race::journal(page.journals, vcpu);
        assert!(
            page.journals >= PLANS && address.is_multiple_of(8) && address + JOURNAL_BYTES <= SYSTEM_LIMIT,
            "no room for journals at {:#x}",
            page.journals
        );
        // SAFETY: the journals lie in the system slot, mapped at their own addresses here and in L2, and nothing else does there. All of their bytes
        // are valid atomics, and whoever shares them uses whole words.
        unsafe { &*core::ptr::with_exposed_provenance(address as usize) }
    }

    /// Accesses that were made so far.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count.load(Relaxed) as usize
    }

    /// None were made.
    pub fn clear(&self) {
        self.count.store(0, Relaxed);
    }

    /// The next access is about to be made. Panics if there is no room.
    pub fn begin(&self, probe: Probe, returned: u64) {
        let [what, before, ..] = &self.accesses[self.count()];
        what.store(Access::what(probe), Relaxed);
        before.store(returned, Relaxed);
    }

    /// It is made, and this is what became of it.
    pub fn end(&self, begun: u64, answer: Answer) {
        let count = self.count();
        let [_, _, after, words @ ..] = &self.accesses[count];
        after.store(begun, Relaxed);
        for (word, value) in words.iter().zip(answer.words()) {
            word.store(value, Relaxed);
        }
        self.count.store(count as u64 + 1, Relaxed);
    }
}
