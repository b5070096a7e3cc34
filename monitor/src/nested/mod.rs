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
pub mod means;
pub mod memory;
mod reserve;
mod shadow;
mod slots;
pub mod source;
mod vcpu;
pub mod windows;

pub use means::{Means, Mechanism};
pub use shadow::Shadow;
pub use vcpu::L2Vcpu;

use crate::kvm::ring::{DEFAULT_ENTRIES, RingSet};
use crate::kvm::{self, Error, Vm};
use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VmFd};
use memory::L1Pages;
use source::Kind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

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
}

/// An L2: what its vCPUs and its trackers share.
///
/// Field order matters: the VM is closed before what its slots lie on.
pub struct Host {
    vm: Arc<VmFd>,
    memory: Arc<L1Pages>,
    shadow: Mutex<Shadow>,
    /// An L2 that is kicked next is given back to its L1.
    expelled: AtomicBool,
}

impl Host {
    /// Makes L2's VM, beside `vm`, which is L1's.
    ///
    /// # Errors
    /// [`Error::Capability`] for what this host lacks; else the system's.
    pub fn new(kvm: &Kvm, vm: &Vm, options: &Options) -> Result<Arc<Self>, Error> {
        let memory = Arc::new(L1Pages::of(vm)?);
        let l2 = Arc::new(kvm::vm::create(kvm)?);
        options.means.mechanism.prepare(&l2, options.source)?;
        let source = options.source.open()?;
        let mut shadow = Shadow::new(Arc::clone(&l2), Arc::clone(&memory), source, options)?;
        if options.means.mechanism == Mechanism::KvmRing {
            shadow.windows.rings = Some(RingSet::new(Arc::clone(&l2)));
        }
        Ok(Arc::new(Self { vm: l2, memory, shadow: Mutex::new(shadow), expelled: AtomicBool::new(false) }))
    }

    /// Makes vCPU `index` of L2, which runs on the thread of L1's.
    ///
    /// # Errors
    /// The system's.
    pub fn vcpu(self: &Arc<Self>, index: usize, cpuid: &CpuId) -> Result<L2Vcpu, Error> {
        let fd = self.vm.create_vcpu(index as u64).map_err(kvm::vm::failed("KVM_CREATE_VCPU"))?;
        fd.set_cpuid2(cpuid).map_err(kvm::vm::failed("KVM_SET_CPUID2"))?;
        if let Some(rings) = &mut self.shadow()?.windows.rings {
            rings.add(&fd, DEFAULT_ENTRIES)?;
        }
        Ok(L2Vcpu::new(Arc::clone(self), index, fd))
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
