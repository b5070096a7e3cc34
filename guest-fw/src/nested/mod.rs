//! The firmware as a hypervisor: each vCPU has an L2 of its own, all of them on one nested page table. How L2 is run is behind [`Guest`].

pub mod ept12;

use crate::arch::lock::Lock;
use crate::arch::mailbox::LiveReport;
use crate::arch::space::{self, SecondSpace};
use crate::arch::svm::Absent;
use crate::arch::tracked::{Executed, Tracked};
use crate::arch::vcpu;
use crate::arch::{paravirtual, svm};
use crate::boot::Setup;
use core::sync::atomic::Ordering::Relaxed;
use ept12::{Ept12, Refusal};
use umbra_shared::L2Gfn;
use umbra_shared::nested::{Nested, Way};

/// What the L2s of all vCPUs share.
struct Shared {
    pml4: u64,
    tracked: Tracked,
    ept12: Ept12<'static>,
}

/// What one run of L2 came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Run {
    /// Times that L2 was entered.
    pub entries: u64,
    /// TSC ticks from before the last entry to after it.
    pub ticks: u64,
}

/// A vCPU's L2, by the way in which it is run. VMX would be one more.
#[allow(clippy::large_enum_variant)] // One a vCPU, and it is never moved.
enum Guest {
    Svm(svm::L2),
    Umbra(paravirtual::L2),
}

impl Guest {
    /// Lets L2 do `work`. `violation` is called for each frame that L1's table does not let L2 touch; L2 then tries again.
    fn run(&mut self, work: &mut dyn FnMut(), violation: &mut dyn FnMut(L2Gfn)) -> Run {
        match self {
            Self::Svm(l2) => l2.run(work, violation),
            Self::Umbra(l2) => l2.run(work, violation),
        }
    }
}

static SHARED: Lock<Option<Shared>> = Lock::new(None);

/// One vCPU's hypervisor.
pub struct Hypervisor {
    l2: Guest,
    /// L2's memory. Only L2 may use it.
    pub tracked: Tracked,
    report: &'static LiveReport,
}

/// What the vCPUs share, made by the first to ask.
fn with_shared<R>(setup: &Setup, nested: &Nested, work: impl FnOnce(&mut Shared) -> R) -> R {
    SHARED.with(|shared| work(shared.get_or_insert_with(|| create(setup, nested))))
}

fn create(setup: &Setup, nested: &Nested) -> Shared {
    let (tables, bytes) = (setup.page.nested_tables, setup.page.nested_table_bytes);
    let SecondSpace { pml4, tracked, nested: rest, nested_address } =
        match space::create_second(tables, bytes, nested, setup.leaf) {
            Ok(second) => second,
            Err(error) => panic!("L2's page tables: {error}"),
        };
    match Ept12::new(rest, nested_address, nested, setup.slots()) {
        Ok(ept12) => Shared { pml4, tracked, ept12 },
        Err(error) => panic!("EPT12: {error}"),
    }
}

impl Hypervisor {
    /// Makes this vCPU's L2. Its own tables are mapped when this returns: the first touch of its pages is that of the pages alone.
    ///
    /// # Errors
    /// What this vCPU lacks.
    pub fn new(setup: &Setup, nested: &Nested) -> Result<Self, Absent> {
        let (pml4, root, tracked) =
            with_shared(setup, nested, |shared| (shared.pml4, shared.ept12.root(), shared.tracked));
        let index = vcpu::current();
        let own_bytes = nested.own_table_bytes(setup.leaf);
        let l2 = match nested.way {
            Way::Umbra => Guest::Umbra(paravirtual::L2::new(index, (pml4, own_bytes), root, nested)),
            Way::Svm | Way::Plain => Guest::Svm(svm::L2::new(index, pml4, root)?),
        };
        let mut hypervisor = Self { l2, tracked, report: LiveReport::of(index) };
        hypervisor.run(&mut || space::touch(pml4, own_bytes));
        Ok(hypervisor)
    }

    /// Lets L2 do `work`. Violations are handled by filling the table as the options say; panics at one that L1 cannot handle.
    pub fn run(&mut self, work: &mut dyn FnMut()) -> u64 {
        let report = self.report;
        let mut violation = |gfn: L2Gfn| {
            let made = SHARED.with(|shared| match shared {
                Some(shared) => shared.ept12.violation(gfn),
                None => Err(Refusal::Beyond(gfn)),
            });
            report.last_address.store(gfn.address(), Relaxed);
            report.violations.fetch_add(1, Relaxed);
            match made {
                Ok(entries) => report.filled.fetch_add(entries, Relaxed),
                Err(refusal) => panic!("{refusal}"),
            };
        };
        let run = self.l2.run(work, &mut violation);
        report.entries.fetch_add(run.entries, Relaxed);
        self.report_tables();
        run.ticks
    }

    /// Enters L2 `times` times with nothing to do, and says how long the last time took.
    pub fn enter(&mut self, times: u64) -> Executed {
        let ticks = (0..times).fold(0, |_, _| self.run(&mut || ()));
        Executed { writes: 0, ticks }
    }

    /// Makes all entries that are not there yet.
    pub fn fill(&mut self) -> Executed {
        let begin = crate::arch::tsc::now();
        let made = SHARED.with(|shared| shared.as_mut().map_or(Ok(0), |shared| shared.ept12.fill()));
        let ticks = crate::arch::tsc::now().wrapping_sub(begin);
        match made {
            Ok(entries) => self.report.filled.fetch_add(entries, Relaxed),
            Err(refusal) => panic!("{refusal}"),
        };
        self.report_tables();
        Executed { writes: 0, ticks }
    }

    fn report_tables(&self) {
        let pages = SHARED.with(|shared| shared.as_ref().map_or(0, |shared| shared.ept12.table_pages()));
        self.report.table_pages.store(pages, Relaxed);
    }
}
