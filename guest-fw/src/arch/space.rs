//! The address space that all vCPUs share: created once by vCPU 0, then entered by each.

use super::idt::LOAD_CR3;
use super::paging::{self, Error};
use super::tracked::Tracked;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use umbra_shared::layout::{self, Slot};
use umbra_shared::nested::{L2_BASE, Nested};
use umbra_shared::{Gfn, Level, PAGE_SIZE};
use x86_64::structures::paging::PageTable;

/// The address of the PML4, 0 before [`create`].
static PML4: AtomicU64 = AtomicU64::new(0);
/// Tracked pages that it maps.
static PAGES: AtomicU64 = AtomicU64::new(0);

/// Builds the final page tables in the `bytes` of the system slot from `tables` on. Only vCPU 0 calls this, while it is alone.
///
/// Panics if that range is none of the system slot's, or if the tables in use are there.
///
/// # Errors
/// Says what does not fit.
pub fn create(tables: u64, bytes: u64, slots: impl Iterator<Item = Slot> + Clone, leaf: Level) -> Result<(), Error> {
    let pool = pool(tables, bytes);
    let pages = slots.clone().map(|slot| slot.pages).sum();
    let pml4 = paging::build(pool, tables, slots, leaf)?;
    PAGES.store(pages, Relaxed);
    PML4.store(pml4, Release);
    Ok(())
}

/// The `bytes` of the system slot from `tables` on, as page tables. Panics if that range is none of the system slot's, or if the tables in
/// use are there.
fn pool(tables: u64, bytes: u64) -> &'static mut [PageTable] {
    let end = tables.checked_add(bytes);
    assert!(
        tables >= layout::PLANS
            && tables.is_multiple_of(PAGE_SIZE)
            && end.is_some_and(|end| end <= layout::SYSTEM_LIMIT),
        "a table pool of {bytes:#x} bytes at {tables:#x} leaves the system slot"
    );
    let in_use = PML4.load(Relaxed);
    assert!(
        in_use == 0 || end.is_some_and(|end| end <= in_use) || in_use < tables,
        "the tables at {tables:#x} are in use"
    );
    // SAFETY: the range is mapped at its own address and holds nothing else: layout.rs gives it to the tables. Any bytes are a valid
    // PageTable, and no CPU walks them.
    unsafe {
        core::slice::from_raw_parts_mut(
            core::ptr::with_exposed_provenance_mut(tables as usize),
            (bytes / PAGE_SIZE) as usize,
        )
    }
}

/// What an L2 runs on: its own tables, and those by which L1 maps its memory.
pub struct SecondSpace {
    /// The address of L2's PML4, in L2's physical space and in L1's.
    pub pml4: u64,
    /// L2's tracked memory. Only L2 may use it.
    pub tracked: Tracked,
    /// Where L1 builds its nested page table.
    pub nested: &'static mut [PageTable],
    /// Where that lies.
    pub nested_address: u64,
}

/// Builds L2's own tables, by leaves of `leaf`, in the system slot from `tables` on, and gives the rest of the `bytes` to L1's nested page table.
/// Only vCPU 0 calls this, once.
///
/// # Errors
/// Says what does not fit.
pub fn create_second(tables: u64, bytes: u64, nested: &Nested, leaf: Level) -> Result<SecondSpace, Error> {
    let own_bytes = nested.own_table_bytes(leaf);
    let pool = pool(tables, bytes);
    let (own, rest) = pool.split_at_mut_checked((own_bytes / PAGE_SIZE) as usize).ok_or(Error::PoolExhausted(0))?;
    let pages = nested.map.l2_pages();
    // To L2 its pages are one slot.
    let slot = Slot { base: Gfn(L2_BASE.0), pages, first_page: 0 };
    let pml4 = paging::build(own, tables, core::iter::once(slot), leaf)?;
    // SAFETY: L2's tables map that many pages, and nobody but L2 gets this.
    let tracked = unsafe { Tracked::mapped(pages) };
    Ok(SecondSpace { pml4, tracked, nested: rest, nested_address: tables + own_bytes })
}

/// Loads CR3, by the one gate that leads from ring 3 to ring 0, and returns the tracked memory. Panics if vCPU 0 has not created the
/// address space.
#[must_use]
pub fn enter() -> Tracked {
    let pml4 = PML4.load(Acquire);
    assert!(pml4 != 0, "vCPU 0 has not built the page tables");
    // SAFETY: the stub is MOV CR3, RDI and IRETQ, and these tables map the system slot as those before did.
    unsafe { core::arch::asm!("int {vector}", vector = const LOAD_CR3, in("rdi") pml4) };
    // SAFETY: these tables map that many pages.
    unsafe { Tracked::mapped(PAGES.load(Relaxed)) }
}

/// The first word of frame `frame`, read at its own address. Panics beyond the low memory that is mapped so.
#[must_use]
pub fn first_word(frame: Gfn) -> u64 {
    assert!(frame.address() < layout::SYSTEM_LIMIT, "frame {frame} is not mapped at its own address");
    // SAFETY: mapped and readable; volatile, because it may be an alias of tracked memory.
    unsafe { core::ptr::with_exposed_provenance::<u64>(frame.address() as usize).read_volatile() }
}

/// Reads each of the `bytes` from `address` on once a page, so that whoever maps them for this CPU has done so. Panics beyond the low memory
/// that is mapped at its own addresses.
pub fn touch(address: u64, bytes: u64) {
    for page in (address..address + bytes).step_by(PAGE_SIZE as usize) {
        let _ = first_word(Gfn::containing(page));
    }
}
