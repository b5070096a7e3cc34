//! The edits race L2s that run ([`umbra_shared::race`]): no barrier stands between an edit and the accesses of L2 to the pages concerned, nor
//! between them and a harvest.
//!
//! ```text
//! vCPU 0      L1 | edits, says what is due | edits, says what is due | ...      until the journals are full
//! vCPU 1, 2.. L2 | reads and writes the pages concerned, and keeps a journal
//! monitor     harvests, clears, and copies what was reported, a few times
//! ```
//!
//! Then all stand still, and the journals are checked against the table's past ([`Chronicle`]): each page that was read, each refusal that L1 was
//! told of, and each page where a write landed, as L1's memory shows. After one last harvest the copy has to be equal to the memory, and nothing
//! was reported that was not written.

use super::chronicle::{Chronicle, May};
use super::mirror::Mirror;
use super::{Trial, describe};
use crate::failure::Failure;
use crate::kvm::Vm;
use crate::pages::PageSet;
use crate::report::record::{Pages, Row, TruthOfL2};
use crate::scenario::l1_cpu::violation;
use crate::scenario::setup::Fault;
use std::time::Duration;
use umbra_shared::nested::L2_BASE;
use umbra_shared::protocol::Command;
use umbra_shared::race::{Access, Lapse, Order, Turn};

/// Epochs of a race, at most.
const EPOCHS: u64 = 64;
/// Edits of an epoch: on the average it has rather more.
const EDITS: u64 = 4;
/// Harvests while it is on, and the time from one to the next.
const HARVESTS: u32 = 4;
const PAUSE: Duration = Duration::from_millis(2);
/// Accesses of each L2 between two epochs, at most.
const GAP: u64 = 63;
/// Accesses after which an L2 lets others run, where there are fewer CPUs than vCPUs. Few, so that it often is inside then: one in three is a violation.
const BURST: u64 = 4;
/// How long an L2 waits between two accesses at most, where each has a CPU: so the journals are not full before much is edited.
const SPINS: u64 = 40;

/// What all pages of L1 hold.
struct Contents(Vec<[u64; 512]>);

impl Contents {
    fn of(vm: &Vm, pages: u64) -> Self {
        let mut all = Self(vec![[0; 512]; usize::try_from(pages).unwrap_or(0)]);
        (0..pages).for_each(|page| all.copy(vm, page));
        all
    }

    /// Copies a page from the machine.
    fn copy(&mut self, vm: &Vm, page: u64) {
        let Some(into) = usize::try_from(page).ok().and_then(|page| self.0.get_mut(page)) else { return };
        if let Some(slot) = vm.slot_of(page) {
            let _ = slot.memory.copy_page(page - slot.place.first_page, into);
        }
    }

    fn page(&self, page: u64) -> &[u64; 512] {
        const NOTHING: [u64; 512] = [0; 512];
        usize::try_from(page).ok().and_then(|page| self.0.get(page)).unwrap_or(&NOTHING)
    }
}

/// One row.
pub fn row(mut trial: Trial) -> Result<Row, Failure> {
    let counts = ["edits", "epochs", "due", "races", "reads", "writes", "violations", "raced", "overwritten"];
    trial.counts = counts.map(|name| (name, 0)).into();
    trial.row.truth.l2 = trial.tracker.as_ref().map(|_| TruthOfL2::default());
    let mut race = Race::new(trial)?;
    race.start()?;
    while race.trial.missing() > 0 {
        race.race()?;
    }
    if race.trial.tracker.is_some() {
        race.trial.count("harvests", race.harvests);
    }
    Ok(race.trial.finish())
}

struct Race<'a> {
    trial: Trial<'a>,
    chronicle: Chronicle,
    pages: u64,
    /// The first epoch of the next race.
    first: u64,
    /// What L1's memory held before the race; and what was copied of it since, as reported.
    before: Contents,
    copy: Contents,
    /// Reported at some harvest of this race.
    ever: PageSet,
    harvests: u64,
}

impl<'a> Race<'a> {
    fn new(trial: Trial<'a>) -> Result<Self, Failure> {
        let pages = trial.nested.map.l1_pages();
        Ok(Self {
            chronicle: Chronicle::new(&trial.nested)?,
            pages,
            first: 1,
            before: Contents::of(trial.machine.vm(), pages),
            copy: Contents::of(trial.machine.vm(), pages),
            ever: PageSet::new(pages),
            harvests: 0,
            trial,
        })
    }

    fn start(&mut self) -> Result<(), Failure> {
        self.trial.start()?;
        if self.trial.setup.inject == Some(Fault::LoseTransfer)
            && let Some(l2) = self.trial.machine.l2()
            && let Some(log) = &mut l2.shadow()?.places.here_mut().log
        {
            log.forgetful = true;
        }
        Ok(())
    }

    fn order(&self) -> Order {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let (burst, spins) = if cpus < self.trial.machine.vcpus() { (BURST, 0) } else { (0, SPINS) };
        let lapse = match self.trial.setup.inject {
            Some(Fault::LoseInvalidation) => Lapse::Lost,
            Some(Fault::LateInvalidation) => Lapse::Late,
            _ => Lapse::None,
        };
        let epochs = EPOCHS.min(self.trial.missing().div_ceil(EDITS));
        Order { first: self.first, epochs, gap: GAP, burst, spins, lapse }
    }

    fn race(&mut self) -> Result<(), Failure> {
        let order = self.order();
        self.ever.clear();
        self.trial.machine.begin(Command::Race, order.word())?;
        if self.trial.tracker.is_some() {
            for _ in 0..HARVESTS {
                std::thread::sleep(PAUSE);
                self.harvest()?;
            }
        }
        self.trial.machine.finish_all(Command::Race)?;
        self.harvest()?;

        let played = self.trial.machine.mailbox(0)?.writes.min(order.epochs);
        for number in self.first..self.first + played {
            let epoch = self.chronicle.play(self.trial.nested.map.seed(), number);
            self.trial.count_epoch(&epoch);
        }
        self.trial.count("races", 1);
        if played == 0 {
            return Err(Failure::Check(format!("race {}: L1 made no edit", self.first)));
        }
        let journals = (1..self.trial.machine.vcpus())
            .map(|vcpu| self.trial.machine.journal(vcpu))
            .collect::<Result<Vec<_>, _>>()?;
        let now = Contents::of(self.trial.machine.vm(), self.pages);
        self.check(&journals, &now);
        self.trial.audit(self.first + played - 1)?;
        self.before = now;
        self.first += played;
        self.chronicle.forget(self.first - 1);
        Ok(())
    }

    /// Asks for what was written, and copies it once it was cleared: a write behind the copy is reported again.
    fn harvest(&mut self) -> Result<(), Failure> {
        if self.trial.tracker.is_none() {
            return Ok(());
        }
        self.trial.harvest()?;
        self.harvests += 1;
        let Trial { setup, machine, reported, .. } = &mut self.trial;
        if setup.inject == Some(Fault::LosePage) {
            let first = reported.iter().next();
            if let Some(page) = first {
                reported.remove(page);
            }
        }
        for page in reported.iter() {
            self.copy.copy(machine.vm(), page);
            self.ever.insert(page);
        }
        Ok(())
    }

    /// Checks a race that is over, where L1's memory holds `now` what it left.
    fn check(&mut self, journals: &[Vec<Access>], now: &Contents) {
        let may: Vec<Vec<May>> =
            journals.iter().map(|journal| journal.iter().map(|access| self.chronicle.may(access)).collect()).collect();
        for (vcpu, (journal, may)) in (1..).zip(journals.iter().zip(&may)) {
            for (index, (access, may)) in journal.iter().zip(may).enumerate() {
                self.check_access(Turn { first: self.first, vcpu, index }, access, may);
            }
        }
        let landed = self.check_memory(journals, &may, now);
        self.check_lost(journals, &may, &landed, now);
        if self.trial.tracker.is_some() {
            self.check_report((journals, &may), &landed, now);
        }
    }

    /// What was read, and what L1 was told.
    fn check_access(&mut self, turn: Turn, access: &Access, may: &May) {
        let probe = access.probe();
        let answer = &access.answer;
        self.trial.count("raced", may.differ().into());
        self.trial.count(if probe.write { "writes" } else { "reads" }, 1);
        let right = if answer.code == 0 {
            let read = |page: &u64| answer.value == Mirror::word(*page);
            if probe.write { !may.lead_to.is_empty() } else { may.lead_to.iter().any(read) }
        } else {
            self.trial.count("violations", 1);
            let (code, bytes) = violation(self.trial.nested.way);
            let within = if probe.write { turn.word() as u64 * 8 } else { 0 };
            let address = L2_BASE.plus(probe.page).address() + within;
            answer.code == code
                && answer.address / bytes == address / bytes
                && may.be_told.contains(&answer.qualification)
        };
        if !right {
            let (verb, what) = (if probe.write { "writes" } else { "reads" }, describe(answer));
            self.trial.differences.add(format!(
                "{}: L2 {verb} page {}: {what}, and {may:x?}",
                self.at(turn, access),
                probe.page
            ));
        }
    }

    fn at(&self, turn: Turn, access: &Access) -> String {
        let Turn { vcpu, index, .. } = turn;
        format!(
            "vCPU {vcpu}'s access {index} of the race from epoch {}, made between {} and {}",
            self.first, access.returned, access.begun
        )
    }

    /// Every word that changed is the stamp of a write that may have led there. Says for each write where it landed, if that shows.
    fn check_memory(&mut self, journals: &[Vec<Access>], may: &[Vec<May>], now: &Contents) -> Vec<Vec<Option<u64>>> {
        let mut landed: Vec<Vec<Option<u64>>> = journals.iter().map(|journal| vec![None; journal.len()]).collect();
        for page in 0..self.pages {
            let words = self.before.page(page).iter().zip(now.page(page)).enumerate();
            let changed: Vec<(usize, u64)> =
                words.filter(|(_, (was, is))| was != is).map(|(word, (_, is))| (word, *is)).collect();
            for (word, value) in changed {
                let found =
                    Turn::of(value).filter(|turn| turn.first == self.first && turn.word() == word).and_then(|turn| {
                        let (vcpu, index) = (turn.vcpu.checked_sub(1)?, turn.index);
                        let access = journals.get(vcpu)?.get(index)?;
                        Some((turn, access, may.get(vcpu)?.get(index)?, landed.get_mut(vcpu)?.get_mut(index)?))
                    });
                let Some((turn, access, may, landed)) = found else {
                    self.trial.differences.add(format!("word {word} of L1's page {page} became {value:#x}, which no L2 wrote there in the race from epoch {}", self.first));
                    continue;
                };
                *landed = Some(page);
                if access.answer.code != 0 || !may.lead_to.contains(&page) {
                    let what = format!(
                        "{}: L2's write to its page {} landed in L1's page {page}: {}, and {may:x?}",
                        self.at(turn, access),
                        access.probe().page,
                        describe(&access.answer)
                    );
                    self.trial.differences.add(what);
                }
            }
        }
        landed
    }

    /// A write that shows nowhere was overwritten where it may have landed, by a later one of the same L2 or by another's.
    fn check_lost(&mut self, journals: &[Vec<Access>], may: &[Vec<May>], landed: &[Vec<Option<u64>>], now: &Contents) {
        for (vcpu, ((journal, may), landed)) in (1..).zip(journals.iter().zip(may).zip(landed)) {
            for (index, ((access, may), landed)) in journal.iter().zip(may).zip(landed).enumerate() {
                if !access.probe().write || access.answer.code != 0 || landed.is_some() {
                    continue;
                }
                let turn = Turn { first: self.first, vcpu, index };
                let over = |page: &u64| {
                    let stamp = now.page(*page).get(turn.word()).copied().and_then(Turn::of);
                    stamp.is_some_and(|it| it.first == turn.first && (it.vcpu != vcpu || it.index > index))
                };
                if may.lead_to.iter().any(over) {
                    self.trial.count("overwritten", 1);
                } else if !may.lead_to.is_empty() {
                    let page = access.probe().page;
                    self.trial.differences.add(format!(
                        "{}: L2's write to its page {page} landed nowhere, and {may:x?}",
                        self.at(turn, access)
                    ));
                }
            }
        }
    }

    /// The copy is equal to the memory, and what was reported was written; by L1's pages and by L2's. KVM's log takes a page for written when it maps it
    /// for a write: who loses the page again before the write is made has it reported all the same, so where a write may have led is explained.
    fn check_report(
        &mut self,
        (journals, may): (&[Vec<Access>], &[Vec<May>]),
        landed: &[Vec<Option<u64>>],
        now: &Contents,
    ) {
        let (mut written, mut lost) = (PageSet::new(self.pages), PageSet::new(self.pages));
        for page in 0..self.pages {
            if self.before.page(page) != now.page(page) {
                written.insert(page);
            }
            if self.copy.page(page) != now.page(page) {
                lost.insert(page);
                self.trial.differences.add(format!(
                    "L1's page {page} differs from its copy after the last harvest of the race from epoch {}",
                    self.first
                ));
            }
        }
        let unwritten = self.ever.without(&written);
        let mut attempted = PageSet::new(self.pages);
        let writes = journals.iter().flatten().zip(may.iter().flatten()).filter(|(access, _)| access.probe().write);
        for (_, may) in writes {
            may.lead_to.iter().for_each(|page| {
                attempted.insert(*page);
            });
        }
        let extra = unwritten.without(&attempted);
        for page in extra.iter() {
            self.trial.differences.add(format!(
                "L1's page {page} was reported in the race from epoch {}, and nobody wrote it",
                self.first
            ));
        }
        // No tracker names L2's pages. One counts as reported where its writes are in the copy.
        let l2_pages = self.trial.nested.map.l2_pages();
        let (mut l2_written, mut l2_lost) = (PageSet::new(l2_pages), PageSet::new(l2_pages));
        for (access, to) in journals.iter().flatten().zip(landed.iter().flatten()) {
            let Some(to) = to else { continue };
            l2_written.insert(access.probe().page);
            if lost.contains(*to) {
                l2_lost.insert(access.probe().page);
            }
        }
        self.trial.row.truth.pages += Pages {
            written: written.count(),
            reported: self.ever.count(),
            missed: lost.count(),
            extra: extra.count(),
            explained: unwritten.count() - extra.count(),
            ..Pages::default()
        };
        if let Some(l2) = &mut self.trial.row.truth.l2 {
            l2.pages += Pages {
                written: l2_written.count(),
                reported: l2_written.without(&l2_lost).count(),
                missed: l2_lost.count(),
                ..Pages::default()
            };
        }
        // What was lost is named once.
        for page in lost.iter() {
            self.copy.copy(self.trial.machine.vm(), page);
        }
    }
}
