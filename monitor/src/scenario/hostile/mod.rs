//! A malicious L1 against the monitor ([`umbra_shared::hostile`]): words that are no entries in its table, nonsense in its control page,
//! doorbells out of turn. After each case L2 reads and writes the pages concerned; what comes of it has to be what a naive walk of the table says, the
//! windows have to be what EPT02 and the process's memory map say, and what the monitor did has to stay within bounds.

mod forecast;

use super::Setup;
use super::l2::Nesting;
use crate::failure::Failure;
use crate::guest::{Machine, Plan};
use crate::nested::Host;
use crate::nested::memory::View;
use crate::progress::Progress;
use crate::report::Record;
use crate::report::record::{Counter, Row};
use crate::scenario::setup::Fault;
use crate::track::{Kind, Tracker};
use forecast::{Expected, Forecast};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use umbra_mmu::{Access, Extent, Format, Frame, Mapper as _, Slots};
use umbra_shared::edits::{Answer, Board, Words};
use umbra_shared::hostile::{CASES, Case, Place};
use umbra_shared::nested::{self, Flags, L2_BASE, Nested};
use umbra_shared::paging::ENTRIES;
use umbra_shared::protocol::Command;
use umbra_shared::{Level, PAGE_SIZE};

/// Faults that are named one by one.
const NAMED: usize = 16;
/// How long an L2 that begins with nonsense may run.
const PATIENCE: Duration = Duration::from_millis(100);
/// Cases from a harvest to the next.
const HARVEST: u64 = 16;
/// Calls by which one command of L1's may change the windows: each page of L2's can be mapped apart, and be closed and mapped again; L1 says up
/// to nine times in a case that its table changed.
const CALLS_A_PAGE: u64 = 4;
/// Bytes that the shadow MMU may take for each page of the windows, and besides.
const BYTES_A_PAGE: u64 = 256;
const BYTES: u64 = 16 << 20;

/// L1's memory as a generator of edits reads it.
struct Memory<'a>(&'a View);

impl Words for Memory<'_> {
    fn read(&self, address: u64) -> u64 {
        self.0.0.word(address).map_or(0, |word| word.load(std::sync::atomic::Ordering::Acquire))
    }

    fn write(&mut self, _: u64, _: u64) {}
}

/// Runs the scenario.
pub fn run(setup: &Setup, progress: &Progress) -> Result<Record, Failure> {
    let Some(l2) = &setup.l2 else { return Err(Failure::Input("hostile: its options are missing".into())) };
    let plan = super::nested::plan(setup, l2, Nesting::Umbra);
    let mut rows = Vec::new();
    for &means in &l2.means {
        let kind = Kind::Shadow(means);
        let name = format!("umbra:{kind}");
        let row = match &plan {
            Ok(plan) => Siege::new(setup, plan, kind, &name, progress).and_then(Siege::finish),
            Err(Failure::NotHere(why)) => Err(Failure::NotHere(why.clone())),
            Err(other) => Err(Failure::Check(other.to_string())),
        };
        rows.push(Setup::or_not_here(&name, row)?);
    }
    let has_one = rows.iter().any(|row| matches!(row, crate::report::record::Rows::Measured(_)));
    setup.record_of(rows, |_| !has_one || l2.means_by_name)
}

/// One row.
struct Siege<'a> {
    setup: &'a Setup,
    nested: Nested,
    machine: Machine,
    host: Arc<Host>,
    view: View,
    slots: Slots,
    place: Place,
    /// The words that lead to L2's own code, as L1 built them.
    code: Vec<(u64, u64)>,
    tracker: Box<dyn Tracker>,
    row: Row,
    counts: BTreeMap<&'static str, u64>,
}

impl<'a> Siege<'a> {
    fn new(setup: &'a Setup, plan: &Plan, kind: Kind, name: &str, progress: &Progress) -> Result<Self, Failure> {
        let Kind::Shadow(means) = kind else { return Err(Failure::Check("hostile: no strategy".into())) };
        let shadow = super::nested::shadow(setup, plan, means, progress)?;
        let plan = Plan { shadow, ..plan.clone() };
        let Some(nested) = plan.nested else { return Err(Failure::Check("hostile: a plan without an L2".into())) };
        progress.step(&format!("{name}: {} cases", setup.l2.as_ref().map_or(0, |l2| l2.edits)));
        let machine = Machine::new(&plan, None, |_| Ok(()))?;
        machine.untimed(0..1, Command::Renew, 0)?;
        let Some(host) = machine.l2().map(Arc::clone) else {
            return Err(Failure::Check("hostile: a machine without an L2".into()));
        };
        let view = View(Arc::clone(host.memory()));
        let slots = Slots::new(&host.memory().slots(), host.memory().frames()).map_err(Failure::Check)?;
        let root = machine.control(0)?.root;
        let (l1, l2) = (nested.map.l1_pages(), nested.map.l2_pages());
        let Some(board) = Board::find(Memory(&view), root, nested.format, l1, l2) else {
            return Err(Failure::Check("hostile: L1's table has no leaf tables".into()));
        };
        let place = Place::of(&board, root, machine.nested_report()?.table_pages);
        let code = code(&Memory(&view), root, host.memory().frames());
        let tracker = kind.build(&machine, None)?;
        let row = Row { name: name.to_owned(), ..Row::default() };
        let counts = [
            "cases",
            "probes",
            "told",
            "compared",
            "control_pages",
            "blind",
            "endless",
            "faults",
            "most_calls",
            "most_bytes",
        ];
        let counts = counts.map(|name| (name, 0)).into();
        Ok(Self { setup, nested, machine, host, view, slots, place, code, tracker, row, counts })
    }

    fn finish(mut self) -> Result<Row, Failure> {
        self.tracker.start(&self.machine)?;
        let cases = self.setup.l2.as_ref().map_or(0, |l2| l2.edits);
        for number in 0..cases {
            if let Err(error) = self.case(number) {
                self.fault(number, &error.to_string());
                break;
            }
            if number % HARVEST == HARVEST - 1 {
                self.tracker.harvest(&self.machine)?;
                if self.tracker.clears() {
                    self.tracker.clear(&self.machine)?;
                }
            }
        }
        let faults = self.counts["faults"];
        if faults > NAMED as u64 {
            self.row.truth.faults.push(format!("and {} more faults", faults - NAMED as u64));
        }
        let own = self.counts.iter().map(|(name, value)| (*name, *value));
        for (name, value) in own.chain(self.tracker.counters(&self.machine)) {
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
            let seed = self.nested.map.seed().wrapping_add(number / CASES);
            let again = format!("--seed {seed} --edits {}", number % CASES + 1);
            self.row.truth.faults.push(format!("case {number} ({again}): {what}"));
        }
    }

    fn case(&mut self, number: u64) -> Result<(), Failure> {
        let prober = self.machine.vcpus() - 1;
        if number.is_multiple_of(CASES) || !self.has_code() {
            (0..self.machine.vcpus()).try_for_each(|vcpu| self.machine.untimed(vcpu..vcpu + 1, Command::Renew, 0))?;
        }
        let before = self.calls()?;
        let expelled = self.machine.untimed_within(0, Command::Attack, number, PATIENCE)?;
        self.count("endless", u64::from(expelled > 0));
        self.bounded(number, before)?;
        let seed = self.nested.map.seed().wrapping_add(number / CASES);
        let case = Case::draw(seed, number % CASES, &self.place);
        self.count("cases", 1);
        if case.control.is_some() {
            self.count("control_pages", 1);
        } else {
            let expected = self.forecast(&case);
            self.machine.untimed(prober..prober + 1, Command::Probe, 0)?;
            let answers = self.machine.answers(prober)?;
            self.count("probes", case.probes().len() as u64);
            self.count("told", answers.probes.iter().zip(case.probes()).filter(|(it, _)| it.code != 0).count() as u64);
            match expected {
                Some(expected) => self.compare(number, &case, &expected, &answers.probes),
                None => self.count("blind", 1),
            }
        }
        // The fault: a page of a window that EPT02 knows nothing of.
        if self.setup.inject == Some(Fault::StrayPage) && number == 3 {
            self.stray()?;
        }
        let audited = self.host.shadow()?.audit();
        if let Err(what) = audited {
            self.fault(number, &what);
        }
        Ok(())
    }

    /// Maps a page that EPT02 does not.
    fn stray(&self) -> Result<(), Failure> {
        let mut shadow = self.host.shadow()?;
        let Some(root) = shadow.root() else { return Ok(()) };
        let windows = shadow.places.here().windows().iter();
        let mut pages = windows.flat_map(|window| (0..window.pages.len() as u64).map(|page| window.first.plus(page)));
        let free = pages.find(|&gfn| shadow.mmu.peek(root, gfn).is_ok_and(|granted| granted.is_none()));
        if let Some(start) = free {
            let access = Access::READ.or(Access::WRITE).or(Access::EXECUTE);
            shadow.places.here_mut().map(Extent { root, start, frames: 1 }, Frame(0), Level::K4, access);
            if let Some(error) = shadow.places.settle() {
                return Err(Failure::Check(format!("--inject stray-page: {error}")));
            }
        }
        Ok(())
    }

    /// What L2 will find; `None` where nobody can say: L1 did not say that its table changed, or took the code away that probes.
    fn forecast(&self, case: &Case) -> Option<Vec<Expected>> {
        if case.invalidations == 0 || !self.has_code() {
            return None;
        }
        let format = match self.nested.format {
            nested::Format::Ept => {
                Format::Ept { five_levels: false, accessed_dirty: self.nested.flags != Flags::Unused }
            }
            _ => Format::Npt { five_levels: false, nx: true },
        };
        Some(Forecast::new(&self.view, &self.slots, format, self.place.root).answers(case.probes()))
    }

    /// Whether L1's table still leads L2 to its code.
    fn has_code(&self) -> bool {
        let memory = Memory(&self.view);
        self.code.iter().all(|&(address, word)| memory.read(address) == word)
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

    /// Calls that changed the windows so far.
    fn calls(&self) -> Result<u64, Failure> {
        let counts = self.host.shadow()?.places.counts();
        Ok(counts.maps + counts.protects + counts.closes)
    }

    /// What L1's command made the monitor do is bounded, and so is what the monitor remembers.
    fn bounded(&mut self, number: u64, before: u64) -> Result<(), Failure> {
        let calls = self.calls()? - before;
        let (pages, bytes) = {
            let shadow = self.host.shadow()?;
            let memory = shadow.memory();
            let pages: usize = shadow.places.here().windows().iter().map(|window| window.pages.len()).sum();
            (pages as u64, memory.total())
        };
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

/// The words of L1's table by which L2 finds its code, its stack, and what it shares with L1: the first ones of the first three tables.
fn code(memory: &Memory<'_>, root: u64, frames: u64) -> Vec<(u64, u64)> {
    let pointers = root + PAGE_SIZE;
    let directory = root + 2 * PAGE_SIZE;
    let large = frames.div_ceil(ENTRIES as u64);
    let places = [root, pointers].into_iter().chain((0..large.min(ENTRIES as u64)).map(|index| directory + index * 8));
    places.map(|address| (address, memory.read(address))).collect()
}
