//! The firmware, but every plan of vCPU 0 lacks its last write: checks of what it wrote have to fail with it.
#![no_std]
#![no_main]

use umbra_guest_fw::workload::{self, Conduct};

/// Where the boot code leads.
#[unsafe(no_mangle)]
extern "C" fn runtime_entry(_argc: i32, _argv: *const *const u8, _env: *const *const u8) -> ! {
    workload::run(Conduct::OneWriteShort)
}
