//! The options of a run, checked: everything that can be refused is refused here, before a VM exists.

use super::dirty_rate;
use super::l2::L2Options;
use super::roots_l2::Cure;
use super::script::Script;
use super::toggles::{On, Toggles};
use crate::cli::{RunArgs, Switch};
use crate::failure::Failure;
use crate::ground::Ground;
use crate::guest::{Image, Plan};
use crate::host;
use crate::kvm::clock::Timer;
use crate::kvm::{self, Backing};
use crate::report::Host;
use crate::report::record::{Record, Row, Rows, SCHEMA};
use crate::track::{self, Kind};
use kvm_ioctls::Cap;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use umbra_mmu::track::Strategy;
use umbra_shared::layout::Slot;
use umbra_shared::paging::Mode;
use umbra_shared::pattern::{MAX_ACCESSES, Pattern};
use umbra_shared::{Level, PAGE_SIZE, layout};

/// A fault that `--inject` puts into a report, to see it caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Takes a written page out of the report of round 2 (round 1 if it is the only one).
    LosePage,
    /// Puts a page into it that was not written.
    ExtraPage,
    /// Has the walker play another epoch than L1, once.
    LoseEdit,
    /// L1 makes no invalidation.
    LoseInvalidation,
    /// L1 says that each invalidation is over before it makes it.
    LateInvalidation,
    /// What the log of L2's VM holds for pages that are closed is lost.
    LoseTransfer,
    /// Maps a page into a window that EPT02 does not grant.
    StrayPage,
    /// Breaks L1 where it waits.
    BreakL1,
    /// Puts a HLT where SMM's handler begins, after which nobody would wake the vCPU.
    BreakSmm,
    /// Puts an endless loop there.
    LoopSmm,
}

impl Fault {
    fn parse(text: &str) -> Result<Self, Failure> {
        match text {
            "lose-page" => Ok(Self::LosePage),
            "extra-page" => Ok(Self::ExtraPage),
            "break-smm" => Ok(Self::BreakSmm),
            "loop-smm" => Ok(Self::LoopSmm),
            "lose-edit" => Ok(Self::LoseEdit),
            "lose-invalidation" => Ok(Self::LoseInvalidation),
            "late-invalidation" => Ok(Self::LateInvalidation),
            "lose-transfer" => Ok(Self::LoseTransfer),
            "stray-page" => Ok(Self::StrayPage),
            "break-l1" => Ok(Self::BreakL1),
            other => Err(input(format!(
                "--inject {other}: there are lose-page, extra-page, (in roots) break-smm and loop-smm, (in edits) lose-edit, (in edits --race) lose-invalidation, late-invalidation and lose-transfer, and (in hostile) stray-page and break-l1"
            ))),
        }
    }

    /// The code that takes the place of SMM's handler: HLT, or a jump to itself.
    pub const fn smm_code(self) -> Option<&'static [u8]> {
        match self {
            Self::BreakSmm => Some(&[0xf4]),
            Self::LoopSmm => Some(&[0xeb, 0xfe]),
            _ => None,
        }
    }
}

/// How long a guest may be silent inside one command; and one that is known to be.
const PATIENCE: Duration = Duration::from_secs(120);
const IMPATIENCE: Duration = Duration::from_secs(1);

/// Accesses per million TSC ticks.
const DEFAULT_RATE: u64 = 100;

/// The scenarios that have an L2.
pub const NESTED: &str = "nested";
/// Another one.
pub const EDITS: &str = "edits";
/// One whose L1 is malicious.
pub const HOSTILE: &str = "hostile";
/// The last one.
pub const VIOLATIONS: &str = "violations";
/// The scenario that asks for a rate.
pub const DIRTY_RATE: &str = "dirty-rate";
/// The scenario that has toggles.
pub const ROOTS: &str = "roots";

/// Whether the scenario of this name has an L2.
pub fn has_l2(scenario: &str) -> bool {
    [NESTED, EDITS, HOSTILE, VIOLATIONS].contains(&scenario)
}

/// Whether the scenario of this name edits L1's table at random.
pub fn has_edits(scenario: &str) -> bool {
    [EDITS, HOSTILE].contains(&scenario)
}

/// More than anybody waits for; the stamps have room for 2^32.
const MAX_ROUNDS: u64 = 1 << 20;

fn input(message: String) -> Failure {
    Failure::Input(message)
}

/// What `--tracker` asks for.
#[derive(Clone, Debug, Default)]
struct Trackers {
    /// A row each; empty for the scenario's own choice.
    rows: Vec<Kind>,
    /// Those that were asked for by name, so that a missing one is a failure.
    named: Vec<Kind>,
}

impl Trackers {
    fn parse(words: &[String]) -> Result<Self, Failure> {
        let mut trackers = Self::default();
        for word in words {
            let kinds = if word == "all" {
                track::ALL.to_vec()
            } else {
                let kind = word.parse().map_err(input)?;
                trackers.named.push(kind);
                vec![kind]
            };
            for kind in kinds {
                // `all,ring-1024` has a row for each once.
                if word != "all" || !trackers.rows.contains(&kind) {
                    trackers.rows.push(kind);
                }
            }
        }
        Ok(trackers)
    }
}

/// Options that make sense by themselves, on whatever host. The lab checks them before it boots.
#[derive(Debug)]
pub struct Options {
    pattern: Pattern,
    slots: Vec<Slot>,
    /// `None`: what the host has.
    backing: Option<Backing>,
    l2: Option<L2Options>,
    guest_page: Level,
    irqchip: bool,
    mode: Mode,
    image: Arc<Image>,
    trackers: Trackers,
    toggles: Option<Toggles>,
    cure: Option<Cure>,
    script: Script,
    strategies: Vec<&'static dyn Strategy>,
    inject: Option<Fault>,
    config: BTreeMap<String, Value>,
}

impl Options {
    /// Checks what can be checked without a look at the host.
    ///
    /// # Errors
    /// [`Failure::Input`] with the option, its value and what it can be.
    pub fn new(args: &RunArgs) -> Result<Self, Failure> {
        let backing = args.backing.as_deref().map(backing).transpose()?;
        let guest_page = match args.guest_page.as_str() {
            "4k" => Level::K4,
            "2m" => Level::M2,
            other => return Err(input(format!("--guest-page {other}: it is 4k or 2m"))),
        };
        let irqchip = match args.irqchip.as_deref() {
            None | Some("none") => false,
            Some("kernel") => true,
            Some(other) => return Err(input(format!("--irqchip {other}: it is none or kernel"))),
        };
        let has_l2 = has_l2(&args.scenario);
        let huge_leaves = guest_page == Level::M2 || args.shadow.leaf.as_deref() == Some("2m");
        let granule = if huge_leaves || backing == Some(Backing::Hugetlb) { Level::M2 } else { Level::K4 };
        let inject = args.inject.as_deref().map(Fault::parse).transpose()?;
        check_ranges(args, granule)?;
        let pages = args.memory / PAGE_SIZE;
        let mode = mode(args)?;
        let base = if mode == Mode::Long { layout::TRACKED_GPA } else { layout::LEGACY_BASE };
        let slots = layout::slots_at(base, pages, args.slots, granule).ok_or_else(|| {
            let (size, most) = (granule.bytes(), layout::MAX_SLOTS);
            input(format!(
                "--slots {}: it is 1 to {most}, and each slot needs at least {size} bytes of --memory",
                args.slots
            ))
        })?;
        let end = slots.clone().map(|slot| slot.base.plus(slot.pages).address()).max().unwrap_or(0);
        if mode != Mode::Long && end > layout::LEGACY_LIMIT {
            let room = (layout::LEGACY_LIMIT - layout::LEGACY_BASE) >> 20;
            return Err(input(format!(
                "--guest-paging {}: its memory lies below 3 GiB, {room}M with the gaps between slots, and --memory {}M does not fit",
                mode.name(),
                args.memory >> 20
            )));
        }
        let trackers = Trackers::parse(&args.tracker)?;
        let cure = if args.scenario == ROOTS { Cure::new(args)? } else { None };
        let on = if cure.is_some() { On::L2 } else { On::Kvm };
        let toggles = (args.scenario == ROOTS).then(|| Toggles::new(&args.toggle, args.vcpus, on)).transpose()?;
        let script = Script::read(args.script.as_ref())?;
        let strategies = if args.scenario == DIRTY_RATE { dirty_rate::strategies(args)? } else { Vec::new() };
        let image = Arc::new(Image::load(args.firmware.as_deref())?);
        let mut config = args.config();
        let l2 = has_l2.then(|| L2Options::new(args, guest_page, &mut config)).transpose()?;
        let mut pattern = Pattern {
            kind: args.pattern,
            seed: args.seed,
            pages: l2.as_ref().map_or(pages, |l2| l2.map.l2_pages()),
            write_percent: args.write_percent,
            accesses_per_page: args.accesses_per_page,
        };
        if inject == Some(Fault::ExtraPage) && pattern.write_percent == 100 {
            // An extra page is one that the guest did not write, so there must be one.
            pattern.write_percent = 99;
            config.insert("write-percent".into(), 99.into());
        }
        if let Some(script) = &args.script {
            config.insert("script".into(), script.digest().into());
        }
        if let Some(file) = &args.firmware {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            config.insert("firmware".into(), format!("{name} sha256:{}", image.sha256).into());
        }
        Ok(Self {
            pattern,
            slots: slots.collect(),
            backing,
            l2,
            guest_page,
            irqchip,
            mode,
            image,
            trackers,
            toggles,
            cure,
            script,
            strategies,
            inject,
            config,
        })
    }

    /// The backing in effect. An L2's memory must be one that others can map, a memfd; many hosts have no huge pages there, so there the default
    /// is what the host has.
    fn backing_here(&self, bytes: u64) -> Result<Backing, kvm::Error> {
        let backing = match (self.backing, &self.l2) {
            (Some(backing), None) if self.cure.is_none() => backing,
            // A page is a fault there: with huge pages one would stand for 512.
            (None, None) if self.cure.is_some() => Backing::Anonymous.shared(),
            (None, None) if self.toggles.is_some() => Backing::Anonymous,
            (None, None) => Backing::Thp,
            (Some(backing), _) => backing.shared(),
            (None, Some(_)) if Backing::Thp.shared().check(bytes).is_ok() => Backing::Thp.shared(),
            (None, Some(_)) => Backing::Anonymous.shared(),
        };
        backing.check(bytes)?;
        Ok(backing)
    }
}

fn backing(name: &str) -> Result<Backing, Failure> {
    name.parse().map_err(|()| {
        let names = Backing::ALL.map(Backing::name).join(", ");
        input(format!("--backing {name}: there is no such backing; there are {names}"))
    })
}

/// The paging mode in which tracked memory is touched.
fn mode(args: &RunArgs) -> Result<Mode, Failure> {
    let Some(name) = &args.guest_paging else { return Ok(Mode::Long) };
    let mode = Mode::ALL.into_iter().find(|mode| mode.name() == name);
    let mode = mode
        .ok_or_else(|| input(format!("--guest-paging {name}: there are {}", Mode::ALL.map(Mode::name).join(", "))))?;
    if mode != Mode::Long && !matches!(args.scenario.as_str(), "dirty-log" | "snapshot" | "soak" | super::COLLAPSE) {
        return Err(input(format!("--guest-paging {name}: {} touches its memory in 64bit", args.scenario)));
    }
    if mode == Mode::Bits32 && args.guest_page == "2m" {
        return Err(input("--guest-page 2m: with --guest-paging 32bit leaves are 4k".into()));
    }
    Ok(mode)
}

/// The numbers that have a range of their own.
fn check_ranges(args: &RunArgs, granule: Level) -> Result<(), Failure> {
    let size = granule.bytes();
    if args.memory == 0 || !args.memory.is_multiple_of(size) {
        return Err(input(format!("--memory {}: it is a multiple of {size} bytes and not zero", args.memory)));
    }
    if args.vcpus == 0 || args.vcpus > layout::MAX_VCPUS {
        return Err(input(format!("--vcpus {}: the firmware runs 1 to {}", args.vcpus, layout::MAX_VCPUS)));
    }
    if args.rounds == 0 || args.rounds > MAX_ROUNDS {
        return Err(input(format!("--rounds {}: it is 1 to {MAX_ROUNDS}", args.rounds)));
    }
    if let Some(chunk) = args.chunk.filter(|&chunk| chunk == 0 || !chunk.is_multiple_of(64)) {
        return Err(input(format!("--chunk {chunk}: KVM clears in multiples of 64 pages")));
    }
    let pages = (args.memory / PAGE_SIZE).saturating_mul(args.shadow.alias.unwrap_or(1));
    let accesses = pages.saturating_mul(args.accesses_per_page);
    if accesses > MAX_ACCESSES {
        let each = args.accesses_per_page;
        return Err(input(format!(
            "--accesses-per-page {each}: {accesses} accesses a round with this --memory, and there can be {MAX_ACCESSES}"
        )));
    }
    Ok(())
}

/// A run that this host can make.
#[derive(Clone, Debug)]
pub struct Setup {
    /// What machines are made of.
    pub plan: Plan,
    /// Rounds.
    pub rounds: u64,
    /// Pages of a CLEAR.
    pub chunk: Option<u64>,
    /// Seconds of a soak.
    pub seconds: u64,
    /// A fault to inject.
    pub inject: Option<Fault>,
    /// What L2 is, in the scenario that has one.
    pub l2: Option<L2Options>,
    /// What changes, in the scenario that changes something.
    pub toggles: Option<Toggles>,
    /// Whether the observed pass logs the roots that KVM makes.
    pub role_log: bool,
    /// What becomes of roots, if an L2 on the shadow MMU makes the changes.
    pub cure: Option<Cure>,
    /// The script of row `script`.
    pub script: Script,
    /// Strategies of the shadow MMU that get rows, in the scenario that has them beside its trackers.
    pub strategies: Vec<&'static dyn Strategy>,
    /// SMIs of a storm.
    pub smis: u64,
    trackers: Trackers,
    scenario: String,
    host: Host,
    config: BTreeMap<String, Value>,
}

impl Setup {
    /// Checks the options against this host.
    ///
    /// # Errors
    /// Those of [`Options::new`]; [`Failure::NotHere`] for what this host lacks.
    pub fn new(args: &RunArgs, ground: Ground) -> Result<Self, Failure> {
        let options = Options::new(args)?;
        if let Some(host) = host::memory_bytes().filter(|&host| args.memory > host) {
            return Err(input(format!("--memory {}M: this host has {}M in all", args.memory >> 20, host >> 20)));
        }
        let most = kvm::vm::open()?.check_extension_int(Cap::MaxVcpus);
        if usize::try_from(most).is_ok_and(|most| args.vcpus > most) {
            return Err(input(format!("--vcpus {}: KVM allows {most} here", args.vcpus)));
        }
        if options.mode != Mode::Long && host::vendor() == "pvm" {
            return Err(Failure::NotHere(format!(
                "--guest-paging {}: the guest leaves long mode for it, and PVM runs ring 0 in long mode alone (try `umbra lab {}`)",
                options.mode.name(),
                args.scenario
            )));
        }
        let backing = options.backing_here(args.memory)?;
        let mut config = options.config;
        config.insert("backing".into(), backing.name().into());
        let host = host::describe(ground, &options.image);
        let plan = Plan {
            pattern: options.pattern,
            slots: options.slots,
            vcpus: args.vcpus,
            backing,
            guest_page: options.guest_page,
            irqchip: options.irqchip,
            mode: options.mode,
            // Never 0: the firmware divides nothing by it, but a rate without an end is none.
            pace: 1_000_000 / args.rate.unwrap_or(DEFAULT_RATE),
            nested: None,
            shadow: None,
            bus: None,
            journals: false,
            smm: None,
            image: options.image,
            timer: Timer::new(ground.clock()),
            patience: if options.inject == Some(Fault::LoopSmm) { IMPATIENCE } else { PATIENCE },
        };
        let mut trackers = options.trackers;
        if trackers.rows.is_empty() {
            trackers.rows = super::find(args)?.trackers.to_vec();
        }
        Ok(Self {
            plan,
            rounds: args.rounds,
            chunk: args.chunk,
            seconds: args.seconds,
            smis: args.smis,
            inject: options.inject,
            l2: options.l2,
            toggles: options.toggles,
            role_log: args.role_log != Some(Switch::Off),
            cure: options.cure,
            script: options.script,
            strategies: options.strategies,
            trackers,
            scenario: args.scenario.clone(),
            host,
            config,
        })
    }

    /// The trackers that get a row each.
    #[must_use]
    pub fn trackers(&self) -> &[Kind] {
        &self.trackers.rows
    }

    /// Whether the processor is one of the lab's emulators'.
    #[must_use]
    pub fn in_lab(&self) -> bool {
        self.host.ground == "lab"
    }

    /// The same run with another share of writes.
    #[must_use]
    pub fn writing(&self, percent: u64) -> Self {
        let mut other = self.clone();
        other.plan.pattern.write_percent = percent;
        other
    }

    /// The Record of this run with these rows. `asked` says of a row by its name whether it was asked for.
    ///
    /// # Errors
    /// [`Failure::NotHere`] if no row could be measured, or one that was asked for could not.
    pub fn record_of(&self, rows: Vec<Rows>, asked: impl Fn(&str) -> bool) -> Result<Record, Failure> {
        let (mut missing, mut fails) = (Vec::new(), false);
        for row in &rows {
            if let Rows::NotHere { name, not_here } = row {
                missing.push(format!("{name}: {not_here}"));
                fails |= asked(name);
            }
        }
        if fails || (!missing.is_empty() && missing.len() == rows.len()) {
            return Err(self.not_here(&missing.join("; ")));
        }
        Ok(Record {
            schema: SCHEMA,
            scenario: self.scenario.clone(),
            host: self.host.clone(),
            config: self.config.clone(),
            rows,
        })
    }

    /// The Record of this run with these rows, each named by its tracker.
    ///
    /// # Errors
    /// As [`Setup::record_of`], where a tracker was asked for by name.
    pub fn record(&self, rows: Vec<Rows>) -> Result<Record, Failure> {
        self.record_of(rows, |name| self.trackers.named.iter().any(|kind| kind.to_string() == name))
    }

    /// A row, or why this host has none. A failure tells which row it was.
    ///
    /// # Errors
    /// All but [`Failure::NotHere`].
    pub fn or_not_here(name: &str, row: Result<Row, Failure>) -> Result<Rows, Failure> {
        match row {
            Ok(row) => Ok(Rows::Measured(Box::new(row))),
            Err(Failure::NotHere(not_here)) => Ok(Rows::NotHere { name: name.to_owned(), not_here }),
            Err(Failure::Check(what)) => Err(Failure::Check(format!("{name}: {what}"))),
            Err(other) => Err(other),
        }
    }

    /// Whether all trackers that were asked for by name can be had: said at once, not after minutes of other rows.
    ///
    /// # Errors
    /// [`Failure::NotHere`].
    pub fn check_named(&self) -> Result<(), Failure> {
        self.trackers.named.iter().try_for_each(|kind| {
            kind.missing().map_or(Ok(()), |reason| Err(self.not_here(&format!("{kind}: {reason}"))))
        })
    }

    /// What this host lacks, and where it would run.
    #[must_use]
    pub fn not_here(&self, what: &str) -> Failure {
        let where_else = if self.in_lab() { String::new() } else { format!(" (try `umbra lab {}`)", self.scenario) };
        Failure::NotHere(format!("{what}{where_else}"))
    }

    /// Measures a row for each tracker. Those that this host cannot do become `not_here`.
    ///
    /// # Errors
    /// Those of `measure`, and of [`Setup::record`].
    pub fn rows(&self, mut measure: impl FnMut(Kind) -> Result<Row, Failure>) -> Result<Record, Failure> {
        self.check_named()?;
        let rows = self.trackers.rows.iter().map(|&kind| Self::or_not_here(&kind.to_string(), measure(kind)));
        self.record(rows.collect::<Result<Vec<_>, _>>()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_each_tracker_once_and_none_of_them_by_name() {
        let parse = |words: &[&str]| Trackers::parse(&words.iter().map(ToString::to_string).collect::<Vec<_>>());
        let all = parse(&["all"]).unwrap();
        assert_eq!((all.rows.as_slice(), all.named.len()), (&track::ALL[..], 0));
        let more = parse(&["ring-1024", "mincore", "all"]).unwrap();
        assert_eq!(
            (more.rows.len(), more.named.as_slice()),
            (track::ALL.len() + 1, &[Kind::Ring(1024), Kind::Mincore][..])
        );
        assert!(parse(&["all", "none"]).is_err());
    }
}
