//! Preloaded into Bochs, which seeds its random numbers from the time of day: without a seed glibc's `rand` begins with 1 in every run.
//!
//! build.rs makes a shared library of this file alone; nothing of the C library or of Rust's comes along.

#![no_std]

/// C's `srand`, without its effect.
// SAFETY: the name is meant to take the place of glibc's, whose signature this is.
#[unsafe(no_mangle)]
pub extern "C" fn srand(_seed: core::ffi::c_uint) {}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // Nothing here panics.
    loop {}
}
