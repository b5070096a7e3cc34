//! `bitmap`, `clear` and `clear+init-set`: KVM's dirty bitmap.

use super::Tracker;
use crate::guest::Machine;
use crate::kvm::Error;
use crate::kvm::log::SlotBitmap;
use crate::pages::PageSet;

/// What makes harvested pages report again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clearing {
    /// GET itself.
    ByGet,
    /// CLEAR, so many pages a call.
    Manual {
        /// A multiple of 64.
        chunk: u64,
    },
}

/// The bitmaps of all tracked slots.
pub struct Log {
    slots: Vec<SlotBitmap>,
    clearing: Clearing,
}

impl Log {
    /// A log of the machine's slots.
    pub fn new(machine: &Machine, clearing: Clearing) -> Self {
        let slots = machine.vm().slots().iter().map(|slot| SlotBitmap::new(slot.id, slot.place.pages)).collect();
        Self { slots, clearing }
    }
}

impl Tracker for Log {
    fn start(&mut self, machine: &Machine) -> Result<(), Error> {
        machine.vm().log_dirty_pages(true)
    }

    fn harvest(&mut self, machine: &Machine) -> Result<(), Error> {
        self.slots.iter_mut().try_for_each(|slot| slot.get(machine.vm().fd()))
    }

    fn clear(&mut self, machine: &Machine) -> Result<(), Error> {
        let Clearing::Manual { chunk } = self.clearing else { return Ok(()) };
        self.slots.iter().try_for_each(|slot| slot.clear(machine.vm().fd(), chunk))
    }

    fn clears(&self) -> bool {
        self.clearing != Clearing::ByGet
    }

    fn stop(&mut self, machine: &Machine) -> Result<(), Error> {
        machine.vm().log_dirty_pages(false)
    }

    fn report(&mut self, machine: &Machine, into: &mut PageSet) {
        for (bitmap, slot) in self.slots.iter().zip(machine.vm().slots()) {
            into.add_slot(slot.place.first_page, slot.place.pages, bitmap.words());
        }
    }
}
