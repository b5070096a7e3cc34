//! What a machine is made of, and what of it the firmware is told.

use super::{Error, Image};
use crate::kvm::Backing;
use crate::kvm::bus::EmptyBus;
use crate::kvm::clock::Timer;
use crate::nested;
use std::sync::Arc;
use std::time::Duration;
use umbra_shared::layout::{self, Slot};
use umbra_shared::nested::{Map, Nested, WORDS};
use umbra_shared::paging::Mode;
use umbra_shared::pattern::Pattern;
use umbra_shared::protocol::{BOOT_MAGIC, BootPage};
use umbra_shared::race::JOURNAL_BYTES;
use umbra_shared::{Gfn, Level, PAGE_SIZE, smm};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::IntoBytes;

/// What a machine is made of.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What the guest does.
    pub pattern: Pattern,
    /// The tracked slots.
    pub slots: Vec<Slot>,
    /// 1 to 8.
    pub vcpus: usize,
    /// What backs the tracked slots.
    pub backing: Backing,
    /// Leaf size of the firmware's own tables, and of its L2's.
    pub guest_page: Level,
    /// Whether KVM has the interrupt controllers.
    pub irqchip: bool,
    /// The mode in which the firmware touches the tracked slots, which lie below 3 GiB if it is not long mode.
    pub mode: Mode,
    /// TSC ticks between the accesses of a paced run.
    pub pace: u64,
    /// What the pattern's pages are, if not the tracked pages themselves.
    pub nested: Option<Nested>,
    /// How the monitor runs L2, if it does.
    pub shadow: Option<nested::Options>,
    /// What answers accesses beyond the slots; without it the machine stops there.
    pub bus: Option<Arc<EmptyBus>>,
    /// Whether L2s keep journals ([`umbra_shared::race`]).
    pub journals: bool,
    /// What SMM sees, if the machine has one.
    pub smm: Option<smm::View>,
    /// The firmware.
    pub image: Arc<Image>,
    /// The clock of windows.
    pub timer: Timer,
    /// How long the guest may be silent inside one command. In the lab that is virtual time.
    pub patience: Duration,
}

impl Plan {
    /// The first tracked frame.
    #[must_use]
    pub fn first_tracked(&self) -> Gfn {
        self.slots.first().map_or(Gfn::containing(layout::TRACKED_GPA), |slot| slot.base)
    }

    /// Which tracked page each of the pattern's is.
    #[must_use]
    pub fn map(&self) -> Map {
        self.nested.map_or_else(|| Map::identity(self.pattern.pages), |nested| nested.map)
    }
}

/// What the system slot holds beyond its fixed part.
pub(super) struct SystemPlace {
    pub(super) bytes: u64,
    plan_entries: u64,
    tables: u64,
    table_bytes: u64,
    nested_tables: u64,
    nested_table_bytes: u64,
    legacy_tables: u64,
    legacy_table_bytes: u64,
    /// 0 where there are none.
    pub(super) journals: u64,
}

impl SystemPlace {
    pub(super) fn new(plan: &Plan) -> Result<Self, Error> {
        let (pages, plan_entries) = (plan.pattern.pages, plan.pattern.accesses());
        let tables = (layout::PLANS + 4 * plan_entries).next_multiple_of(PAGE_SIZE);
        let table_bytes = layout::table_bytes(pages, plan.guest_page);
        let nested_tables = tables + table_bytes;
        let nested_table_bytes = plan.nested.map_or(0, |nested| nested.table_bytes(plan.guest_page));
        let legacy_tables = nested_tables + nested_table_bytes;
        let legacy_table_bytes = layout::legacy_table_bytes(pages, plan.guest_page, plan.mode);
        let journals = legacy_tables + legacy_table_bytes;
        let journal_bytes = if plan.journals { JOURNAL_BYTES * (plan.vcpus as u64).saturating_sub(1) } else { 0 };
        let bytes = (journals + journal_bytes).next_multiple_of(Level::M2.bytes());
        if bytes > layout::SYSTEM_LIMIT {
            return Err(Error::Memory(format!(
                "{pages} pages with {plan_entries} accesses a round need {bytes} bytes of tables and plans, and there is room for {} (ask for less memory or --guest-page 2m)",
                layout::SYSTEM_LIMIT
            )));
        }
        Ok(Self {
            bytes,
            plan_entries,
            tables,
            table_bytes,
            nested_tables,
            nested_table_bytes,
            legacy_tables,
            legacy_table_bytes,
            journals: if plan.journals { journals } else { 0 },
        })
    }

    pub(super) fn write_boot_page(&self, memory: &GuestMemoryMmap, plan: &Plan, tsc_khz: u32) -> Result<(), Error> {
        let mut page = BootPage {
            magic: BOOT_MAGIC,
            vcpus: plan.vcpus as u64,
            pages: plan.map().l1_pages(),
            guest_page_level: plan.guest_page.number().into(),
            tsc_khz: tsc_khz.into(),
            plans: layout::PLANS,
            plan_entries: self.plan_entries,
            tables: self.tables,
            table_bytes: self.table_bytes,
            pattern: plan.pattern.encode(),
            nested: plan.nested.map_or([0; WORDS], |nested| nested.encode()),
            nested_tables: self.nested_tables,
            nested_table_bytes: self.nested_table_bytes,
            guest_paging: plan.mode as u64,
            legacy_tables: self.legacy_tables,
            legacy_table_bytes: self.legacy_table_bytes,
            pace: plan.pace,
            journals: self.journals,
            smram: plan.smm.is_some().into(),
            slot_count: plan.slots.len() as u64,
            ..BootPage::default()
        };
        for (entry, slot) in page.slots.iter_mut().zip(&plan.slots) {
            *entry = [slot.base.0, slot.pages];
        }
        memory
            .write_slice(page.as_bytes(), GuestAddress(layout::BOOT_PAGE))
            .map_err(|error| Error::Memory(error.to_string()))
    }
}
