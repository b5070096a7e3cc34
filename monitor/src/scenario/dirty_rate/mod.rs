//! How fast a guest dirties its memory, as tools find it out that a user may run at any time: start a tracker, wait, count, stop; or look at a sample of
//! pages twice, as QEMU's calc-dirty-rate does. The guest touches pages at a fixed rate all the while; what it loses and what stays behind is measured too.
//!
//! ```text
//!  |-- before --|-- start, wait, count, stop --|-- after --|      the guest writes, at most one access every `pace` ticks
//! ```
//! The truth is counted by the guest: each access has a number, so the pages of a stretch of time follow from the pattern. Its ends are not sharp
//! (an access may fall beside the tool's call), so what is certain and what is possible bound the answer. A guest on Umbra's own shadow MMU has rows too
//! ([`shadow`]).

mod shadow;

pub use shadow::strategies;

use super::Setup;
use crate::failure::Failure;
use crate::ground::Clock;
use crate::guest::Machine;
use crate::pages::PageSet;
use crate::progress::Progress;
use crate::report::Record;
use crate::report::record::{Counter, Pages, Rate, Row, Rows, Share, Truth, TruthRound};
use crate::track::{self, Expectation, Kind, Tracker};
use std::time::Duration;
use umbra_shared::histogram::Histogram;
use umbra_shared::pattern::{self, Pattern};
use umbra_shared::protocol::Command;

/// How long the tool waits: in the lab in its time.
const fn interval(clock: Clock) -> Duration {
    match clock {
        Clock::Instructions => Duration::from_millis(100),
        Clock::Nanoseconds => Duration::from_secs(1),
    }
}

/// QEMU's default: pages that are sampled of each GiB (migration/dirtyrate.h, `DIRTYRATE_DEFAULT_SAMPLE_PAGES`).
const SAMPLES_PER_GIB: u64 = 512;

/// The row without a tracker.
const SAMPLING: &str = "sampling";

/// Runs the scenario: a row for each tracker, one for page sampling, and two for each strategy of the shadow MMU.
pub fn run(setup: &Setup, progress: &Progress) -> Result<Record, Failure> {
    setup.check_named()?;
    let mut rows = Vec::new();
    for &kind in setup.trackers() {
        progress.step(&format!("{kind}: the rate of a running guest"));
        rows.push(Setup::or_not_here(&kind.to_string(), by_tracker(setup, kind))?);
    }
    progress.step("sampling: the rate of a running guest");
    rows.push(Rows::Measured(Box::new(by_samples(setup)?)));
    progress.step("the shadow MMU: the rate of a running guest");
    rows.extend(shadow::rows(setup)?);
    setup.record(rows)
}

/// A guest at work, and what it did in stretches of time.
struct Guest<'a> {
    setup: &'a Setup,
    machine: Machine,
    last: Moment,
}

/// How far the guest is.
struct Moment {
    /// Accesses of each vCPU.
    done: Vec<u64>,
    ticks: u64,
    stalls: Histogram,
    now: u64,
}

impl<'a> Guest<'a> {
    fn new(setup: &'a Setup, ring_entries: Option<u32>, kind: Option<Kind>) -> Result<Self, Failure> {
        let machine = Machine::new(&setup.plan, ring_entries, |vm| kind.map_or(Ok(()), |kind| kind.prepare(vm)))?;
        machine.command(Command::Populate, 0)?;
        machine.command(Command::ClearHistogram, 0)?;
        let last = Moment { done: Vec::new(), ticks: 0, stalls: Histogram::default(), now: 0 };
        Ok(Self { setup, machine, last })
    }

    /// The guest begins to touch its pages, and gets into its stride.
    fn begin(&mut self) -> Result<(), Failure> {
        self.machine.begin(Command::PacedRun, 1)?;
        std::thread::sleep(interval(self.setup.plan.timer.clock()));
        self.last = self.moment()?;
        Ok(())
    }

    fn moment(&self) -> Result<Moment, Failure> {
        let stalls = self.machine.stalls()?;
        let now = self.setup.plan.timer.now();
        Ok(Moment { done: self.done()?, ticks: stalls.total, stalls, now })
    }

    fn done(&self) -> Result<Vec<u64>, Failure> {
        (0..self.setup.plan.vcpus).map(|vcpu| Ok(self.machine.accesses_done(vcpu)?)).collect()
    }

    /// What the guest did since the last look.
    fn share(&mut self) -> Result<Share, Failure> {
        let moment = self.moment()?;
        let sum = |done: &[u64]| done.iter().sum::<u64>();
        let writes = moment.stalls.count - self.last.stalls.count;
        let share = Share {
            accesses: sum(&moment.done) - sum(&self.last.done),
            time: moment.now - self.last.now,
            ticks_per_write: (moment.ticks - self.last.ticks).checked_div(writes).unwrap_or(0),
        };
        self.last = moment;
        Ok(share)
    }

    /// Pages that the accesses from `from` to `to` wrote, and those that they read.
    fn pages(&self, from: &[u64], to: &[u64]) -> (PageSet, PageSet) {
        let pattern = self.setup.plan.pattern;
        let (mut written, mut read) = (PageSet::new(pattern.pages), PageSet::new(pattern.pages));
        for (vcpu, (&from, &to)) in from.iter().zip(to).enumerate() {
            let share = pattern.share(vcpu as u64, self.setup.plan.vcpus as u64);
            let length = (share.end - share.start).max(1);
            // A round has all pages of the share: what is longer ago than two of them adds none.
            for number in from.max(to.saturating_sub(2 * length))..to {
                let access = pattern.access(1 + number / length, share.start + number % length);
                let set = if access.write { &mut written } else { &mut read };
                set.insert(access.page);
            }
        }
        (written, read)
    }

    fn end(&self) -> Result<(), Failure> {
        self.machine.stop_free_run()?;
        self.machine.finish_all(Command::PacedRun)?;
        Ok(())
    }
}

fn row(name: &str, rate: Rate) -> Row {
    Row { name: name.to_owned(), rate: Some(rate), ..Row::default() }
}

fn by_tracker(setup: &Setup, kind: Kind) -> Result<Row, Failure> {
    let mut guest = Guest::new(setup, kind.ring_entries(), Some(kind))?;
    let mut tracker = kind.build(&guest.machine, setup.chunk)?;
    let (all, huge_before) = (setup.plan.pattern.pages, huge(&guest.machine)?);
    let mut expectation = Expectation::new(kind, &setup.plan.slots, setup.plan.backing, track::Host::here());
    guest.begin()?;
    let before = guest.share_of_rest()?;

    let first_possible = guest.done()?;
    tracker.start(&guest.machine)?;
    let mut explained = PageSet::new(all);
    if expectation.promises_all() {
        // What is reported whatever the guest does is fetched and thrown away, as QEMU does.
        let possible = guest.done()?;
        harvest(&mut *tracker, &guest.machine)?;
        let (written, read) = guest.pages(&first_possible, &possible);
        let _ = expectation.explained(&written, &read);
    }
    let certain_from = guest.done()?;
    std::thread::sleep(interval(setup.plan.timer.clock()));
    let certain_to = guest.done()?;
    harvest(&mut *tracker, &guest.machine)?;
    // The access that a vCPU is in the middle of is not counted yet, and may be seen nevertheless: a fault is told before the write that it holds up.
    let last_possible: Vec<u64> = guest.done()?.into_iter().map(|done| done + 1).collect();
    let during = guest.share()?;
    let mut reported = PageSet::new(all);
    tracker.report(&guest.machine, &mut reported);
    tracker.stop(&guest.machine)?;
    guest.share()?;
    let after = guest.share_of_rest()?;
    guest.end()?;

    let (certain, _) = guest.pages(&certain_from, &certain_to);
    let (possible, read) = guest.pages(&first_possible, &last_possible);
    explained.add(&expectation.explained(&possible, &read));
    let mut row =
        row(&kind.to_string(), rate(setup, (&before, &during, &after), reported.count(), (&certain, &possible)));
    let (missed, extra) = (certain.without(&reported).count(), reported.without(&possible).without(&explained).count());
    let pages = Pages {
        written: certain.count(),
        reported: reported.count(),
        missed,
        extra,
        explained: reported.without(&possible).count() - extra,
        unchanged: 0,
    };
    let round = TruthRound { round: 1, pass: "observed".to_owned(), pages };
    row.truth = Truth { pages, rounds: vec![round], faults: tracker.fault().into_iter().collect(), l2: None };
    count(&mut row, huge_before, &guest)?;
    Ok(row)
}

/// Fetches and clears: what a tool has to do to see the next writes.
fn harvest(tracker: &mut dyn Tracker, machine: &Machine) -> Result<(), Failure> {
    tracker.harvest(machine)?;
    if tracker.clears() {
        tracker.clear(machine)?;
    }
    Ok(())
}

fn by_samples(setup: &Setup) -> Result<Row, Failure> {
    let mut guest = Guest::new(setup, None, None)?;
    let all = setup.plan.pattern.pages;
    let samples = (all * SAMPLES_PER_GIB).div_ceil(1 << 18).min(all);
    // Different pages in an order that the seed decides.
    let order = Pattern { kind: pattern::Kind::Random, ..setup.plan.pattern };
    let chosen: Vec<u64> = (0..samples).map(|index| order.access(0, index).page).collect();
    let huge_before = huge(&guest.machine)?;
    guest.begin()?;
    let before = guest.share_of_rest()?;
    let from = guest.done()?;
    let hashes: Vec<_> = chosen.iter().map(|&page| guest.machine.vm().hash(page)).collect();
    std::thread::sleep(interval(setup.plan.timer.clock()));
    let changed = chosen.iter().zip(&hashes).filter(|(page, hash)| guest.machine.vm().hash(**page) != **hash).count();
    let to = guest.done()?;
    let during = guest.share()?;
    let after = guest.share_of_rest()?;
    guest.end()?;
    let (written, _) = guest.pages(&from, &to);
    let found = changed as u64 * all / samples.max(1);
    let mut row = row(SAMPLING, rate(setup, (&before, &during, &after), found, (&written, &written)));
    let counter = Counter { value: samples, source: "umbra".to_owned(), pass: "observed".to_owned() };
    row.counters.insert("sampled_pages".to_owned(), counter);
    count(&mut row, huge_before, &guest)?;
    Ok(row)
}

impl Guest<'_> {
    /// What the guest does in an interval in which nobody looks.
    fn share_of_rest(&mut self) -> Result<Share, Failure> {
        std::thread::sleep(interval(self.setup.plan.timer.clock()));
        self.share()
    }
}

fn rate(
    setup: &Setup,
    shares: (&Share, &Share, &Share),
    found: u64,
    (certain, possible): (&PageSet, &PageSet),
) -> Rate {
    let (before, during, after) = shares;
    // Written for certain, and half of what may be.
    let written = u64::midpoint(certain.count(), possible.count());
    Rate {
        unit: setup.plan.timer.clock().unit().to_owned(),
        pace: setup.plan.pace,
        found,
        certain: certain.count(),
        possible: possible.count(),
        error_permille: i64::try_from(1000 * u128::from(found.abs_diff(written)) / u128::from(written.max(1)))
            .unwrap_or(i64::MAX)
            * if found < written { -1 } else { 1 },
        before: before.clone(),
        during: during.clone(),
        after: after.clone(),
    }
}

fn huge(machine: &Machine) -> Result<Option<u64>, Failure> {
    Ok(machine.statistics()?.get("pages_2m").copied())
}

fn count(row: &mut Row, before: Option<u64>, guest: &Guest) -> Result<(), Failure> {
    let after = huge(&guest.machine)?;
    for (name, value) in [("pages_2m_before", before), ("pages_2m_left", after)] {
        let counter = value.map(|value| Counter { value, source: "stats".to_owned(), pass: "observed".to_owned() });
        row.counters.extend(counter.map(|counter| (name.to_owned(), counter)));
    }
    Ok(())
}
