//! An L2 on this CPU's extension for guests, and the one trait in which AMD's, Intel's and the monitor's meet.
//!
//! L2 is the same program on tables and a stack of its own, at ring 3. It waits in its hypercall between two pieces of work: [`L2::run`] hands
//! it one and lets it run until the next hypercall, handling what comes between. Everything that L2 does not need is intercepted, ports and
//! MSRs included; a doorbell that it rings goes to the monitor, so that a panic or an exception in L2 is reported like any other.
//!
//! L1 is at ring 0, where interrupts are off, from an entry to the exit after it and no longer.

use super::modes;
use super::paging::Format;
use core::fmt;
use umbra_shared::L2Gfn;
use umbra_shared::hostile::Control;
use umbra_shared::nested::Nested;
use umbra_shared::role::Role;
use umbra_shared::toggle::Toggle;

/// A CPU's extension, with the one L2 that this vCPU has on it.
pub trait Extension: Sized {
    /// Whether [`Self::forget`] on one vCPU is for the L2s of all. Where it is not, each must do it.
    const FORGETS_FOR_ALL: bool = false;

    /// Why this vCPU cannot have an L2.
    type Absent: fmt::Display;
    /// The format of L1's table.
    fn format(nested: &Nested) -> Format;

    /// Switches the extension on and makes the L2 of vCPU `vcpu`, which executes this, on `tables`. It begins at [`main`], and needs nothing
    /// but the system slot to come to its first hypercall.
    ///
    /// # Errors
    /// What this vCPU lacks.
    fn new(vcpu: usize, tables: &Tables) -> Result<Self, Self::Absent>;

    /// Enters L2 once, and says why it was left. After a hypercall L2 goes on behind it.
    fn enter(&mut self) -> Left;

    /// L2 finds `value` in RAX.
    fn set_rax(&mut self, value: u64);

    /// L2 begins anew at [`main`] when it is next entered: what it was doing is given up.
    fn restart(&mut self);

    /// Accessed and dirty flags of L1's table are in use from now on, or not. Says whether that can be.
    fn use_flags(&mut self, on: bool) -> bool;

    /// Forgets translations by L1's table, after rights or entries were taken away in it.
    fn forget(&mut self);

    /// Executed by L2: changes its mode there and back.
    fn toggle(toggle: Toggle) {
        let _ = modes::toggle(toggle, None);
    }

    /// Executed by L2: says which role it is in. Panics where nobody wants to know.
    fn announce(role: Role) {
        panic!("an L2 of the monitor's alone can announce {role:?}");
    }

    /// L2's hypercall, executed by L2: returns what it then finds in RAX.
    ///
    /// # Safety
    /// Only L2 may execute it.
    unsafe fn hypercall() -> u64;

    /// What the monitor's interface alone has: L1 is told when L2 ends, and begins with a control page as it was at first.
    fn renew(&mut self) {}

    /// The same: stores words into the control page and rings, as a malicious L1 does, then makes the page what it was.
    fn attack(&mut self, _control: &Control) {}

    /// What an exit says that L1 cannot handle, in words; `None` for those that it can.
    #[must_use]
    fn complaint(_violation: &Violation) -> Option<&'static str> {
        None
    }
}

/// What an L2 runs on.
#[derive(Clone, Copy, Debug)]
pub struct Tables {
    /// Its own tables' root, in its physical space and in L1's.
    pub pml4: u64,
    /// Bytes of its own tables, from the root on.
    pub own_bytes: u64,
    /// The root of L1's table.
    pub root: u64,
    /// What L2 is.
    pub nested: Nested,
}

/// An entry into L2 that is over.
#[derive(Clone, Copy, Debug)]
pub struct Left {
    /// Why it is.
    pub exit: Exit,
    /// TSC ticks from before the entry to after it.
    pub ticks: u64,
}

/// Why L2 was left, whatever the vendor calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// L2 wants work.
    Hypercall,
    /// L1's table does not permit an access.
    Violation(Violation),
    /// For the host's sake, which has done what there was to do.
    Interrupted,
    /// L1 has no answer to it.
    Other {
        /// The vendor's number.
        code: u64,
        /// What the vendor has to say about it.
        information: [u64; 2],
        /// Where L2 was.
        rip: u64,
    },
}

/// An access that L1's table does not permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// SVM: the exit code, 400h. VMX: the basic exit reason, 48 for a violation and 49 for a misconfiguration.
    pub code: u64,
    /// SVM: EXITINFO1 (APM 2, 15.25.6). VMX: the exit qualification (SDM 3C, table 28-7).
    pub qualification: u64,
    /// L2's physical address.
    pub address: u64,
}

impl Violation {
    /// The frame of the address.
    #[must_use]
    pub const fn gfn(&self) -> L2Gfn {
        L2Gfn::containing(self.address)
    }
}

/// What L1 did about a violation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It made entries where none were: no translation knows of them.
    Made,
    /// It changed entries that translations may come from.
    Changed,
    /// It did nothing: L2 gives up its work.
    GivenUp,
    /// The same, and L2 is not waited for: it does not come to its hypercall any more.
    Stopped,
}

/// What one run of L2 came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Run {
    /// Times that L2 was entered.
    pub entries: u64,
    /// TSC ticks from before the last entry to after it.
    pub ticks: u64,
}

/// The L2 of one vCPU.
pub struct L2<E> {
    extension: E,
    /// It waits in its hypercall.
    waits: bool,
}

impl<E: Extension> L2<E> {
    /// Makes the L2 of vCPU `vcpu`, which executes this, and lets it run up to its first hypercall.
    ///
    /// # Errors
    /// What this vCPU lacks.
    pub fn new(vcpu: usize, tables: &Tables) -> Result<Self, E::Absent> {
        let mut l2 = Self { extension: E::new(vcpu, tables)?, waits: false };
        l2.run(&mut || (), &mut |violation| -> Answer {
            panic!("L2 has no system slot at its frame {}", violation.gfn())
        });
        Ok(l2)
    }

    /// The extension, for what [`Self::run`] does not do.
    pub const fn extension(&mut self) -> &mut E {
        &mut self.extension
    }

    /// L2 begins anew when it is next entered.
    pub fn restart(&mut self) {
        self.extension.restart();
        self.waits = false;
    }

    /// Lets L2 do `work`. `violation` is called for each access that L1's table does not permit; L2 then tries again, or gives the work up, which
    /// must hold nothing that has to be dropped.
    ///
    /// Panics if L2 is left for another reason.
    pub fn run(&mut self, work: &mut dyn FnMut(), violation: &mut dyn FnMut(Violation) -> Answer) -> Run {
        let mut work: &mut dyn FnMut() = work;
        let work = (&raw mut work).expose_provenance() as u64;
        let (mut run, mut handed) = (Run::default(), false);
        loop {
            if self.waits {
                if handed {
                    return run;
                }
                self.extension.set_rax(work);
                (self.waits, handed) = (false, true);
            }
            let left = self.extension.enter();
            run.entries += 1;
            run.ticks = left.ticks;
            match left.exit {
                Exit::Hypercall => self.waits = true,
                Exit::Violation(what) => match violation(what) {
                    Answer::Made => {}
                    Answer::Changed => self.extension.forget(),
                    Answer::GivenUp => self.restart(),
                    Answer::Stopped => {
                        self.restart();
                        return run;
                    }
                },
                Exit::Interrupted => {}
                Exit::Other { code, information: [first, second], rip } => {
                    panic!("L2 was left at {rip:#x} with exit code {code:#x} ({first:#x}, {second:#x})")
                }
            }
        }
    }
}

/// Where L2 begins, at ring 3: it asks for work, and does it.
pub extern "C" fn main<E: Extension>() -> ! {
    loop {
        // SAFETY: this is L2.
        let work = unsafe { E::hypercall() };
        let work = core::ptr::with_exposed_provenance_mut::<&mut dyn FnMut()>(work as usize);
        // SAFETY: `L2::run` passes a pointer to its own variable and waits; L2 sees the same memory at the same addresses.
        unsafe { (*work)() };
    }
}
