//! A vCPU's mailbox, live: the monitor may read and write it at any moment, so every word is an atomic.

use core::mem::offset_of;
use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::{AtomicU8, AtomicU64};
use umbra_shared::layout::{self, MAX_VCPUS};
use umbra_shared::nested::Report;
use umbra_shared::probe::{Answer, Answers, MAX_PROBES};
use umbra_shared::protocol::{ExceptionReport, Mailbox, TEXT_BYTES};

/// [`Mailbox`] word for word.
#[repr(C)]
pub struct LiveMailbox {
    /// [`umbra_shared::protocol::Command`], from the monitor.
    pub command: AtomicU64,
    /// Its argument.
    pub argument: AtomicU64,
    /// Ends a free run.
    pub stop: AtomicU64,
    /// Accesses of the last plan.
    pub accesses: AtomicU64,
    /// Writes of the last command.
    pub writes: AtomicU64,
    /// TSC ticks of the last command.
    pub ticks: AtomicU64,
    /// The number of the next round of a free run.
    pub rounds_done: AtomicU64,
    /// Accesses of a paced run.
    pub accesses_done: AtomicU64,
    /// Of a program that ended.
    pub exit_code: AtomicU64,
    /// Filled by the exception stubs.
    exception: [AtomicU64; 6],
    text_bytes: AtomicU64,
    text: [AtomicU8; TEXT_BYTES],
}

const _: () = {
    assert!(size_of::<LiveMailbox>() == size_of::<Mailbox>());
    assert!(offset_of!(LiveMailbox, command) == offset_of!(Mailbox, command));
    assert!(offset_of!(LiveMailbox, argument) == offset_of!(Mailbox, argument));
    assert!(offset_of!(LiveMailbox, stop) == offset_of!(Mailbox, stop));
    assert!(offset_of!(LiveMailbox, accesses) == offset_of!(Mailbox, accesses));
    assert!(offset_of!(LiveMailbox, writes) == offset_of!(Mailbox, writes));
    assert!(offset_of!(LiveMailbox, ticks) == offset_of!(Mailbox, ticks));
    assert!(offset_of!(LiveMailbox, rounds_done) == offset_of!(Mailbox, rounds_done));
    assert!(offset_of!(LiveMailbox, accesses_done) == offset_of!(Mailbox, accesses_done));
    assert!(offset_of!(LiveMailbox, exit_code) == offset_of!(Mailbox, exit_code));
    assert!(offset_of!(LiveMailbox, exception) == offset_of!(Mailbox, exception));
    assert!(offset_of!(LiveMailbox, text_bytes) == offset_of!(Mailbox, text_bytes));
    assert!(offset_of!(LiveMailbox, text) == offset_of!(Mailbox, text));
};

impl LiveMailbox {
    /// The mailbox of vCPU `index`. Panics if there is no such vCPU.
    #[must_use]
    pub fn of(index: usize) -> &'static Self {
        assert!(index < MAX_VCPUS, "vCPU {index} has no mailbox");
        let address = layout::vcpu_area(index) + layout::vcpu_area::MAILBOX;
        // SAFETY: the area is in the system slot, mapped at its own address, and holds nothing else there. All of its bytes are
        // valid atomics, and whoever shares it uses whole words.
        unsafe { &*core::ptr::with_exposed_provenance(address as usize) }
    }

    /// Puts `text` into the mailbox, cut to what fits, and returns how many bytes that is.
    pub fn put_text(&self, text: &[u8]) -> usize {
        let length = text.len().min(TEXT_BYTES);
        for (to, &from) in self.text.iter().zip(text) {
            to.store(from, Relaxed);
        }
        self.text_bytes.store(length as u64, Relaxed);
        length
    }

    /// What the exception stubs reported last.
    #[must_use]
    pub fn exception(&self) -> ExceptionReport {
        let word = |index: usize| self.exception[index].load(Relaxed);
        ExceptionReport {
            vector: word(offset_of!(ExceptionReport, vector) / 8),
            error_code: word(offset_of!(ExceptionReport, error_code) / 8),
            rip: word(offset_of!(ExceptionReport, rip) / 8),
            cr2: word(offset_of!(ExceptionReport, cr2) / 8),
            rsp: word(offset_of!(ExceptionReport, rsp) / 8),
            cs: word(offset_of!(ExceptionReport, cs) / 8),
        }
    }
}

/// [`Report`] word for word: what L1 says about its L2.
#[repr(C)]
pub struct LiveReport {
    /// Entries into L2.
    pub entries: AtomicU64,
    /// Violations handled.
    pub violations: AtomicU64,
    /// Entries made.
    pub filled: AtomicU64,
    /// Pages of L1's table.
    pub table_pages: AtomicU64,
    /// Its root.
    pub table_root: AtomicU64,
    /// Where the last violation was.
    pub last_address: AtomicU64,
    /// What it was.
    pub last_code: AtomicU64,
    /// More about it.
    pub last_qualification: AtomicU64,
    /// An entry of the probe's.
    pub probed_entry: AtomicU64,
}

const _: () = {
    assert!(size_of::<LiveReport>() == size_of::<Report>());
    assert!(offset_of!(LiveReport, entries) == offset_of!(Report, entries));
    assert!(offset_of!(LiveReport, violations) == offset_of!(Report, violations));
    assert!(offset_of!(LiveReport, filled) == offset_of!(Report, filled));
    assert!(offset_of!(LiveReport, table_pages) == offset_of!(Report, table_pages));
    assert!(offset_of!(LiveReport, table_root) == offset_of!(Report, table_root));
    assert!(offset_of!(LiveReport, last_address) == offset_of!(Report, last_address));
    assert!(offset_of!(LiveReport, last_code) == offset_of!(Report, last_code));
    assert!(offset_of!(LiveReport, last_qualification) == offset_of!(Report, last_qualification));
    assert!(offset_of!(LiveReport, probed_entry) == offset_of!(Report, probed_entry));
};

impl LiveReport {
    /// The report of vCPU `index`. Panics if there is no such vCPU.
    #[must_use]
    pub fn of(index: usize) -> &'static Self {
        assert!(index < MAX_VCPUS, "vCPU {index} has no report");
        let address = layout::vcpu_area(index) + layout::vcpu_area::NESTED_REPORT;
        // SAFETY: as for the mailbox.
        unsafe { &*core::ptr::with_exposed_provenance(address as usize) }
    }
}

/// [`Answers`] word for word: L2 and its L1 fill them, the monitor reads them.
#[repr(C)]
pub struct LiveAnswers {
    count: AtomicU64,
    probes: [[AtomicU64; 4]; MAX_PROBES],
}

const _: () = {
    assert!(size_of::<LiveAnswers>() == size_of::<Answers>());
    assert!(offset_of!(LiveAnswers, probes) == offset_of!(Answers, probes));
    assert!(offset_of!(Answer, value) == 0 && offset_of!(Answer, code) == 8);
    assert!(offset_of!(Answer, qualification) == 16 && offset_of!(Answer, address) == 24);
};

impl LiveAnswers {
    /// Those of vCPU `index`. Panics if there is no such vCPU.
    #[must_use]
    pub fn of(index: usize) -> &'static Self {
        assert!(index < MAX_VCPUS, "vCPU {index} has no answers");
        let address = layout::vcpu_area(index) + layout::vcpu_area::ANSWERS;
        // SAFETY: as for the mailbox.
        unsafe { &*core::ptr::with_exposed_provenance(address as usize) }
    }

    /// Probes that were made so far.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count.load(Relaxed) as usize
    }

    /// None were made.
    pub fn clear(&self) {
        self.count.store(0, Relaxed);
    }

    /// The next probe is made, and this is what became of it. Panics if there is no room.
    pub fn push(&self, answer: Answer) {
        let index = self.count();
        for (word, value) in self.probes[index].iter().zip(answer.words()) {
            word.store(value, Relaxed);
        }
        self.count.store(index as u64 + 1, Relaxed);
    }
}
