//! One pass of a row held against the truth, round by round.

use super::pass::{Case, ExplainedBy, Pass};
use super::setup::Fault;
use crate::guest::Machine;
use crate::host;
use crate::pages::PageSet;
use crate::report::record::{Truth, TruthOfL2, TruthRound};
use crate::track::{Expectation, Kind};
use crate::truth::{self, Contents, Round, Verdict};
use umbra_shared::layout::Slot;
use umbra_shared::nested::{Map, Way};
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
        let (slots, huge) = (&case.plan.slots, case.plan.backing.is_huge());
        match case.explained_by {
            ExplainedBy::L1 => {
                Self { l1: Expectation::new(case.kind, slots, huge && host::drops_huge_mappings()), l2: None }
            }
            ExplainedBy::L2 => {
                let map = case.plan.map();
                let drops = huge && map.leaf().frames() > 1 && host::drops_huge_shadow_mappings();
                // L2's pages are one slot; what the tracker itself reports at first is by L1's.
                let slot = Slot { pages: map.l2_pages(), ..Slot::default() };
                let l2 = Expectation::new(Kind::Bitmap, &[slot], drops);
                Self { l1: Expectation::new(case.kind, slots, false), l2: Some(l2) }
            }
        }
    }

    /// Pages of L1 that the report of `round` may hold although they were not written.
    fn explained(&mut self, map: &Map, round: &Round) -> PageSet {
        let mut explained = self.l1.explained(&round.l1.written, &round.l1.read);
        if let Some(l2) = &mut self.l2 {
            explained.add(&truth::l1_of(map, &l2.explained(&round.l2.written, &round.l2.read)));
        }
        explained.without(&round.l1.written)
    }
}

/// The check of one pass.
pub struct Check {
    name: String,
    pass: Pass,
    pattern: Pattern,
    map: Map,
    /// Whether the row is an L2's, whose pages are checked too.
    has_l2: bool,
    contents: Contents,
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
            map,
            has_l2,
            contents: Contents::zeroes(&map, case.plan.vcpus),
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
        self.contents.write(round, &Round::of(&self.pattern, &self.map, round));
    }

    /// Holds the report of `round` against the truth. `writes` is what the firmware says it made.
    pub fn reported(&mut self, round: u64, writes: u64, reported: &mut PageSet, machine: &Machine) {
        let truth = Round::of(&self.pattern, &self.map, round);
        let explained = self.prediction.explained(&self.map, &truth);
        self.inject(round, &truth.l1.written, &explained, reported);
        self.contents.write(round, &truth);
        if writes != truth.writes {
            self.fault(&format!(
                "round {round}: the firmware made {writes} writes where the pattern has {}",
                truth.writes
            ));
        }
        let verdict = Verdict::of(&truth.l1.written, reported, &explained);
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
                Verdict::of(&truth.l2.written, &truth::l2_of(&self.map, reported), &truth::l2_of(&self.map, &may));
            l2.pages += verdict.pages;
            l2.rounds.push(entry(verdict.pages));
        }
        self.truth.pages += verdict.pages;
        self.truth.rounds.push(entry(verdict.pages));
    }

    fn inject(&mut self, round: u64, written: &PageSet, explained: &PageSet, reported: &mut PageSet) {
        match self.inject.filter(|&(_, at)| at == round) {
            Some((Fault::LosePage, _)) => {
                if let Some(page) = written.iter().next() {
                    reported.remove(page);
                }
            }
            Some((Fault::ExtraPage, _)) => {
                let innocent =
                    (0..self.map.l1_pages()).find(|&page| !written.contains(page) && !explained.contains(page));
                if let Some(page) = innocent {
                    reported.insert(page);
                }
            }
            None => {}
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

    fn fault(&mut self, what: &str) {
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
