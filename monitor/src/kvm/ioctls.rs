//! The ioctls that kvm-ioctls does not have, or has only with an allocation in every call; and a counter of KVM's tracepoints.
//!
//! Numbers and structures: Linux, include/uapi/linux/kvm.h; semantics: Documentation/virt/kvm/api.rst, 4.8, 4.117, 4.127
//! and 4.133.

use kvm_bindings::{
    KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1,
};
use rustix::process::Pid;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr};

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);
ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, PreFaultMemory);

/// `struct kvm_pre_fault_memory`.
#[repr(C)]
struct PreFaultMemory {
    gpa: u64,
    size: u64,
    flags: u64,
    padding: [u64; 5],
}

/// `KVM_PRE_FAULT_MEMORY` (api.rst, 4.143): maps `size` bytes from `gpa` on as the guest's reads would.
///
/// # Errors
/// The system's.
pub fn pre_fault_memory(vcpu: &impl AsRawFd, gpa: u64, size: u64) -> io::Result<()> {
    let mut range = PreFaultMemory { gpa, size, flags: 0, padding: [0; 5] };
    while range.size > 0 {
        // SAFETY: the structure has the layout that the call reads and writes; what it maps is what a fault of the guest would map.
        let result = check(unsafe { ioctl_with_mut_ref(vcpu, KVM_PRE_FAULT_MEMORY(), &mut range) });
        match result {
            // It did a part, and says which is left.
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// `struct kvm_signal_mask`, with the kernel's set of signals behind it.
#[repr(C)]
struct SignalMask {
    length: u32,
    signals: [u32; 2],
}

ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, u32);

/// `KVM_SET_SIGNAL_MASK` (api.rst, 4.27): the signals that are blocked while the vCPU runs, signal 1 in bit 0.
///
/// # Errors
/// The system's.
#[allow(clippy::cast_possible_truncation)] // The two halves.
pub fn set_signal_mask(vcpu: &impl AsRawFd, blocked: u64) -> io::Result<()> {
    let mask = SignalMask { length: 8, signals: [blocked as u32, (blocked >> 32) as u32] };
    // SAFETY: the call reads the length, and as many bytes behind it.
    check(unsafe { ioctl_with_ptr(vcpu, KVM_SET_SIGNAL_MASK(), &raw const mask) })?;
    Ok(())
}

/// 64-bit words of a bitmap that KVM may write for a slot of `pages`.
#[allow(clippy::cast_possible_truncation)] // usize has 64 bits on the one target there is.
pub const fn bitmap_words(pages: u64) -> usize {
    pages.div_ceil(64) as usize
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// `KVM_GET_DIRTY_LOG` of a slot of `pages` into `bitmap`.
///
/// # Errors
/// The system's, and `InvalidInput` if `bitmap` is too small for the slot.
pub fn get_dirty_log(vm: &impl AsRawFd, slot: u32, pages: u64, bitmap: &mut [u64]) -> io::Result<()> {
    if bitmap.len() < bitmap_words(pages) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let log = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.as_mut_ptr().cast() },
    };
    // SAFETY: KVM writes one bit for each page of the slot, rounded up to 64; the bitmap has that many words.
    check(unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &log) })?;
    Ok(())
}

/// `KVM_CLEAR_DIRTY_LOG` of `pages` pages from `first` on. `bitmap` begins with the bit of page `first`.
///
/// # Errors
/// The system's (`first` must be a multiple of 64, and `pages` too unless it reaches the slot's end), and `InvalidInput` if
/// `bitmap` is shorter than `pages`.
pub fn clear_dirty_log(vm: &impl AsRawFd, slot: u32, first: u64, pages: u32, bitmap: &[u64]) -> io::Result<()> {
    if bitmap.len() < bitmap_words(u64::from(pages)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let clear = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page: first,
        // KVM only reads the bitmap (api.rst, 4.117), so the cast to *mut is never used to write.
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.as_ptr().cast_mut().cast() },
    };
    // SAFETY: KVM reads one bit for each of `pages`, rounded up to 64; the bitmap has that many words.
    check(unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &clear) })?;
    Ok(())
}

/// `KVM_RESET_DIRTY_RINGS`: gives all harvested entries of all rings back. Returns how many.
///
/// # Errors
/// The system's.
pub fn reset_dirty_rings(vm: &impl AsRawFd) -> io::Result<u64> {
    // SAFETY: the call takes no argument.
    let count = check(unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) })?;
    Ok(count.unsigned_abs().into())
}

/// `struct perf_event_attr` (`include/uapi/linux/perf_event.h`) as far as its first version goes.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PerfEventAttr {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    breakpoint_kind: u32,
    config1: u64,
}

const PERF_TYPE_TRACEPOINT: u32 = 2;
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;
ioctl_iow_nr!(PERF_EVENT_IOC_SET_FILTER, 0x24, 6, usize);

/// `PERF_SAMPLE_TIME` and `PERF_SAMPLE_RAW`.
const PERF_SAMPLE_TIME_RAW: u64 = 1 << 2 | 1 << 10;
ioctl_io_nr!(PERF_EVENT_IOC_SET_OUTPUT, 0x24, 5);

/// A counter of a tracepoint's hits on one thread, of those that pass the filter if there is one (`perf_event_open(2)`).
///
/// # Errors
/// The system's: the user may not, there is no such thread, or the filter is none.
pub fn tracepoint_counter(number: u64, thread: Pid, filter: Option<&str>) -> io::Result<File> {
    let attr = PerfEventAttr { config: number, ..PerfEventAttr::default() };
    perf_event(&attr, libc::c_long::from(thread.as_raw_nonzero().get()), -1, filter)
}

/// A recorder of a tracepoint's hits on one CPU, each with time and fields, of those that pass the filter if there is one.
///
/// # Errors
/// As [`tracepoint_counter`].
pub fn tracepoint_recorder(number: u64, cpu: u32, filter: Option<&str>) -> io::Result<File> {
    let attr = PerfEventAttr {
        config: number,
        sample_period: 1,
        sample_type: PERF_SAMPLE_TIME_RAW,
        ..PerfEventAttr::default()
    };
    perf_event(&attr, -1, cpu.into(), filter)
}

/// Lets `recorder` write into the ring of another one of its CPU, which is mapped.
///
/// # Errors
/// The system's.
pub fn share_ring(recorder: &File, other: &File) -> io::Result<()> {
    let other = libc::c_ulong::try_from(other.as_raw_fd()).map_err(io::Error::other)?;
    // SAFETY: the call takes a descriptor, which is open.
    check(unsafe { ioctl_with_val(recorder, PERF_EVENT_IOC_SET_OUTPUT(), other) })?;
    Ok(())
}

/// Opens an event of a tracepoint, of a thread or (-1) of all, on a CPU or (-1) on all.
fn perf_event(attr: &PerfEventAttr, thread: libc::c_long, cpu: i64, filter: Option<&str>) -> io::Result<File> {
    const SIZE: u32 = 64;
    const { assert!(size_of::<PerfEventAttr>() == SIZE as usize) };
    let attr = PerfEventAttr { kind: PERF_TYPE_TRACEPOINT, size: SIZE, ..*attr };
    let no_group = -1_i64;
    // SAFETY: `attr` has the size that it says; the kernel only reads it.
    let fd = unsafe {
        libc::syscall(libc::SYS_perf_event_open, &raw const attr, thread, cpu, no_group, PERF_FLAG_FD_CLOEXEC)
    };
    let fd = check(fd.try_into().map_err(io::Error::other)?)?;
    // SAFETY: the kernel has just made this descriptor for us.
    let file = unsafe { File::from_raw_fd(fd) };
    if let Some(filter) = filter {
        let filter = CString::new(filter)?;
        // SAFETY: the kernel copies the string, which ends with a zero byte.
        check(unsafe { ioctl_with_ptr(&file, PERF_EVENT_IOC_SET_FILTER(), filter.as_ptr()) })?;
    }
    Ok(file)
}

/// `PERF_SAMPLE_RAW`, and the flag `disabled` of a `perf_event_attr`.
const SAMPLE_RAW: u64 = 1 << 10;
const FLAG_DISABLED: u64 = 1;
ioctl_io_nr!(PERF_EVENT_IOC_ENABLE, 0x24, 0);
ioctl_io_nr!(PERF_EVENT_IOC_DISABLE, 0x24, 1);

/// An event that records each hit of a tracepoint on the calling thread, once it is enabled (`perf_event_open(2)`).
///
/// # Errors
/// The system's: the user may not.
pub fn tracepoint_sampler(number: u64) -> io::Result<File> {
    let attr = PerfEventAttr {
        kind: PERF_TYPE_TRACEPOINT,
        size: 64,
        config: number,
        sample_period: 1,
        sample_type: SAMPLE_RAW,
        flags: FLAG_DISABLED,
        ..PerfEventAttr::default()
    };
    let (this_thread, any_cpu, no_group) = (0_i64, -1_i64, -1_i64);
    // SAFETY: `attr` has the size that it says; the kernel only reads it.
    let fd = unsafe {
        libc::syscall(libc::SYS_perf_event_open, &raw const attr, this_thread, any_cpu, no_group, PERF_FLAG_FD_CLOEXEC)
    };
    let fd = check(fd.try_into().map_err(io::Error::other)?)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Lets an event record, or not.
///
/// # Errors
/// The system's.
pub fn enable_event(event: &File, on: bool) -> io::Result<()> {
    // SAFETY: the calls take no argument but a flag, 0.
    check(unsafe { ioctl(event, if on { PERF_EVENT_IOC_ENABLE() } else { PERF_EVENT_IOC_DISABLE() }) })?;
    Ok(())
}

/// `KVM_GET_STATS_FD` of a VM or vCPU.
///
/// # Errors
/// The system's; ENOTTY before Linux 5.14.
pub fn stats_file(fd: &impl AsRawFd) -> io::Result<File> {
    // SAFETY: the call takes no argument.
    let stats = check(unsafe { ioctl(fd, KVM_GET_STATS_FD()) })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { File::from_raw_fd(stats) })
}
