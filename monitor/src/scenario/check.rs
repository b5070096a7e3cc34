//! One pass of a row held against the truth, round by round.

use super::pass::{Case, ExplainedBy, Pass};
use super::setup::Fault;
use crate::guest::{Machine, Plan};
use crate::host;
use crate::pages::PageSet;
use crate::report::record::{Truth, TruthOfL2, TruthRound};
use crate::track::{self, Expectation, Kind};
use crate::truth::{self, Contents, Round, Touched, Translation, Verdict};
use umbra_shared::Level;
use umbra_shared::layout::Slot;
use umbra_shared::nested::Way;
use umbra_shared::pattern::Pattern;

/// Faults that a row names one by one; more are counted.
const NAMED_FAULTS: usize = 8;

/// Over-reports that the tracker's definition and the guest's mappings predict.
struct Prediction {
    l1: Expectation,
    /// By L2's pages, where KVM shadows L2's mappings.
    l2: Option<Expectation>,
}

impl Prediction {
    fn new(case: &Case) -> Self {
        let Plan { slots, backing, .. } = case.plan;
        let host = track::Host::here();
        match case.explained_by {
            ExplainedBy::L1 => Self { l1: Expectation::new(case.kind, slots, *backing, host), l2: None },
            ExplainedBy::L2 => {
                let map = case.plan.map();
                let drops_huge_mappings = map.leaf() > Level::K4 && host::drops_huge_shadow_mappings();
                // L2's pages are one slot; what the tracker itself reports is by L1's, which L1 does not map.
                let slot = Slot { pages: map.l2_pages(), ..Slot::default() };
                let l2 = track::Host { drops_huge_mappings, ..host };
                let l1 = track::Host { drops_huge_mappings: false, ..host };
                Self {
                    l1: Expectation::new(case.kind, slots, *backing, l1),
                    l2: case.kind.is_of_kvm().then(|| Expectation::new(Kind::Bitmap, &[slot], *backing, l2)),
                }
            }
        }
    }

    /// Pages of L1 that a report may hold although they were not written, when the guest did `l1` and `l2` since the last one.
    fn explained(&mut self, map: &Translation, l1: &Touched, l2: &Touched) -> PageSet {
        let mut explained = self.l1.explained(&l1.written, &l1.read);
        if let Some(expectation) = &mut self.l2 {
            explained.add(&truth::l1_of(map, &expectation.explained(&l2.written, &l2.read)));
        }
        explained.without(&l1.written)
    }
}

/// The check of one pass.
pub struct Check {
    name: String,
    pass: Pass,
    pattern: Pattern,
    map: Translation,
    /// Exchanges of L1 in each round.
    remaps: u64,
    /// Whether the row is an L2's, whose pages are checked too.
    has_l2: bool,
    contents: Contents,
    /// Whether the tracker compares bytes.
    compares: bool,
    prediction: Prediction,
    /// A fault to inject, and into the report of which round.
    inject: Option<(Fault, u64)>,
    truth: Truth,
}

impl Check {
    /// Of memory that nobody has written yet.
    pub fn new(case: &Case, pass: Pass) -> Self {
        let map = case.plan.map();
        let has_l2 = case.plan.nested.is_some_and(|nested| nested.way != Way::Plain || nested.map.aliases() > 1);
        let inject = case.setup.inject.filter(|_| pass == Pass::Timed).map(|fault| (fault, case.setup.rounds.min(2)));
        Self {
            name: case.name.clone(),
            pass,
            pattern: case.plan.pattern,
            map: Translation::new(map),
            remaps: case.plan.nested.map_or(0, |nested| nested.remaps),
            has_l2,
            contents: Contents::zeroes(&map, case.plan.vcpus),
            compares: case.kind.compares(),
            prediction: Prediction::new(case),
            inject,
            truth: Truth { l2: has_l2.then(TruthOfL2::default), ..Truth::default() },
        }
    }

    /// Every page was written once.
    pub fn populated(&mut self) {
        self.contents.write(0, &Round::populating(&self.map));
    }

    /// Round `round` was executed, and nobody asked which pages it wrote.
    pub fn executed(&mut self, round: u64) {
        self.contents.write(self.pattern.written_as(round), &Round::of(&self.pattern, &self.map, round));
    }

    /// L1 edited its table after L2's writes of round `round`. To be said after the round's report.
    pub fn edited(&mut self, round: u64) {
        self.map.exchange(round, self.remaps);
    }

    /// Holds the report of `round` against the truth. `writes` is what the firmware says it made.
    pub fn reported(&mut self, round: u64, writes: u64, reported: &mut PageSet, machine: &Machine) {
        let truth = Round::of(&self.pattern, &self.map, round);
        let promised = self.prediction.l1.promises_all();
        let explained = self.prediction.explained(&self.map, &truth.l1, &truth.l2);
        if promised && reported.count() < self.map.l1_pages() {
            self.fault(&format!("round {round}: initially all set promises every page, and not all were reported"));
        }
        self.inject(round, &truth.l1.written, &explained, reported);
        let stamps = self.pattern.written_as(round);
        let unchanged =
            if self.compares { self.contents.unchanged(stamps, &truth) } else { PageSet::new(self.map.l1_pages()) };
        self.contents.write(stamps, &truth);
        if writes != truth.writes {
            self.fault(&format!(
                "round {round}: the firmware made {writes} writes where the pattern has {}",
                truth.writes
            ));
        }
        let verdict = Verdict::of(&truth.l1.written, reported, &explained).comparing(&unchanged);
        for page in verdict.missed.iter() {
            let blame = if self.contents.holds(page, machine.vm().first_word(page)) {
                "the page holds the written value: the tracker lost it"
            } else {
                "the page does not hold the value: the guest did not write it"
            };
            self.fault(&format!("round {round}: {} was not reported; {blame}", place(machine, page)));
        }
        for page in verdict.extra.iter() {
            self.fault(&format!(
                "round {round}: {} was reported, but not written, and nothing explains it",
                place(machine, page)
            ));
        }
        let entry = |pages| TruthRound { round, pass: self.pass.name().to_owned(), pages };
        if let Some(l2) = &mut self.truth.l2 {
            // A report names a page of L1, so it stands for all of L2's that are it: the written one and its aliases.
            let mut may = truth.l1.written.clone();
            may.add(&explained);
            let verdict =
                Verdict::of(&truth.l2.written, &truth::l2_of(&self.map, reported), &truth::l2_of(&self.map, &may))
                    .comparing(&truth::l2_of(&self.map, &unchanged));
            l2.pages += verdict.pages;
            l2.rounds.push(entry(verdict.pages));
        }
        self.truth.pages += verdict.pages;
        self.truth.rounds.push(entry(verdict.pages));
    }

    fn inject(&mut self, round: u64, written: &PageSet, explained: &PageSet, reported: &mut PageSet) {
        match self.inject.filter(|&(_, at)| at == round) {
            Some((Fault::LosePage, _)) => {
                let Some(page) = written.iter().next() else {
                    return self.fault("--inject lose-page: the round wrote no page that could be lost");
                };
                reported.remove(page);
            }
            Some((Fault::ExtraPage, _)) => {
                let innocent =
                    (0..self.map.l1_pages()).find(|&page| !written.contains(page) && !explained.contains(page));
                let Some(page) = innocent else {
                    return self.fault(
                        "--inject extra-page: every page of the round is written or explained (take more --rounds)",
                    );
                };
                reported.insert(page);
            }
            // No report's.
            _ => {}
        }
    }

    /// The firmware says that it measured `writes` in `rounds` rounds.
    pub fn measured(&mut self, writes: u64, rounds: u64) {
        let expected = rounds * self.pattern.writes();
        if writes != expected {
            self.fault(&format!("the firmware measured {writes} writes where the pattern has {expected}"));
        }
    }

    /// A harvest while the guest rests reports nothing but what the tracker reports whatever the guest does. Where every round writes every
    /// page, only this shows that clearing cleared: a bit that stays would hide a page that is lost later.
    pub fn at_rest(&mut self, reported: &PageSet, machine: &Machine) {
        let (l1, l2) = (Touched::none(self.map.l1_pages()), Touched::none(self.map.l2_pages()));
        let explained = self.prediction.explained(&self.map, &l1, &l2);
        let stale: Vec<_> = reported.without(&explained).iter().collect();
        self.truth.pages.extra += stale.len() as u64;
        for page in stale {
            self.fault(&format!(
                "after the last round: {} is still reported, although it was cleared",
                place(machine, page)
            ));
        }
    }

    /// The end: every page must hold what its last write left.
    pub fn finish(mut self, machine: &Machine) -> Truth {
        let vm = machine.vm();
        let wrong: Vec<_> = self.contents.wrong(|page| vm.first_word(page)).collect();
        for page in wrong {
            let (holds, l2) = (vm.first_word(page).unwrap_or(0), if self.has_l2 { " of L2" } else { "" });
            self.fault(&format!(
                "at the end: {} does not hold what the pattern wrote there last, but the stamp of page {}{l2}",
                place(machine, page),
                holds & u64::from(u32::MAX),
            ));
        }
        self.truth
    }

    /// Names what failed, in words.
    pub fn fault(&mut self, what: &str) {
        let faults = &mut self.truth.faults;
        if faults.len() < NAMED_FAULTS {
            faults.push(format!("tracker {}, {} pass, {what}", self.name, self.pass.name()));
        }
    }
}

/// A page as a message names it.
fn place(machine: &Machine, page: u64) -> String {
    match machine.vm().slot_of(page) {
        Some(slot) => {
            let offset = page - slot.place.first_page;
            let gpa = slot.place.base.plus(offset).address();
            format!("page {page} (slot {}, its page {offset}, GPA {gpa:#x})", slot.id)
        }
        None => format!("page {page}"),
    }
}
