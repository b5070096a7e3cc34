//! Edits of L1's table, epoch by epoch, and L2's probes of what they came to ([`umbra_shared::edits`]).

use super::{Hypervisor, SHARED};
use crate::arch::l2::{Answer, Extension, Violation};
use crate::arch::lock::Lock;
use crate::arch::mailbox::LiveAnswers;
use crate::arch::table_words::TableWords;
use crate::arch::tracked::Executed;
use crate::arch::vcpu;
use crate::boot::Setup;
use core::sync::atomic::Ordering::Relaxed;
use umbra_shared::edits::{self, Board, Epoch, Probe};
use umbra_shared::nested::Nested;

/// The table as it is edited, and the last epoch.
struct Played {
    board: Board<TableWords>,
    number: u64,
    epoch: Option<Epoch>,
    /// Epochs after which an invalidation was due.
    due: u64,
}

static PLAYED: Lock<Option<Played>> = Lock::new(None);

fn find(setup: &Setup, nested: &Nested) -> Played {
    let root = SHARED.with(|shared| shared.as_ref().map_or(0, |shared| shared.table.root()));
    let words = TableWords::of(&setup.page);
    let Some(board) = Board::find(words, root, nested.format, nested.map.l1_pages(), nested.map.l2_pages()) else {
        panic!("L1's table has no leaf tables for whole regions of 2 MiB");
    };
    Played { board, number: 0, epoch: None, due: 0 }
}

impl<E: Extension> Hypervisor<E> {
    /// Makes the edits of epoch `number`, on the table that all vCPUs share. No L2 runs meanwhile.
    pub fn play(&mut self, setup: &Setup, nested: &Nested, number: u64) -> Executed {
        PLAYED.with(|played| {
            let played = played.get_or_insert_with(|| find(setup, nested));
            let epoch = played.board.play(nested.map.seed(), number);
            played.due += u64::from(epoch.due);
            (played.number, played.epoch) = (number, Some(epoch));
        });
        Executed::default()
    }

    /// Says what is due since this was last called on this vCPU, and lets its L2 make the probes of the last epoch.
    pub fn probe(&mut self) -> Executed {
        let (number, epoch, due) = PLAYED.with(|played| match played {
            Some(Played { number, epoch: Some(epoch), due, .. }) => (*number, epoch.clone(), *due),
            _ => panic!("no epoch was played"),
        });
        if self.forgotten != due {
            self.l2.extension().forget();
            self.forgotten = due;
        }
        let answers = LiveAnswers::of(vcpu::current());
        answers.clear();
        let tracked = self.tracked;
        let mut violation = |violation: Violation| {
            let Violation { code, qualification, address } = violation;
            answers.push(edits::Answer { value: 0, code, qualification, address });
            Answer::GivenUp
        };
        while answers.count() < epoch.probes().len() {
            let mut work = || {
                while let Some(&Probe { page, write }) = epoch.probes().get(answers.count()) {
                    let value = if write {
                        tracked.write(page, Probe::stamp(number, answers.count()));
                        0
                    } else {
                        tracked.read(page)
                    };
                    answers.push(edits::Answer { value, ..edits::Answer::default() });
                }
            };
            let run = self.l2.run(&mut work, &mut violation);
            self.report.entries.fetch_add(run.entries, Relaxed);
        }
        Executed::default()
    }
}
