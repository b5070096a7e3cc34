//! The same question about a guest whose tables are Umbra's shadow MMU on the software walker: what a tool there finds, costs and leaves behind.
//! The guest has the tool's CPU, and stands still while the tool works, so that the truth has sharp ends.

use super::{Setup, interval, rate, row};
use crate::cli::RunArgs;
use crate::failure::Failure;
use crate::ground::Clock;
use crate::kvm::clock::Timer;
use crate::pages::PageSet;
use crate::report::record::{Counter, Pages, Row, Rows, Share, Truth, TruthRound};
use crate::scenario::model::{broken, named_strategies};
use std::iter::once;
use std::mem::{replace, take};
use std::time::Instant;
use umbra_mmu::model::{Hooks, Model, ModelConfig, NoHooks, PageAccess};
use umbra_mmu::track::Strategy;
use umbra_mmu::{Collapse, Config, Format, Split};
use umbra_shared::Level;

/// Strategies that get a row if nobody chooses.
const DEFAULT: [&str; 4] = ["write-protect", "dirty-bit", "log", "combined"];

/// The strategies that get rows: those that were asked for; else the default ones, but none beside trackers that were.
///
/// # Errors
/// [`Failure::Input`] for a name that is none.
pub fn strategies(args: &RunArgs) -> Result<Vec<&'static dyn Strategy>, Failure> {
    match &args.shadow.strategy[..] {
        [] if args.tracker.is_empty() => named_strategies(&DEFAULT.map(str::to_owned)),
        names => named_strategies(names),
    }
}

/// Two rows for each strategy: what it leaves if nothing is collapsed, and what in-place collapse leaves.
pub fn rows(setup: &Setup) -> Result<Vec<Rows>, Failure> {
    let mut rows = Vec::new();
    for &strategy in &setup.strategies {
        for (how, collapse) in [("no collapse", Collapse::None), ("in-place", Collapse::InPlace)] {
            let name = format!("umbra:{} {how}", strategy.name());
            let pages = setup.plan.pattern.pages;
            let mmu = Config { split: Split::Shatter, collapse, memory_frames: pages, ..Config::new(pages, strategy) };
            let config = ModelConfig::new(pages, Format::EPT, Level::M2, mmu);
            rows.push(match config.check() {
                Ok(()) => Rows::Measured(Box::new(Guest::new(setup, config)?.run(&name)?)),
                Err(not_here) => Rows::NotHere { name, not_here },
            });
        }
    }
    Ok(rows)
}

/// A guest on the walker.
struct Guest<'a> {
    setup: &'a Setup,
    strategy: &'static dyn Strategy,
    model: Model,
    stopwatch: Stopwatch,
    accesses: u64,
    /// When the next access may be, in ticks.
    due: u64,
    /// Accesses and time at the last look.
    last: (u64, u64),
}

/// The ticks that writes took, as the guest itself counts them.
struct Stopwatch {
    /// The guest's pace is in ticks of the TSC, whatever the run's clock is.
    ticks: Timer,
    begun: u64,
    sum: u64,
    writes: u64,
}

impl Hooks for Stopwatch {
    fn begin(&mut self) {
        self.begun = self.ticks.now();
    }

    fn end(&mut self, _faults: u32) {
        self.sum += self.ticks.now() - self.begun;
        self.writes += 1;
    }
}

impl<'a> Guest<'a> {
    fn new(setup: &'a Setup, config: ModelConfig) -> Result<Self, Failure> {
        let mut model = Model::new(config).map_err(Failure::Input)?;
        let stopwatch = Stopwatch { ticks: Timer::new(Clock::Instructions), begun: 0, sum: 0, writes: 0 };
        // Each page is written once, as the firmware does before it begins.
        model.retouch(&mut NoHooks).map_err(broken)?;
        Ok(Self { setup, strategy: config.mmu.strategy, model, stopwatch, accesses: 0, due: 0, last: (0, 0) })
    }

    /// The guest runs for an interval.
    fn work(&mut self) -> Result<(), Failure> {
        let Setup { plan, .. } = self.setup;
        let round = plan.pattern.accesses().max(1);
        let begun = Instant::now();
        while begun.elapsed() < interval(plan.timer.clock()) {
            let now = self.stopwatch.ticks.now();
            if now < self.due {
                continue;
            }
            self.due = now + plan.pace;
            let access = plan.pattern.access(1 + self.accesses / round, self.accesses % round);
            let access = PageAccess { page: access.page, write: access.write };
            if access.write {
                self.model.round(once(access), &mut self.stopwatch).map_err(broken)?;
            } else {
                self.model.round(once(access), &mut NoHooks).map_err(broken)?;
            }
            self.accesses += 1;
        }
        Ok(())
    }

    /// What the guest did since the last call.
    fn share(&mut self) -> Share {
        let (accesses, time) = (self.accesses, self.setup.plan.timer.now());
        let (ticks, writes) = (take(&mut self.stopwatch.sum), take(&mut self.stopwatch.writes));
        let (accesses_before, time_before) = replace(&mut self.last, (accesses, time));
        Share {
            accesses: accesses - accesses_before,
            time: time - time_before,
            ticks_per_write: ticks.checked_div(writes).unwrap_or(0),
        }
    }

    /// Fetches and clears; what was reported is left in the model.
    fn harvest(&mut self) -> Result<(), Failure> {
        self.model.harvest().map_err(broken)?;
        self.model.clear(0).map_err(broken)?;
        Ok(())
    }

    fn run(mut self, name: &str) -> Result<Row, Failure> {
        let huge_before = self.huge()?;
        self.share();
        self.work()?;
        let before = self.share();

        self.model.enable().map_err(broken)?;
        if self.strategy.starts_all_set() {
            // Initially all set: fetched and thrown away, as with KVM's.
            self.harvest()?;
        }
        let first = self.accesses;
        self.work()?;
        let behind = self.accesses;
        self.harvest()?;
        let during = self.share();
        let reported = self.model.collect().pages;
        self.model.disable().map_err(broken)?;
        self.share();
        self.work()?;
        let after = self.share();

        let all = self.setup.plan.pattern.pages;
        let mut found = PageSet::new(all);
        for frame in reported.iter() {
            found.insert(frame.0);
        }
        let written = self.written(first..behind);
        let mut row = row(name, rate(self.setup, (&before, &during, &after), found.count(), (&written, &written)));
        let (missed, extra) = (written.without(&found).count(), found.without(&written).count());
        let pages =
            Pages { written: written.count(), reported: found.count(), missed, extra, explained: 0, unchanged: 0 };
        let round = TruthRound { round: 1, pass: "observed".to_owned(), pages };
        row.truth = Truth { pages, rounds: vec![round], ..Truth::default() };
        for (name, value) in [("pages_2m_before", huge_before), ("pages_2m_left", self.huge()?)] {
            let counter = Counter { value, source: "umbra-mmu".to_owned(), pass: "observed".to_owned() };
            row.counters.insert(name.to_owned(), counter);
        }
        Ok(row)
    }

    fn written(&self, accesses: std::ops::Range<u64>) -> PageSet {
        let pattern = self.setup.plan.pattern;
        let round = pattern.accesses().max(1);
        let mut written = PageSet::new(pattern.pages);
        let accesses = accesses.map(|number| pattern.access(1 + number / round, number % round));
        for access in accesses.filter(|access| access.write) {
            written.insert(access.page);
        }
        written
    }

    /// Leaves of 2 MiB that L2 has now.
    fn huge(&self) -> Result<u64, Failure> {
        let (root, _) = self.model.root();
        let mut huge = 0;
        for page in (0..self.setup.plan.pattern.pages).step_by(512) {
            let leaf = self.model.mmu.peek(root, self.model.l2_gfn(page)).map_err(broken)?;
            huge += u64::from(leaf.is_some_and(|(_, level, _)| level == Level::M2));
        }
        Ok(huge)
    }
}
