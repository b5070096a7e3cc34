//! `roots` with `--roots` and `--mechanism walker`: the same changes on Umbra's own shadow MMU, where what becomes of an unused root is an option. L2's
//! accesses are executed in software, and no KVM is needed.
//!
//! A role is the paging-mode bits that an L2 announces and whether it is in SMM. A toggle loads the roots of the roles that it passes through.
//! Without a clock a phase's value is the number of faults in it; in the lab it is instructions, walker included.

use super::model::{self, described};
use super::script::{Script, Step};
use super::toggles::{Change, On, Toggles, Toggling};
use crate::cli::RunArgs;
use crate::failure::Failure;
use crate::ground::Ground;
use crate::kvm::clock::Timer;
use crate::kvm::witness::Witness;
use crate::progress::Progress;
use crate::report::record::{Bytes, Counter, Phase, Record, Row, Rows, SCHEMA};
use umbra_mmu::model::{Model, ModelConfig, NoHooks, PageAccess, Phase as Events};
use umbra_mmu::track::strategy;
use umbra_mmu::{Config, Format, ModeBits, RootPolicy};
use umbra_shared::role::Role;
use umbra_shared::{Level, PAGE_SIZE};

/// A checked run.
struct Plan {
    toggles: Toggles,
    script: Script,
    config: ModelConfig,
    rounds: u64,
    timer: Option<Timer>,
}

impl Plan {
    fn new(args: &RunArgs, ground: Ground) -> Result<Self, Failure> {
        if !args.memory.is_multiple_of(PAGE_SIZE) || args.memory == 0 {
            return Err(Failure::Input(format!("--memory {}: it is a multiple of {PAGE_SIZE} bytes", args.memory)));
        }
        if args.rounds == 0 || args.vcpus != 1 {
            return Err(Failure::Input("roots: with --roots it takes one --vcpus and at least one of --rounds".into()));
        }
        let policy = model::roots(args.shadow.roots.as_deref())?;
        let Some(strategy) = strategy("write-protect") else {
            return Err(Failure::Check("the shadow MMU has lost its strategy write-protect".into()));
        };
        let mmu = Config { roots: policy, ..Config::new(1, strategy) };
        let config = ModelConfig::new(args.memory / PAGE_SIZE, Format::EPT, Level::K4, mmu);
        config.check().map_err(Failure::Input)?;
        Config { memory_frames: config.pages, ..mmu }.check().map_err(|error| Failure::Input(error.to_string()))?;
        let timer = match ground {
            Ground::Kvm => None,
            Ground::Lab(clock) => Some(Timer::new(clock)),
        };
        Ok(Self {
            toggles: Toggles::new(&args.toggle, args.vcpus, On::Walker)?,
            script: Script::read(args.script.as_ref())?,
            config,
            rounds: args.rounds,
            timer,
        })
    }
}

/// Checks `args` without running anything.
pub fn check(args: &RunArgs) -> Result<(), Failure> {
    Plan::new(args, Ground::Kvm).map(|_| ())
}

/// Runs the scenario.
pub fn run(args: &RunArgs, ground: Ground, progress: &Progress) -> Result<Record, Failure> {
    let plan = Plan::new(args, ground)?;
    let rows = plan.toggles.rows.iter().map(|&toggling| {
        progress.step(&toggling.to_string());
        let row = Row { name: toggling.to_string(), memory: Some(Bytes::default()), ..Row::default() };
        let model = Model::new(plan.config).map_err(Failure::Input)?;
        let run = Run { plan: &plan, model, row, most_pages: 0 };
        run.finish(toggling).map(|row| Rows::Measured(Box::new(row)))
    });
    let rows = rows.collect::<Result<Vec<_>, _>>()?;
    let mut config = args.config();
    if let Some(script) = &args.script {
        config.insert("script".into(), script.digest().into());
    }
    Ok(Record { schema: SCHEMA, scenario: args.scenario.clone(), host: described(ground)?, config, rows })
}

/// One row under way.
struct Run<'a> {
    plan: &'a Plan,
    model: Model,
    row: Row,
    /// Shadow pages in use at once.
    most_pages: u32,
}

impl Run<'_> {
    fn finish(mut self, toggling: Toggling) -> Result<Row, Failure> {
        match toggling.change {
            Change::Script => self.replay()?,
            Change::TwelveRoles => self.twelve_roles()?,
            change => self.toggle_and_touch(change)?,
        }
        self.count("shadow_pages", u64::from(self.most_pages));
        if let RootPolicy::Quota(most) = self.plan.config.mmu.roots
            && self.most_pages > most
        {
            self.row
                .truth
                .faults
                .push(format!("{toggling}: {} shadow pages were in use, and the quota is {most}", self.most_pages));
        }
        Ok(self.row)
    }

    fn toggle_and_touch(&mut self, change: Change) -> Result<(), Failure> {
        let all = self.plan.config.pages;
        self.phase("populate", 0, |run| run.touch(all))?;
        for round in 1..=self.plan.rounds {
            self.phase("toggle", round, |run| run.change(change))?;
            let events = self.phase("refault", round, |run| run.touch(all))?;
            let before = self.row.counters.get("refaults").map_or(0, |counter| counter.value);
            self.count("refaults", before.max(events.stats.faults));
        }
        Ok(())
    }

    /// Every role touches all pages, in turn; then the first one again.
    fn twelve_roles(&mut self) -> Result<(), Failure> {
        let all = self.plan.config.pages;
        let mut most = 0;
        for round in 0..=self.plan.rounds {
            let mut refaults = 0;
            for role in Role::TWELVE {
                self.phase("toggle", round, |run| run.enter(role))?;
                let events = self.phase("refault", round, |run| run.touch(all))?;
                refaults += events.stats.faults;
            }
            // In the first round each role touches for the first time.
            most = most.max(if round == 0 { 0 } else { refaults });
        }
        self.count("refaults", most);
        Ok(())
    }

    fn replay(&mut self) -> Result<(), Failure> {
        let plan = self.plan;
        let (mut grown, mut used, mut refaults, mut teardowns, mut changes) = (0, 0, 0, 0, 0);
        for &step in &plan.script.steps {
            let mut new = 0;
            match step {
                Step::Grow(parts) => {
                    grown += parts;
                    let pages = plan.script.pages(grown, plan.config.pages);
                    (new, used) = (pages - used, pages);
                }
                Step::Toggle(change) => {
                    changes += 1;
                    self.phase("toggle", 0, |run| run.change(change))?;
                }
            }
            let again = self.phase("refault", 0, |run| run.touch(used))?.stats.faults.saturating_sub(new);
            refaults += again;
            teardowns += u64::from(again > 0);
        }
        for (name, value) in [("refaults", refaults), ("teardowns", teardowns), ("changes", changes)] {
            self.count(name, value);
        }
        Ok(())
    }

    fn touch(&mut self, pages: u64) -> Result<Events, String> {
        self.model.round((0..pages).map(|page| PageAccess { page, write: true }), &mut NoHooks)
    }

    fn enter(&mut self, role: Role) -> Result<Events, String> {
        self.model.change_role(ModeBits(role.mode()), role.is_smm())
    }

    /// A change there and back.
    fn change(&mut self, change: Change) -> Result<Events, String> {
        match change {
            Change::Firmware(toggle) => {
                let roles = toggle.visits();
                for &role in roles {
                    self.enter(role)?;
                }
                if roles.is_empty() { Ok(Events::default()) } else { self.enter(Role::HOME) }
            }
            Change::SlotDelete | Change::SlotMove => self.model.replace_memory(),
            other => Err(format!("{other:?} is none of the shadow MMU's")),
        }
    }

    /// Runs one phase in a window; phases of one name and round are one in the Record.
    fn phase(
        &mut self,
        name: &str,
        round: u64,
        work: impl FnOnce(&mut Self) -> Result<Events, String>,
    ) -> Result<Events, Failure> {
        let (events, window) = match self.plan.timer {
            Some(timer) => {
                let (events, window) = timer.window(Witness::of_controller(timer.clock()), || work(self));
                (events, Some((window, timer.clock().unit())))
            }
            None => (work(self), None),
        };
        let events = events.map_err(|error| Failure::Check(format!("the model is broken: {error}")))?;
        let (value, unit, clean) = window
            .map_or((events.stats.faults, "faults", true), |(window, unit)| (window.length(), unit, window.clean));
        match self.row.phases.iter_mut().find(|phase| phase.phase == name && phase.round == round) {
            Some(phase) => {
                phase.value += value;
                phase.clean &= clean;
            }
            None => self.row.phases.push(Phase {
                phase: name.to_owned(),
                round,
                pass: "timed".to_owned(),
                value,
                unit: unit.to_owned(),
                clean,
            }),
        }
        self.most_pages = self.most_pages.max(self.model.mmu.shadow_pages());
        if let Some(most) = &mut self.row.memory {
            let now = self.model.mmu.memory_in_use();
            most.table_bytes = most.table_bytes.max(now.table_bytes);
            most.rmap_bytes = most.rmap_bytes.max(now.rmap_bytes);
            most.cache_bytes = most.cache_bytes.max(now.cache_bytes);
            most.track_bytes = most.track_bytes.max(now.track_bytes);
        }
        Ok(events)
    }

    fn count(&mut self, name: &str, value: u64) {
        let counter = Counter { value, source: "umbra-mmu".to_owned(), pass: "timed".to_owned() };
        self.row.counters.insert(name.to_owned(), counter);
    }
}
