//! What is measured: the shape of L2 over L1, and EPT12 built to it.

use umbra_shared::{Gfn, L2Gfn, Level};

use crate::access::Access;
use crate::config::Config;
use crate::format::Format;
use crate::tables::{Tables, span};
use crate::walker::PlainMemory;

/// How the aliases of L1's pages lie in L2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AliasKind {
    /// Each alias is a copy of the whole range, in order.
    #[default]
    Contiguous,
    /// Each alias has the range's leaves in an order of its own.
    Scattered,
    /// Each alias is a copy in order, through the same lowest tables of EPT12.
    SharedTables,
}

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct ModelConfig {
    /// Tracked pages of L1, from frame 0.
    pub pages: u64,
    /// The format of EPT12.
    pub format: Format,
    /// The leaves of EPT12.
    pub leaf: Level,
    /// L2 pages for each L1 page.
    pub aliases: u64,
    /// How they lie.
    pub alias_kind: AliasKind,
    /// EPT12 starts with accessed and dirty flags set, as a hypervisor does that does not want them: neighbours can be
    /// mapped along, and a read maps for writing.
    pub used: bool,
    /// The MMU. `memory_frames` is set from the above.
    pub mmu: Config,
}

impl ModelConfig {
    /// `pages` L1 pages without aliases under `format`, leaves of `leaf`, and an MMU configured as `mmu`.
    #[must_use]
    pub const fn new(pages: u64, format: Format, leaf: Level, mmu: Config) -> Self {
        Self { pages, format, leaf, aliases: 1, alias_kind: AliasKind::Contiguous, used: true, mmu }
    }

    /// L2 frames from one alias of the range to the next.
    pub(super) fn stride(&self) -> u64 {
        let unit = match self.alias_kind {
            AliasKind::SharedTables => {
                let above = Level::from_number(self.leaf.number() + 1).unwrap_or(Level::P256);
                span(self.format, above).max(self.leaf.frames())
            }
            _ => span(self.format, self.leaf),
        };
        self.pages.div_ceil(unit) * unit
    }

    /// The step by which scattered aliases go through the leaves: about five eighths of their number, and coprime to it.
    pub(super) fn multiplier(&self) -> u64 {
        let units = self.pages / span(self.format, self.leaf);
        (units * 5 / 8..=units).find(|&step| gcd(step, units) == 1).unwrap_or(1)
    }

    /// Refuses what makes no sense, in one line.
    ///
    /// # Errors
    /// The reason, with what would be right.
    pub fn check(&self) -> Result<(), String> {
        let leaf = span(self.format, self.leaf);
        if self.pages == 0 || self.pages > 1 << 32 {
            return Err(format!("{} tracked pages: give 1 to 2^32", self.pages));
        }
        if self.leaf > self.format.max_leaf() {
            let size =
                |level: Level| ["4k", "2m", "1g"].get(usize::from(level.number()) - 1).copied().unwrap_or("512g");
            return Err(format!(
                "{} has no leaves of {}: its largest is {}",
                self.format,
                size(self.leaf),
                size(self.format.max_leaf())
            ));
        }
        if !self.pages.is_multiple_of(leaf) {
            return Err(format!("{} tracked pages are no multiple of a leaf's {leaf}", self.pages));
        }
        if self.aliases == 0 {
            return Err("no alias means no mapping: give 1 or more".into());
        }
        if self.alias_kind == AliasKind::SharedTables && self.format.has_4_byte_gpte() && self.leaf > Level::K4 {
            return Err("32-bit directories are under no entry that aliases could share: take leaf 4k".into());
        }
        let need = self.stride().saturating_mul(self.aliases);
        if need > self.format.frames() {
            return Err(format!(
                "{} aliases need {need} L2 pages, {} has {}",
                self.aliases,
                self.format,
                self.format.frames()
            ));
        }
        Ok(())
    }
}

const fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

pub(super) fn l1_page(config: &ModelConfig, stride: u64, multiplier: u64, l2: L2Gfn) -> u64 {
    let (alias, page) = (l2.0 / stride, l2.0 % stride);
    match config.alias_kind {
        AliasKind::Contiguous | AliasKind::SharedTables => page,
        AliasKind::Scattered => {
            let unit = span(config.format, config.leaf);
            let units = config.pages / unit;
            // A step coprime to their number visits every unit once.
            let at = u128::from(page / unit) * u128::from(multiplier) + u128::from(alias * 7);
            let at = u64::try_from(at % u128::from(units)).unwrap_or(0);
            at * unit + page % unit
        }
    }
}

pub(super) fn build(
    config: &ModelConfig,
    stride: u64,
    tables: &mut Tables,
    memory: &mut PlainMemory,
    l1: impl Fn(L2Gfn) -> u64,
) {
    let unit = span(config.format, config.leaf);
    let above = Level::from_number(config.leaf.number() + 1).unwrap_or(Level::P256);
    let table_span = span(config.format, above).max(unit);
    for alias in 0..config.aliases {
        let base = alias * stride;
        let mut page = 0;
        while page < config.pages {
            let l2 = L2Gfn(base + page);
            if alias > 0 && config.alias_kind == AliasKind::SharedTables {
                let table = tables.table(memory, L2Gfn(page), config.leaf);
                tables.share(memory, l2, config.leaf, table);
                page += table_span;
                continue;
            }
            tables.map(memory, l2, Gfn(l1(l2)), config.leaf, Access::ALL, config.used);
            page += unit;
        }
    }
}
