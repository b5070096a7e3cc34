//! KVM's binary statistics (Documentation/virt/kvm/api.rst, 4.133; since Linux 5.14), and what older kernels have of them in debugfs.

use super::{Error, ioctls};
use crate::host;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// The scalar statistics of one VM or vCPU: names and places are read once, values whenever asked.
#[derive(Debug)]
pub enum Stats {
    /// The binary ones.
    Binary {
        /// All of it.
        file: File,
        /// Name and offset in the file.
        places: Vec<(String, u64)>,
    },
    /// Those of a whole VM before Linux 5.14: each a file, by the name that it has today.
    Files(Vec<(&'static str, PathBuf)>),
}

/// Files of debugfs (5.10: arch/x86/kvm/x86.c, `debugfs_entries`) that count what binary statistics count too. There `largepages` are those
/// of 2 MiB and of 1 GiB, which only the older MMU counts; `pf_taken` has no counterpart.
const IN_DEBUGFS: &[(&str, &str)] =
    &[("pages_2m", "largepages"), ("pf_fixed", "pf_fixed"), ("remote_tlb_flush", "remote_tlb_flush")];

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
        Ok(Self::Binary { file, places })
    }

    /// Finds the statistics of a VM in debugfs: a directory that is named after the process and its descriptor.
    #[must_use]
    pub fn in_debugfs(vm: &impl AsRawFd) -> Option<Self> {
        let name = format!("{}-{}", std::process::id(), vm.as_raw_fd());
        let directory = PathBuf::from("/sys/kernel/debug/kvm").join(name);
        let files = IN_DEBUGFS.iter().map(|&(name, file)| (name, directory.join(file)));
        let uncounted = host::two_dimensional_paging() && host::parameter("kvm", "tdp_mmu").is_some_and(|on| on == "Y");
        let files: Vec<_> = files.filter(|(name, file)| file.exists() && !(uncounted && *name == "pages_2m")).collect();
        (!files.is_empty()).then_some(Self::Files(files))
    }

    /// All values now.
    ///
    /// # Errors
    /// The system's.
    pub fn read(&self) -> Result<BTreeMap<String, u64>, Error> {
        let unreadable = |source| Error::Call { what: "reading KVM's statistics", source };
        match self {
            Self::Binary { file, places } => {
                let value = |(name, offset): &(String, u64)| {
                    let mut value = [0; 8];
                    file.read_exact_at(&mut value, *offset).map_err(unreadable)?;
                    Ok((name.clone(), u64::from_ne_bytes(value)))
                };
                places.iter().map(value).collect()
            }
            Self::Files(files) => {
                let value = |(name, file): &(&str, PathBuf)| {
                    let text = std::fs::read_to_string(file).map_err(unreadable)?;
                    let value = text.trim().parse().map_err(|error| unreadable(std::io::Error::other(error)))?;
                    Ok(((*name).to_owned(), value))
                };
                files.iter().map(value).collect()
            }
        }
    }
}
