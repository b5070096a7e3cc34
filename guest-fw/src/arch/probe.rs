//! The probe: one page that L2 reaches by four entries of EPT12 that are for this alone ([`umbra_shared::violation`]).
//!
//! All of it lies in the image, at its physical address; every access is volatile, since processor and host read and write here too.

use core::cell::UnsafeCell;
use umbra_shared::paging::{ADDRESS_MASK, ENTRIES, long};
use umbra_shared::violation::{Access, Case, DATA_OFFSET, ENTRY_OFFSET, PROBE, PROBE_DATA, PROBE_TABLE};
use umbra_shared::{Level, PAGE_SIZE};

#[repr(C, align(4096))]
struct Page([u64; ENTRIES]);

/// L2's three tables below its PML4, EPT12's three below its root, and the page.
#[repr(C)]
struct Pages(UnsafeCell<[Page; 7]>);

// SAFETY: words that are only read and written whole and volatile.
unsafe impl Sync for Pages {}

static PAGES: Pages = Pages(UnsafeCell::new([const { Page([0; ENTRIES]) }; 7]));

const OF_L2: usize = 0;
const OF_TABLE12: usize = 3;
const PAGE: usize = 6;
/// `ret`.
const RETURN: u64 = 0xc3;
/// Present, writable, a user's, accessed; dirty.
const LEAF: u64 = long::PRESENT | long::WRITE | long::USER | long::ACCESSED | long::DIRTY;

fn address_of(page: usize) -> u64 {
    PAGES.0.get() as u64 + page as u64 * PAGE_SIZE
}

/// The word at the physical address `address`.
///
/// # Safety
/// It is one of [`PAGES`], or of a table that the caller may change.
unsafe fn word(address: u64) -> *mut u64 {
    core::ptr::with_exposed_provenance_mut(address as usize)
}

/// Entry `index` of the table at `table`.
const fn at(table: u64, index: u64) -> u64 {
    table + index % ENTRIES as u64 * 8
}

/// Where the probe is in L2's physical space.
#[must_use]
pub fn l2_address() -> u64 {
    PROBE | address_of(PAGE)
}

/// Fills the page and L2's own tables for it, below its PML4 at `pml4`.
///
/// # Safety
/// L2 does not run, and that is its PML4.
pub unsafe fn prepare(pml4: u64) {
    let (pointers, directory, table) = (address_of(OF_L2), address_of(OF_L2 + 1), address_of(OF_L2 + 2));
    let page = address_of(PAGE);
    for (place, value) in [
        (page, RETURN),
        // What PROBE_TABLE leads to in the end: the same page, where everybody may read it.
        (page + ENTRY_OFFSET, page | LEAF),
        (at(pml4, PROBE_DATA >> 39), pointers | LEAF),
        (at(pointers, PROBE_DATA >> 30), directory | LEAF),
        (at(directory, PROBE_DATA >> 21), table | LEAF),
        (at(table, PROBE_DATA >> 12), l2_address() | LEAF),
        (at(directory, PROBE_TABLE >> 21), l2_address() | LEAF),
    ] {
        // SAFETY: the caller's, and our own pages. D in an entry that leads to a table is ignored.
        unsafe { word(place).write_volatile(value) };
    }
}

/// The entry of `level` in EPT12 with its root at `root`, and what it leads to when the leaf is at `leaf`.
fn place(root: u64, level: Level, leaf: Level) -> (u64, u64) {
    let l2 = l2_address();
    let depth = (Level::T512 as u64 - level as u64) as usize;
    let table = if depth == 0 { root } else { address_of(OF_TABLE12 + depth - 1) };
    let to = if level == leaf {
        address_of(PAGE) & ADDRESS_MASK & !(level.bytes() - 1)
    } else {
        address_of(OF_TABLE12 + depth)
    };
    (at(table, l2 >> level.shift()), to)
}

/// Writes the four entries (fewer with larger leaves): the case's, or such that permit everything.
///
/// # Safety
/// L2 does not run, and EPT12's root is at `root`.
pub unsafe fn set(root: u64, case: &Case, permissive: bool) {
    for level in [Level::T512, Level::G1, Level::M2, Level::K4].into_iter().filter(|level| *level >= case.leaf) {
        let (place, to) = place(root, level, case.leaf);
        let entry = if permissive { case.permissive(level, to) } else { case.entry(level, to) };
        // SAFETY: the caller's, and our own pages.
        unsafe { word(place).write_volatile(entry) };
    }
}

/// The entry that the case is about, as it is now.
///
/// # Safety
/// EPT12's root is at `root`.
#[must_use]
pub unsafe fn entry(root: u64, case: &Case) -> u64 {
    // SAFETY: the caller's, and our own pages.
    unsafe { word(place(root, case.at, case.leaf).0).read_volatile() }
}

/// Makes the access.
///
/// # Safety
/// Only L2 may call it, after [`prepare`].
pub unsafe fn access(access: Access) {
    let data = PROBE_DATA + DATA_OFFSET;
    // SAFETY: L2's tables map both addresses, and nothing else is there. At the page's begin is `ret`.
    unsafe {
        match access {
            Access::Read => {
                let _ = word(data).read_volatile();
            }
            Access::Write => word(data).write_volatile(0),
            Access::Execute => core::arch::asm!("call {}", in(reg) PROBE_DATA, clobber_abi("C")),
            Access::Walk => {
                let _ = word(PROBE_TABLE).read_volatile();
            }
        }
    }
}
