//! The edits, and L2's probes after them, by turns.
//!
//! ```text
//! vCPU 0   edits ---|                    probes |
//! vCPU 1            | probes | edits ----|                 each waits where the other one's bar is
//! monitor  the same edits and probes on the walker, compared at each bar; harvest at every third
//! ```

use super::mirror::{Expected, Mirror};
use super::{Trial, describe};
use crate::failure::Failure;
use crate::report::record::Row;
use crate::scenario::l1_cpu::{caps_of, violation};
use crate::scenario::setup::Fault;
use umbra_shared::nested::{L2_BASE, Way};
use umbra_shared::probe::{Answer, Probe};
use umbra_shared::protocol::Command;

/// Epochs from a harvest to the next: edits come between writes and their harvest, too.
const HARVEST: u64 = 3;
/// Epochs from a comparison of windows, EPT02 and the process's memory map to the next.
const AUDIT: u64 = 16;

/// One row.
pub fn row(mut trial: Trial) -> Result<Row, Failure> {
    trial.counts = ["edits", "epochs", "due", "probes", "violations"].map(|name| (name, 0)).into();
    let mut turns = Turns { mirror: Mirror::new(&trial.nested, caps_of(trial.nested.way)?)?, trial };
    turns.play()?;
    Ok(turns.trial.finish())
}

struct Turns<'a> {
    trial: Trial<'a>,
    mirror: Mirror,
}

impl Turns<'_> {
    fn play(&mut self) -> Result<(), Failure> {
        self.trial.start()?;
        let mut number = 0;
        while self.trial.missing() > 0 {
            number += 1;
            self.epoch(number)?;
            if number % HARVEST == 0 {
                self.harvest()?;
            }
            if number % AUDIT == 0 {
                self.trial.audit(number)?;
            }
        }
        self.harvest()?;
        self.trial.audit(number)?;
        self.compare_memory();
        Ok(())
    }

    /// One vCPU edits while every L2 stands still; then the L2 of another probes, if there is another.
    fn epoch(&mut self, number: u64) -> Result<(), Failure> {
        let Self { trial, mirror } = self;
        let vcpus = trial.machine.vcpus();
        let editor = usize::try_from(number).unwrap_or(0) % vcpus;
        let prober = (editor + 1) % vcpus;
        trial.machine.untimed(editor..editor + 1, Command::Play, number)?;
        trial.machine.untimed(prober..prober + 1, Command::Probe, 0)?;
        let answers = trial.machine.answers(prober)?;
        // The fault: the walker plays another epoch.
        let lost = trial.setup.inject == Some(Fault::LoseEdit) && number == 3;
        let epoch = mirror.play(trial.nested.map.seed(), if lost { 0 } else { number });
        trial.count_epoch(&epoch);
        if answers.count != epoch.probes().len() as u64 {
            let (made, due) = (answers.count, epoch.probes().len());
            trial.differences.add(format!("epoch {number}: L2 made {made} probes of {due}"));
        }
        for ((index, &probe), answer) in epoch.probes().iter().enumerate().zip(&answers.probes) {
            let expected = mirror.probe(probe, Probe::stamp(number, index))?;
            trial.count("probes", 1);
            trial.count("violations", u64::from(answer.code != 0));
            if let Some(what) = difference(trial.nested.way, probe, answer, expected) {
                trial.differences.add(format!("epoch {number}, probe {index}: {what}"));
            }
        }
        Ok(())
    }

    /// Compares what the tracker reports with what was written since the last time.
    fn harvest(&mut self) -> Result<(), Failure> {
        let Self { trial, mirror } = self;
        if trial.tracker.is_none() {
            return Ok(());
        }
        trial.harvest()?;
        let pages = &mut trial.row.truth.pages;
        pages.written += mirror.written.count();
        pages.reported += trial.reported.count();
        pages.missed += mirror.written.without(&trial.reported).count();
        pages.extra += trial.reported.without(&mirror.written).count();
        mirror.written.clear();
        Ok(())
    }

    /// Every page of L1's memory ends as the walker's.
    fn compare_memory(&mut self) {
        let Self { trial, mirror } = self;
        for page in 0..mirror.pages() {
            let (found, expected) = (trial.machine.vm().first_word(page), mirror.word_now(page));
            if found != Some(expected) {
                let found = found.unwrap_or(0);
                trial.differences.add(format!("L1's page {page} begins with {found:#x} at the end, not {expected:#x}"));
            }
        }
    }
}

/// What is wrong with an answer, if something is.
fn difference(way: Way, probe: Probe, answer: &Answer, expected: Expected) -> Option<String> {
    let (code, bytes) = violation(way);
    let address = L2_BASE.plus(probe.page).address();
    let right = match expected {
        Expected::Done(value) => answer.code == 0 && answer.value == value,
        Expected::Told(bits) => {
            (answer.code, answer.qualification, answer.address / bytes) == (code, bits, address / bytes)
        }
    };
    let verb = if probe.write { "writes" } else { "reads" };
    (!right).then(|| format!("L2 {verb} page {}: {}, the walker says {expected:x?}", probe.page, describe(answer)))
}
