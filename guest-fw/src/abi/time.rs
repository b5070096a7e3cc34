//! Time for payloads: the TSC, since the firmware began.

use crate::arch::tsc;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use hermit_abi::{CLOCK_MONOTONIC, EINVAL, timespec};

const NANOSECONDS: u64 = 1_000_000_000;

static BEGIN: AtomicU64 = AtomicU64::new(0);
static KHZ: AtomicU64 = AtomicU64::new(0);

/// Begins to count. Where the frequency is unknown (0) a tick counts as a nanosecond; under QEMU's instruction clock it is one.
pub fn begin(khz: u64) {
    KHZ.store(if khz == 0 { 1_000_000 } else { khz }, Relaxed);
    BEGIN.store(tsc::now(), Relaxed);
}

/// `ticks` of `khz` thousand a second, in nanoseconds, cut to 64 bits (584 years).
const fn to_nanoseconds(ticks: u64, khz: u64) -> u64 {
    (ticks as u128 * 1_000_000 / khz as u128) as u64
}

fn nanoseconds() -> u64 {
    to_nanoseconds(tsc::now().wrapping_sub(BEGIN.load(Relaxed)), KHZ.load(Relaxed))
}

/// Reads the monotonic clock. The date is not known here: any other clock is -EINVAL.
///
/// # Safety
/// `time` is valid.
#[unsafe(no_mangle)]
#[allow(clippy::cast_possible_wrap)] // Below 2^30 and 2^35.
pub unsafe extern "C" fn sys_clock_gettime(clock: i32, time: *mut timespec) -> i32 {
    if clock != CLOCK_MONOTONIC {
        return -EINVAL;
    }
    let now = nanoseconds();
    // SAFETY: the caller's.
    unsafe { time.write(timespec { tv_sec: (now / NANOSECONDS) as i64, tv_nsec: (now % NANOSECONDS) as i32 }) };
    0
}

fn wait(length: u64) {
    let begin = nanoseconds();
    while nanoseconds().wrapping_sub(begin) < length {
        core::hint::spin_loop();
    }
}

/// Waits at least that long, on the CPU.
#[unsafe(no_mangle)]
pub extern "C" fn sys_usleep(microseconds: u64) {
    wait(microseconds.saturating_mul(1000));
}

/// Waits at least that long, on the CPU. Returns 0, or -EINVAL for a time that is none.
///
/// # Safety
/// `length` is valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sys_nanosleep(length: *const timespec) -> i32 {
    // SAFETY: the caller's.
    let length = unsafe { length.read() };
    let (Ok(seconds), Ok(rest)) = (u64::try_from(length.tv_sec), u64::try_from(length.tv_nsec)) else { return -EINVAL };
    if rest >= NANOSECONDS {
        return -EINVAL;
    }
    wait(seconds.saturating_mul(NANOSECONDS).saturating_add(rest));
    0
}

#[cfg(test)]
mod tests {
    use super::to_nanoseconds;

    #[test]
    fn ticks_become_nanoseconds_without_overflow() {
        assert_eq!(to_nanoseconds(3_000_000, 3_000_000), 1_000_000);
        assert_eq!(to_nanoseconds(u64::MAX, 1_000_000), u64::MAX);
    }
}
