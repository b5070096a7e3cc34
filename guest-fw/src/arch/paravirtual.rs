//! Umbra's own interface: the monitor runs L2, on its shadow MMU, and L1 says by a control page what L2 is ([`umbra_shared::control`]).
//!
//! L2 is the same program on tables and a stack of its own, at ring 3. Between two pieces of work it waits in a doorbell. Everything here happens
//! at ring 3: a PVM host, where ring 0 is emulated, can do it too.

use super::l2::{Exit, Extension, Left, Tables, Violation, main};
use super::paging::Format;
use super::{gdt, idt, port, tsc, vcpu};
use core::fmt;
use core::mem::offset_of;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;
use umbra_shared::PAGE_SIZE;
use umbra_shared::control::{self, ControlPage, State};
use umbra_shared::hostile::Control;
use umbra_shared::layout::{MAX_VCPUS, SYSTEM_LIMIT, vcpu_area, vcpu_area as area};
use umbra_shared::nested::{self, Flags, L2_BASE, Nested};
use umbra_shared::protocol::Doorbell;
use umbra_shared::role::Role;
use umbra_shared::toggle::Toggle;

const WORDS: usize = size_of::<ControlPage>() / 8;

/// A control page, live: the monitor reads and writes it while L1 waits in a doorbell, L2 reads its work.
struct LiveControl([AtomicU64; WORDS]);

impl LiveControl {
    fn of(index: usize) -> &'static Self {
        assert!(index < MAX_VCPUS, "vCPU {index} has no control page");
        let address = vcpu_area(index) + area::CONTROL_BLOCK;
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

/// The monitor as the extension on which this vCPU has its L2.
pub struct Paravirtual {
    control: &'static LiveControl,
    /// As it is when L2 begins.
    page: ControlPage,
}

/// Why the monitor could not be asked: never.
pub enum Absent {}

impl fmt::Display for Absent {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {}
    }
}

/// L2's state when it begins: as this vCPU's, but for tables, stack and place.
fn state(vcpu: usize, pml4: u64) -> State {
    let (gdt, idt) = (&gdt::GDT_POINTER, &idt::IDT_POINTER);
    let linear = |base: *const ()| base.expose_provenance() as u64;
    let task = core::ptr::from_ref(&gdt::task_states[vcpu]);
    State {
        cr3: pml4,
        rip: main::<Paravirtual> as *const () as u64,
        // As a function finds it that was called: 8 below a multiple of 16.
        rsp: vcpu_area(vcpu) + area::L2_STACK_TOP - 8,
        rflags: port::USER_FLAGS.into(),
        selectors: [gdt::USER_CODE.into(), gdt::USER_DATA.into(), u64::from(gdt::FIRST_TSS) + 16 * vcpu as u64],
        gdt: [linear(core::ptr::from_ref(gdt.base).cast()), gdt.limit.into()],
        idt: [linear(core::ptr::from_ref(idt.base).cast()), idt.limit.into()],
        task: [linear(task.cast()), size_of_val(&gdt::task_states[vcpu]) as u64 - 1],
    }
}

impl Extension for Paravirtual {
    /// The monitor has one shadow of the table.
    const FORGETS_FOR_ALL: bool = true;

    type Absent = Absent;

    fn format(nested: &Nested) -> Format {
        if nested.format == nested::Format::Ept { Format::EPT } else { Format::LONG }
    }

    fn new(vcpu: usize, tables: &Tables) -> Result<Self, Absent> {
        let nested = &tables.nested;
        let mut page = ControlPage {
            root: tables.root,
            format: nested.format as u64,
            accessed_dirty: u64::from(nested.flags != Flags::Unused),
            tables: [tables.pml4, tables.own_bytes],
            start: 1,
            state: state(vcpu, tables.pml4),
            ..ControlPage::default()
        };
        page.windows[0] = [0, SYSTEM_LIMIT / PAGE_SIZE];
        page.windows[1] = [L2_BASE.0, nested.map.l2_pages()];
        let control = LiveControl::of(vcpu);
        control.put(&page);
        Ok(Self { control, page })
    }

    fn enter(&mut self) -> Left {
        let begin = tsc::now();
        port::ring(Doorbell::EnterL2);
        let ticks = tsc::now().wrapping_sub(begin);
        let word = |offset| self.control.word(offset).load(Relaxed);
        self.control.word(offset_of!(ControlPage, start)).store(0, Relaxed);
        let (code, address) = (word(offset_of!(ControlPage, exit)), word(offset_of!(ControlPage, address)));
        let qualification = word(offset_of!(ControlPage, qualification));
        let exit = match control::Exit::from_number(code) {
            Some(control::Exit::Yield) => Exit::Hypercall,
            Some(
                control::Exit::Violation
                | control::Exit::Beyond
                | control::Exit::Misconfigured
                | control::Exit::ExecuteRights
                | control::Exit::Ended,
            ) => Exit::Violation(Violation { code, qualification, address }),
            Some(control::Exit::Refused) | None => Exit::Other { code, information: [address, qualification], rip: 0 },
        };
        Left { exit, ticks }
    }

    fn set_rax(&mut self, value: u64) {
        // A register of a VM of the monitor's is dear: L2 reads it here.
        self.control.word(offset_of!(ControlPage, work)).store(value, Relaxed);
    }

    fn restart(&mut self) {
        // The page still has the state in which L2 began.
        self.control.word(offset_of!(ControlPage, start)).store(1, Relaxed);
    }

    fn use_flags(&mut self, on: bool) -> bool {
        self.control.word(offset_of!(ControlPage, accessed_dirty)).store(on.into(), Relaxed);
        true
    }

    fn forget(&mut self) {
        port::ring(Doorbell::Invalidate);
    }

    /// Ring 0 is nowhere here: L2 says what it would be.
    fn toggle(toggle: Toggle) {
        for &role in toggle.visits() {
            Self::announce(role);
        }
        if !toggle.visits().is_empty() {
            Self::announce(Role::HOME);
        }
    }

    fn announce(role: Role) {
        LiveControl::of(vcpu::current()).word(offset_of!(ControlPage, role)).store(role.word(), Relaxed);
        port::ring(Doorbell::ChangeRole);
    }

    unsafe fn hypercall() -> u64 {
        port::ring(Doorbell::Yield);
        LiveControl::of(vcpu::current()).word(offset_of!(ControlPage, work)).load(Relaxed)
    }

    fn renew(&mut self) {
        self.page.intercept = 1;
        self.control.put(&self.page);
    }

    fn attack(&mut self, control: &Control) {
        // What L2 does if it gets that far.
        let mut nothing = || ();
        let mut work: &mut dyn FnMut() = &mut nothing;
        self.set_rax((&raw mut work).expose_provenance() as u64);
        for &(word, value) in control.words() {
            self.control.0[word as usize].store(value, Relaxed);
        }
        for _ in 0..control.rings {
            port::ring(Doorbell::EnterL2);
            // L2's own doorbell, which is nothing from L1.
            port::ring(Doorbell::Yield);
        }
        self.control.put(&self.page);
    }

    fn complaint(violation: &Violation) -> Option<&'static str> {
        match control::Exit::from_number(violation.code) {
            Some(control::Exit::Beyond) => Some("EPT12 leads L2 out of L1's memory"),
            Some(control::Exit::Misconfigured) => Some("EPT12 has an entry for L2 that is none"),
            Some(control::Exit::ExecuteRights) => Some(
                "a leaf of EPT12 permits no execution, or nothing else, and a shadow in userspace cannot enforce that (ExecuteRights)",
            ),
            Some(control::Exit::Ended) => Some("L2 ended"),
            _ => None,
        }
    }
}
