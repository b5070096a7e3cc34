//! Accesses of L2 that L1's table may not permit: each is made or given up, and what became of it is reported.

use super::Hypervisor;
use crate::arch::l2::{Answer, Extension, Violation};
use crate::arch::lock::Lock;
use crate::arch::mailbox::LiveAnswers;
use crate::arch::tracked::Executed;
use crate::arch::vcpu;
use core::sync::atomic::Ordering::Relaxed;
use umbra_shared::probe::{self, MAX_PROBES, Probe};

/// What the L2 of any vCPU is to do, and what is due before.
#[derive(Clone)]
struct Probes {
    /// Each with the word that it writes, if it writes.
    list: [(Probe, u64); MAX_PROBES],
    count: usize,
    /// Invalidations that were due so far.
    due: u64,
}

static PROBES: Lock<Probes> =
    Lock::new(Probes { list: [(Probe { page: 0, write: false }, 0); MAX_PROBES], count: 0, due: 0 });

/// The next probes, cut to what there is room for; `due` says whether each vCPU has to forget translations first.
pub fn set(probes: impl Iterator<Item = (Probe, u64)>, due: bool) {
    PROBES.with(|next| {
        next.count = 0;
        for (place, probe) in next.list.iter_mut().zip(probes) {
            *place = probe;
            next.count += 1;
        }
        next.due += u64::from(due);
    });
}

impl<E: Extension> Hypervisor<E> {
    /// Says what is due since this was last called on this vCPU, and lets its L2 make the probes.
    pub fn probe(&mut self) -> Executed {
        let probes = PROBES.with(|probes| probes.clone());
        if self.forgotten != probes.due {
            self.l2.extension().forget();
            self.forgotten = probes.due;
        }
        let list = &probes.list[..probes.count];
        let answers = LiveAnswers::of(vcpu::current());
        answers.clear();
        let tracked = self.tracked;
        let mut violation = |violation: Violation| {
            if answers.count() == list.len() {
                return Answer::Stopped;
            }
            let Violation { code, qualification, address } = violation;
            answers.push(probe::Answer { value: 0, code, qualification, address });
            Answer::GivenUp
        };
        while answers.count() < list.len() {
            let mut work = || {
                while let Some(&(Probe { page, write }, word)) = list.get(answers.count()) {
                    let value = if write {
                        tracked.write(page, word);
                        0
                    } else {
                        tracked.read(page)
                    };
                    answers.push(probe::Answer { value, ..probe::Answer::default() });
                }
            };
            let run = self.l2.run(&mut work, &mut violation);
            self.report.entries.fetch_add(run.entries, Relaxed);
        }
        Executed::default()
    }
}
