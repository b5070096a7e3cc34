//! The Record, schema 1. Nothing in it holds wall-clock dates or host paths, so two runs under the instruction clock give
//! byte-identical files. Parts that a scenario does not have are left out.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use umbra_shared::histogram::Histogram;

/// The schema that this code writes and reads.
pub const SCHEMA: u32 = 1;

/// One scenario's run on one host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The scenario's name.
    pub scenario: String,
    /// Where it ran.
    pub host: Host,
    /// Every option in effect, by its name on the command line; files by name and hash.
    pub config: BTreeMap<String, Value>,
    /// A row for each tracker, strategy or toggle.
    pub rows: Vec<Rows>,
}

/// Where a run took place.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// `kvm`, `lab` or `model`.
    pub ground: String,
    /// Kernel release (`uname -r`).
    pub kernel: String,
    /// Lab: the package's name, version and SHA-256.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub kernel_package: Option<String>,
    /// `amd`, `intel`, `pvm` or `none`: who runs the guest.
    pub vendor: String,
    /// As CPUID's brand string says it.
    pub cpu_model: String,
    /// Levels of the page tables that KVM builds, where it can be known.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub paging_levels: Option<u32>,
    /// Module parameters, as `kvm.tdp_mmu`.
    pub params: BTreeMap<String, String>,
    /// `instructions`, `nanoseconds` or `none`.
    pub clock: String,
    /// Whether a second run gives the same file.
    pub deterministic: bool,
    /// Lab: name and version.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub emulator: Option<String>,
    /// Lab: hash of the initramfs.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub image_sha256: Option<String>,
    /// Umbra's version.
    pub umbra: String,
    /// Hash of the firmware's ELF file.
    pub firmware_sha256: String,
}

impl Host {
    /// The kernel's version as a table names it: that of its package (`6.1.192`), since Debian's releases say `6.1.0` for all of a series; else the
    /// release without what a distribution puts behind it.
    #[must_use]
    pub fn kernel_version(&self) -> &str {
        let package = self.kernel_package.as_deref().and_then(|package| {
            let mut words = package.split(' ');
            // A kernel of the user's own has its release there.
            (words.next()? != "own").then(|| words.next())?
        });
        // Debian's version ends with its own revision.
        let of_package = package.and_then(|version| Some(version.rsplit_once('-')?.0));
        of_package.unwrap_or_else(|| self.kernel.split(['+', '-']).next().unwrap_or_default())
    }
}

/// A row: measured, or why not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Rows {
    /// What this host cannot do.
    NotHere {
        /// The row's name.
        name: String,
        /// The capability that is missing.
        not_here: String,
    },
    /// What was measured.
    Measured(Box<Row>),
}

impl Rows {
    /// The row's name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::NotHere { name, .. } => name,
            Self::Measured(row) => &row.name,
        }
    }
}

/// A measured row.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The tracker's name.
    pub name: String,
    /// Phases in the order in which they ran.
    pub phases: Vec<Phase>,
    /// Events, by name.
    pub counters: BTreeMap<String, Counter>,
    /// Whether the reported pages were the written ones.
    pub truth: Truth,
    /// How long single writes took in the guest.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stall: Option<Stall>,
    /// How fast the guest dirtied its memory, as it was found and as it was.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub rate: Option<Rate>,
    /// What the shadow MMU's structures take.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub memory: Option<Bytes>,
    /// The roots that KVM made, in the observed pass.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub roles: Vec<RootLife>,
}

/// One root of KVM's, from its making to its teardown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootLife {
    /// Its role, in the kernel's words.
    pub role: String,
    /// What was being done when it was made.
    pub cause: String,
    /// When, in nanoseconds (instructions, in the lab) after the first event of the log.
    pub time: u64,
    /// How long it lived; absent if it outlived the log.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub life: Option<u64>,
    /// What was being done when it was torn down.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ended_by: Option<String>,
    /// Tracked pages that it mapped in its life.
    pub mapped: u64,
}

/// A dirty rate: the pages that a tool found in its interval beside those that were written in it, and what the guest did meanwhile.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// Of `time`: `instructions` or `nanoseconds`.
    pub unit: String,
    /// TSC ticks between two accesses, where nothing is in the guest's way.
    pub pace: u64,
    /// Pages that the tool found.
    pub found: u64,
    /// Pages that were written after it began to look and before it looked again.
    pub certain: u64,
    /// These, and those that were written while it did either.
    pub possible: u64,
    /// What was found against the middle of the two, in thousandths of it.
    pub error_permille: i64,
    /// The guest before the tool.
    pub before: Share,
    /// The guest while it ran.
    pub during: Share,
    /// The guest when it had gone.
    pub after: Share,
}

/// What a guest did in a stretch of time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Accesses.
    pub accesses: u64,
    /// How long it was.
    pub time: u64,
    /// TSC ticks that a write took on average.
    pub ticks_per_write: u64,
}

/// Heap bytes of the shadow MMU, at their most over the phases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bytes {
    /// Shadow pages: tables, headers, hash.
    pub table_bytes: u64,
    /// Reverse maps and their lists.
    pub rmap_bytes: u64,
    /// What the split caches hold, a part of the two above.
    pub cache_bytes: u64,
    /// Bitmaps, log and copies of tracking.
    pub track_bytes: u64,
}

impl Bytes {
    /// All together.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.table_bytes + self.rmap_bytes + self.track_bytes
    }
}

/// One phase of one round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// populate, enable, dirty, get, clear, disable, retouch; in `nested` also enter, fill, first-touch, second-touch, edit.
    pub phase: String,
    /// The round, from 1; 0 for phases outside the rounds.
    pub round: u64,
    /// `timed` or `observed`.
    pub pass: String,
    /// How long it took.
    pub value: u64,
    /// `instructions` or `nanoseconds`.
    pub unit: String,
    /// False when another task ran inside the window.
    pub clean: bool,
}

/// A counted event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counter {
    /// How often.
    pub value: u64,
    /// `stats`, `tracepoint`, `umbra` or `umbra-mmu`.
    pub source: String,
    /// The pass it was counted in.
    pub pass: String,
}

/// Six numbers about the pages of a round, or of all rounds together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// Pages that the guest wrote.
    pub written: u64,
    /// Pages that the tracker reported.
    pub reported: u64,
    /// Written and not reported: a lost update.
    pub missed: u64,
    /// Reported, not written, and explained by nothing.
    pub extra: u64,
    /// Reported, not written, and predicted from the tracker's definition.
    pub explained: u64,
    /// Written with the bytes they already held.
    pub unchanged: u64,
}

impl std::ops::AddAssign for Pages {
    fn add_assign(&mut self, other: Self) {
        self.written += other.written;
        self.reported += other.reported;
        self.missed += other.missed;
        self.extra += other.extra;
        self.explained += other.explained;
        self.unchanged += other.unchanged;
    }
}

/// The truth check of a row: all rounds of both passes summed, and each by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Truth {
    /// The sums.
    #[serde(flatten)]
    pub pages: Pages,
    /// A round each.
    pub rounds: Vec<TruthRound>,
    /// The same by L2's pages, where there is an L2: a report of an L1 page is one of each L2 page that it is.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub l2: Option<TruthOfL2>,
    /// What failed, in words, the first few of it. Empty when the truth held.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub faults: Vec<String>,
}

/// The truth check by L2's pages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TruthOfL2 {
    /// The sums.
    #[serde(flatten)]
    pub pages: Pages,
    /// A round each.
    pub rounds: Vec<TruthRound>,
}

/// The truth check of one round.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TruthRound {
    /// The round, from 1.
    pub round: u64,
    /// The pass it was checked in.
    pub pass: String,
    /// The numbers.
    #[serde(flatten)]
    pub pages: Pages,
}

/// The distribution of the time that single writes took, measured by the guest in the observed pass.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stall {
    /// `instructions` or `nanoseconds`.
    pub unit: String,
    /// Accesses.
    pub count: u64,
    /// Median.
    pub p50: u64,
    /// 99th percentile.
    pub p99: u64,
    /// 99.9th percentile.
    pub p999: u64,
    /// The longest.
    pub max: u64,
    /// The sum.
    pub total: u64,
}

impl Stall {
    /// What `histogram` holds, each value turned into `unit` by `convert`.
    #[must_use]
    pub fn of(histogram: &Histogram, unit: &str, convert: impl Fn(u64) -> u64) -> Self {
        Self {
            unit: unit.to_owned(),
            count: histogram.count,
            p50: convert(histogram.quantile(500)),
            p99: convert(histogram.quantile(990)),
            p999: convert(histogram.quantile(999)),
            max: convert(histogram.max),
            total: convert(histogram.total),
        }
    }
}

impl Row {
    /// Whether the truth did not hold.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.truth.pages.missed > 0 || self.truth.pages.extra > 0 || !self.truth.faults.is_empty()
    }
}

impl Record {
    /// The file's text: JSON with two spaces of indent and a newline at the end.
    ///
    /// # Panics
    /// Never: a Record has only string keys.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("a Record has only string keys");
        text.push('\n');
        text
    }

    /// What failed in the truth checks of all rows, in words. Empty when every reported page was right.
    #[must_use]
    pub fn faults(&self) -> Vec<String> {
        self.measured()
            .flat_map(|row| {
                let sums = |pages: Pages, of: &str| {
                    (pages.missed > 0 || pages.extra > 0)
                        .then(|| format!("{}: {} pages{of} missed, {} extra", row.name, pages.missed, pages.extra))
                };
                let l2 = row.truth.l2.as_ref().and_then(|l2| sums(l2.pages, " of L2"));
                row.truth.faults.iter().cloned().chain(sums(row.truth.pages, "")).chain(l2)
            })
            .collect()
    }

    /// Measured rows.
    pub fn measured(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter_map(|row| match row {
            Rows::Measured(row) => Some(&**row),
            Rows::NotHere { .. } => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_named_by_its_package_or_else_by_its_release() {
        let host = |kernel: &str, package: Option<&str>| Host {
            kernel: kernel.into(),
            kernel_package: package.map(str::to_owned),
            ..Host::default()
        };
        for (kernel, package, name) in [
            ("6.1.0-56-cloud-amd64", Some("linux-image-6.1.0-56-cloud-amd64 6.1.192-2 abc"), "6.1.192"),
            (
                "6.12.111+deb12-cloud-amd64",
                Some("linux-image-6.12.111+deb12-cloud-amd64 6.12.111-1~deb12u1 a"),
                "6.12.111",
            ),
            (
                "7.3-cloud-amd64",
                Some("linux-binary-unsigned-7.3-cloud-amd64 7.3~rc7-1~exp1 a, linux-modules b"),
                "7.3~rc7",
            ),
            ("6.19.0-me", Some("own 6.19.0-me abc"), "6.19.0"),
            ("6.18.5-pvm", None, "6.18.5"),
            ("6.18.5", Some(""), "6.18.5"),
        ] {
            assert_eq!(host(kernel, package).kernel_version(), name, "{kernel}");
        }
    }

    #[test]
    fn a_record_survives_its_file() {
        let row = Row {
            name: "clear".into(),
            phases: vec![Phase {
                phase: "enable".into(),
                round: 0,
                pass: "timed".into(),
                value: 7,
                unit: "instructions".into(),
                clean: true,
            }],
            truth: Truth {
                pages: Pages { written: 3, ..Pages::default() },
                rounds: vec![TruthRound::default()],
                ..Truth::default()
            },
            ..Row::default()
        };
        let record = Record {
            schema: SCHEMA,
            scenario: "dirty-log".into(),
            host: Host { ground: "lab".into(), ..Host::default() },
            config: BTreeMap::from([("memory".into(), Value::from(64))]),
            rows: vec![
                Rows::Measured(Box::new(row)),
                Rows::NotHere { name: "ring".into(), not_here: "KVM_CAP_DIRTY_LOG_RING".into() },
            ],
        };
        let text = record.to_json();
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record);
        assert!(text.contains("\"written\": 3"), "{text}");
    }
}
