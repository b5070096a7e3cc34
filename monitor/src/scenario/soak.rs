//! The guest writes without pause while the controller harvests, as in the pre-copy phase of a migration.
//!
//! The controller keeps a copy of each page's first word, as a migration's destination would: it copies a page when it is
//! reported, after the log was cleared. A write may then be reported in this harvest or the next, but:
//! - the last round that a vCPU had finished before a harvest began must be in the copy after it, for every page the round wrote;
//! - at the end, one last harvest makes the copy equal to the memory.
//!
//! Either failing means that a write was lost. Where several vCPUs write the same page, the first holds in a weaker form: a vCPU that is behind
//! may overwrite a newer stamp with an older one, but not with one of a round that it had finished before the newer one's began.
//!
//! Where a tracker loses writes between harvest and clear by its definition (`soft-dirty`), the guest stands still from the one to the other.

use super::Setup;
use super::setup::Fault;
use crate::failure::Failure;
use crate::guest::Machine;
use crate::host;
use crate::pages::PageSet;
use crate::progress::Progress;
use crate::report::Record;
use crate::report::record::{Counter, Pages, Row, Truth, TruthRound};
use crate::track::{self, Tracker};
use std::time::{Duration, Instant};
use umbra_shared::pattern::{Kind, Pattern};
use umbra_shared::protocol::Command;

/// The guest gets the CPU between two harvests: a harvester that never pauses starves it under legacy GET.
const PAUSE: Duration = Duration::from_millis(5);
/// On a machine that is too busy a tracker's share may end before much was checked: then it is given more, at most so much.
const PATIENCE: Duration = Duration::from_secs(10);
/// Until then: harvests, and rounds that each vCPU has finished.
const ENOUGH: u64 = 4;
/// Lost pages that are named one by one.
const NAMED_FAULTS: usize = 8;

/// Runs the scenario: a row for each tracker, the time shared out among them.
pub fn run(setup: &Setup, progress: &Progress) -> Result<Record, Failure> {
    let share = Duration::from_secs(setup.seconds) / u32::try_from(setup.trackers().len()).unwrap_or(1).max(1);
    setup.rows(|kind| {
        if kind.ring_entries().is_some() && host::parameter("kvm_intel", "pml").as_deref() == Some("Y") {
            // api.rst, 8.29: entries that still lie in a vCPU's PML buffer reach the ring when it leaves KVM_RUN.
            return Err(Failure::NotHere(
                "under PML a ring is complete only when its vCPUs have left KVM_RUN, and soak harvests while they run"
                    .into(),
            ));
        }
        progress.step(&format!("{kind}: harvesting a running guest for {:.1} s", share.as_secs_f64()));
        Soak::new(setup, kind)?.run(share)
    })
}

struct Soak<'a> {
    setup: &'a Setup,
    kind: track::Kind,
    /// Before the machine: a tracker may hold the VM's descriptor, which is closed before the memory under it goes.
    tracker: Box<dyn Tracker>,
    machine: Machine,
    /// The copy: each page's first word.
    copy: Vec<u64>,
    reported: PageSet,
    harvests: u64,
    /// The round that each vCPU was in before the last harvest, and one that all vCPUs had reached when it began.
    running: Vec<(u64, u64)>,
    /// A round that all vCPUs had reached before `running` was read.
    reached: u64,
    sums: Pages,
    faults: Vec<String>,
}

impl<'a> Soak<'a> {
    fn new(setup: &'a Setup, kind: track::Kind) -> Result<Self, Failure> {
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
            running: vec![(1, 1); setup.plan.vcpus],
            reached: 1,
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
        while begin.elapsed() < share
            || begin.elapsed() < share + PATIENCE && (self.harvests < ENOUGH || self.least_rounds()? < ENOUGH)
        {
            std::thread::sleep(PAUSE);
            if self.kind.needs_standstill() {
                self.stand_still()?;
            }
            // In this order: what begins after the second look began after the first.
            let reached = self.least_rounds()? + 1;
            let finished = self.rounds_done()?;
            self.harvest()?;
            self.check_finished(&finished);
            self.reached = reached;
            if self.kind.needs_standstill() {
                self.go_on(&finished)?;
            }
        }
        self.stand_still()?;
        self.harvest()?;
        let lost: Vec<_> =
            (0..self.setup.plan.pattern.pages).filter(|&page| self.word(page) != self.copied(page)).collect();
        for page in lost {
            self.lost(page, "differs from its copy after the last harvest");
        }
        let rounds = self.rounds_done()?.iter().fold(0_u64, |sum, next| sum.saturating_add(next - 1));
        if self.least_rounds()? == 0 {
            self.faults.push(format!(
                "tracker {}: a vCPU finished no round, so nothing that it wrote was checked: take more --seconds, or less --memory",
                self.kind
            ));
        }
        self.tracker.stop(&self.machine)?;
        self.faults.extend(self.tracker.fault());
        Ok(self.row(rounds))
    }

    /// Lets the vCPUs finish their round and waits for them.
    fn stand_still(&mut self) -> Result<(), Failure> {
        self.machine.stop_free_run()?;
        self.machine.finish_all(Command::FreeRun)?;
        // The firmware counts over the whole free run; a page written in several rounds counts in each.
        self.sums.written += self.machine.writes()?;
        Ok(())
    }

    /// After a stand-still all vCPUs go on with the same round, the next of the one that was ahead: stamps still grow, and nobody is held to the
    /// rounds that the others leave out.
    fn go_on(&mut self, finished: &[u64]) -> Result<(), Failure> {
        let next = finished.iter().copied().max().unwrap_or(1);
        self.running.fill((next, next));
        self.reached = next;
        Ok(self.machine.begin(Command::FreeRun, next)?)
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

    /// Rounds that each vCPU has finished.
    fn least_rounds(&self) -> Result<u64, Failure> {
        Ok(self.rounds_done()?.into_iter().min().unwrap_or(1) - 1)
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

    /// What a vCPU wrote in the round that it finished last must be in the copy, or what was written there after it.
    fn check_finished(&mut self, finished: &[u64]) {
        let pattern = self.setup.plan.pattern;
        // A page that only one vCPU writes holds stamps that grow with its rounds.
        let one_writer = finished.len() == 1
            || pattern.accesses_per_page == 1 && matches!(pattern.kind, Kind::Sequential | Kind::Stride(_));
        for (vcpu, &next) in finished.iter().enumerate() {
            let (running, then_reached) = self.running[vcpu];
            if next == running {
                continue;
            }
            self.running[vcpu] = (next, self.reached);
            let last = next.saturating_sub(1);
            let then_reached = if last == running { then_reached } else { self.reached };
            let surely = if one_writer { last } else { then_reached.min(last) };
            let share = pattern.share(vcpu as u64, finished.len() as u64);
            let late: Vec<_> = share
                .map(|index| pattern.access(last, index))
                .filter(|access| {
                    access.write && self.copied(access.page) < Pattern::stamp(pattern.written_as(surely), access.page)
                })
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
