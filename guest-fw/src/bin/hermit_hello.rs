//! A small program written to `hermit-abi` alone: it prints, allocates, reads the time, and exits with code 7.
#![no_std]
#![no_main]

use hermit_abi::{CLOCK_MONOTONIC, STDOUT_FILENO, timespec};
// Only for its boot code and the definitions behind hermit-abi.
use umbra_guest_fw as _;

fn print(text: &[u8]) {
    // SAFETY: a slice is valid for its length.
    unsafe { hermit_abi::write(STDOUT_FILENO, text.as_ptr(), text.len()) };
}

/// Whether memory can be had, holds what is written to it, is aligned, and can be given back.
fn memory_works() -> bool {
    const WORDS: usize = 1000;
    // SAFETY: the block is used inside its size, and given back as it was taken.
    unsafe {
        #[allow(clippy::cast_ptr_alignment)] // Asked for, and checked.
        let block = hermit_abi::alloc(WORDS * 8, 64).cast::<u64>();
        if block.is_null() || block.addr() % 64 != 0 {
            return false;
        }
        for index in 0..WORDS {
            block.add(index).write_volatile(index as u64 * 3);
        }
        let held = (0..WORDS).all(|index| block.add(index).read_volatile() == index as u64 * 3);
        hermit_abi::dealloc(block.cast(), WORDS * 8, 64);

        let mut pages = core::ptr::null_mut();
        let mapped = hermit_abi::mmap(8192, hermit_abi::PROT_READ | hermit_abi::PROT_WRITE, &mut pages) == 0;
        held && mapped && pages.add(8191).read_volatile() == 0 && hermit_abi::munmap(pages, 8192) == 0
    }
}

/// Whether time goes on, by at least as much as the program waits.
fn time_works() -> bool {
    let now = || {
        let mut time = timespec::default();
        // SAFETY: a reference is valid.
        let result = unsafe { hermit_abi::clock_gettime(CLOCK_MONOTONIC, &raw mut time) };
        (result == 0).then_some(time.tv_sec * 1_000_000_000 + i64::from(time.tv_nsec))
    };
    let before = now();
    // SAFETY: takes a number.
    unsafe { hermit_abi::usleep(200) };
    before.zip(now()).is_some_and(|(before, after)| after - before >= 200_000)
}

/// Where the boot code leads.
#[unsafe(no_mangle)]
extern "C" fn runtime_entry(argc: i32, _argv: *const *const u8, _env: *const *const u8) -> ! {
    print(b"hello from a hermit-abi program\n");
    let memory = memory_works();
    print(if memory { b"memory: yes\n" } else { b"memory: no\n" });
    let time = time_works();
    print(if time { b"time: yes\n" } else { b"time: no\n" });
    // SAFETY: takes a number.
    unsafe { hermit_abi::exit(if argc == 1 && memory && time { 7 } else { 1 }) }
}
