//! The firmware as a hypervisor: each vCPU has an L2 of its own, all of them on one nested page table.

mod edits;
mod hostile;
mod probes;
mod race;
pub mod table;

use crate::arch::l2::{Answer, Extension, L2, Tables, Violation};
use crate::arch::lock::Lock;
use crate::arch::mailbox::LiveReport;
use crate::arch::probe;
use crate::arch::space::{self, SecondSpace};
use crate::arch::tracked::{Executed, Tracked};
use crate::arch::vcpu;
use crate::boot::Setup;
use core::sync::atomic::Ordering::Relaxed;
use table::{Refusal, Table12};
use umbra_shared::nested::Nested;
use umbra_shared::violation::Case;

/// What the L2s of all vCPUs share.
struct Shared {
    pml4: u64,
    tracked: Tracked,
    table: Table12<'static>,
}

static SHARED: Lock<Option<Shared>> = Lock::new(None);

/// One vCPU's hypervisor.
pub struct Hypervisor<E> {
    l2: L2<E>,
    /// L2's memory. Only L2 may use it.
    pub tracked: Tracked,
    report: &'static LiveReport,
    /// Invalidations that were due and were made ([`edits`]).
    forgotten: u64,
}

/// What the vCPUs share, made by the first to ask.
fn with_shared<E: Extension, R>(setup: &Setup, nested: &Nested, work: impl FnOnce(&mut Shared) -> R) -> R {
    SHARED.with(|shared| work(shared.get_or_insert_with(|| create::<E>(setup, nested))))
}

/// Root and pages of L1's table; zeroes while there is none.
fn table_place() -> (u64, u64) {
    SHARED.with(|shared| shared.as_ref().map_or((0, 0), |it| (it.table.root(), it.table.table_pages())))
}

fn create<E: Extension>(setup: &Setup, nested: &Nested) -> Shared {
    let (tables, bytes) = (setup.page.nested_tables, setup.page.nested_table_bytes);
    let SecondSpace { pml4, tracked, nested: rest, nested_address } =
        match space::create_second(tables, bytes, nested, setup.leaf) {
            Ok(second) => second,
            Err(error) => panic!("L2's page tables: {error}"),
        };
    match Table12::new(rest, nested_address, E::format(nested), nested, setup.slots()) {
        Ok(table) => Shared { pml4, tracked, table },
        Err(error) => panic!("L1's nested page table: {error}"),
    }
}

/// Reports a violation.
fn note(report: &LiveReport, violation: &Violation) {
    report.last_address.store(violation.address, Relaxed);
    report.last_code.store(violation.code, Relaxed);
    report.last_qualification.store(violation.qualification, Relaxed);
    report.violations.fetch_add(1, Relaxed);
}

impl<E: Extension> Hypervisor<E> {
    /// Makes this vCPU's L2. Its own tables are mapped when this returns: the first touch of its pages is that of the pages alone.
    ///
    /// # Errors
    /// What this vCPU lacks.
    pub fn new(setup: &Setup, nested: &Nested) -> Result<Self, E::Absent> {
        let (pml4, root, tracked) =
            with_shared::<E, _>(setup, nested, |shared| (shared.pml4, shared.table.root(), shared.tracked));
        let index = vcpu::current();
        let own_bytes = nested.own_table_bytes(setup.leaf);
        let l2 = L2::new(index, &Tables { pml4, own_bytes, root, nested: *nested })?;
        let mut hypervisor = Self { l2, tracked, report: LiveReport::of(index), forgotten: 0 };
        hypervisor.run(&mut || space::touch(pml4, own_bytes));
        Ok(hypervisor)
    }

    /// Lets L2 do `work`. Violations are handled by filling the table as the options say; panics at one that L1 cannot handle.
    pub fn run(&mut self, work: &mut dyn FnMut()) -> u64 {
        let report = self.report;
        let mut violation = |violation: Violation| {
            if let Some(complaint) = E::complaint(&violation) {
                panic!("{complaint}: at L2's {:#x}", violation.address);
            }
            let made = SHARED.with(|shared| match shared {
                Some(shared) => shared.table.violation(violation.gfn()),
                None => Err(Refusal::Beyond(violation.gfn())),
            });
            note(report, &violation);
            match made {
                Ok(entries) => report.filled.fetch_add(entries, Relaxed),
                Err(refusal) => panic!("{refusal}"),
            };
            Answer::Made
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
        let made = SHARED.with(|shared| shared.as_mut().map_or(Ok(0), |shared| shared.table.fill()));
        let ticks = crate::arch::tsc::now().wrapping_sub(begin);
        match made {
            Ok(entries) => self.report.filled.fetch_add(entries, Relaxed),
            Err(refusal) => panic!("{refusal}"),
        };
        self.report_tables();
        Executed { writes: 0, ticks }
    }

    /// Exchanges leaves as `round` demands, once for all vCPUs. Each forgets what it had translated.
    pub fn edit(&mut self, nested: &Nested, round: u64) -> Executed {
        let begin = crate::arch::tsc::now();
        if vcpu::current() == 0 {
            for index in 0..nested.remaps {
                let (one, other) = nested.map.exchanged(round, index);
                let edited =
                    SHARED.with(|shared| shared.as_mut().map_or(Ok(()), |shared| shared.table.exchange(one, other)));
                if let Err(refusal) = edited {
                    panic!("{refusal}");
                }
            }
        }
        self.l2.extension().forget();
        Executed { writes: 0, ticks: crate::arch::tsc::now().wrapping_sub(begin) }
    }

    /// Provokes one case of the list, and reports what L1 was told of it: nothing where the access was permitted.
    pub fn provoke(&mut self, case: &Case) {
        let (pml4, root) = SHARED.with(|shared| shared.as_ref().map_or((0, 0), |it| (it.pml4, it.table.root())));
        assert!(self.l2.extension().use_flags(case.accessed_dirty), "this vCPU's EPT has no accessed and dirty flags");
        // SAFETY: L2 is not running, and these are its tables.
        unsafe {
            probe::prepare(pml4);
            probe::set(root, case, false);
        }
        self.l2.extension().forget();
        let report = self.report;
        let mut told = false;
        let mut violation = |violation: Violation| {
            assert!(!told, "{case:?} violates the table that permits everything: {violation:x?}");
            told = true;
            note(report, &violation);
            // SAFETY: as above.
            unsafe {
                report.probed_entry.store(probe::entry(root, case), Relaxed);
                probe::set(root, case, true);
            }
            Answer::Changed
        };
        // SAFETY: L2 does it.
        self.l2.run(&mut || unsafe { probe::access(case.access) }, &mut violation);
        if !told {
            // SAFETY: as above.
            report.probed_entry.store(unsafe { probe::entry(root, case) }, Relaxed);
        }
        // SAFETY: as above.
        unsafe { probe::set(root, case, true) };
        self.l2.extension().forget();
    }

    fn report_tables(&self) {
        let (root, pages) = table_place();
        self.report.table_root.store(root, Relaxed);
        self.report.table_pages.store(pages, Relaxed);
    }
}
