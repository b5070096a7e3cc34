//! GDT and TSS, complete at link time: [`TASK_STATES`] has a fixed address (see `link.ld`), so its descriptors are constants.
//!
//! Intel SDM 3A, 3.4.5 and 8.2.3 (descriptors), 8.7 (64-bit TSS); AMD APM 2, 4.8 and 12.2.5. One GDT serves all vCPUs: LTR marks
//! a TSS descriptor busy, so each vCPU has its own.

use super::port::USER_PORTS;
use umbra_shared::layout::{self, MAX_VCPUS, vcpu_area};
use umbra_shared::protocol::DOORBELL_PORT;
use x86_64::VirtAddr;
use x86_64::structures::gdt::DescriptorFlags;
use x86_64::structures::tss::TaskStateSegment;

/// Selector of ring 0's code segment.
pub const KERNEL_CODE: u16 = 0x08;
/// Selector of ring 3's data segment, with its RPL.
#[cfg_attr(test, allow(dead_code))]
pub const USER_DATA: u16 = 0x18 | 3;
/// Selector of ring 3's code segment, with its RPL.
#[cfg_attr(test, allow(dead_code))]
pub const USER_CODE: u16 = 0x20 | 3;
/// Selector of ring 0's data segment.
pub const KERNEL_DATA: u16 = 0x10;
/// Selector of ring 0's 32-bit code segment: the way out of long mode leads through it.
pub const KERNEL_CODE_32: u16 = 0x28;
/// Selector of vCPU 0's TSS; the others follow, 16 bytes each.
pub const FIRST_TSS: u16 = 0x30;

/// `link.ld` puts the TSSs here.
const TASK_STATES_ADDRESS: u64 = layout::IMAGE_START + 0x1000;

/// The IST entry of everything that has none of its own below.
pub const IST_GENERAL: u8 = 1;
/// The IST entry of #DF, which may come while another exception is being delivered.
pub const IST_DOUBLE_FAULT: u8 = 2;
/// The IST entry of NMI.
pub const IST_NMI: u8 = 3;
/// The IST entry of #MC.
pub const IST_MACHINE_CHECK: u8 = 4;
const IST_STACKS: usize = 4;

/// Ports up to this one have a bit in the permission bitmap; none above it can be used at ring 3.
const PORTS: usize = (DOORBELL_PORT as usize + 4).next_multiple_of(8);

/// A TSS, then its I/O permission bitmap (SDM 1, 19.5.2): a clear bit opens a port to ring 3. The CPU reads two bytes at a time, so one
/// byte of ones follows.
///
/// With IOPL 3 nobody looks at the bitmap. But a PVM host drops IOPL on the way to ring 3, and there the bitmap is what counts.
#[derive(Clone, Copy)]
#[repr(C, packed(4))]
pub struct TaskState {
    state: TaskStateSegment,
    closed_ports: [u8; PORTS / 8 + 1],
}

const fn task_state(vcpu: usize) -> TaskState {
    let mut state = TaskStateSegment::new();
    let top = vcpu_area(vcpu) + vcpu_area::IST_STACKS_TOP;
    let mut index = 0;
    while index < IST_STACKS {
        state.interrupt_stack_table[index] = VirtAddr::new(top - index as u64 * vcpu_area::IST_STACK_BYTES);
        index += 1;
    }
    // Every gate uses an IST stack; RSP0 is set all the same, to the general one.
    state.privilege_stack_table[0] = VirtAddr::new(top);
    // `TaskStateSegment::new` lets the bitmap begin at its own end.
    let mut closed_ports = [0xff; PORTS / 8 + 1];
    let mut range = 0;
    while range < USER_PORTS.len() {
        let (mut port, last) = USER_PORTS[range];
        while port <= last {
            closed_ports[port as usize / 8] &= !(1 << (port % 8));
            port += 1;
        }
        range += 1;
    }
    TaskState { state, closed_ports }
}

/// The task states, in the one page that `link.ld` has for them. The CPU only reads them.
#[cfg_attr(not(test), unsafe(no_mangle), unsafe(link_section = ".umbra.tss"))]
#[allow(non_upper_case_globals)] // An assembler symbol, for link.ld.
pub static task_states: [TaskState; MAX_VCPUS] = {
    assert!(size_of::<[TaskState; MAX_VCPUS]>() <= 4096);
    let mut states = [task_state(0); MAX_VCPUS];
    let mut vcpu = 0;
    while vcpu < MAX_VCPUS {
        states[vcpu] = task_state(vcpu);
        vcpu += 1;
    }
    states
};

/// An available 64-bit TSS descriptor (SDM 3A, figure 8-4): type 9, present, byte limit.
const fn tss_descriptor(base: u64) -> [u64; 2] {
    let limit = size_of::<TaskState>() as u64 - 1;
    let low = limit | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
    [low, base >> 32]
}

const ENTRIES: usize = FIRST_TSS as usize / 8 + 2 * MAX_VCPUS;

/// The GDT as it lies in memory. In `.data`, because the CPU sets busy and accessed bits.
#[repr(C, align(16))]
pub struct Gdt([u64; ENTRIES]);

/// The one GDT.
#[cfg_attr(not(test), unsafe(link_section = ".umbra.tables"))]
pub static GDT: Gdt = {
    let mut entries = [0; ENTRIES];
    entries[1] = DescriptorFlags::KERNEL_CODE64.bits();
    entries[2] = DescriptorFlags::KERNEL_DATA.bits();
    entries[3] = DescriptorFlags::USER_DATA.bits();
    entries[4] = DescriptorFlags::USER_CODE64.bits();
    entries[5] = DescriptorFlags::KERNEL_CODE32.bits();
    let mut vcpu = 0;
    while vcpu < MAX_VCPUS {
        let Task { selector, base, .. } = task(vcpu);
        let at = selector as usize / 8;
        [entries[at], entries[at + 1]] = tss_descriptor(base);
        vcpu += 1;
    }
    Gdt(entries)
};

/// A vCPU's TSS as TR holds it.
#[derive(Clone, Copy, Debug)]
pub struct Task {
    /// Its selector.
    pub selector: u16,
    /// Where it lies.
    pub base: u64,
    /// Its bytes, less one.
    pub limit: u32,
}

/// The TSS of vCPU `vcpu`.
pub const fn task(vcpu: usize) -> Task {
    let size = size_of::<TaskState>();
    let selector = FIRST_TSS + 16 * vcpu as u16;
    Task { selector, base: TASK_STATES_ADDRESS + (vcpu * size) as u64, limit: size as u32 - 1 }
}

/// What LGDT and LIDT load (SDM 3A, figure 2-6).
#[repr(C, packed)]
pub struct Pointer<T: 'static> {
    /// Bytes of the table, less one.
    pub limit: u16,
    /// Where it lies.
    pub base: &'static T,
}

/// For LGDT.
pub static GDT_POINTER: Pointer<Gdt> = Pointer { limit: size_of::<Gdt>() as u16 - 1, base: &GDT };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tss_descriptor_is_laid_out_as_the_manual_says() {
        let limit = size_of::<TaskState>() as u64 - 1;
        assert_eq!(tss_descriptor(0x11_2233_4455), [0x2200_8933_4455_0000 | limit, 0x11]);
    }

    #[test]
    fn ist_stacks_lie_inside_their_area_and_apart() {
        for (vcpu, task) in task_states.iter().enumerate() {
            let area = vcpu_area(vcpu);
            let state = task.state;
            let stacks = state.interrupt_stack_table;
            for pair in stacks[..IST_STACKS].windows(2) {
                assert_eq!(pair[0].as_u64() - pair[1].as_u64(), vcpu_area::IST_STACK_BYTES);
            }
            let lowest = stacks[IST_STACKS - 1].as_u64() - vcpu_area::IST_STACK_BYTES;
            let histogram_end = vcpu_area::HISTOGRAM + size_of::<umbra_shared::histogram::Histogram>() as u64;
            assert!(lowest >= area + histogram_end);
            assert!(stacks[0].as_u64() < area + vcpu_area::STACK_TOP);
        }
    }

    #[test]
    fn ring_3_has_its_ports_and_no_others() {
        let closed = task_states[0].closed_ports;
        let open: Vec<usize> = (0..PORTS).filter(|port| closed[port / 8] >> (port % 8) & 1 == 0).collect();
        let listed: Vec<usize> = USER_PORTS.iter().flat_map(|&(first, last)| first.into()..=last.into()).collect();
        assert_eq!(open, listed);
        assert_eq!(closed[PORTS / 8], 0xff);
        let state = task_states[0].state;
        assert_eq!(usize::from(state.iomap_base), size_of::<TaskStateSegment>());
    }

    #[test]
    fn selectors_and_entries_agree() {
        let executable = 1 << 43;
        assert_ne!(GDT.0[usize::from(KERNEL_CODE / 8)] & executable, 0);
        assert_ne!(GDT.0[usize::from(USER_CODE / 8)] & executable, 0);
        assert_eq!(GDT.0[usize::from(USER_DATA / 8)] & executable, 0);
        // DPL 3 in both of ring 3's.
        assert_eq!(GDT.0[usize::from(USER_CODE / 8)] >> 45 & 3, 3);
        assert_eq!(GDT.0[usize::from(USER_DATA / 8)] >> 45 & 3, 3);
    }
}
