//! The options of an L2, checked.

use crate::cli::RunArgs;
use crate::failure::Failure;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use umbra_shared::nested::{AliasKind, Map, MapError, Nested, Way};
use umbra_shared::{Level, PAGE_SIZE};

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

/// The formats of L1's table.
const FORMATS: [(&str, Format); 4] =
    [("ept", Format::Ept), ("npt", Format::Npt), ("pae", Format::Pae), ("32bit", Format::ThirtyTwoBit)];

/// A format of L1's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Intel's extended page tables.
    Ept,
    /// AMD's nested page tables, 64-bit.
    Npt,
    /// The same, PAE.
    Pae,
    /// The same, with 4-byte entries.
    ThirtyTwoBit,
}

/// What `--NAME text` chooses among `choices`.
fn named<T: Copy>(name: &str, text: &str, choices: &[(&str, T)]) -> Result<T, Failure> {
    choices.iter().find(|(choice, _)| *choice == text).map(|(_, value)| *value).ok_or_else(|| {
        let choices: Vec<_> = choices.iter().map(|(choice, _)| *choice).collect();
        Failure::Input(format!("--{name} {text}: it is one of {}", choices.join(", ")))
    })
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
    preset: bool,
    fill_batch: u64,
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
        let accessed_dirty = text(&given.accessed_dirty, "clear");
        let level = named("leaf", &leaf, &[("4k", Level::K4), ("2m", Level::M2), ("1g", Level::G1)])?;
        let alias_kind = named("alias-kind", &kind, &AliasKind::ALL.map(|kind| (kind.name(), kind)))?;
        let preset = named("accessed-dirty", &accessed_dirty, &[("clear", false), ("preset", true)])?;
        let format = table.format.as_deref().map(|format| named("format", format, &FORMATS)).transpose()?;
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
            ("accessed-dirty", accessed_dirty.into()),
            ("fill-batch", fill_batch.into()),
        ] {
            config.insert(name.to_owned(), value);
        }
        Ok(Self { ways, map, format, preset, fill_batch })
    }

    /// The ways that get a row for each tracker. Without `--nesting` a host has those of its `vendor`; one that has neither's is to say
    /// so for both.
    #[must_use]
    pub fn ways_here(&self, vendor: &str) -> Vec<Nesting> {
        match vendor {
            _ if !self.ways.is_empty() => self.ways.clone(),
            "amd" => vec![Nesting::Plain, Nesting::Svm],
            "intel" => vec![Nesting::Plain, Nesting::Vmx],
            _ => vec![Nesting::Plain, Nesting::Svm, Nesting::Vmx],
        }
    }

    /// Whether the row of this name was asked for by its way, so that it is a failure when it is missing.
    #[must_use]
    pub fn named(&self, row: &str) -> bool {
        let of_row = row.split(':').next();
        self.ways.iter().any(|way| of_row == Some(way.name()))
    }

    /// What the firmware is told to be one of those ways.
    #[must_use]
    pub const fn nested(&self, way: Way) -> Nested {
        Nested { way, map: self.map, preset: self.preset, fill_batch: self.fill_batch }
    }
}
