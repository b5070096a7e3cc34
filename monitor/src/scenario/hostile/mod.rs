//! A malicious L1 against whoever shadows its table, the monitor or KVM ([`umbra_shared::hostile`]): words in that table that are no entries, nonsense in
//! its control page, doorbells out of turn. After each case L2 reads and writes the pages concerned; what comes of it has to be what a naive walk of the
//! table says. Where it is the monitor, the windows have to be what EPT02 and the process's memory map say, and what it did has to stay within bounds.
//!
//! An L1 may break itself: its table may let L2 write L1's own memory, or lead L2 to code that is none. Whether it may have is told by the table alone
//! (`reach`). Then it may end in any way, each of which is one clear line, and another L1 goes on with the next case. One that ends otherwise is a
//! fault.

mod forecast;
mod fort;
mod reach;

use super::Setup;
use super::each_way;
use crate::failure::Failure;
use crate::guest::{self, Plan};
use crate::kvm::bus;
use crate::progress::Progress;
use crate::report::Record;
use crate::report::record::{Counter, Row};
use crate::scenario::setup::Fault;
use crate::track::Kind;
use forecast::{Expected, Foretold};
use fort::Fort;
use std::collections::BTreeMap;
use std::time::Duration;
use umbra_mmu::Frame;
use umbra_shared::hostile::{CASES, Case};
use umbra_shared::nested::{L2_BASE, Nested};
use umbra_shared::probe::Answer;
use umbra_shared::protocol::Command;

/// Faults that are named one by one.
const NAMED: usize = 16;
/// How long an L2 that begins with nonsense, or finds it in the place of its code, may run; one of KVM's that may come to that by its own writes, since
/// nobody can take that one back; and one that probes.
const PATIENCE: Duration = Duration::from_millis(100);
const DOUBT: Duration = Duration::from_secs(2);
const PROBING: Duration = Duration::from_secs(30);
/// How long L1 may be silent.
const SILENCE: Duration = Duration::from_secs(40);
/// Cases from a harvest to the next.
const HARVEST: u64 = 16;
/// Cases from one sign of life to the next.
const SIGN: u64 = 5000;
/// Calls by which one command of L1's may change the windows: each page of L2's can be mapped apart, and be closed and mapped again; L1 says up
/// to nine times in a case that its table changed.
const CALLS_A_PAGE: u64 = 4;
/// Bytes that the shadow MMU may take for each page of the windows, and besides.
const BYTES_A_PAGE: u64 = 256;
const BYTES: u64 = 16 << 20;

/// Runs the scenario.
pub fn run(setup: &Setup, progress: &Progress) -> Result<Record, Failure> {
    let Some(l2) = &setup.l2 else { return Err(Failure::Input("hostile: its options are missing".into())) };
    each_way::record(setup, l2, &l2.nested_ways_here(crate::host::vendor()), &[None], progress, |plan, kind, name| {
        Siege::new(setup, plan, kind, name)?.finish(progress)
    })
}

/// One row.
struct Siege<'a> {
    setup: &'a Setup,
    plan: Plan,
    nested: Nested,
    /// `None` where KVM shadows L1's table.
    kind: Option<Kind>,
    row: Row,
    counts: BTreeMap<&'static str, u64>,
    /// The fault that breaks L1, or slips a page in, was made.
    injected: bool,
}

/// What became of a case.
struct Outcome {
    /// L1 may have broken itself.
    exposed: bool,
    /// How it ended, if it did.
    end: Option<guest::Error>,
}

impl<'a> Siege<'a> {
    fn new(setup: &'a Setup, plan: &Plan, kind: Option<Kind>, name: &str) -> Result<Self, Failure> {
        let plan = Plan { patience: SILENCE, ..plan.clone() };
        let Some(nested) = plan.nested else { return Err(Failure::Check("a plan without an L2".into())) };
        let row = Row { name: name.to_owned(), ..Row::default() };
        let whoever = ["cases", "probes", "told", "compared", "blind", "exposed", "guest_deaths", "machines", "faults"];
        let others = match kind {
            Some(_) => &["control_pages", "endless", "most_calls", "most_bytes"][..],
            None => &["beyond", "not_here"],
        };
        let counts = whoever.iter().chain(others).map(|&name| (name, 0)).collect();
        Ok(Self { setup, plan, nested, kind, row, counts, injected: false })
    }

    fn finish(mut self, progress: &Progress) -> Result<Row, Failure> {
        let cases = self.setup.l2.as_ref().map_or(0, |l2| l2.edits);
        let mut number = 0;
        while number < cases && self.counts["faults"] <= NAMED as u64 {
            let mut fort = Fort::new(&self.plan, self.nested, self.kind)?;
            self.count("machines", 1);
            number = self.hold(&mut fort, number..cases, progress)?;
            for (name, value) in fort.counters() {
                self.count(name, value);
            }
        }
        let faults = self.counts["faults"];
        if faults > NAMED as u64 {
            self.row.truth.faults.push(format!("and {} more faults", faults - NAMED as u64));
        }
        for (name, value) in self.counts {
            let counter = Counter { value, source: "umbra".to_owned(), pass: "observed".to_owned() };
            self.row.counters.insert(name.to_owned(), counter);
        }
        Ok(self.row)
    }

    fn count(&mut self, name: &'static str, more: u64) {
        *self.counts.entry(name).or_default() += more;
    }

    /// Names a fault, and how to see it again.
    fn fault(&mut self, number: u64, what: &str) {
        self.count("faults", 1);
        if self.counts["faults"] <= NAMED as u64 {
            let again = self.again(number);
            self.row.truth.faults.push(format!("case {number} ({again}): {what}"));
        }
    }

    /// The options that come to a case again.
    fn again(&self, number: u64) -> String {
        format!("--seed {} --edits {}", self.seed(number), number % CASES + 1)
    }

    fn seed(&self, number: u64) -> u64 {
        self.nested.map.seed().wrapping_add(number / CASES)
    }

    /// Makes cases for as long as L1 is sound. Returns the number of the first that was not made.
    fn hold(&mut self, fort: &mut Fort, cases: std::ops::Range<u64>, progress: &Progress) -> Result<u64, Failure> {
        let (first, end) = (cases.start, cases.end);
        for number in cases {
            if number % SIGN == 0 {
                progress.step(&format!("{}: case {number} of {end}", self.row.name));
            }
            if number == first || number % CASES == 0 || !fort.has_code() {
                fort.renew()?;
            }
            let mut outcome = self.case(fort, number)?;
            if let Some(what) = fort.audit()? {
                self.fault(number, &what);
            }
            if outcome.exposed && outcome.end.is_none() {
                // The same fault where L1 may have broken itself: that is its own end.
                if self.setup.inject == Some(Fault::BreakL1) {
                    fort.break_l1()?;
                }
                outcome.end = fort.last_table().err();
            }
            if outcome.exposed || outcome.end.is_some() {
                self.end(number, outcome, progress);
                return Ok(number + 1);
            }
            if number % HARVEST == HARVEST - 1 {
                fort.harvest()?;
            }
        }
        Ok(end)
    }

    /// This L1 is not used any more.
    fn end(&mut self, number: u64, Outcome { exposed, end }: Outcome, progress: &Progress) {
        self.count("exposed", exposed.into());
        let Some(error) = end else { return };
        let told = error.to_string();
        // A guest's words are the guest's; the monitor's line is one line.
        let clear = !told.contains(char::is_control);
        match error {
            guest::Error::Broken { .. } | guest::Error::Silent { .. } | guest::Error::NotHere(_)
                if exposed && clear =>
            {
                self.count("guest_deaths", 1);
                progress.step(&format!("case {number} ({}): L1 broke itself: {told}", self.again(number)));
            }
            _ if exposed => self.fault(number, &format!("{told:?}")),
            _ => self.fault(number, &format!("L1 ended, and nothing let L2 write L1's own memory: {told:?}")),
        }
    }

    fn case(&mut self, fort: &mut Fort, number: u64) -> Result<Outcome, Failure> {
        let case = Case::draw(self.seed(number), number % CASES, &fort.place);
        self.count("cases", 1);
        let (calls, words) = (fort.calls()?, fort.words());
        fort.store(&case);
        let patience = if fort.is_kvms() { PROBING } else { PATIENCE };
        let attacked = fort.machine.untimed_within(0, Command::Attack, number, patience);
        self.bounded(fort, number, calls)?;
        let mut outcome = match &case.control {
            // KVM's nesting has no control page, and L1 does nothing.
            Some(_) if fort.is_kvms() => {
                self.count("not_here", 1);
                Outcome { exposed: false, end: None }
            }
            Some(control) => {
                self.count("control_pages", 1);
                Outcome { exposed: control.misleads(), end: None }
            }
            None if attacked.is_ok() => self.probe(fort, number, &case, &words)?,
            None => Outcome { exposed: false, end: None },
        };
        match attacked {
            Ok(0) => {}
            Ok(_) => self.count("endless", 1),
            Err(error) => outcome.end = Some(error),
        }
        // The fault: a page of a window that EPT02 knows nothing of.
        if self.setup.inject == Some(Fault::StrayPage) && number == 3 {
            fort.stray()?;
        }
        Ok(outcome)
    }

    /// L2 makes the probes of `case`.
    fn probe(
        &mut self,
        fort: &mut Fort,
        number: u64,
        case: &Case,
        words: &BTreeMap<Frame, u64>,
    ) -> Result<Outcome, Failure> {
        let misled = fort.misleads();
        // Nobody can say what L2 finds if L1 did not say that its table changed, or took the code away that probes.
        let foretold = (case.invalidations > 0 && fort.has_code()).then(|| fort.forecast().answers(case.probes()));
        let reached = fort.reached(case);
        let own = reached.as_ref().is_none_or(|reached| fort.is_own(reached));
        // The fault: L1 breaks though it has done nothing that would break it.
        if self.setup.inject == Some(Fault::BreakL1) && !self.injected && !misled && !own {
            fort.break_l1()?;
            self.injected = true;
        }
        // The fault: a page that L1's table does not grant, where KVM maps it.
        if self.setup.inject == Some(Fault::StrayPage) && fort.is_kvms() && !self.injected && !misled && !own {
            let told = foretold.as_ref().map_or(0, |foretold| foretold.answers.len());
            self.injected = fort.slip_in(&case.probes()[..told]);
        }
        let prober = fort.machine.vcpus() - 1;
        let patience = match &reached {
            _ if misled => PATIENCE,
            Some(reached) if fort.is_kvms() && (own || fort.is_code(reached)) => DOUBT,
            None if fort.is_kvms() => DOUBT,
            _ => PROBING,
        };
        let calls = fort.calls()?;
        drop(fort.went_beyond());
        let made = fort.machine.untimed_within(prober, Command::Probe, 0, patience);
        self.bounded(fort, number, calls)?;
        let misled = misled || fort.misleads();
        let outcome = Outcome { exposed: misled || own, end: made.err() };
        self.count("probes", case.probes().len() as u64);
        if outcome.exposed || outcome.end.is_some() {
            return Ok(outcome);
        }
        let answers = fort.machine.answers(prober)?;
        let (made, due) = (answers.count, case.probes().len());
        if made != due as u64 {
            self.fault(number, &format!("L2 made {made} probes of {due}"));
            return Ok(outcome);
        }
        self.count("told", answers.probes.iter().zip(case.probes()).filter(|(it, _)| it.code != 0).count() as u64);
        let beyond = fort.went_beyond();
        if !beyond.is_empty() {
            self.count("beyond", beyond.len() as u64);
        }
        if foretold.is_none() {
            self.count("blind", 1);
        }
        let Foretold { answers: expected, written } = foretold.unwrap_or_default();
        self.compare(number, case, &expected, &answers.probes);
        self.compare_beyond(number, case, &expected, &beyond);
        if let Some(what) = reached.and_then(|reached| fort.misplaced(words, &reached, &written)) {
            self.fault(number, &what);
        }
        Ok(outcome)
    }

    fn compare(&mut self, number: u64, case: &Case, expected: &[Expected], found: &[Answer]) {
        self.count("compared", expected.len() as u64);
        let pairs = expected.iter().zip(found).zip(case.probes());
        let different = pairs.into_iter().find(|((expected, found), _)| !expected.fits(found));
        if let Some(((expected, found), (probe, _))) = different {
            let what = format!(
                "{probe:?} at {:#x} came to {found:x?}, and a walk of the table to {expected:x?}",
                L2_BASE.plus(probe.page).address()
            );
            self.fault(number, &what);
        }
    }

    /// What L2 did beyond L1's memory has to be what it was foretold to do there, for as many probes as were foretold.
    fn compare_beyond(&mut self, number: u64, case: &Case, expected: &[Expected], found: &[bus::Access]) {
        let foretold: Vec<_> = expected.iter().filter_map(|expected| expected.beyond).collect();
        let all = expected.len() == case.probes().len();
        if !found.starts_with(&foretold) || all && found.len() > foretold.len() {
            self.fault(number, &format!("beyond L1's memory L2 did {found:x?}, and a walk of the table {foretold:x?}"));
        }
    }

    /// What L1's command made the monitor do is bounded, and so is what the monitor remembers.
    fn bounded(&mut self, fort: &Fort, number: u64, before: u64) -> Result<(), Failure> {
        if fort.is_kvms() {
            return Ok(());
        }
        let calls = fort.calls()? - before;
        let (pages, bytes) = fort.sizes()?;
        for (name, value) in [("most_calls", calls), ("most_bytes", bytes)] {
            let most = self.counts.entry(name).or_default();
            *most = (*most).max(value);
        }
        let limit = self.nested.map.l2_pages() * CALLS_A_PAGE;
        if calls > limit {
            self.fault(number, &format!("one command of L1's made {calls} calls for the windows (limit {limit})"));
        }
        let limit = pages * BYTES_A_PAGE + BYTES;
        if bytes > limit {
            self.fault(number, &format!("the shadow MMU takes {bytes} bytes (limit {limit})"));
        }
        Ok(())
    }
}
