//! Memory for payloads: one region of the image, outside everything that is tracked.

use crate::arch::lock::Lock;
use crate::heap::Heap;
use core::cell::UnsafeCell;
use hermit_abi::{EINVAL, ENOMEM};
use umbra_shared::PAGE_SIZE;

const PAGE: usize = PAGE_SIZE as usize;
/// Bytes of the region.
pub const REGION_BYTES: usize = 256 << 10;
/// Free spans that the books have lines for.
const SPANS: usize = 256;

#[repr(C, align(4096))]
struct Region(UnsafeCell<[u8; REGION_BYTES]>);

// SAFETY: HEAP gives each byte to one owner at a time.
unsafe impl Sync for Region {}

static REGION: Region = Region(UnsafeCell::new([0; REGION_BYTES]));
static HEAP: Lock<Heap<SPANS>> = Lock::new(Heap::new(REGION_BYTES));

fn start() -> *mut u8 {
    REGION.0.get().cast()
}

/// Bytes of the smallest page.
#[unsafe(no_mangle)]
pub extern "C" fn sys_getpagesize() -> i32 {
    const { (PAGE as u32).cast_signed() }
}

/// `size` bytes aligned to `align`, a power of two of at most a page; else, or if there is no room, null.
#[unsafe(no_mangle)]
pub extern "C" fn sys_alloc(size: usize, align: usize) -> *mut u8 {
    HEAP.with(|heap| heap.take(size, align)).map_or(core::ptr::null_mut(), |offset| start().wrapping_add(offset))
}

/// As [`sys_alloc`]; the older name.
#[unsafe(no_mangle)]
pub extern "C" fn sys_malloc(size: usize, align: usize) -> *mut u8 {
    sys_alloc(size, align)
}

/// As [`sys_alloc`], all bytes zero.
#[unsafe(no_mangle)]
pub extern "C" fn sys_alloc_zeroed(size: usize, align: usize) -> *mut u8 {
    let block = sys_alloc(size, align);
    if !block.is_null() {
        // SAFETY: the block is the caller's from here on, and nobody else's.
        unsafe { block.write_bytes(0, size) };
    }
    block
}

/// Frees a block; panics if it is none.
///
/// # Safety
/// `block` came from an allocation of `size` bytes here, and is used no more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sys_dealloc(block: *mut u8, size: usize, _align: usize) {
    let offset = block.addr().wrapping_sub(start().addr());
    assert!(
        offset < REGION_BYTES && HEAP.with(|heap| heap.give(offset, size)),
        "{size} bytes at {block:p} cannot be freed"
    );
}

/// As [`sys_dealloc`]; the older name.
///
/// # Safety
/// As there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sys_free(block: *mut u8, size: usize, align: usize) {
    // SAFETY: the caller's.
    unsafe { sys_dealloc(block, size, align) }
}

/// Moves a block to one of `new_size` bytes. Null, and the old block stays, if there is no room.
///
/// # Safety
/// `block` came from an allocation of `size` bytes here, and is used no more unless null comes back.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sys_realloc(block: *mut u8, size: usize, align: usize, new_size: usize) -> *mut u8 {
    let new = sys_alloc(new_size, align);
    if !new.is_null() {
        // SAFETY: both blocks are allocated, and so do not overlap.
        unsafe {
            new.copy_from_nonoverlapping(block, size.min(new_size));
            sys_dealloc(block, size, align);
        }
    }
    new
}

/// `size` bytes of whole pages, zeroed, into `block`. All memory here can be read, written and executed, so `_protection` is granted
/// whatever it is. Returns 0, -EINVAL or -ENOMEM.
#[unsafe(no_mangle)]
pub extern "C" fn sys_mmap(size: usize, _protection: u32, block: &mut *mut u8) -> i32 {
    let Some(bytes) = size.checked_next_multiple_of(PAGE).filter(|&bytes| bytes > 0) else { return -EINVAL };
    let pages = sys_alloc_zeroed(bytes, PAGE);
    if pages.is_null() {
        return -ENOMEM;
    }
    *block = pages;
    0
}

/// Unmaps whole pages. Returns 0 or -EINVAL.
///
/// # Safety
/// They came from [`sys_mmap`] and are used no more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sys_munmap(block: *mut u8, size: usize) -> i32 {
    let offset = block.addr().wrapping_sub(start().addr());
    let bytes = size.checked_next_multiple_of(PAGE).filter(|&bytes| bytes > 0);
    match bytes {
        Some(bytes)
            if offset < REGION_BYTES && offset.is_multiple_of(PAGE) && HEAP.with(|heap| heap.give(offset, bytes)) =>
        {
            0
        }
        _ => -EINVAL,
    }
}
