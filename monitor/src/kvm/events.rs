//! Hits of the kernel's tracepoints, recorded with their fields: a perf event for each of them and each CPU, all of one CPU in one ring, whose
//! records are in the order in which they happened (`perf_event_open(2)`, "MMAP layout").
//!
//! Where a field lies, the event's own `format` file says, so that one reader serves all kernels that have the field.

use super::{Error, ioctls};
use std::ffi::c_void;
use std::fs;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU64, Ordering};

/// Pages of a ring's data, a power of two: 4 MiB, room for 40,000 events between two looks.
const RING_PAGES: usize = 1024;
const PAGE: usize = 4096;
/// Where `data_head` and `data_tail` are in the ring's first page (`struct perf_event_mmap_page`).
const HEAD: usize = 1024;
const TAIL: usize = 1032;
/// Types of a record (`enum perf_event_type`).
const LOST: u32 = 2;
const SAMPLE: u32 = 9;

/// An event to record: its folder below `events`, and the fields that are wanted.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// As `kvmmmu/kvm_mmu_get_page`.
    pub event: &'a str,
    /// Names of unsigned fields of 1 to 8 bytes.
    pub fields: &'static [&'static str],
    /// Which hits, by a filter on fields.
    pub filter: Option<&'a str>,
}

/// A recorded hit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Nanoseconds of the scheduler's clock.
    pub time: u64,
    /// Which of the wanted ones, by its place among them.
    pub which: usize,
    /// The fields, in the order in which they were wanted.
    pub fields: Vec<u64>,
}

/// Offset and size of a field in the raw data.
type Place = (usize, usize);

/// A wanted event as this kernel has it.
struct Format {
    number: u64,
    places: Vec<Place>,
}

/// The ring of one CPU.
struct Ring {
    address: *mut c_void,
    /// The first owns the mapping, the others write to it.
    files: Vec<File>,
}

/// What is being recorded.
pub struct Events {
    formats: Vec<Format>,
    rings: Vec<Ring>,
}

impl Events {
    /// Begins to record on all CPUs, whichever task hits.
    ///
    /// # Errors
    /// [`Error::Call`] where tracefs is not mounted, the user may not, or the kernel has no such event or field.
    pub fn record(wanted: &[Wanted]) -> Result<Self, Error> {
        let failed = |source| Error::Call { what: "recording tracepoints of KVM", source };
        let formats = wanted.iter().map(format).collect::<io::Result<Vec<_>>>().map_err(failed)?;
        let cpus = fs::read_to_string("/sys/devices/system/cpu/online").map_err(failed)?;
        let rings = list(&cpus).map(|cpu| Ring::new(cpu, wanted, &formats)).collect::<io::Result<_>>();
        Ok(Self { formats, rings: rings.map_err(failed)? })
    }

    /// Takes what was recorded since the last time, in order.
    ///
    /// # Errors
    /// [`Error::Call`] if the kernel had to leave some out.
    pub fn take(&self) -> Result<Vec<Event>, Error> {
        let mut events = Vec::new();
        for ring in &self.rings {
            for record in ring.take() {
                match record {
                    Record::Sample { time, raw } => events.extend(self.decode(time, &raw)),
                    Record::Lost => {
                        let source = io::Error::other("the ring was full, and events are lost");
                        return Err(Error::Call { what: "recording tracepoints of KVM", source });
                    }
                }
            }
        }
        events.sort_by_key(|event: &Event| event.time);
        Ok(events)
    }

    fn decode(&self, time: u64, raw: &[u8]) -> Option<Event> {
        // `common_type` comes first in every event.
        let number = u64::from(u16::from_ne_bytes(raw.get(..2)?.try_into().ok()?));
        let which = self.formats.iter().position(|format| format.number == number)?;
        let fields = self.formats[which].places.iter().map(|&place| field(raw, place)).collect::<Option<_>>()?;
        Some(Event { time, which, fields })
    }
}

/// An unsigned field; `None` beyond the data's end.
fn field(raw: &[u8], (offset, size): Place) -> Option<u64> {
    let mut bytes = [0; 8];
    bytes.get_mut(..size)?.copy_from_slice(raw.get(offset..offset.checked_add(size)?)?);
    Some(u64::from_le_bytes(bytes))
}

fn format(wanted: &Wanted) -> io::Result<Format> {
    let folder = format!("/sys/kernel/tracing/events/{}", wanted.event);
    let number = fs::read_to_string(format!("{folder}/id"))?.trim().parse().map_err(io::Error::other)?;
    let text = fs::read_to_string(format!("{folder}/format"))?;
    let places = wanted.fields.iter().map(|name| {
        place(&text, name).ok_or_else(|| io::Error::other(format!("{} has no field {name}", wanted.event)))
    });
    Ok(Format { number, places: places.collect::<io::Result<_>>()? })
}

/// Where a field lies, by a line as `field:__u32 role; offset:24; size:4; signed:0;`.
fn place(format: &str, name: &str) -> Option<Place> {
    format.lines().find_map(|line| {
        let mut parts = line.trim().strip_prefix("field:")?.split(';').map(str::trim);
        if parts.next()?.split_whitespace().next_back()? != name {
            return None;
        }
        let offset = parts.next()?.strip_prefix("offset:")?.parse().ok()?;
        let size: usize = parts.next()?.strip_prefix("size:")?.parse().ok()?;
        (1..=8).contains(&size).then_some((offset, size))
    })
}

/// The numbers of a list as `0-3,5`.
fn list(text: &str) -> impl Iterator<Item = u32> {
    text.trim()
        .split(',')
        .filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(first.parse::<u32>().ok()?..=last.parse().ok()?)
        })
        .flatten()
}

enum Record {
    Sample { time: u64, raw: Vec<u8> },
    Lost,
}

impl Ring {
    fn new(cpu: u32, wanted: &[Wanted], formats: &[Format]) -> io::Result<Self> {
        let mut files = Vec::new();
        for (wanted, format) in wanted.iter().zip(formats) {
            let file = ioctls::tracepoint_recorder(format.number, cpu, wanted.filter)?;
            files.push(file);
        }
        let Some(first) = files.first() else { return Err(io::ErrorKind::InvalidInput.into()) };
        let flags = rustix::mm::MapFlags::SHARED;
        let rights = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel likes; it replaces nothing.
        let address = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), (RING_PAGES + 1) * PAGE, rights, flags, first.as_fd(), 0)
        }?;
        let ring = Self { address, files };
        // Without a ring an event that shares it has nowhere to write to.
        for other in &ring.files[1..] {
            ioctls::share_ring(other, &ring.files[0])?;
        }
        Ok(ring)
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: an aligned word of the ring's first page, which lives as long as this; the kernel writes whole words.
        unsafe { AtomicU64::from_ptr(self.address.cast::<u8>().add(offset).cast()) }
    }

    /// Takes all records. The kernel writes nothing between tail and head.
    fn take(&self) -> Vec<Record> {
        let (head, tail) = (self.word(HEAD).load(Ordering::Acquire), self.word(TAIL).load(Ordering::Relaxed));
        let size = RING_PAGES * PAGE;
        let length = usize::try_from(head.wrapping_sub(tail)).unwrap_or(0).min(size);
        let start = usize::try_from(tail % size as u64).unwrap_or(0);
        let data: Vec<u8> = (0..length)
            // SAFETY: inside the ring's data, which follows its first page; volatile, since it is shared with the kernel.
            .map(|index| unsafe { self.address.cast::<u8>().add(PAGE + (start + index) % size).read_volatile() })
            .collect();
        self.word(TAIL).store(head, Ordering::Release);
        records(&data)
    }
}

/// Cuts records (`struct perf_event_header`: type, misc, size) of samples that hold a time and raw data (size, then bytes).
fn records(mut data: &[u8]) -> Vec<Record> {
    let mut records = Vec::new();
    while let Some((header, _)) = data.split_first_chunk::<8>() {
        let kind = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]);
        let size = usize::from(u16::from_ne_bytes([header[6], header[7]]));
        let Some((record, rest)) = data.split_at_checked(size).filter(|_| size >= 8) else { break };
        match kind {
            LOST => records.push(Record::Lost),
            SAMPLE => {
                if let (Some(time), Some(length)) = (field(record, (8, 8)), field(record, (16, 4))) {
                    let raw = record.get(20..).unwrap_or_default();
                    let length = usize::try_from(length).unwrap_or(0).min(raw.len());
                    records.push(Record::Sample { time, raw: raw[..length].to_vec() });
                }
            }
            _ => {}
        }
        data = rest;
    }
    records
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: our mapping, and nobody has a reference into it.
        let result = unsafe { rustix::mm::munmap(self.address, (RING_PAGES + 1) * PAGE) };
        debug_assert!(result.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_name() {
        let format = "name: x\nformat:\n\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\n\tfield:__u32 role;\toffset:24;\tsize:4;\tsigned:0;\n\tfield:u64 long_one[8];\toffset:32;\tsize:64;\tsigned:0;\n";
        assert_eq!(place(format, "role"), Some((24, 4)));
        assert_eq!(place(format, "common_type"), Some((0, 2)));
        assert_eq!((place(format, "rol"), place(format, "long_one[8]")), (None, None));
        assert_eq!(field(&[1, 2, 3, 4], (1, 2)), Some(0x0302));
        assert_eq!((field(&[1, 2], (1, 2)), field(&[1, 2], (usize::MAX, 2))), (None, None));
        assert_eq!(list("0-2,5\n").collect::<Vec<_>>(), [0, 1, 2, 5]);
    }

    #[test]
    fn records_are_cut_and_what_is_broken_ends_them() {
        let mut data = Vec::new();
        data.extend(9_u32.to_ne_bytes());
        data.extend([0, 0]);
        data.extend(24_u16.to_ne_bytes());
        data.extend(77_u64.to_ne_bytes());
        data.extend(4_u32.to_ne_bytes());
        data.extend([1, 2, 3, 4]);
        data.extend([2, 0, 0, 0, 0, 0, 8, 0]);
        // A size of nothing would go on for ever.
        data.extend([9, 0, 0, 0, 0, 0, 0, 0]);
        let records = records(&data);
        assert_eq!(records.len(), 2);
        assert!(matches!(&records[0], Record::Sample { time: 77, raw } if raw == &[1, 2, 3, 4]));
        assert!(matches!(records[1], Record::Lost));
    }
}
