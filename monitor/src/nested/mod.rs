//! L2 without hardware nesting: L1 builds EPT12 and rings a doorbell ([`umbra_shared::control`]); the monitor runs L2 on a second VM, whose
//! memory slots are windows of host addresses. The shadow MMU (umbra-mmu) turns EPT12 into EPT02, and EPT02 becomes effective by mapping L1's
//! memory into the windows.
//!
//! ```text
//!  L2 touches a page that no mapping is for
//!    |  KVM_RUN of L2's VM fails                        vcpu.rs
//!    |  where was it?                                   source/
//!    v
//!  Mmu::fault --- EPT12 does not permit it -----------> control page, L1 goes on
//!    |  EPT12 permits it: Mapper::map, protect, unmap
//!    v
//!  windows: mmap of L1's memfd, extents of it           windows.rs
//!    |
//!    v  KVM_RUN of L2's VM again
//! ```

mod audit;
mod gather;
pub mod log;
mod mapper;
pub mod means;
pub mod memory;
pub mod places;
mod reserve;
mod roots_log;
mod shadow;
mod slots;
pub mod source;
mod vcpu;
mod watch;
mod window;
pub mod windows;

pub use means::{Means, Mechanism};
pub use roots_log::{Life, RootsLog};
pub use shadow::Shadow;
pub use vcpu::L2Vcpu;

use crate::kvm::ring::DEFAULT_ENTRIES;
use crate::kvm::{self, Error, Vm};
use kvm_bindings::CpuId;
use kvm_ioctls::VcpuFd;
use memory::L1Pages;
use source::Kind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
pub use umbra_mmu::RootPolicy;

/// How an L2 is run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How its writes are tracked.
    pub means: Means,
    /// The fault source.
    pub source: Kind,
    /// Pages that one fault may map.
    pub extent: u32,
    /// Copies of huge leaves that `twin` may hold.
    pub twins: u32,
    /// Single pages will change: no mapping is to cover 2 MiB.
    pub pieces: bool,
    /// What becomes of roots that L2 is not on.
    pub roots: RootPolicy,
    /// What becomes of them is logged ([`Shadow::log`]).
    pub log_roots: bool,
    /// What KVM's log makes of pages that L2 reads first.
    pub first_reads: FirstReads,
}

/// What KVM's log of L2's VM makes of a page that is first mapped by a read, while it logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstReads {
    /// It was not written. The first write to each page that is mapped while KVM logs costs a fault of the host's for that.
    Exact,
    /// It counts as written, as in any VM of KVM's.
    Counted,
}

/// An L2: what its vCPUs and its trackers share.
///
/// Field order matters: the VMs are closed before what their slots lie on.
pub struct Host {
    memory: Arc<L1Pages>,
    shadow: Mutex<Shadow>,
    /// An L2 that is kicked next is given back to its L1.
    expelled: AtomicBool,
}

impl Host {
    /// Makes L2's first VM, beside `vm`, which is L1's.
    ///
    /// # Errors
    /// [`Error::Capability`] for what this host lacks; else the system's.
    pub fn new(vm: &Vm, options: &Options) -> Result<Arc<Self>, Error> {
        let memory = Arc::new(L1Pages::shared(vm)?);
        let shadow = Shadow::new(Arc::clone(&memory), options)?;
        Ok(Arc::new(Self { memory, shadow: Mutex::new(shadow), expelled: AtomicBool::new(false) }))
    }

    /// Makes vCPU `index` of L2, which runs on the thread of L1's.
    ///
    /// # Errors
    /// The system's.
    pub fn vcpu(self: &Arc<Self>, index: usize, cpuid: &CpuId) -> Result<L2Vcpu, Error> {
        L2Vcpu::new(Arc::clone(self), index, cpuid)
    }

    /// Makes vCPU `index` of the VM of a place.
    ///
    /// # Errors
    /// The system's.
    fn vcpu_at(&self, place: usize, index: usize, cpuid: &CpuId) -> Result<VcpuFd, Error> {
        let mut shadow = self.shadow()?;
        let Some(place) = shadow.places.get_mut(place) else { return Err(Error::Memory("L2 has no such VM".into())) };
        let fd = place.vm().create_vcpu(index as u64).map_err(kvm::vm::failed("KVM_CREATE_VCPU"))?;
        fd.set_cpuid2(cpuid).map_err(kvm::vm::failed("KVM_SET_CPUID2"))?;
        if let Some(rings) = &mut place.rings {
            rings.add(&fd, DEFAULT_ENTRIES)?;
        }
        Ok(fd)
    }

    /// An L2 whose vCPU is kicked from now on ends for its L1 ([`umbra_shared::control::Exit::Ended`]), once.
    pub fn expel(&self) {
        self.expelled.store(true, Ordering::Release);
    }

    /// L1's memory.
    #[must_use]
    pub const fn memory(&self) -> &Arc<L1Pages> {
        &self.memory
    }

    /// The shadow MMU and its windows, for one at a time.
    ///
    /// # Errors
    /// [`Error::Memory`] if a thread panicked while it had them.
    pub fn shadow(&self) -> Result<MutexGuard<'_, Shadow>, Error> {
        self.shadow.lock().map_err(|_| Error::Memory("the shadow MMU is lost with the thread that held it".into()))
    }
}
