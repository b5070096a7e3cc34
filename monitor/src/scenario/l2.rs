//! The options of an L2, checked.

use super::setup;
use crate::cli::{NestedArgs, RunArgs};
use crate::failure::Failure;
use crate::kvm::Backing;
use crate::nested::{self, FirstReads, Means, Mechanism, source};
use crate::progress::Progress;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use umbra_mmu::track::STRATEGIES;
use umbra_mmu::{DEFAULT_TWINS, RootPolicy};
use umbra_shared::nested::{AliasKind, Flags, Format, Map, MapError, Nested, Way};
use umbra_shared::{Level, PAGE_SIZE};

/// Edits of L1's table in a round that anybody waits for.
const MAX_REMAPS: u64 = 1 << 20;

/// Edits of L1's table, and cases of a malicious L1, without `--edits`.
const EDITS: u64 = 500;
const CASES: u64 = 2000;

/// A way to run L2, as `--nesting` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nesting {
    /// No L2: L1 itself executes the pattern.
    Plain,
    /// KVM's own nesting on AMD.
    Svm,
    /// KVM's own nesting on Intel.
    Vmx,
    /// Umbra's shadow MMU.
    Umbra,
}

impl Nesting {
    const ALL: [Self; 4] = [Self::Plain, Self::Svm, Self::Vmx, Self::Umbra];

    const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Svm => "svm",
            Self::Vmx => "vmx",
            Self::Umbra => "umbra",
        }
    }
}

impl fmt::Display for Nesting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Nesting {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        named("nesting", text, &Self::ALL.map(|nesting| (nesting.name(), nesting)))
    }
}

/// What `--NAME text` chooses among `choices`.
fn named<T: Copy>(name: &str, text: &str, choices: &[(&str, T)]) -> Result<T, Failure> {
    choices.iter().find(|(choice, _)| *choice == text).map(|(_, value)| *value).ok_or_else(|| {
        let choices: Vec<_> = choices.iter().map(|(choice, _)| *choice).collect();
        Failure::Input(format!("--{name} {text}: it is one of {}", choices.join(", ")))
    })
}

/// When L2 touches its pages for the first time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstTouch {
    /// Before anything is logged.
    Before,
    /// In the first round.
    Logged,
}

/// What L2 is, and the ways to run it.
#[derive(Clone, Debug)]
pub struct L2Options {
    /// What `--nesting` names; empty for all that the host has.
    ways: Vec<Nesting>,
    /// What L2's pages are.
    pub map: Map,
    /// The table's format, if it was asked for.
    pub format: Option<Format>,
    /// A and D, if they were asked for.
    flags: Option<Flags>,
    fill_batch: u64,
    remaps: u64,
    /// Random edits of the table, or cases of a malicious L1; 0 where there are none.
    pub edits: u64,
    /// The edits race L2s that run.
    pub race: bool,
    /// When L2 touches its pages for the first time.
    pub first_touch: FirstTouch,
    /// What KVM's log of umbra's L2 makes of pages that are first mapped by a read.
    first_reads: FirstReads,
    /// Umbra's rows: a strategy each, and what makes it effective.
    pub means: Vec<Means>,
    /// Whether mechanisms were asked for by name.
    pub means_by_name: bool,
    /// The fault source, if one was asked for.
    pub source: Option<source::Kind>,
    /// Pages that one fault may map, if it was asked for.
    extent: Option<u32>,
    /// Copies of huge leaves, if it was asked for.
    twins: Option<u32>,
}

impl L2Options {
    /// Checks the options, and puts the defaults into `config`.
    ///
    /// # Errors
    /// [`Failure::Input`] with the option, its value and what it can be.
    pub fn new(args: &RunArgs, guest_page: Level, config: &mut BTreeMap<String, Value>) -> Result<Self, Failure> {
        let (given, table) = (&args.nested, &args.shadow);
        let ways = given.nesting.iter().map(|name| name.parse()).collect::<Result<Vec<Nesting>, _>>()?;
        let text = |given: &Option<String>, default: &str| given.clone().unwrap_or_else(|| default.to_owned());
        let (leaf, kind) = (text(&table.leaf, "4k"), text(&table.alias_kind, AliasKind::Contiguous.name()));
        let (aliases, fill_batch) = (table.alias.unwrap_or(1), given.fill_batch.unwrap_or(0));
        let level = named("leaf", &leaf, &[("4k", Level::K4), ("2m", Level::M2), ("1g", Level::G1)])?;
        let alias_kind = named("alias-kind", &kind, &AliasKind::ALL.map(|kind| (kind.name(), kind)))?;
        let flags = Flags::ALL.map(|flags| (flags.name(), flags));
        let flags = given.accessed_dirty.as_deref().map(|text| named("accessed-dirty", text, &flags)).transpose()?;
        let formats = Format::ALL.map(|format| (format.name(), format));
        let format = table.format.as_deref().map(|format| named("format", format, &formats)).transpose()?;
        let source = fault_source(given)?;
        let means = means(&table.strategy, &given.mechanism)?;
        let remaps = given.remaps.unwrap_or(0);
        if remaps > MAX_REMAPS {
            return Err(Failure::Input(format!("--remaps {remaps}: there can be {MAX_REMAPS}")));
        }
        if remaps > 0 && (alias_kind == AliasKind::SharedTables || args.vcpus > 1 && aliases > 1) {
            return Err(Failure::Input(format!(
                "--remaps {remaps}: which page an L2 page is then must be known, so no --alias-kind shared-tables, and no --alias with several --vcpus"
            )));
        }
        if let Some(extent) = table.extent.filter(|extent| !extent.is_power_of_two() || *extent > 4096) {
            return Err(Failure::Input(format!("--extent {extent}: it is a power of two up to 4096")));
        }
        if alias_kind == AliasKind::Scattered && guest_page > level {
            return Err(Failure::Input(format!(
                "--guest-page 2m: it cannot hold leaves of {leaf} that are scattered (use --guest-page 4k or --leaf 2m)"
            )));
        }
        if level == Level::G1 && args.slots > 1 {
            return Err(Failure::Input(format!("--slots {}: a leaf of 1g holds one slot (use --leaf 2m)", args.slots)));
        }
        let map = Map::new(args.memory / PAGE_SIZE, level, aliases, alias_kind, args.seed).map_err(|error| {
            let (option, value) = match error {
                MapError::Leaf(_) => ("leaf", leaf.clone()),
                MapError::Giant(_) => ("alias", format!("{aliases} with --alias-kind {kind}")),
                MapError::Pages(_) => ("memory", args.memory.to_string()),
                MapError::Aliases(_) => ("alias", aliases.to_string()),
                MapError::Shared(_) => ("alias-kind", format!("{kind} with --leaf {leaf}")),
            };
            Failure::Input(format!("--{option} {value}: {error}"))
        })?;
        for (name, value) in [
            ("leaf", Value::from(leaf)),
            ("alias", aliases.into()),
            ("alias-kind", kind.into()),
            ("fill-batch", fill_batch.into()),
            ("remaps", remaps.into()),
        ] {
            config.insert(name.to_owned(), value);
        }
        let edits = match args.scenario.as_str() {
            setup::EDITS => given.edits.unwrap_or(EDITS),
            setup::HOSTILE => given.edits.unwrap_or(CASES),
            _ => 0,
        };
        if edits > 0 {
            check_edits(args, level, alias_kind)?;
            config.insert("edits".to_owned(), edits.into());
        }
        check_race(args)?;
        let (first_touch, first_reads) = first(args, config)?;
        let means_by_name = !given.mechanism.is_empty();
        let (extent, twins) = (table.extent, table.twins);
        Ok(Self {
            ways,
            map,
            format,
            flags,
            fill_batch,
            remaps,
            edits,
            race: given.race,
            first_touch,
            first_reads,
            means,
            means_by_name,
            source,
            extent,
            twins,
        })
    }

    /// The ways that get a row for each tracker. Without `--nesting` a host has those of its `vendor`; one that has neither's is to say
    /// so for both.
    #[must_use]
    pub fn ways_here(&self, vendor: &str) -> Vec<Nesting> {
        match vendor {
            _ if !self.ways.is_empty() => self.ways.clone(),
            "amd" => vec![Nesting::Plain, Nesting::Svm, Nesting::Umbra],
            "intel" => vec![Nesting::Plain, Nesting::Vmx, Nesting::Umbra],
            _ => vec![Nesting::Plain, Nesting::Svm, Nesting::Vmx, Nesting::Umbra],
        }
    }

    /// Those of them that have an L2 with a table of its own.
    #[must_use]
    pub fn nested_ways_here(&self, vendor: &str) -> Vec<Nesting> {
        self.ways_here(vendor).into_iter().filter(|way| *way != Nesting::Plain).collect()
    }

    /// Whether the row of this name was asked for by its way, so that it is a failure when it is missing.
    #[must_use]
    pub fn named(&self, row: &str) -> bool {
        let of_row = row.split(':').next();
        self.ways.iter().any(|way| of_row == Some(way.name()))
    }

    /// What the firmware is told to be one of those ways.
    #[must_use]
    pub fn nested(&self, way: Way) -> Nested {
        let format = self.format.unwrap_or(match way {
            Way::Umbra | Way::Vmx => Format::Ept,
            Way::Svm | Way::Plain => Format::Npt,
        });
        let unused = way == Way::Umbra && format == Format::Ept;
        let flags = self.flags.unwrap_or(if unused { Flags::Unused } else { Flags::Clear });
        Nested { way, map: self.map, format, flags, fill_batch: self.fill_batch, remaps: self.remaps }
    }

    /// How the monitor runs L2 by `means`, with faults told by `source`. On huge pages one fault maps up to eight.
    #[must_use]
    pub fn options(&self, means: Means, source: source::Kind, backing: Backing) -> nested::Options {
        let extent = self.extent.unwrap_or(if backing.is_huge() { 4096 } else { 64 });
        let pieces = !backing.is_huge() || self.remaps + self.edits > 0 && self.map.leaf() == Level::K4;
        let twins = self.twins.unwrap_or(DEFAULT_TWINS);
        let (roots, log_roots) = (RootPolicy::default(), false);
        nested::Options { means, source, extent, twins, pieces, first_reads: self.first_reads, roots, log_roots }
    }
}

/// What random edits start from: a slot of whole regions, by small leaves, each copy's in tables of its own.
fn check_edits(args: &RunArgs, leaf: Level, kind: AliasKind) -> Result<(), Failure> {
    let wrong = |what: String| {
        Err(Failure::Input(format!(
            "{what}: edits begins with a table of 4k leaves for one slot of whole 2M, all of it filled"
        )))
    };
    if leaf != Level::K4 {
        return wrong("--leaf 2m and 1g".to_owned());
    }
    if kind == AliasKind::SharedTables {
        return wrong("--alias-kind shared-tables".to_owned());
    }
    if args.slots > 1 {
        return wrong(format!("--slots {}", args.slots));
    }
    if !args.memory.is_multiple_of(Level::M2.bytes()) {
        return wrong(format!("--memory {}", args.memory));
    }
    match (args.nested.fill_batch, args.nested.remaps) {
        (None | Some(0), None | Some(0)) => Ok(()),
        _ => wrong("--fill-batch and --remaps".to_owned()),
    }
}

/// Who races whom.
fn check_race(args: &RunArgs) -> Result<(), Failure> {
    if !args.nested.race {
        return Ok(());
    }
    if args.scenario != setup::EDITS {
        return Err(Failure::Input(format!("--race: it is for edits, and {} makes none", args.scenario)));
    }
    if args.vcpus < 2 {
        return Err(Failure::Input(format!(
            "--race with --vcpus {}: the first edits while the L2s of the others run, so there are 2 or more",
            args.vcpus
        )));
    }
    Ok(())
}

/// What `--fault-source` asks for; `None` for the cheapest that the host has.
///
/// # Errors
/// [`Failure::Input`] with what there is.
pub fn fault_source(given: &NestedArgs) -> Result<Option<source::Kind>, Failure> {
    let sources = source::Kind::ALL.map(|kind| (kind.name(), Some(kind)));
    let sources: Vec<_> = sources.into_iter().chain([("auto", None)]).collect();
    given.fault_source.as_deref().map_or(Ok(None), |text| named("fault-source", text, &sources))
}

/// The fault source that was `asked` for, or the first of `kinds` that this host has and that tells of writes to read-only pages where L2 has
/// some. Of the latter a line of progress begins with `means`.
///
/// # Errors
/// [`Failure::NotHere`] with what each of them lacks.
pub fn choose_source(
    asked: Option<source::Kind>,
    kinds: &[source::Kind],
    read_only: Option<&str>,
    means: &str,
    progress: &Progress,
) -> Result<source::Kind, Failure> {
    if let Some(kind) = asked {
        kind.open_for(read_only)?;
        return Ok(kind);
    }
    let (kind, missing) = source::first(kinds, read_only)?;
    let missing = if missing.is_empty() { String::new() } else { format!(" ({})", missing.join("; ")) };
    progress.step(&format!("{means}fault source {kind}{missing}"));
    Ok(kind)
}

/// When L2's pages are first touched, and what is made of it; into `config` too.
fn first(args: &RunArgs, config: &mut BTreeMap<String, Value>) -> Result<(FirstTouch, FirstReads), Failure> {
    let given = &args.nested;
    let first_touch = given.first_touch.as_deref().unwrap_or("before");
    config.insert("first-touch".to_owned(), first_touch.into());
    let first_touch =
        named("first-touch", first_touch, &[("before", FirstTouch::Before), ("logged", FirstTouch::Logged)])?;
    if first_touch == FirstTouch::Logged
        && (given.fill_batch.is_some_and(|batch| batch > 0) || args.write_percent < 100)
    {
        return Err(Failure::Input(
            "--first-touch logged: L1 fills its table before, and every page is written (no --fill-batch, no --write-percent): KVM counts a page that it first maps for a read as written"
                .to_owned(),
        ));
    }
    let first_reads = given.first_reads.as_deref().unwrap_or("exact");
    config.insert("first-reads".to_owned(), first_reads.into());
    let first_reads =
        named("first-reads", first_reads, &[("exact", FirstReads::Exact), ("counted", FirstReads::Counted)])?;
    if first_reads == FirstReads::Counted && args.write_percent < 100 {
        return Err(Failure::Input(format!(
            "--write-percent {}: with --first-reads counted pages that are read may be reported as well",
            args.write_percent
        )));
    }
    Ok((first_touch, first_reads))
}

/// The strategies and mechanisms that fit each other and were asked for.
fn means(strategies: &[String], mechanisms: &[String]) -> Result<Vec<Means>, Failure> {
    let all = STRATEGIES.map(|strategy| (strategy.name(), strategy.name()));
    let strategies = strategies.iter().map(|text| named("strategy", text, &all)).collect::<Result<Vec<_>, _>>()?;
    let all = Mechanism::ALL.map(|mechanism| (mechanism.name(), mechanism));
    let mechanisms = mechanisms.iter().map(|text| named("mechanism", text, &all)).collect::<Result<Vec<_>, _>>()?;
    let wanted = |means: &Means| {
        (strategies.is_empty() || strategies.contains(&means.strategy))
            && (mechanisms.is_empty() || mechanisms.contains(&means.mechanism))
    };
    let means: Vec<Means> = Means::all().filter(wanted).collect();
    if means.is_empty() {
        let all: Vec<String> = Means::all().map(|means| means.to_string()).collect();
        return Err(Failure::Input(format!(
            "--strategy and --mechanism: nothing fits both; there are {}",
            all.join(", ")
        )));
    }
    Ok(means)
}
