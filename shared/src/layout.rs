//! The guest's physical map.
//!
//! ```text
//! GPA
//! 0x0000_0000  system slot: one memory slot, never tracked
//!   0x0000_1000   boot page (BootPage)
//!   0x0003_0000   where SMM has its SMRAM, 64 KiB for each vCPU (smm); ordinary memory to everybody else
//!   0x0010_0000   firmware image (link address), at most 5 MiB
//!   0x0060_0000   one area of 256 KiB for each vCPU (vcpu_area): mailbox, histogram, what its L2 needs, stacks
//!   0x0080_0000   plans: the accesses of one round, 4 bytes each
//!                 page tables, built by the firmware
//!                 L2's own page tables and L1's (EPT12), if the firmware is a hypervisor (nested)
//! 0x1_0000_0000  tracked slot 0
//!   (gap)
//!               tracked slot 1, ...
//! ```
//! The firmware maps the system slot at its physical addresses, and the tracked slots one after the other from
//! [`TRACKED_BASE`]: page `i` of the tracked memory has the linear address `TRACKED_BASE + i * 4096` whatever slot it
//! is in. The gaps exist because dirty-log bugs hide where slots do not adjoin (firecracker #5696).

use crate::gfn::{Gfn, Level, PAGE_SIZE};
use crate::paging::Mode;

/// Where the boot page lies.
pub const BOOT_PAGE: u64 = 0x1000;
/// Where the firmware image is linked to, and the first address that its segments may use.
pub const IMAGE_START: u64 = 0x10_0000;
/// The first address that the image may not use any more.
pub const IMAGE_END: u64 = 0x60_0000;
/// Where the areas of the vCPUs begin.
pub const VCPU_AREAS: u64 = 0x60_0000;
/// Bytes of one vCPU's area.
pub const VCPU_AREA_BYTES: u64 = 0x4_0000;
/// vCPUs that the firmware knows how to run.
pub const MAX_VCPUS: usize = 8;
/// Where plans begin; page tables follow them.
pub const PLANS: u64 = VCPU_AREAS + MAX_VCPUS as u64 * VCPU_AREA_BYTES;
/// The system slot cannot reach beyond the identity map that the firmware boots with.
pub const SYSTEM_LIMIT: u64 = 1 << 30;
/// Where the first tracked slot begins.
pub const TRACKED_GPA: u64 = 4 << 30;
/// Linear address of the first tracked page in the modes before long mode, and where the first tracked slot begins then: behind the system slot.
pub const LEGACY_BASE: u64 = SYSTEM_LIMIT;
/// In these modes all tracked memory lies below: what is above belongs to devices.
pub const LEGACY_LIMIT: u64 = 3 << 30;
/// Guest physical bytes between two tracked slots.
pub const SLOT_GAP: u64 = 64 << 20;
/// Linear address of the first tracked page: the second entry of the PML4.
pub const TRACKED_BASE: u64 = 1 << 39;
/// Tracked slots that the boot page has room for.
pub const MAX_SLOTS: usize = 32;

/// Offsets inside a vCPU's area.
pub mod vcpu_area {
    /// The mailbox ([`crate::protocol::Mailbox`]): one page.
    pub const MAILBOX: u64 = 0;
    /// The stall histogram ([`crate::histogram::Histogram`]).
    pub const HISTOGRAM: u64 = 0x1000;
    /// What L1 reports about its L2 ([`crate::nested::Report`]).
    pub const NESTED_REPORT: u64 = 0x9000;
    /// What SMM's handler reports to everybody: 8 bytes, the SMIs that it has handled.
    pub const SMM_REPORT: u64 = 0x9800;
    /// The VMCB or VMCS of this vCPU's L2, or its control page where the monitor runs it ([`crate::control::ControlPage`]).
    pub const CONTROL_BLOCK: u64 = 0xa000;
    /// What the processor keeps for L1: where VMRUN saves its state (SVM), or the VMXON region (VMX).
    pub const HOST_REGION: u64 = 0xb000;
    /// The I/O permission map of L2: three pages, of which VMX uses two.
    pub const IO_MAP: u64 = 0xc000;
    /// The MSR permission map of L2: two pages. On VMX there is none: without a map every access exits.
    pub const MSR_MAP: u64 = 0xf000;
    /// What became of L2's probes ([`crate::probe::Answers`]): one page.
    pub const ANSWERS: u64 = 0x1_1000;
    /// Top of L2's stack, growing down to the page before it.
    pub const L2_STACK_TOP: u64 = 0x1_8000;
    /// End of the stacks that exceptions use (IST), each [`IST_STACK_BYTES`] long, growing down.
    pub const IST_STACKS_TOP: u64 = 0x2_0000;
    /// Bytes of one exception stack.
    pub const IST_STACK_BYTES: u64 = 0x2000;
    /// Top of the stack that ring 3 uses, growing down to [`IST_STACKS_TOP`].
    pub const STACK_TOP: u64 = super::VCPU_AREA_BYTES;
}

/// The physical address of the area of vCPU `index`.
#[must_use]
pub const fn vcpu_area(index: usize) -> u64 {
    VCPU_AREAS + index as u64 * VCPU_AREA_BYTES
}

/// A tracked memory slot as the firmware sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// First frame.
    pub base: Gfn,
    /// 4 KiB pages.
    pub pages: u64,
    /// Index of the slot's first page among all tracked pages.
    pub first_page: u64,
}

/// Cuts `pages` tracked pages into `count` slots with gaps between them, each slot a multiple of `granule` but the last, which
/// takes the rest. Returns `None` if a slot would be empty or there are more than [`MAX_SLOTS`].
#[must_use]
pub fn slots(pages: u64, count: usize, granule: Level) -> Option<impl Iterator<Item = Slot> + Clone> {
    slots_at(TRACKED_GPA, pages, count, granule)
}

/// The same with the first slot at `base`, which is a multiple of 2 MiB.
#[must_use]
pub fn slots_at(base: u64, pages: u64, count: usize, granule: Level) -> Option<impl Iterator<Item = Slot> + Clone> {
    if count == 0 || count > MAX_SLOTS {
        return None;
    }
    let each = (pages / count as u64) & !(granule.frames() - 1);
    if each == 0 {
        return None;
    }
    // A gap keeps the alignment of 2 MiB that huge pages need, whatever the length of the slot before it.
    let stride = (each * PAGE_SIZE).next_multiple_of(Level::M2.bytes()) + SLOT_GAP;
    Some((0..count as u64).map(move |index| Slot {
        base: Gfn::containing(base + index * stride),
        pages: if index + 1 == count as u64 { pages - each * index } else { each },
        first_page: each * index,
    }))
}

/// The frame of tracked page `page`, `None` beyond the last slot.
#[must_use]
pub fn frame_of(mut slots: impl Iterator<Item = Slot>, page: u64) -> Option<Gfn> {
    let slot = slots.find(|slot| page.wrapping_sub(slot.first_page) < slot.pages)?;
    Some(slot.base.plus(page - slot.first_page))
}

/// Bytes of page tables that the firmware needs to map the system slot by 2 MiB leaves and `pages` tracked pages by `leaf`.
#[must_use]
pub const fn table_bytes(pages: u64, leaf: Level) -> u64 {
    let linear = pages * PAGE_SIZE;
    let page_tables = if matches!(leaf, Level::K4) { linear.div_ceil(Level::M2.bytes()) } else { 0 };
    let directories = linear.div_ceil(Level::G1.bytes());
    let directory_pointers = linear.div_ceil(Level::T512.bytes());
    // PML4, and one PDPT and one directory for the system slot.
    (3 + page_tables + directories + directory_pointers) * PAGE_SIZE
}

/// Bytes of page tables that the firmware needs for `pages` tracked pages in a mode before long mode; 0 for long mode.
#[must_use]
pub const fn legacy_table_bytes(pages: u64, leaf: Level, mode: Mode) -> u64 {
    let tables = match (mode, leaf) {
        (Mode::Long, _) => return 0,
        // The pointers' page and four directories.
        (Mode::Pae, Level::K4) => 5 + pages.div_ceil(512),
        (Mode::Pae, _) => 5,
        (Mode::Bits32, _) => 1 + pages.div_ceil(1024),
    };
    tables * PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn slots_cover_every_page_once_and_never_adjoin(pages in 1_u64..1 << 20, count in 0_usize..40) {
            let Some(slots) = slots(pages, count, Level::K4) else {
                prop_assert!(count == 0 || count > MAX_SLOTS || pages < count as u64);
                return Ok(());
            };
            let mut next_page = 0;
            let mut end_of_last = Gfn(0);
            for slot in slots {
                prop_assert_eq!(slot.first_page, next_page);
                prop_assert!(slot.pages > 0);
                prop_assert!(slot.base.address() >= TRACKED_GPA);
                prop_assert_eq!(slot.base.address() % Level::M2.bytes(), 0);
                prop_assert!(slot.base > end_of_last);
                next_page += slot.pages;
                end_of_last = slot.base.plus(slot.pages);
            }
            prop_assert_eq!(next_page, pages);
        }
    }

    #[test]
    fn huge_slots_are_whole_huge_pages() {
        let sizes: Vec<u64> = slots(512 * 7, 3, Level::M2).unwrap().map(|slot| slot.pages).collect();
        assert_eq!(sizes, [1024, 1024, 1536]);
        assert!(slots(512 * 2, 3, Level::M2).is_none());
    }

    #[test]
    fn areas_hold_what_they_are_cut_for() {
        use crate::{histogram::Histogram, protocol::Mailbox};
        assert!(size_of::<Mailbox>() as u64 <= vcpu_area::HISTOGRAM);
        let histogram_end = vcpu_area::HISTOGRAM + size_of::<Histogram>() as u64;
        assert!(histogram_end <= vcpu_area::NESTED_REPORT);
        assert!(size_of::<crate::nested::Report>() as u64 <= vcpu_area::SMM_REPORT - vcpu_area::NESTED_REPORT);
        assert_eq!(vcpu_area::IO_MAP + 3 * PAGE_SIZE, vcpu_area::MSR_MAP);
        const {
            assert!(vcpu_area::MSR_MAP + 2 * PAGE_SIZE <= vcpu_area::ANSWERS);
            assert!(vcpu_area::ANSWERS + PAGE_SIZE < vcpu_area::L2_STACK_TOP);
            assert!(vcpu_area::L2_STACK_TOP <= vcpu_area::IST_STACKS_TOP - 4 * vcpu_area::IST_STACK_BYTES);
        }
    }

    #[test]
    fn every_page_has_the_frame_of_its_slot() {
        let slots = || slots(1000, 3, Level::K4).unwrap();
        for slot in slots() {
            assert_eq!(frame_of(slots(), slot.first_page), Some(slot.base));
            assert_eq!(frame_of(slots(), slot.first_page + slot.pages - 1), Some(slot.base.plus(slot.pages - 1)));
        }
        assert_eq!(frame_of(slots(), 1000), None);
    }

    #[test]
    fn tables_for_64_mib() {
        // PML4 + system (PDPT, PD) + PDPT + PD + 32 page tables.
        assert_eq!(table_bytes(16384, Level::K4), 37 * PAGE_SIZE);
        assert_eq!(table_bytes(16384, Level::M2), 5 * PAGE_SIZE);
    }
}
