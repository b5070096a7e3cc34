//! A VM and its memory slots.

use super::log::SlotBitmap;
use super::memory::HostMemory;
use super::{Backing, Error};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::sync::Arc;
use umbra_shared::layout::Slot;
use umbra_shared::smm::{self, SMRAM};
use umbra_shared::{Gfn, PAGE_SIZE};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// Where KVM on Intel without unrestricted guests keeps its real-mode TSS; nothing else is near.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// Where a slot is while it is away: beyond all tracked slots (32 of them, less than 1 TiB in all), within the 40 address bits that every CPU has.
const MOVED_TO: u64 = 1 << 39;
/// Slot id of the system slot; tracked slots follow it.
const SYSTEM_SLOT: u32 = 0;
/// What a slot's id has beside its number in the view that SMM has (api.rst, 4.35).
const SMM_VIEW: u32 = 1 << 16;
/// What everybody finds where SMRAM is, once it is closed.
pub const CLOSED_SMRAM: u8 = 0xc5;

/// A tracked slot and its memory.
#[derive(Debug)]
pub struct TrackedSlot {
    /// KVM's slot id.
    pub id: u32,
    /// Where it lies in the guest.
    pub place: Slot,
    /// What backs it.
    pub memory: Arc<HostMemory>,
}

/// A VM with a system slot and tracked slots.
///
/// Field order matters: the descriptor is closed before the memory under it goes.
pub struct Vm {
    fd: Arc<VmFd>,
    system: GuestMemoryMmap,
    slots: Vec<TrackedSlot>,
    system_memory: Arc<HostMemory>,
    smram: Option<Smram>,
}

/// Memory that only SMM sees, at [`SMRAM`].
struct Smram {
    slot: u32,
    view: GuestMemoryMmap,
    memory: HostMemory,
}

/// A stretch of host memory as KVM gets it.
struct Region<'a> {
    slot: u32,
    base: Gfn,
    memory: &'a HostMemory,
    /// Of the memory: from this byte on, so many.
    from: u64,
    bytes: u64,
    flags: u32,
}

/// Opens /dev/kvm.
///
/// # Errors
/// [`Error::NoDevice`], [`Error::Permission`], or the system's.
pub fn open() -> Result<Kvm, Error> {
    Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => Error::NoDevice,
        libc::EACCES | libc::EPERM => Error::Permission,
        _ => Error::call("opening /dev/kvm", std::io::Error::from_raw_os_error(error.errno())),
    })
}

/// A call of kvm-ioctls that failed.
pub(crate) fn failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |error| Error::call(what, std::io::Error::from_raw_os_error(error.errno()))
}

/// A VM without slots.
///
/// # Errors
/// The system's.
pub fn create(kvm: &Kvm) -> Result<VmFd, Error> {
    let fd = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    fd.set_tss_address(TSS_ADDRESS).map_err(failed("KVM_SET_TSS_ADDR"))?;
    Ok(fd)
}

impl Vm {
    /// Makes a VM. `prepare` may enable capabilities before there is a slot or vCPU.
    ///
    /// # Errors
    /// The system's, those of `prepare`, and [`Error::Memory`].
    pub fn new(
        kvm: &Kvm,
        (system_bytes, system_backing): (u64, Backing),
        slots: impl Iterator<Item = Slot>,
        backing: Backing,
        prepare: impl FnOnce(&VmFd) -> Result<(), Error>,
    ) -> Result<Self, Error> {
        let fd = create(kvm)?;
        prepare(&fd)?;
        let system_memory = Arc::new(HostMemory::new(system_bytes, system_backing)?);
        let slots = slots
            .zip(SYSTEM_SLOT + 1..)
            .map(|(place, id)| {
                let memory = Arc::new(HostMemory::new(place.pages * PAGE_SIZE, backing)?);
                Ok(TrackedSlot { id, place, memory })
            })
            .collect::<Result<Vec<_>, Error>>()?;
        let vm = Self { fd: Arc::new(fd), system: view(&system_memory, 0)?, slots, system_memory, smram: None };
        vm.set_region(SYSTEM_SLOT, Gfn(0), &vm.system_memory, 0)?;
        for slot in &vm.slots {
            vm.set_region(slot.id, slot.place.base, &slot.memory, 0)?;
        }
        Ok(vm)
    }

    fn set_region(&self, slot: u32, base: Gfn, memory: &HostMemory, flags: u32) -> Result<(), Error> {
        self.set_part(&Region { slot, base, memory, from: 0, bytes: memory.len() as u64, flags })
    }

    fn set_part(&self, part: &Region) -> Result<(), Error> {
        let &Region { slot, base, memory, from, bytes, flags } = part;
        if from.checked_add(bytes).is_none_or(|end| end > memory.len() as u64) {
            return Err(Error::Memory(format!("{bytes} bytes from {from:#x} on are beyond the memory's end")));
        }
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: base.address(),
            memory_size: bytes,
            userspace_addr: memory.as_ptr() as u64 + from,
        };
        // SAFETY: the memory is mapped and has that many bytes there, and lives until after the descriptor is closed (see the struct's field order).
        unsafe { self.fd.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))
    }

    /// Closes SMRAM, `bytes` from [`SMRAM`] on, in which the firmware has installed its handler: from now on SMM has a view of the slots. If it is
    /// its own, SMRAM is other memory there, with what the firmware left; everybody else finds [`CLOSED_SMRAM`] in its place.
    ///
    /// # Errors
    /// The system's, and [`Error::Memory`].
    pub fn close_smram(&mut self, view_of: smm::View, bytes: u64) -> Result<(), Error> {
        let system = &self.system_memory;
        let end = system.len() as u64;
        let part = |slot: u32, from: u64, to: u64| Region {
            slot: slot | SMM_VIEW,
            base: Gfn::containing(from),
            memory: system,
            from,
            bytes: to - from,
            flags: 0,
        };
        let next = SYSTEM_SLOT + 1 + u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
        let above = SMRAM + bytes;
        match view_of {
            smm::View::Shared => self.set_part(&part(SYSTEM_SLOT, 0, end))?,
            smm::View::Own => {
                self.set_part(&part(SYSTEM_SLOT, 0, SMRAM))?;
                self.set_part(&part(next, above, end))?;
            }
        }
        for slot in &self.slots {
            self.set_region(slot.id | SMM_VIEW, slot.place.base, &slot.memory, 0)?;
        }
        if view_of == smm::View::Own {
            let lost = |error: vm_memory::GuestMemoryError| Error::Memory(format!("SMRAM: {error}"));
            let memory = HostMemory::new(bytes, Backing::Anonymous)?;
            let mut content = vec![0; memory.len()];
            self.system.read_slice(&mut content, GuestAddress(SMRAM)).map_err(lost)?;
            let smram = Smram { slot: (next + 1) | SMM_VIEW, view: view(&memory, SMRAM)?, memory };
            smram.view.write_slice(&content, GuestAddress(SMRAM)).map_err(lost)?;
            content.fill(CLOSED_SMRAM);
            self.system.write_slice(&content, GuestAddress(SMRAM)).map_err(lost)?;
            self.set_region(smram.slot, Gfn::containing(SMRAM), &smram.memory, 0)?;
            self.smram = Some(smram);
        }
        Ok(())
    }

    /// Switches dirty logging of SMM's own memory on. Nothing happens where it has none.
    ///
    /// # Errors
    /// The system's.
    pub fn log_smram(&self) -> Result<(), Error> {
        let Some(smram) = &self.smram else { return Ok(()) };
        self.set_region(smram.slot, Gfn::containing(SMRAM), &smram.memory, KVM_MEM_LOG_DIRTY_PAGES)
    }

    /// A bitmap for the pages of SMM's own memory; `None` where it has none.
    #[must_use]
    pub fn smram_bitmap(&self) -> Option<SlotBitmap> {
        self.smram.as_ref().map(|smram| SlotBitmap::new(smram.slot, smram.memory.len() as u64 / PAGE_SIZE))
    }

    /// SMRAM as SMM sees it: memory of its own, or everybody's.
    #[must_use]
    pub fn smram(&self) -> &GuestMemoryMmap {
        self.smram.as_ref().map_or(&self.system, |smram| &smram.view)
    }

    /// Switches dirty logging of all tracked slots on or off.
    ///
    /// # Errors
    /// The system's.
    pub fn log_dirty_pages(&self, on: bool) -> Result<(), Error> {
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        self.slots.iter().try_for_each(|slot| self.set_region(slot.id, slot.place.base, &slot.memory, flags))
    }

    /// Takes tracked slot `index` away from the guest (KVM drops every mapping of the VM), and gives it back at the same place. The memory stays.
    ///
    /// # Errors
    /// The system's.
    pub fn delete_and_restore(&self, index: usize) -> Result<(), Error> {
        let slot = &self.slots[index];
        self.delete_region(slot.id)?;
        self.set_region(slot.id, slot.place.base, &slot.memory, 0)
    }

    /// Moves tracked slot `index` to [`MOVED_TO`], where no slot is, and back.
    ///
    /// # Errors
    /// The system's.
    pub fn move_and_restore(&self, index: usize) -> Result<(), Error> {
        let slot = &self.slots[index];
        let beyond = Gfn::containing(MOVED_TO);
        self.set_region(slot.id, beyond, &slot.memory, 0)?;
        self.set_region(slot.id, slot.place.base, &slot.memory, 0)
    }

    fn delete_region(&self, slot: u32) -> Result<(), Error> {
        let region = kvm_userspace_memory_region { slot, ..kvm_userspace_memory_region::default() };
        // SAFETY: a slot without memory; KVM forgets the mapping.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))
    }

    /// Gives all tracked pages their host memory. Only before the guest has written any.
    pub fn populate(&self) {
        self.slots.iter().for_each(|slot| slot.memory.populate());
    }

    /// The descriptor.
    #[must_use]
    pub const fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// The system slot's memory.
    #[must_use]
    pub const fn system(&self) -> &GuestMemoryMmap {
        &self.system
    }

    /// The system slot's memory as the host has it.
    #[must_use]
    pub const fn system_memory(&self) -> &Arc<HostMemory> {
        &self.system_memory
    }

    /// The tracked slots.
    #[must_use]
    pub fn slots(&self) -> &[TrackedSlot] {
        &self.slots
    }

    /// The slot of tracked page `page`.
    #[must_use]
    pub fn slot_of(&self, page: u64) -> Option<&TrackedSlot> {
        self.slots.iter().find(|slot| (slot.place.first_page..slot.place.first_page + slot.place.pages).contains(&page))
    }

    /// The first word of tracked page `page`; `None` beyond the last.
    #[must_use]
    pub fn first_word(&self, page: u64) -> Option<u64> {
        let slot = self.slot_of(page)?;
        slot.memory.first_word(page - slot.place.first_page)
    }
}

impl Vm {
    /// A hash of what tracked page `page` holds, which the guest may be writing; `None` beyond the last.
    #[must_use]
    pub fn hash(&self, page: u64) -> Option<u64> {
        let slot = self.slot_of(page)?;
        slot.memory.hash(page - slot.place.first_page)
    }
}

/// Memory as vm-memory sees it, at `base` in the guest.
fn view(memory: &HostMemory, base: u64) -> Result<GuestMemoryMmap, Error> {
    let refused = || Error::Memory("a slot does not fit the guest's address space".into());
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: the mapping has this length, is readable and writable, and outlives the view (field order of `Vm`).
    let region =
        unsafe { MmapRegion::build_raw(memory.as_ptr(), memory.len(), libc::PROT_READ | libc::PROT_WRITE, flags) }
            .map_err(|_| refused())?;
    let region = GuestRegionMmap::new(region, GuestAddress(base)).ok_or_else(refused)?;
    GuestMemoryMmap::from_regions(vec![region]).map_err(|_| refused())
}

/// A VM with one vCPU that does nothing, for as long as this lives.
///
/// KVM patches its own and the scheduler's code when the first VM or the first vCPU without an in-kernel APIC appears and when the last one goes
/// (`preempt_notifier_key`, `kvm_has_noapic_vcpu`). Rows make and drop machines, so without a resident one each row would stop all CPUs for
/// that; and QEMU's multi-threaded emulation now and then runs into the breakpoint of such a patch (`int3` in `__schedule`, seen with 7.2).
pub struct Resident {
    _vcpu: VcpuFd,
    _vm: VmFd,
}

impl Resident {
    /// Makes it.
    ///
    /// # Errors
    /// The system's.
    pub fn new() -> Result<Self, Error> {
        let vm = open()?.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        let vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
        Ok(Self { _vcpu: vcpu, _vm: vm })
    }
}

/// What the VM answers for capability `cap` (`KVM_CHECK_EXTENSION`): 0 if it has none.
#[must_use]
pub fn offered(vm: &VmFd, cap: u32) -> u64 {
    u64::try_from(vm.check_extension_raw(cap.into())).unwrap_or(0)
}

/// Enables a capability with one argument.
///
/// # Errors
/// [`Error::Capability`] with `consequence` if the kernel refuses it.
pub fn enable(vm: &VmFd, cap: u32, name: &'static str, argument: u64, consequence: &str) -> Result<(), Error> {
    let enable = kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..kvm_enable_cap::default() };
    vm.enable_cap(&enable).map_err(|_| Error::Capability { capability: name, consequence: consequence.to_owned() })
}
