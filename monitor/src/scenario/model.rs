//! Umbra's shadow MMU on the software walker: a row for each strategy, all on the same run.
//!
//! Without a clock a phase's value is the number of faults in it; in the lab it is instructions, walker included, and an observed pass of
//! the same rounds adds how long each access took. Truth is held per L1 page, whichever alias was written.

use super::pass;
use crate::cli::RunArgs;
use crate::failure::Failure;
use crate::ground::{Clock, Ground};
use crate::guest::Image;
use crate::host;
use crate::kvm::clock::{Timer, Window};
use crate::kvm::witness::Witness;
use crate::pages::PageSet;
use crate::progress::Progress;
use crate::report::Host;
use crate::report::record::{Bytes, Counter, Phase, Record, Row, Rows, SCHEMA, Stall, TruthRound};
use crate::truth::Verdict;
use umbra_mmu::model::{AliasKind, Hooks, Model, ModelConfig, NoHooks, PageAccess, Phase as Events};
use umbra_mmu::track::{STRATEGIES, Strategy, strategy};
use umbra_mmu::{CacheSize, Caches, Collapse, Config, DEFAULT_TWINS, Format, RootPolicy, Split};
use umbra_shared::histogram::Histogram;
use umbra_shared::pattern::{MAX_ACCESSES, Pattern};
use umbra_shared::{Level, PAGE_SIZE};

/// A checked run.
struct Plan {
    /// One for each strategy.
    strategies: Vec<&'static dyn Strategy>,
    /// With the first strategy in it.
    config: ModelConfig,
    /// Over L2 pages.
    pattern: Pattern,
    rounds: u64,
    chunk: u64,
    by_name: bool,
}

/// Checks `args` without running anything.
pub fn check(args: &RunArgs) -> Result<(), Failure> {
    Plan::new(args).map(|_| ())
}

/// Runs the scenario.
pub fn run(args: &RunArgs, ground: Ground, progress: &Progress) -> Result<Record, Failure> {
    let plan = Plan::new(args)?;
    let timer = match ground {
        Ground::Kvm => None,
        Ground::Lab(clock) => Some(Timer::new(clock)),
    };
    let rows =
        plan.strategies.iter().map(|&strategy| row(&plan, strategy, timer, progress)).collect::<Result<_, _>>()?;
    Ok(Record {
        schema: SCHEMA,
        scenario: args.scenario.clone(),
        host: described(ground)?,
        config: args.config(),
        rows,
    })
}

/// This host, as far as the shadow MMU on the walker depends on it.
pub fn described(ground: Ground) -> Result<Host, Failure> {
    let mut host = host::describe(ground, &Image::load(None)?);
    if ground == Ground::Kvm {
        "model".clone_into(&mut host.ground);
        "none".clone_into(&mut host.clock);
        "none".clone_into(&mut host.vendor);
        host.params.clear();
        // Nothing in the model depends on the host.
        (host.deterministic, host.paging_levels) = (true, None);
    }
    Ok(host)
}

fn input(option: &str, value: &str, choices: &str) -> Failure {
    Failure::Input(format!("--{option} {value}: there are {choices}"))
}

/// The value that a name stands for.
fn named<T: Copy>(option: &str, given: Option<&str>, values: &[(&str, T)]) -> Result<T, Failure> {
    let Some(given) = given else { return Ok(values[0].1) };
    values.iter().find(|(name, _)| *name == given).map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<_> = values.iter().map(|(name, _)| *name).collect();
        input(option, given, &names.join(", "))
    })
}

/// The root policy of that name.
pub fn roots(given: Option<&str>) -> Result<RootPolicy, Failure> {
    if let Some(Ok(pages)) = given.and_then(|text| text.strip_prefix("quota=")).map(str::parse) {
        return Ok(RootPolicy::Quota(pages));
    }
    let plain = [("keep", RootPolicy::Keep), ("drop", RootPolicy::Drop), ("address-space", RootPolicy::AddressSpace)];
    named("roots", given, &plain)
        .map_err(|_| input("roots", given.unwrap_or_default(), "drop, address-space, keep, quota=N"))
}

/// The strategies of those names.
pub fn named_strategies(names: &[String]) -> Result<Vec<&'static dyn Strategy>, Failure> {
    let all = || STRATEGIES.map(Strategy::name).join(", ");
    names.iter().map(|name| strategy(name).ok_or_else(|| input("strategy", name, &all()))).collect()
}

fn caches(given: Option<&str>) -> Result<Caches, Failure> {
    let Some(text) = given else { return Ok(Caches::default()) };
    let size = text
        .split_once('/')
        .and_then(|(min, capacity)| Some(CacheSize { min: min.parse().ok()?, capacity: capacity.parse().ok()? }));
    let size = size.ok_or_else(|| input("cache", text, "sizes as MINIMUM/CAPACITY, in objects"))?;
    Ok(Caches { pages: size, descs: size, ..Caches::default() })
}

impl Plan {
    fn new(args: &RunArgs) -> Result<Self, Failure> {
        let shadow = &args.shadow;
        let mut strategies = named_strategies(&shadow.strategy)?;
        let by_name = !strategies.is_empty();
        if !by_name {
            strategies = STRATEGIES.to_vec();
        }
        let mmu = Config {
            split: named(
                "split",
                shadow.split.as_deref(),
                &[
                    ("lazy", Split::Lazy),
                    ("shatter", Split::Shatter),
                    ("eager", Split::Eager),
                    ("eager-clear", Split::EagerClear),
                ],
            )?,
            collapse: named(
                "collapse",
                shadow.collapse.as_deref(),
                &[("none", Collapse::None), ("lazy", Collapse::Lazy), ("in-place", Collapse::InPlace)],
            )?,
            roots: roots(shadow.roots.as_deref())?,
            caches: caches(shadow.cache.as_deref())?,
            extent: shadow.extent.unwrap_or(1),
            max_twins: shadow.twins.unwrap_or(DEFAULT_TWINS),
            ..Config::new(1, strategies[0])
        };
        let formats = [
            ("ept", Format::EPT),
            ("npt", Format::Npt { five_levels: false, nx: true }),
            ("pae", Format::Pae { nx: true }),
            ("32bit", Format::Bits32 { pse: true }),
        ];
        let format = named("format", shadow.format.as_deref(), &formats)?;
        let leaf = named("leaf", shadow.leaf.as_deref(), &[("4k", Level::K4), ("2m", Level::M2), ("1g", Level::G1)])?;
        let mut config = ModelConfig::new(args.memory / PAGE_SIZE, format, leaf, mmu);
        config.aliases = shadow.alias.unwrap_or(1);
        config.alias_kind = named(
            "alias-kind",
            shadow.alias_kind.as_deref(),
            &[
                ("contiguous", AliasKind::Contiguous),
                ("scattered", AliasKind::Scattered),
                ("shared-tables", AliasKind::SharedTables),
            ],
        )?;
        let plan = Self {
            pattern: Pattern {
                kind: args.pattern,
                seed: args.seed,
                pages: config.pages.saturating_mul(config.aliases),
                write_percent: args.write_percent,
                accesses_per_page: args.accesses_per_page,
            },
            strategies,
            config,
            rounds: args.rounds,
            chunk: args.chunk.unwrap_or(0),
            by_name,
        };
        plan.check(args)?;
        Ok(plan)
    }

    fn check(&self, args: &RunArgs) -> Result<(), Failure> {
        if !args.memory.is_multiple_of(PAGE_SIZE) {
            return Err(Failure::Input(format!("--memory {}: it is a multiple of {PAGE_SIZE} bytes", args.memory)));
        }
        if self.rounds == 0 {
            return Err(Failure::Input("--rounds 0: it is 1 or more".into()));
        }
        if args.inject.is_some() || !args.tracker.is_empty() {
            return Err(Failure::Input(
                "model: --inject and --tracker mean nothing to it (`make fuzz` injects defects)".into(),
            ));
        }
        self.config.check().map_err(Failure::Input)?;
        let accesses = self.pattern.pages.saturating_mul(self.pattern.accesses_per_page);
        if accesses > MAX_ACCESSES {
            return Err(Failure::Input(format!(
                "{accesses} accesses a round: there can be {MAX_ACCESSES} (less --memory or --alias)"
            )));
        }
        // What no strategy can do is nonsense; what only some can do makes rows that say so, unless they were asked for by name.
        let refusals: Vec<_> =
            self.strategies.iter().filter_map(|&strategy| self.mmu(strategy).check().err()).collect();
        match refusals.first() {
            Some(refusal) if self.by_name || refusals.len() == self.strategies.len() => {
                return Err(Failure::Input(refusal.to_string()));
            }
            _ => {}
        }
        Ok(())
    }

    fn mmu(&self, strategy: &'static dyn Strategy) -> Config {
        Config { strategy, memory_frames: self.config.pages, ..self.config.mmu }
    }

    fn accesses(&self, round: u64) -> impl Iterator<Item = PageAccess> {
        let pattern = self.pattern;
        (0..pattern.accesses()).map(move |index| {
            let access = pattern.access(round, index);
            PageAccess { page: access.page, write: access.write }
        })
    }
}

/// Says how far a long phase is. Inside a timed window it is silent.
struct Report<'a> {
    progress: Option<&'a Progress>,
    what: String,
    accesses: u64,
}

impl Hooks for Report<'_> {
    fn progress(&mut self, done: u64) {
        if let Some(progress) = self.progress {
            progress.step(&format!("{}: {}%", self.what, 100 * done / self.accesses.max(1)));
        }
    }
}

/// Times each access: in the observed pass alone, since looking at the clock costs.
struct Stopwatch {
    timer: Timer,
    begun: u64,
    ticks: Histogram,
}

impl Hooks for Stopwatch {
    fn begin(&mut self) {
        self.begun = self.timer.now();
    }

    fn end(&mut self, _faults: u32) {
        self.ticks.record(self.timer.now() - self.begun);
    }
}

/// The model did what it cannot do.
pub fn broken(error: impl std::fmt::Display) -> Failure {
    Failure::Check(format!("the model is broken: {error}"))
}

/// The observed pass: the rounds once more on a fresh model, with a look at the clock around each access.
fn stall(plan: &Plan, config: ModelConfig, timer: Timer) -> Result<Stall, Failure> {
    let mut model = Model::new(config).map_err(Failure::Input)?;
    let mut watch = Stopwatch { timer, begun: 0, ticks: Histogram::default() };
    model.populate(&mut NoHooks).map_err(broken)?;
    model.enable().map_err(broken)?;
    for round in 1..=plan.rounds {
        model.round(plan.accesses(round), &mut watch).map_err(broken)?;
        model.harvest().map_err(broken)?;
        model.clear(plan.chunk).map_err(broken)?;
    }
    Ok(Stall::of(&watch.ticks, timer.clock().unit(), |ticks| ticks))
}

fn row(
    plan: &Plan,
    strategy: &'static dyn Strategy,
    timer: Option<Timer>,
    progress: &Progress,
) -> Result<Rows, Failure> {
    let name = strategy.name().to_owned();
    if let Err(error) = plan.mmu(strategy).check() {
        return Ok(Rows::NotHere { name, not_here: error.to_string() });
    }
    let config = ModelConfig { mmu: Config { strategy, ..plan.config.mmu }, ..plan.config };
    let measure = || {
        progress.step(&format!("{name}: building EPT12"));
        let model = Model::new(config).map_err(Failure::Input)?;
        let row = Row { name: name.clone(), memory: Some(Bytes::default()), ..Row::default() };
        Measurement { plan, timer, progress, model, row }.run()
    };
    // Without a clock faults are counted, which no other task changes.
    let clock = timer.map_or(Clock::Nanoseconds, |timer| timer.clock());
    let mut row = pass::until_clean(clock, &name, progress, measure)?;
    if let Some(timer) = timer {
        progress.step(&format!("{}: each access", row.name));
        row.stall = Some(stall(plan, config, timer)?);
    }
    Ok(Rows::Measured(Box::new(row)))
}

/// One row under way.
struct Measurement<'a> {
    plan: &'a Plan,
    timer: Option<Timer>,
    progress: &'a Progress,
    model: Model,
    row: Row,
}

impl Measurement<'_> {
    fn run(mut self) -> Result<Row, Failure> {
        self.phase("populate", 0, |model, _, report| model.populate(report))?;
        self.phase("enable", 0, |model, _, _| model.enable())?;
        for round in 1..=self.plan.rounds {
            self.phase("dirty", round, |model, plan, report| model.round(plan.accesses(round), report))?;
            self.phase("get", round, |model, _, _| model.harvest())?;
            self.check(round);
            self.phase("clear", round, |model, plan, _| model.clear(plan.chunk))?;
        }
        self.phase("disable", 0, |model, _, _| model.disable())?;
        self.phase("retouch", 0, |model, _, report| model.retouch(report))?;
        Ok(self.row)
    }

    /// Runs one phase in a window, and adds its events to the row.
    fn phase(
        &mut self,
        phase: &str,
        round: u64,
        work: impl FnOnce(&mut Model, &Plan, &mut Report<'_>) -> Result<Events, String>,
    ) -> Result<(), Failure> {
        let what = format!("{}: {phase} {round}", self.row.name);
        self.progress.step(&what);
        let progress = self.timer.is_none().then_some(self.progress);
        let mut report = Report { progress, what, accesses: self.plan.pattern.accesses() };
        let (events, window) = match self.timer {
            Some(timer) => {
                let witness = Witness::of_controller(timer.clock());
                let (events, window) = timer.window(witness, || work(&mut self.model, self.plan, &mut report));
                (events.map_err(broken)?, Some(window))
            }
            None => (work(&mut self.model, self.plan, &mut report).map_err(broken)?, None),
        };
        self.row.phases.push(self.timed(phase, round, &events, window));
        for (name, value) in events.stats.list().into_iter().chain([("log_exits", events.log_exits)]) {
            self.count(name, |sum| sum + value);
        }
        self.count("worst_faults", |worst| worst.max(events.worst_faults.into()));
        if let Some(most) = &mut self.row.memory {
            most.table_bytes = most.table_bytes.max(events.memory.table_bytes);
            most.rmap_bytes = most.rmap_bytes.max(events.memory.rmap_bytes);
            most.cache_bytes = most.cache_bytes.max(events.memory.cache_bytes);
            most.track_bytes = most.track_bytes.max(events.memory.track_bytes);
        }
        Ok(())
    }

    fn timed(&self, phase: &str, round: u64, events: &Events, window: Option<Window>) -> Phase {
        let (value, unit, clean) = match (self.timer, window) {
            (Some(timer), Some(window)) => (window.length(), timer.clock().unit(), window.clean),
            _ => (events.stats.faults, "faults", true),
        };
        Phase { phase: phase.to_owned(), round, pass: "timed".to_owned(), value, unit: unit.to_owned(), clean }
    }

    fn count(&mut self, name: &str, update: impl FnOnce(u64) -> u64) {
        let entry = self.row.counters.entry(name.to_owned()).or_insert_with(|| Counter {
            value: 0,
            source: "umbra-mmu".to_owned(),
            pass: "timed".to_owned(),
        });
        entry.value = update(entry.value);
    }

    /// Holds the harvest of `round` against the truth, per L1 page.
    fn check(&mut self, round: u64) {
        let pages = self.plan.config.pages;
        let mut written = PageSet::new(pages);
        for access in self.plan.accesses(round).filter(|access| access.write) {
            written.insert(self.model.l1_page(access.page));
        }
        let collected = self.model.collect();
        let set = |frames: &umbra_mmu::PageSet| {
            let mut set = PageSet::new(pages);
            for frame in frames.iter() {
                set.insert(frame.0);
            }
            set
        };
        let (reported, explained) = (set(&collected.pages), set(&collected.explained));
        let verdict = Verdict::of(&written, &reported, &explained);
        for (page, what) in verdict
            .missed
            .iter()
            .map(|page| (page, "written and not reported"))
            .chain(verdict.extra.iter().map(|page| (page, "reported, not written, and nothing explains it")))
        {
            if self.row.truth.faults.len() < 8 {
                self.row
                    .truth
                    .faults
                    .push(format!("strategy {}, round {round}: L1 page {page} was {what}", self.row.name));
            }
        }
        self.row.truth.pages += verdict.pages;
        self.row.truth.rounds.push(TruthRound { round, pass: "timed".to_owned(), pages: verdict.pages });
    }
}
