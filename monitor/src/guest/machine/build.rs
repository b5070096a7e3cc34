//! From a plan to a machine whose vCPUs stand at the firmware's entry.

use super::Machine;
use crate::guest::plan::{Plan, SystemPlace};
use crate::guest::{Error, Image};
use crate::kvm::registers::{LongMode, Table};
use crate::kvm::ring::Rings;
use crate::kvm::stats::Stats;
use crate::kvm::vcpu::{Below, Vcpu, VcpuThread};
use crate::kvm::{self, Backing, Vm};
use crate::nested;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, Msrs, kvm_mp_state, kvm_msr_entry, kvm_regs};
use kvm_ioctls::{VcpuFd, VmFd};
use std::sync::{Arc, Mutex};
use umbra_shared::layout::vcpu_area;
use umbra_shared::protocol::ENTERED_BY_MONITOR;
use umbra_shared::smm;

impl Machine {
    pub(super) fn unbooted(
        plan: &Plan,
        ring_entries: Option<u32>,
        prepare: impl FnOnce(&VmFd) -> Result<(), kvm::Error>,
    ) -> Result<Self, Error> {
        let kvm = kvm::vm::open()?;
        let place = SystemPlace::new(plan)?;
        // L2's VM maps all of L1's memory.
        let system = if plan.shadow.is_some() { plan.backing } else { Backing::Anonymous };
        let vm = Vm::new(&kvm, (place.bytes, system), plan.slots.iter().copied(), plan.backing, prepare)?;
        plan.image.write_to(vm.system())?;
        let l2 = plan.shadow.as_ref().map(|options| nested::Host::new(&vm, options)).transpose()?;

        let rings = ring_entries.map(|entries| {
            let mut slots = vec![(0, 0)];
            slots.extend(plan.slots.iter().map(|slot| (slot.first_page, slot.pages)));
            (entries, Rings::new(Arc::clone(vm.fd()), slots, plan.map().l1_pages()))
        });
        let cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm::vm::failed("KVM_GET_SUPPORTED_CPUID"))?;
        if plan.irqchip {
            vm.fd().create_irq_chip().map_err(kvm::vm::failed("KVM_CREATE_IRQCHIP"))?;
        }
        let vcpus = (0..plan.vcpus)
            .map(|index| create_vcpu(&vm, plan, index, &cpuid))
            .collect::<Result<Vec<_>, kvm::Error>>()?;
        let stats = open_stats(&vm, &vcpus);
        let tsc_khz = vcpus.first().and_then(|vcpu| vcpu.get_tsc_khz().ok()).unwrap_or(0);
        let rings = rings
            .map(|(entries, mut rings)| {
                vcpus.iter().try_for_each(|vcpu| rings.add(vcpu, entries))?;
                Ok::<_, kvm::Error>(Arc::new(Mutex::new(rings)))
            })
            .transpose()?;
        place.write_boot_page(vm.system(), plan, tsc_khz)?;

        let (report, stops) = crossbeam::channel::unbounded();
        let threads = vcpus
            .into_iter()
            .enumerate()
            .map(|(index, fd)| {
                let below = match &l2 {
                    Some(l2) => Some(Box::new(l2.vcpu(index, &cpuid)?) as Box<dyn Below>),
                    None => None,
                };
                let (timer, rings, bus) = (plan.timer, rings.clone(), plan.bus.clone());
                VcpuThread::start(Vcpu { index, fd, timer, rings, below, bus }, report.clone())
            })
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            threads,
            stops,
            image: Arc::clone(&plan.image),
            rings,
            clock: plan.timer.clock(),
            patience: plan.patience,
            stats,
            tsc_khz,
            journals: place.journals,
            l2,
            vm,
        })
    }
}

fn create_vcpu(vm: &Vm, plan: &Plan, index: usize, cpuid: &CpuId) -> Result<VcpuFd, kvm::Error> {
    let vcpu = vm.fd().create_vcpu(index as u64).map_err(kvm::vm::failed("KVM_CREATE_VCPU"))?;
    vcpu.set_cpuid2(cpuid).map_err(kvm::vm::failed("KVM_SET_CPUID2"))?;
    set_registers(&vcpu, index, &plan.image)?;
    if plan.smm.is_some() {
        set_smbase(&vcpu, index)?;
    }
    if plan.irqchip {
        // All but the first would wait for a start-up IPI.
        let running = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
        vcpu.set_mp_state(running).map_err(kvm::vm::failed("KVM_SET_MP_STATE"))?;
    }
    Ok(vcpu)
}

/// Of the VM, then of each vCPU; on kernels before 5.14 what debugfs has of them, if it is there.
fn open_stats(vm: &Vm, vcpus: &[VcpuFd]) -> Vec<Stats> {
    let all = std::iter::once(Stats::open(&**vm.fd())).chain(vcpus.iter().map(Stats::open));
    all.collect::<Result<_, _>>().unwrap_or_else(|_| Stats::in_debugfs(&**vm.fd()).into_iter().collect())
}

/// The state in which the firmware expects to be entered: ring 0, on the image's own page tables.
fn set_registers(vcpu: &VcpuFd, index: usize, image: &Image) -> Result<(), kvm::Error> {
    let registers = kvm_regs {
        rip: image.entry,
        rdi: ENTERED_BY_MONITOR,
        rsi: index as u64,
        rsp: vcpu_area(index) + vcpu_area::STACK_TOP,
        // Bit 1 is always set (SDM 1, 3.4.3).
        rflags: 2,
        ..kvm_regs::default()
    };
    let state = LongMode {
        cr3: image.boot_tables,
        ring: 0,
        selectors: [0x8, 0x10, 0],
        task: Table { base: 0, limit: 0x67 },
        gdt: None,
        idt: None,
        registers,
    };
    state.load(vcpu)
}

/// SMBASE, where a firmware's own relocation would leave it (Intel SDM 3C, 32.11; the register is the host's to write alone).
fn set_smbase(vcpu: &VcpuFd, index: usize) -> Result<(), kvm::Error> {
    const MSR_IA32_SMBASE: u32 = 0x9e;
    let entry = kvm_msr_entry { index: MSR_IA32_SMBASE, data: smm::smbase(index), ..kvm_msr_entry::default() };
    let refused = || kvm::Error::Memory("one register does not fit a list of registers".into());
    let msrs = Msrs::from_entries(&[entry]).map_err(|_| refused())?;
    match vcpu.set_msrs(&msrs).map_err(kvm::vm::failed("KVM_SET_MSRS"))? {
        1 => Ok(()),
        _ => Err(kvm::Error::Capability {
            capability: "MSR_IA32_SMBASE",
            consequence: "each vCPU needs an SMRAM of its own".into(),
        }),
    }
}
