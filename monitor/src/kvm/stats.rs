//! KVM's binary statistics (Documentation/virt/kvm/api.rst, 4.133; since Linux 5.14).

use super::{Error, ioctls};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// The scalar statistics of one VM or vCPU: names and places are read once, values whenever asked.
#[derive(Debug)]
pub struct Stats {
    file: File,
    /// Name and offset in the file.
    places: Vec<(String, u64)>,
}

/// `flags & 0xf` of a descriptor: cumulative, instant and peak are plain numbers, the others histograms.
const TYPE_MASK: u32 = 0xf;
const TYPE_PEAK: u32 = 2;
/// Bytes of `struct kvm_stats_desc` before the name.
const DESCRIPTOR_BYTES: usize = 16;

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

impl Stats {
    /// Opens the statistics of a VM or vCPU descriptor.
    ///
    /// # Errors
    /// [`Error::Capability`] on kernels without `KVM_CAP_BINARY_STATS_FD`.
    pub fn open(fd: &impl AsRawFd) -> Result<Self, Error> {
        let file = ioctls::stats_file(fd).map_err(|_| Error::Capability {
            capability: "KVM_CAP_BINARY_STATS_FD",
            consequence: "counters need Linux 5.14 or later".into(),
        })?;
        let unreadable = |source| Error::Call { what: "reading KVM's statistics", source };
        let mut header = [0; 24];
        file.read_exact_at(&mut header, 0).map_err(unreadable)?;
        let field = |index: usize| word(&header, 4 * index).unwrap_or(0) as usize;
        let (name_bytes, count, descriptors, data) = (field(1), field(2), field(4), field(5));
        let stride = DESCRIPTOR_BYTES + name_bytes;
        let mut table = vec![0; stride * count];
        file.read_exact_at(&mut table, descriptors as u64).map_err(unreadable)?;
        let places = table
            .chunks_exact(stride)
            .filter(|descriptor| word(descriptor, 0).is_some_and(|flags| flags & TYPE_MASK <= TYPE_PEAK))
            .filter_map(|descriptor| {
                let offset = word(descriptor, 8)?;
                let name = descriptor[DESCRIPTOR_BYTES..].split(|&byte| byte == 0).next()?;
                Some((String::from_utf8_lossy(name).into_owned(), data as u64 + u64::from(offset)))
            })
            .collect();
        Ok(Self { file, places })
    }

    /// All values now.
    ///
    /// # Errors
    /// The system's.
    pub fn read(&self) -> Result<BTreeMap<String, u64>, Error> {
        self.places
            .iter()
            .map(|(name, offset)| {
                let mut value = [0; 8];
                self.file
                    .read_exact_at(&mut value, *offset)
                    .map_err(|source| Error::Call { what: "reading KVM's statistics", source })?;
                Ok((name.clone(), u64::from_ne_bytes(value)))
            })
            .collect()
    }
}
