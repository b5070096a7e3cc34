//! What lies beyond a machine's memory slots, where what is done there is to be known: a bus on which no device answers. KVM emulates the access, and
//! gives it to the monitor with the guest's physical address, also where an L2 on KVM's own nesting made it.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Accesses that are kept until somebody takes them; a guest makes as many as it likes.
const KEPT: usize = 256;

/// An access of the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The physical address.
    pub address: u64,
    /// Bytes, 1 to 8.
    pub bytes: usize,
    /// What was written; `None` for a read.
    pub written: Option<u64>,
}

/// The bus. A read finds all bits set, and a write is lost, as on a PC.
#[derive(Debug, Default)]
pub struct EmptyBus(Mutex<Vec<Access>>);

impl EmptyBus {
    /// Answers a read.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.note(Access { address, bytes: data.len(), written: None });
    }

    /// Takes a write.
    pub fn write(&self, address: u64, data: &[u8]) {
        let written = data.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
        self.note(Access { address, bytes: data.len(), written: Some(written) });
    }

    /// The accesses since this was last called, the first [`KEPT`] of them.
    #[must_use]
    pub fn take(&self) -> Vec<Access> {
        std::mem::take(&mut *self.accesses())
    }

    fn note(&self, access: Access) {
        let mut accesses = self.accesses();
        if accesses.len() < KEPT {
            accesses.push(access);
        }
    }

    /// A thread that ended in the middle of a push has left a list.
    fn accesses(&self) -> MutexGuard<'_, Vec<Access>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_answers_and_all_is_noted() {
        let bus = EmptyBus::default();
        let mut data = [0; 8];
        bus.read(0x1000, &mut data);
        bus.write(0x2000, &0x1122_3344_u32.to_le_bytes());
        assert_eq!(data, [0xff; 8]);
        let read = Access { address: 0x1000, bytes: 8, written: None };
        assert_eq!(bus.take(), [read, Access { address: 0x2000, bytes: 4, written: Some(0x1122_3344) }]);
        assert_eq!(bus.take(), []);
        (0..2 * KEPT).for_each(|_| bus.read(0, &mut data));
        assert_eq!(bus.take().len(), KEPT);
    }
}
