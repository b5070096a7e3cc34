//! A program written to `hermit-abi` alone that reads where nothing is: vector 14, CR2 = [`NOWHERE`], RIP in `read_nowhere`.
#![no_std]
#![no_main]

use hermit_abi::STDOUT_FILENO;
// Only for its boot code and the definitions behind hermit-abi.
use umbra_guest_fw as _;

/// Canonical, and mapped by nobody.
const NOWHERE: usize = 0x7000_0000_0000;

/// A symbol for the report.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn read_nowhere() -> u64 {
    // SAFETY: none; the fault is the purpose, and reading has no other effect.
    unsafe { core::ptr::with_exposed_provenance::<u64>(NOWHERE).read_volatile() }
}

/// Where the boot code leads.
#[unsafe(no_mangle)]
extern "C" fn runtime_entry(_argc: i32, _argv: *const *const u8, _env: *const *const u8) -> ! {
    const TEXT: &[u8] = b"about to read nowhere\n";
    // SAFETY: a slice is valid for its length.
    unsafe { hermit_abi::write(STDOUT_FILENO, TEXT.as_ptr(), TEXT.len()) };
    let word = read_nowhere();
    // SAFETY: takes a number.
    unsafe { hermit_abi::exit(i32::from(word != 0)) }
}
