//! Umbra's own interface: the monitor runs L2, on its shadow MMU, and L1 says by a control page what L2 is ([`umbra_shared::control`]).
//!
//! L2 is the same program on tables and a stack of its own, at ring 3. Between two pieces of work it waits in a doorbell. Everything here happens
//! at ring 3: a PVM host, where ring 0 is emulated, can do it too.

use super::{gdt, idt, port, tsc, vcpu};
use crate::nested::Run;
use core::mem::offset_of;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;
use umbra_shared::control::{ControlPage, Exit, State};
use umbra_shared::layout::{MAX_VCPUS, SYSTEM_LIMIT, vcpu_area, vcpu_area as area};
use umbra_shared::nested::{Flags, L2_BASE, Nested};
use umbra_shared::protocol::Doorbell;
use umbra_shared::{L2Gfn, PAGE_SIZE};

const WORDS: usize = size_of::<ControlPage>() / 8;

/// A control page, live: the monitor reads and writes it while L1 waits in a doorbell, L2 reads its work.
struct LiveControl([AtomicU64; WORDS]);

impl LiveControl {
    fn of(index: usize) -> &'static Self {
        assert!(index < MAX_VCPUS, "vCPU {index} has no control page");
        let address = vcpu_area(index) + area::CONTROL;
        // SAFETY: the page is in the system slot, mapped at its own address here and in L2, and holds nothing else. All of its bytes are
        // valid atomics, and whoever shares it uses whole words.
        unsafe { &*core::ptr::with_exposed_provenance(address as usize) }
    }

    /// The word at an offset of [`ControlPage`].
    fn word(&self, offset: usize) -> &AtomicU64 {
        &self.0[offset / 8]
    }

    fn put(&self, page: &ControlPage) {
        let words: [u64; WORDS] = zerocopy::transmute!(*page);
        for (live, word) in self.0.iter().zip(words) {
            live.store(word, Relaxed);
        }
    }
}

/// The L2 of one vCPU.
pub struct L2 {
    control: &'static LiveControl,
}

/// L2's state when it begins: as this vCPU's, but for tables, stack and place.
fn state(vcpu: usize, pml4: u64) -> State {
    let (gdt, idt) = (&gdt::GDT_POINTER, &idt::IDT_POINTER);
    let linear = |base: *const ()| base.expose_provenance() as u64;
    let task = core::ptr::from_ref(&gdt::task_states[vcpu]);
    State {
        cr3: pml4,
        rip: main as *const () as u64,
        // As a function finds it that was called: 8 below a multiple of 16.
        rsp: vcpu_area(vcpu) + area::L2_STACK_TOP - 8,
        rflags: port::USER_FLAGS.into(),
        selectors: [gdt::USER_CODE.into(), gdt::USER_DATA.into(), u64::from(gdt::FIRST_TSS) + 16 * vcpu as u64],
        gdt: [linear(core::ptr::from_ref(gdt.base).cast()), gdt.limit.into()],
        idt: [linear(core::ptr::from_ref(idt.base).cast()), idt.limit.into()],
        task: [linear(task.cast()), size_of_val(&gdt::task_states[vcpu]) as u64 - 1],
    }
}

impl L2 {
    /// Makes the L2 of vCPU `vcpu`, which executes this: on the tables `own`, address and bytes, and `root`, L1's. It has run up to its first
    /// doorbell, for which it needs nothing but the system slot.
    #[must_use]
    pub fn new(vcpu: usize, own: (u64, u64), root: u64, nested: &Nested) -> Self {
        let mut page = ControlPage {
            root,
            format: nested.format as u64,
            accessed_dirty: u64::from(nested.flags != Flags::Unused),
            tables: [own.0, own.1],
            start: 1,
            state: state(vcpu, own.0),
            ..ControlPage::default()
        };
        page.windows[0] = [0, SYSTEM_LIMIT / PAGE_SIZE];
        page.windows[1] = [L2_BASE.0, nested.map.l2_pages()];
        let l2 = Self { control: LiveControl::of(vcpu) };
        l2.control.put(&page);
        l2.enter(&mut |gfn| panic!("L2 has no system slot at its frame {gfn}"));
        l2.control.word(offset_of!(ControlPage, start)).store(0, Relaxed);
        l2
    }

    /// Lets L2 do `work`. `violation` is called for each frame that L1's table does not let L2 touch; L2 then tries again.
    ///
    /// Panics if L2 is left for another reason.
    pub fn run(&mut self, work: &mut dyn FnMut(), violation: &mut dyn FnMut(L2Gfn)) -> Run {
        let mut work: &mut dyn FnMut() = work;
        let place = (&raw mut work).expose_provenance() as u64;
        self.control.word(offset_of!(ControlPage, work)).store(place, Relaxed);
        self.enter(violation)
    }

    fn enter(&self, violation: &mut dyn FnMut(L2Gfn)) -> Run {
        let mut run = Run::default();
        loop {
            let begin = tsc::now();
            port::ring(Doorbell::EnterL2);
            run.ticks = tsc::now().wrapping_sub(begin);
            run.entries += 1;
            let word = |offset| self.control.word(offset).load(Relaxed);
            let address = word(offset_of!(ControlPage, address));
            match Exit::from_number(word(offset_of!(ControlPage, exit))) {
                Some(Exit::Yield) => return run,
                Some(Exit::Violation) => violation(L2Gfn::containing(address)),
                other => panic!("L2 was left because of {other:?} at its address {address:#x}"),
            }
        }
    }
}

/// Where L2 begins, at ring 3: it asks for work, and does it.
extern "C" fn main() -> ! {
    loop {
        port::ring(Doorbell::Yield);
        let place = LiveControl::of(vcpu::current()).word(offset_of!(ControlPage, work)).load(Relaxed);
        let work: *mut &mut dyn FnMut() = core::ptr::with_exposed_provenance_mut(place as usize);
        // SAFETY: `run` passes a pointer to its own variable and waits; L2 sees the same memory at the same addresses.
        unsafe { (*work)() };
    }
}
