//! The functions of `hermit-abi` that the firmware defines: output, time, memory, exit.
//!
//! A program that uses others does not link, which says more than a function that fails. Errors are negative `errno` values, as
//! Hermit returns them. What is unsafe here is that the interface is C's: callers answer for their pointers.

pub mod memory;
pub mod time;

use crate::console;
use hermit_abi::{EBADF, EINVAL, STDERR_FILENO, STDOUT_FILENO, iovec};

/// What `abort` exits with: 128 + SIGABRT, as a shell would say.
const ABORTED: i32 = 134;

const fn is_output(descriptor: i32) -> bool {
    matches!(descriptor, STDOUT_FILENO | STDERR_FILENO)
}

/// Prints `length` bytes; both output descriptors are the console. Returns `length`, or -EBADF.
///
/// # Safety
/// `bytes` is valid for `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sys_write(descriptor: i32, bytes: *const u8, length: usize) -> isize {
    if !is_output(descriptor) {
        return -(EBADF as isize);
    }
    if length > 0 {
        // SAFETY: the caller's.
        console::print(unsafe { core::slice::from_raw_parts(bytes, length) });
    }
    length.cast_signed()
}

/// Prints several pieces. Returns the sum of their lengths, or -EBADF or -EINVAL.
///
/// # Safety
/// `pieces` is valid for `count` entries, and each of them for its length.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sys_writev(descriptor: i32, pieces: *const iovec, count: usize) -> isize {
    if count == 0 || count > hermit_abi::IOV_MAX {
        return -(EINVAL as isize);
    }
    let mut sum = 0;
    for index in 0..count {
        // SAFETY: the caller's.
        let written = unsafe {
            let piece = &*pieces.add(index);
            sys_write(descriptor, piece.iov_base.cast(), piece.iov_len)
        };
        if written < 0 {
            return written;
        }
        sum += written;
    }
    sum
}

/// Ends the program.
#[unsafe(no_mangle)]
pub extern "C" fn sys_exit(status: i32) -> ! {
    console::exit(status)
}

/// Ends the program as a failure.
#[unsafe(no_mangle)]
pub extern "C" fn sys_abort() -> ! {
    console::exit(ABORTED)
}

/// There is one process.
#[unsafe(no_mangle)]
pub extern "C" fn sys_getpid() -> i32 {
    1
}

/// A payload runs on one vCPU; the others belong to the workload.
#[unsafe(no_mangle)]
pub extern "C" fn sys_available_parallelism() -> usize {
    1
}
