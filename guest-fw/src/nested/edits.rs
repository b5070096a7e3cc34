//! Random edits of L1's table, epoch by epoch ([`umbra_shared::edits`]).

use super::{Hypervisor, SHARED, probes};
use crate::arch::l2::Extension;
use crate::arch::lock::Lock;
use crate::arch::table_words::TableWords;
use crate::arch::tracked::Executed;
use crate::boot::Setup;
use umbra_shared::board::Board;
use umbra_shared::nested::Nested;
use umbra_shared::probe::Probe;

static BOARD: Lock<Option<Board<TableWords>>> = Lock::new(None);

/// The part of L1's table that is edited. Panics if it is not filled.
pub fn find(setup: &Setup, nested: &Nested) -> Board<TableWords> {
    let root = SHARED.with(|shared| shared.as_ref().map_or(0, |shared| shared.table.root()));
    let words = TableWords::of(&setup.page);
    match Board::find(words, root, nested.format, nested.map.l1_pages(), nested.map.l2_pages()) {
        Some(board) => board,
        None => panic!("L1's table has no leaf tables for whole regions of 2 MiB"),
    }
}

/// Does `work` on the part of the table that is edited, which all vCPUs share.
pub fn with_board<R>(setup: &Setup, nested: &Nested, work: impl FnOnce(&mut Board<TableWords>) -> R) -> R {
    BOARD.with(|board| work(board.get_or_insert_with(|| find(setup, nested))))
}

impl<E: Extension> Hypervisor<E> {
    /// Makes the edits of epoch `number`. No L2 runs meanwhile.
    pub fn play(&mut self, setup: &Setup, nested: &Nested, number: u64) -> Executed {
        with_board(setup, nested, |board| {
            let epoch = board.play(nested.map.seed(), number);
            let stamped = |(index, &probe)| (probe, Probe::stamp(number, index));
            probes::set(epoch.probes().iter().enumerate().map(stamped), epoch.due);
        });
        Executed::default()
    }
}
