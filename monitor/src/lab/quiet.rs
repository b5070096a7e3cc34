//! What a kernel does of itself, whether there is something to do or not, and how the lab keeps it out of what is measured.

use super::plan;
use crate::failure::Failure;
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use vmm_sys_util::ioctl_iow_nr;

/// Asks for quiet. What a kernel does not have, it does not do.
///
/// # Errors
/// A setting that is there cannot be written.
pub fn ask() -> Result<(), Failure> {
    khugepaged()?;
    // Adding up the counters of memory every second, and thinking about compaction every half.
    for (setting, value) in [("stat_interval", "86400"), ("compaction_proactiveness", "0")] {
        let _ = std::fs::write(Path::new("/proc/sys/vm").join(setting), value);
    }
    // DAMON's statistics (Linux 6.17, on by default in Debian's 7.x) sample pages every few milliseconds: 10,000 to 28,000 instructions a time.
    let _ = std::fs::write("/sys/module/damon_stat/parameters/enabled", "N");
    // Programs lie at random places, whatever the image: a mapping across two page tables instead of one costs 5,000 more where it is first touched.
    let _ = std::fs::write("/proc/sys/kernel/randomize_va_space", "0");
    seed();
    Ok(())
}

/// khugepaged scans when the first process with room for a huge page appears, drains every CPU's page lists for it, and does so again
/// every ten seconds: in the middle of whatever is measured then. So that first process is PID 1, before the wait for an idle machine, and the
/// next scan is far away. Huge pages at a fault, which `thp` is about, are not its work.
fn khugepaged() -> Result<(), Failure> {
    const INTERVAL: &str = "/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs";
    if !Path::new(INTERVAL).exists() {
        return Ok(());
    }
    std::fs::write(INTERVAL, u32::MAX.to_string())
        .map_err(|error| Failure::Check(format!("inside the lab: {INTERVAL}: {error}")))?;
    let room = vec![1_u8; 2 * usize::try_from(plan::HUGE).unwrap_or(0)];
    // Kept, since an empty list is what wakes it.
    std::hint::black_box(Box::leak(room.into_boxed_slice()));
    Ok(())
}

/// `struct rand_pool_info` (include/uapi/linux/random.h) with as much as any kernel's pool wants.
#[repr(C)]
struct Entropy {
    bits: libc::c_int,
    bytes: libc::c_int,
    words: [u32; 16],
}

// Its number names the two integers alone.
ioctl_iow_nr!(RNDADDENTROPY, b'R' as u32, 0x03, [libc::c_int; 2]);

/// Tells the kernel that its random numbers are random enough. Until it believes so, each refill of its stock hashes the whole pool, 13,000 instructions
/// that fall into whichever slab or mapping takes the stock's last number. Nothing in the lab is secret, and the same seed makes runs equal.
fn seed() {
    let seed = Entropy { bits: 512, bytes: 64, words: [0; 16] };
    if let Ok(random) = File::options().write(true).open("/dev/urandom") {
        // SAFETY: the kernel reads the header and, as that says, the 64 bytes behind it, which are the rest of `seed`.
        unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY(), &raw const seed) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_is_the_kernels() {
        assert_eq!((RNDADDENTROPY(), size_of::<Entropy>()), (0x4008_5203, 72));
    }
}
