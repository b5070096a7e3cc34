//! KVM's tracepoint `kvm_page_fault`, on one thread and only while it is armed: the guest physical address of a fault that KVM cannot resolve,
//! which `KVM_RUN`'s EFAULT does not tell.
//!
//! Layout: `perf_event_open(2)`; the fields' offsets are the tracepoint's `format` file's.

use super::{Error, ioctls};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::fs;
use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

const DIRECTORY: &str = "/sys/kernel/tracing/events/kvm/kvm_page_fault";
/// Bytes of the ring behind its control page: a power of two of pages.
const RING: usize = 4096;
/// More than one record takes.
const RECORD: usize = 256;
/// `PERF_RECORD_SAMPLE`.
const RECORD_SAMPLE: u32 = 9;
/// Offsets in `struct perf_event_mmap_page`.
const DATA_HEAD: usize = 1024;
const DATA_TAIL: usize = 1032;

/// Bits of the error code (Linux, `PFERR_*`; AMD APM 2, 15.25.6): the access was a write; the processor was walking the guest's own tables.
const ERROR_WRITE: u64 = 1 << 1;
const ERROR_TABLE_WALK: u64 = 1 << 33;

/// Where the fields of a record are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fields {
    number: u64,
    address: usize,
    error: (usize, usize),
}

/// A guest's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traced {
    /// Guest physical address.
    pub address: u64,
    /// It wrote.
    pub write: bool,
    /// The processor was walking the guest's own tables.
    pub table_walk: bool,
}

/// What the tracepoint's `format` file says of a field: its offset and size.
fn field(format: &str, name: &str) -> Option<(usize, usize)> {
    let line = format.lines().find(|line| {
        let declared = line.trim().strip_prefix("field:").and_then(|rest| rest.split(';').next());
        declared.is_some_and(|declared| declared.split_whitespace().last() == Some(name))
    })?;
    let number = |key: &str| line.split(';').find_map(|part| part.trim().strip_prefix(key)?.parse().ok());
    Some((number("offset:")?, number("size:")?))
}

/// Whether this user may trace KVM's faults here.
///
/// # Errors
/// [`Error::Capability`] with what is missing: tracefs, the tracepoint, or the right to perf events.
pub fn check() -> Result<(), Error> {
    FaultTrace::open().map(|_| ())
}

fn fields() -> Result<Fields, Error> {
    let read = |file: &str| {
        fs::read_to_string(format!("{DIRECTORY}/{file}")).map_err(|error| Error::Capability {
            capability: "the tracepoint kvm_page_fault",
            consequence: format!("{DIRECTORY}: {error} (mount tracefs, or use userfaultfd)"),
        })
    };
    let (format, number) = (read("format")?, read("id")?);
    let parsed = number.trim().parse().ok().zip(field(&format, "fault_address")).zip(field(&format, "error_code"));
    let Some(((number, (address, 8)), error)) = parsed else {
        return Err(Error::Capability {
            capability: "the tracepoint kvm_page_fault",
            consequence: "its format has no fault_address and error_code".into(),
        });
    };
    Ok(Fields { number, address, error })
}

/// The tracepoint on the thread that opened it.
#[derive(Debug)]
pub struct FaultTrace {
    event: File,
    ring: NonNull<u8>,
    fields: Fields,
}

// SAFETY: the ring belongs to this value.
unsafe impl Send for FaultTrace {}

impl FaultTrace {
    /// Opens it for the calling thread, not armed.
    ///
    /// # Errors
    /// As [`check`].
    pub fn open() -> Result<Self, Error> {
        let fields = fields()?;
        let event = ioctls::tracepoint_sampler(fields.number).map_err(|error| Error::Capability {
            capability: "perf events",
            consequence: format!("perf_event_open: {error} (be root, or lower kernel.perf_event_paranoid)"),
        })?;
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel likes; the control page and the ring behind it.
        let ring = unsafe { mmap(std::ptr::null_mut(), 4096 + RING, rights, MapFlags::SHARED, &event, 0) }
            .map_err(|error| Error::call("mapping a perf event's ring", error))?;
        let ring = NonNull::new(ring.cast()).ok_or_else(|| Error::Memory("a ring at address 0".into()))?;
        Ok(Self { event, ring, fields })
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: all offsets lie in the control page or in the ring, aligned; the kernel changes one of them meanwhile.
        unsafe { AtomicU64::from_ptr(self.ring.as_ptr().add(offset).cast()) }
    }

    /// `bytes` bytes of the ring, at most 8, counted from the begin of all records.
    fn number(&self, at: u64, bytes: usize) -> u64 {
        let word = |at: u64| {
            // The kernel has written it before it moved the head.
            self.word(4096 + (usize::try_from(at % RING as u64).unwrap_or(0) & !7)).load(Ordering::Relaxed)
        };
        let skipped = at % 8 * 8;
        let mut value = word(at) >> skipped;
        if skipped > 0 && at % 8 + bytes as u64 > 8 {
            value |= word(at + 8) << (64 - skipped);
        }
        if bytes >= 8 { value } else { value & ((1 << (8 * bytes)) - 1) }
    }

    /// Begins to record.
    ///
    /// # Errors
    /// The system's.
    pub fn arm(&self) -> io::Result<()> {
        self.forget();
        ioctls::enable_event(&self.event, true)
    }

    /// Ends it.
    ///
    /// # Errors
    /// The system's.
    pub fn disarm(&self) -> io::Result<()> {
        ioctls::enable_event(&self.event, false)
    }

    /// Forgets what was recorded. No call of the kernel's.
    pub fn forget(&self) {
        let head = self.word(DATA_HEAD).load(Ordering::Acquire);
        self.word(DATA_TAIL).store(head, Ordering::Release);
    }

    /// The last fault that was recorded since [`Self::forget`]. `None` if there was none, or if the ring may have had no room for it.
    #[must_use]
    pub fn last(&self) -> Option<Traced> {
        let head = self.word(DATA_HEAD).load(Ordering::Acquire);
        let mut at = self.word(DATA_TAIL).load(Ordering::Relaxed);
        if head - at > (RING - RECORD) as u64 {
            return None;
        }
        let mut last = None;
        while at < head {
            // struct perf_event_header: type, misc, size.
            let (kind, size) = (self.number(at, 4), self.number(at + 6, 2));
            if size < 8 {
                break;
            }
            if kind == u64::from(RECORD_SAMPLE) {
                // Behind the header the raw record's size, then the record.
                let raw = at + 12;
                let address = self.number(raw + self.fields.address as u64, 8);
                let error = self.number(raw + self.fields.error.0 as u64, self.fields.error.1);
                let table_walk = error & ERROR_TABLE_WALK != 0;
                last = Some(Traced { address, write: error & ERROR_WRITE != 0, table_walk });
            }
            at += size;
        }
        last
    }
}

impl Drop for FaultTrace {
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        let result = unsafe { munmap(self.ring.as_ptr().cast(), 4096 + RING) };
        debug_assert!(result.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_name() {
        let format = "name: kvm_page_fault\nID: 7\nformat:\n\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\n\
                      \tfield:unsigned int vcpu_id;\toffset:8;\tsize:4;\tsigned:0;\n\
                      \tfield:u64 fault_address;\toffset:24;\tsize:8;\tsigned:0;\n";
        assert_eq!(field(format, "fault_address"), Some((24, 8)));
        assert_eq!(field(format, "vcpu_id"), Some((8, 4)));
        assert_eq!(field(format, "error_code"), None);
    }

    #[test]
    fn a_host_without_it_says_what_is_missing() {
        if let Err(error) = check() {
            assert!(matches!(error, Error::Capability { .. }), "{error}");
        }
    }
}
