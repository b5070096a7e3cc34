//! The guest writes without pause while the controller harvests, as in the pre-copy phase of a migration.
//!
//! The controller keeps a copy of each page's first word, as a migration's destination would: it copies a page when it is
//! reported, after the log was cleared. A write may then be reported in this harvest or the next, but:
//! - a round that a vCPU had finished before a harvest began must be in the copy after it, for every page the round wrote;
//! - at the end, one last harvest makes the copy equal to the memory.
//!
//! Either failing means that a write was lost.

use super::Setup;
use super::setup::Fault;
use crate::failure::Failure;
use crate::guest::Machine;
use crate::pages::PageSet;
use crate::progress::Progress;
use crate::report::Record;
use crate::report::record::{Counter, Pages, Row, Truth, TruthRound};
use crate::track::{Kind, Tracker};
use std::time::{Duration, Instant};
use umbra_shared::pattern::Pattern;
use umbra_shared::protocol::Command;

/// The guest gets the CPU between two harvests: a harvester that never pauses starves it under legacy GET.
const PAUSE: Duration = Duration::from_millis(5);
/// Lost pages that are named one by one.
const NAMED_FAULTS: usize = 8;

/// Runs the scenario: a row for each tracker, the time shared out among them.
pub fn run(setup: &Setup, progress: &Progress) -> Result<Record, Failure> {
    let share = Duration::from_secs(setup.seconds) / u32::try_from(setup.trackers().len()).unwrap_or(1).max(1);
    setup.rows(|kind| {
        progress.step(&format!("{kind}: harvesting a running guest for {:.1} s", share.as_secs_f64()));
        Soak::new(setup, kind)?.run(share)
    })
}

struct Soak<'a> {
    setup: &'a Setup,
    kind: Kind,
    machine: Machine,
    tracker: Box<dyn Tracker>,
    /// The copy: each page's first word.
    copy: Vec<u64>,
    reported: PageSet,
    harvests: u64,
    sums: Pages,
    faults: Vec<String>,
}

impl<'a> Soak<'a> {
    fn new(setup: &'a Setup, kind: Kind) -> Result<Self, Failure> {
        let machine = Machine::new(&setup.plan, kind.ring_entries(), |vm| kind.prepare(vm))?;
        let tracker = kind.build(&machine, setup.chunk)?;
        let pages = setup.plan.pattern.pages;
        Ok(Self {
            setup,
            kind,
            machine,
            tracker,
            copy: Vec::new(),
            reported: PageSet::new(pages),
            harvests: 0,
            sums: Pages::default(),
            faults: Vec::new(),
        })
    }

    fn run(mut self, share: Duration) -> Result<Row, Failure> {
        self.machine.command(Command::Populate, 0)?;
        self.tracker.start(&self.machine)?;
        // Everything that was there when logging began is copied once; from then on only what is reported.
        self.copy = (0..self.setup.plan.pattern.pages).map(|page| self.word(page)).collect();
        self.machine.begin(Command::FreeRun, 1)?;
        let begin = Instant::now();
        while begin.elapsed() < share {
            std::thread::sleep(PAUSE);
            let finished = self.rounds_done()?;
            self.harvest()?;
            self.check_finished(&finished);
        }
        self.machine.stop_free_run()?;
        self.machine.finish_all(Command::FreeRun)?;
        self.harvest()?;
        let lost: Vec<_> =
            (0..self.setup.plan.pattern.pages).filter(|&page| self.word(page) != self.copied(page)).collect();
        for page in lost {
            self.lost(page, "differs from its copy after the last harvest");
        }
        let rounds: u64 = self.rounds_done()?.iter().map(|next| next - 1).sum();
        self.tracker.stop(&self.machine)?;
        Ok(self.row(rounds))
    }

    fn row(self, rounds: u64) -> Row {
        let mut row = Row { name: self.kind.to_string(), ..Row::default() };
        let own = self.tracker.counters(&self.machine);
        for (name, value) in [("harvests", self.harvests), ("guest_rounds", rounds)].into_iter().chain(own) {
            let counter = Counter { value, source: "umbra".to_owned(), pass: "observed".to_owned() };
            row.counters.insert(name.to_owned(), counter);
        }
        let round = TruthRound { round: 1, pass: "observed".to_owned(), pages: self.sums };
        row.truth = Truth { pages: self.sums, rounds: vec![round], faults: self.faults, ..Truth::default() };
        row
    }

    /// The next round of each vCPU: all before it are finished.
    fn rounds_done(&self) -> Result<Vec<u64>, Failure> {
        (0..self.setup.plan.vcpus).map(|vcpu| Ok(self.machine.rounds_done(vcpu)?.max(1))).collect()
    }

    fn harvest(&mut self) -> Result<(), Failure> {
        self.tracker.harvest(&self.machine)?;
        self.tracker.clear(&self.machine)?;
        self.reported.clear();
        self.tracker.report(&self.machine, &mut self.reported);
        self.harvests += 1;
        if self.setup.inject == Some(Fault::LosePage) && self.harvests > 2 {
            self.reported.remove(0);
        }
        self.sums.reported += self.reported.count();
        for page in self.reported.iter() {
            // A page is copied after it was cleared: a write behind the copy is reported again.
            let word = self.machine.vm().first_word(page).unwrap_or(0);
            if let Some(copy) = usize::try_from(page).ok().and_then(|page| self.copy.get_mut(page)) {
                *copy = word;
            }
        }
        Ok(())
    }

    /// Rounds that were finished before the harvest must be in the copy. A later round may have overwritten them: stamps grow with the round.
    fn check_finished(&mut self, finished: &[u64]) {
        let pattern = self.setup.plan.pattern;
        for (vcpu, &next) in (0..).zip(finished) {
            let Some(last) = next.checked_sub(1).filter(|&round| round > 0) else { continue };
            let share = pattern.share(vcpu, finished.len() as u64);
            let late: Vec<_> = share
                .map(|index| pattern.access(last, index))
                .filter(|access| access.write && self.copied(access.page) < Pattern::stamp(last, access.page))
                .map(|access| access.page)
                .collect();
            for page in late {
                self.lost(
                    page,
                    &format!("was written in round {last} by vCPU {vcpu} and not reported by the harvest after it"),
                );
            }
        }
    }

    fn lost(&mut self, page: u64, what: &str) {
        self.sums.missed += 1;
        if self.faults.len() < NAMED_FAULTS {
            self.faults.push(format!("tracker {}, harvest {}: page {page} {what}", self.kind, self.harvests));
        }
    }

    fn word(&self, page: u64) -> u64 {
        self.machine.vm().first_word(page).unwrap_or(0)
    }

    fn copied(&self, page: u64) -> u64 {
        usize::try_from(page).ok().and_then(|page| self.copy.get(page)).copied().unwrap_or(0)
    }
}
