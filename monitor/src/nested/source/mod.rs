//! Fault sources: how the monitor learns where L2 touched a page that it may not, and what such pages are.
//!
//! KVM does not say: `KVM_RUN` returns EFAULT, without an address (FACTS in docs/nesting.md). So a source also decides what a page of a window
//! is that nothing may reach, and how a page is made read-only: its way to learn addresses depends on both.

mod holes;
mod pages;
pub mod poison;
pub mod tracepoint;
pub mod userfault;

pub(super) use pages::{begins_with, populate};

use super::memory::InFile;
use crate::hostmm::{Hva, Stretch};
use crate::kvm::Error;
use kvm_ioctls::VcpuFd;
use std::fmt;
use std::io;
use std::str::FromStr;
use umbra_mmu::Request;

/// The sources there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Closed pages are holes. KVM's tracepoint tells the address, when the access is tried again.
    Tracepoint,
    /// Closed pages are poisoned: the access ends `KVM_RUN` with a signal that names the address.
    Poison,
    /// Closed pages belong to a userfaultfd: the vCPU thread sleeps, a second thread notes the address and makes the access fail.
    Userfault,
}

impl Kind {
    /// All of them, the cheapest first.
    pub const ALL: [Self; 3] = [Self::Tracepoint, Self::Poison, Self::Userfault];

    /// The name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tracepoint => "tracepoint",
            Self::Poison => "poison",
            Self::Userfault => "userfaultfd",
        }
    }

    /// What it is, where it is missed.
    #[must_use]
    pub const fn capability(self) -> &'static str {
        match self {
            Self::Tracepoint => "the fault source tracepoint",
            Self::Poison => "the fault source poison",
            Self::Userfault => "the fault source userfaultfd",
        }
    }

    /// Whether a write to a read-only page is told.
    #[must_use]
    pub const fn tells_writes(self) -> bool {
        !matches!(self, Self::Poison)
    }

    /// [`Kind::open`], where there may be pages that L2 may only read: `read_only` says why.
    ///
    /// # Errors
    /// [`Error::Capability`] if it cannot tell of writes to them.
    pub fn open_for(self, read_only: Option<&str>) -> Result<Box<dyn Source>, Error> {
        match read_only {
            Some(why) if !self.tells_writes() => Err(Error::Capability {
                capability: self.capability(),
                consequence: format!("it is not told of writes to read-only pages, and there are some: {why}"),
            }),
            _ => self.open(),
        }
    }

    /// Makes the source.
    ///
    /// # Errors
    /// [`Error::Capability`] if this host has it not.
    pub fn open(self) -> Result<Box<dyn Source>, Error> {
        match self {
            Self::Tracepoint => Ok(Box::new(tracepoint::Tracepoint::open()?)),
            Self::Poison => Ok(Box::new(poison::Poison::open()?)),
            Self::Userfault => Ok(Box::new(userfault::Userfaults::open()?)),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kind {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|kind| kind.name() == text).ok_or(())
    }
}

/// The first of `kinds` that this host has, and what those before it lack. With `read_only` there will be pages that L2 may only read, and why.
///
/// # Errors
/// [`Error::Capability`] if it has none.
pub fn first(kinds: &[Kind], read_only: Option<&str>) -> Result<(Kind, Vec<String>), Error> {
    if let [only] = kinds {
        return only.open_for(read_only).map(|_| (*only, Vec::new()));
    }
    let mut missing = Vec::new();
    for &kind in kinds {
        match kind.open_for(read_only) {
            Ok(_) => return Ok((kind, missing)),
            Err(error) => missing.push(format!("{kind}: {error}")),
        }
    }
    Err(Error::Capability { capability: "a fault source", consequence: missing.join("; ") })
}

/// An error as the system told it: who maps must know where there is no room for more mappings.
fn as_told(error: Error) -> io::Error {
    match error {
        Error::Call { source, .. } => source,
        other => io::Error::other(other.to_string()),
    }
}

/// An access of L2 that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The page that it touched.
    pub place: Place,
    /// Whether it wrote.
    pub write: bool,
    /// Whether the processor was walking L2's own page tables.
    pub table_walk: bool,
}

impl Fault {
    /// What the shadow MMU is asked.
    #[must_use]
    pub const fn request(&self) -> Request {
        let kind = if self.write { umbra_mmu::Kind::Write } else { umbra_mmu::Kind::Read };
        Request { table_walk: self.table_walk, ..Request::of(kind) }
    }
}

/// A page of L2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// By L2's physical address.
    Gpa(u64),
    /// By the monitor's address of a window's page.
    Hva(Hva),
}

/// What a source says after a `KVM_RUN` that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// Where.
    At(Fault),
    /// Try once more, and let KVM's tracepoint ([`crate::kvm::fault_trace`]) tell.
    Trace,
    /// Another vCPU's fault is being handled there: try again.
    Again,
    /// Nothing: this was no fault of L2's.
    Nothing,
}

/// How pages are mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// L2 may write them.
    pub writable: bool,
    /// The mapping must not become one with its neighbours (see `windows::PIECE`).
    pub alone: bool,
    /// What becomes of the host's page tables.
    pub tables: Tables,
}

/// What becomes of the host's page tables for pages that are mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tables {
    /// They are left to KVM. Where `KVM_PRE_FAULT_MEMORY` follows, that costs less than to fill them here: Linux maps 16 pages around each that KVM
    /// finds missing.
    Left,
    /// They are filled at once, as by reads. For a huge page that is cheaper than a write, which looks after the file's times as well; for either Linux
    /// takes a page table for small pages first, and gives it back (`do_fault_around` and `__do_fault` in `mm/memory.c`).
    Filled,
    /// The same, and L2's first write to each page is told from a read before it. KVM asks the host for a page with the right to write even if L2
    /// reads, and counts the page as written when it gets that. In memory that is registered for write protection it does not, protected or not.
    ToldApart {
        /// L2 may run on another vCPU meanwhile, and read the pages before they are registered.
        raced: bool,
    },
}

/// What a closed page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// Nothing is mapped there; read-only pages are mapped without the right to write.
    Hole,
    /// A page of a file that has none; read-only pages are write-protected by userfaultfd.
    Empty,
    /// The same, poisoned; read-only pages are mapped without the right to write.
    Poisoned,
}

impl Closed {
    /// The name of the file without pages.
    pub const NAME: &'static str = "umbra-closed";
}

/// A source, for all vCPUs of an L2. Stretches lie in windows, and the caller serialises the calls that change pages.
pub trait Source: Send + Sync {
    /// What its closed pages are.
    fn closed(&self) -> Closed;

    /// Takes a window into care: all its pages are closed from now on.
    ///
    /// # Errors
    /// The system's.
    fn adopt(&self, window: Stretch) -> Result<(), Error>;

    /// Nothing may reach these pages any more.
    ///
    /// # Errors
    /// The system's; ENOMEM when the process has too many mappings.
    fn close(&self, stretch: Stretch) -> io::Result<()>;

    /// The pages are `file`'s from now on.
    ///
    /// # Errors
    /// As [`Source::close`].
    fn map(&self, stretch: Stretch, file: InFile<'_>, how: Mapped) -> io::Result<()>;

    /// Mapped pages become read-only, or writable again.
    ///
    /// # Errors
    /// As [`Source::close`].
    fn protect(&self, stretch: Stretch, writable: bool) -> io::Result<()>;

    /// The calling thread is about to run L2 on `vcpu`, for the first time.
    ///
    /// # Errors
    /// The system's.
    fn enlist(&self, _vcpu: &VcpuFd) -> Result<(), Error> {
        Ok(())
    }

    /// What the calling thread's `KVM_RUN` was about when a signal ended it, if it was a fault.
    fn interrupted(&self) -> Option<Fault> {
        None
    }

    /// What it means that a `KVM_RUN` fails and the source stays silent.
    fn silence(&self) -> &'static str {
        "KVM_RUN of L2 failed (EFAULT), and the fault source knows no address"
    }

    /// What the failed `KVM_RUN` of the calling thread was about.
    fn told(&self) -> Told;

    /// A fault that [`Source::told`] named was dealt with.
    ///
    /// # Errors
    /// The system's.
    fn settled(&self, _fault: &Fault) -> io::Result<()> {
        Ok(())
    }
}
