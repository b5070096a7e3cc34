//! The command line. `umbra lab SCENARIO options` runs inside the lab exactly what `umbra run SCENARIO options` runs here, so
//! both share [`RunArgs`], and the lab's PID 1 parses the same words again.

use crate::failure::Failure;
use crate::guest::image::sha256;
use clap::{Args, Parser, Subcommand};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use umbra_shared::pattern;

/// Umbra: a laboratory for KVM's memory management.
#[derive(Debug, Parser)]
#[command(name = "umbra", version, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// What this host can do, and which scenarios it can run.
    Probe {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Scenarios, trackers, patterns, kernels.
    List,
    /// Run a scenario on this machine's /dev/kvm.
    Run(RunArgs),
    /// Run a scenario inside the lab: real Linux KVM in an emulated machine.
    Lab(LabArgs),
    /// Two results side by side; refused where they are of different work.
    Compare {
        /// The Record (or list) that is compared with.
        a: PathBuf,
        /// The Record (or list) that is compared.
        b: PathBuf,
        /// Exit with 1 if a phase of B costs over so many percent more than in A.
        #[arg(long, value_name = "PCT", value_parser = parse_percent)]
        fail_over: Option<f64>,
    },
    /// Every run that a spec names, two boots at a time; a run that was interrupted goes on where it was.
    #[command(name = "lab matrix", hide = true)]
    LabMatrix {
        /// The spec (images/specs has examples).
        #[arg(long)]
        spec: PathBuf,
        /// How the boots share the machine.
        #[command(flatten)]
        boots: BootArgs,
        /// Write the list of Records to this file; finished runs are kept beside it until it is complete.
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// One scenario on several kernels, side by side in one table.
    #[command(name = "lab history", hide = true)]
    LabHistory {
        /// Kernels, separated by commas (default: the whole shelf).
        #[arg(long, value_delimiter = ',')]
        kernels: Vec<String>,
        /// How the boots share the machine.
        #[command(flatten)]
        boots: BootArgs,
        /// The machine and the scenario.
        #[command(flatten)]
        lab: LabArgs,
    },
    /// One scenario in images that are merely shifted: what a difference must exceed to be one.
    #[command(name = "lab noise", hide = true)]
    LabNoise {
        /// How many images.
        #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(2..=64))]
        images: u64,
        /// How the boots share the machine.
        #[command(flatten)]
        boots: BootArgs,
        /// The machine and the scenario.
        #[command(flatten)]
        lab: LabArgs,
    },
    /// One scenario on two kernels, or with two settings of one kernel's parameters, compared.
    #[command(name = "lab ab", hide = true)]
    LabAb {
        /// B's kernel (default: that of A, which --kernel names).
        #[arg(long, value_name = "KERNEL")]
        b_kernel: Option<String>,
        /// Where B's modules are, if it is a kernel of your own.
        #[arg(long, value_name = "DIR")]
        b_modules: Option<PathBuf>,
        /// A module parameter that B has beside A's; may be repeated.
        #[arg(long = "b-param", value_name = "PARAM")]
        b_params: Vec<String>,
        /// Exit with 1 if a phase of B costs over so many percent more than in A.
        #[arg(long, value_name = "PCT", value_parser = parse_percent)]
        fail_over: Option<f64>,
        /// How the boots share the machine.
        #[command(flatten)]
        boots: BootArgs,
        /// A's machine, and the scenario of both.
        #[command(flatten)]
        lab: LabArgs,
    },
    /// The shelf of kernels.
    Kernels {
        /// What to do with it.
        #[command(subcommand)]
        command: KernelsCommand,
    },
}

/// How several boots share the machine that they run on.
#[derive(Clone, Debug, Args)]
pub struct BootArgs {
    /// Lab machines that run at a time.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=64))]
    pub boots: u64,
}

/// What can be done with the shelf.
#[derive(Debug, Subcommand)]
pub enum KernelsCommand {
    /// The kernels, what each is good for, and whether it is in the cache.
    List,
    /// Download and unpack kernels into the cache.
    Fetch {
        /// Names of kernels, or all (default: the lab's default kernel).
        kernels: Vec<String>,
    },
}

/// A scenario and its options.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// The scenario (see `umbra list`).
    pub scenario: String,
    /// Tracked memory over all slots, as 64M or 1G.
    #[arg(long, default_value = "64M", value_parser = parse_bytes)]
    pub memory: u64,
    /// Memory slots that the tracked memory is cut into, with gaps between them.
    #[arg(long, default_value_t = 1)]
    pub slots: usize,
    /// vCPUs.
    #[arg(long, default_value_t = 1)]
    pub vcpus: usize,
    /// Rounds of dirty, get and clear.
    #[arg(long, default_value_t = 3)]
    pub rounds: u64,
    /// What backs the tracked memory: anonymous, thp, hugetlb, shmem (default: thp; in nested anonymous, where memfds have no huge pages).
    #[arg(long)]
    pub backing: Option<String>,
    /// The order in which pages are touched (see `umbra list`).
    #[arg(long, default_value = "sequential", value_parser = parse_kind)]
    pub pattern: pattern::Kind,
    /// Seed of everything random.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Percent of the accesses that write.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(0..=100))]
    pub write_percent: u64,
    /// Accesses in a round for each page.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub accesses_per_page: u64,
    /// Leaf size of the firmware's own page tables: 4k, 2m.
    #[arg(long, default_value = "4k")]
    pub guest_page: String,
    /// The paging mode in which the firmware touches its tracked memory: 64bit, pae, 32bit (64bit).
    #[arg(long)]
    pub guest_paging: Option<String>,
    /// Accesses per million TSC ticks, for dirty-rate (100).
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub rate: Option<u64>,
    /// Interrupt controllers: none, or kernel, which has KVM look after them at every exit as it does for most VMMs (none).
    #[arg(long)]
    pub irqchip: Option<String>,
    /// Trackers, separated by commas, or all (default: KVM's own; snapshot: all).
    #[arg(long, value_delimiter = ',')]
    pub tracker: Vec<String>,
    /// Pages that one CLEAR covers, a multiple of 64 (default: the whole slot).
    #[arg(long)]
    pub chunk: Option<u64>,
    /// What `roots` changes, there and back, separated by commas; with @all by every vCPU in turn, with @once by all of them at once (default: all that this
    /// host has).
    #[arg(long, value_delimiter = ',')]
    pub toggle: Vec<String>,
    /// The script of `roots`' row of that name: a file, or text:LINES (default: the changes of a Linux boot).
    #[arg(long, value_parser = read_script)]
    pub script: Option<ScriptText>,
    /// Whether the observed pass of `roots` logs which roots KVM makes and tears down: on, off (on).
    #[arg(long, value_enum)]
    pub role_log: Option<Switch>,
    /// SMIs of `roots`' row smm:storm.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub smis: u64,
    /// The shadow MMU, for `model`; what of it concerns L1's table also for `nested`.
    #[command(flatten)]
    pub shadow: ShadowArgs,
    /// Seconds that `soak` runs, shared out among the trackers; one that has checked little by then gets up to 10 more.
    #[arg(long, default_value_t = 5)]
    pub seconds: u64,
    /// L2, for `nested`.
    #[command(flatten)]
    pub nested: NestedArgs,
    /// Another firmware, an ELF file.
    #[arg(long)]
    pub firmware: Option<PathBuf>,
    /// A fault to inject, for tests of the checks: lose-page, extra-page; some scenarios have more.
    #[arg(long)]
    pub inject: Option<String>,
    /// Write the Record to this file.
    #[arg(long)]
    pub out: Option<PathBuf>,
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

/// How `nested` runs L2. What L2's memory is stands among the options of L1's table ([`ShadowArgs`]).
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub struct NestedArgs {
    /// Ways to run L2, separated by commas: plain (L1 itself), svm, vmx, umbra (default: all that this host has).
    #[arg(long, value_delimiter = ',')]
    pub nesting: Vec<String>,
    /// A and D in the entries that L1 makes: clear, preset, or unused, which ept alone can be (clear; with ept unused).
    #[arg(long)]
    pub accessed_dirty: Option<String>,
    /// L2 pages whose entries L1 makes at a violation; 0 for all before L2 starts (0).
    #[arg(long)]
    pub fill_batch: Option<u64>,
    /// Pairs of leaves that L1 exchanges in each round, between L2's writes and the harvest (0).
    #[arg(long)]
    pub remaps: Option<u64>,
    /// Random edits of L1's table that `edits` makes, in epochs of one to eight (500); cases of `hostile` (2000).
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    pub edits: Option<u64>,
    /// The edits of `edits` race L2s that run meanwhile: the first vCPU edits, the L2s of the others (--vcpus 2 or more) use the table.
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false)]
    pub race: bool,
    /// When L2 touches its pages for the first time: before (logging), or logged, in the first round (before).
    #[arg(long)]
    pub first_touch: Option<String>,
    /// Whether KVM's log of umbra's L2 tells a page that is first mapped by a read from a written one: exact, or counted, as KVM has it (exact).
    #[arg(long)]
    pub first_reads: Option<String>,
    /// What makes the strategies of umbra effective, separated by commas: mprotect, uffd-wp, kvm-bitmap, kvm-clear (default: all that this host has).
    #[arg(long, value_delimiter = ',')]
    pub mechanism: Vec<String>,
    /// How umbra learns where L2 faulted: tracepoint, poison, userfaultfd, auto (auto).
    #[arg(long)]
    pub fault_source: Option<String>,
}

impl NestedArgs {
    /// What was given, by option name.
    fn given(&self) -> Vec<(String, Value)> {
        let nesting = (!self.nesting.is_empty()).then(|| ("nesting", self.nesting.join(",").into()));
        let accessed_dirty = self.accessed_dirty.clone().map(|text| ("accessed-dirty", text.into()));
        let fill_batch = self.fill_batch.map(|number| ("fill-batch", number.into()));
        let mechanism = (!self.mechanism.is_empty()).then(|| ("mechanism", self.mechanism.join(",").into()));
        let fault_source = self.fault_source.clone().map(|text| ("fault-source", text.into()));
        let remaps = self.remaps.map(|number| ("remaps", number.into()));
        let edits = self.edits.map(|number| ("edits", number.into()));
        let race = self.race.then(|| ("race", true.into()));
        let first_touch = self.first_touch.clone().map(|text| ("first-touch", text.into()));
        let first_reads = self.first_reads.clone().map(|text| ("first-reads", text.into()));
        [nesting, accessed_dirty, fill_batch, remaps, edits, race, first_touch, first_reads, mechanism, fault_source]
            .into_iter()
            .flatten()
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    }
}

/// Options of Umbra's own shadow MMU (umbra-mmu). An option that is not given has the default that its help names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub struct ShadowArgs {
    /// Strategies, separated by commas (default: all; in nested all that can be made effective): write-protect, lazy-huge, dirty-bit, log, combined, twin.
    #[arg(long, value_delimiter = ',')]
    pub strategy: Vec<String>,
    /// How a huge entry becomes small ones: lazy, shatter, eager, eager-clear (lazy).
    #[arg(long)]
    pub split: Option<String>,
    /// How they become huge again: none, lazy, in-place (none).
    #[arg(long)]
    pub collapse: Option<String>,
    /// What becomes of roots: drop, address-space, keep, quota=N (keep).
    #[arg(long)]
    pub roots: Option<String>,
    /// The format of EPT12: ept, npt, pae, 32bit (ept; in nested under svm npt).
    #[arg(long)]
    pub format: Option<String>,
    /// The leaves of EPT12: 4k, 2m, 1g (4k).
    #[arg(long)]
    pub leaf: Option<String>,
    /// L2 GPAs for each L1 page (1).
    #[arg(long)]
    pub alias: Option<u64>,
    /// How the aliases lie: contiguous, scattered, shared-tables (contiguous).
    #[arg(long)]
    pub alias_kind: Option<String>,
    /// Pages that one fault may map, a power of two up to 512 (1; in nested up to 4096: 64, and 4096 on huge pages).
    #[arg(long)]
    pub extent: Option<u32>,
    /// Copies of huge leaves, 2 MiB each, that the strategy twin may hold at once; further leaves are split (64).
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub twins: Option<u32>,
    /// Split-cache sizes in objects, MINIMUM/CAPACITY (1/40 tables, 64/104 descriptors; given, both are that).
    #[arg(long)]
    pub cache: Option<String>,
}

impl ShadowArgs {
    /// What was given, by option name.
    fn given(&self) -> Vec<(String, Value)> {
        let texts = [
            ("split", &self.split),
            ("collapse", &self.collapse),
            ("roots", &self.roots),
            ("format", &self.format),
            ("leaf", &self.leaf),
            ("alias-kind", &self.alias_kind),
            ("cache", &self.cache),
        ];
        let texts = texts.into_iter().filter_map(|(name, text)| Some((name, text.clone()?.into())));
        let numbers =
            [("alias", self.alias), ("extent", self.extent.map(u64::from)), ("twins", self.twins.map(u64::from))];
        let numbers = numbers.into_iter().filter_map(|(name, number)| Some((name, number?.into())));
        let strategy = (!self.strategy.is_empty()).then(|| ("strategy", self.strategy.join(",").into()));
        texts.chain(numbers).chain(strategy).map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// The lab and what runs in it.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "`umbra lab history SCENARIO` runs it on every kernel of the shelf, `umbra lab matrix --spec FILE` what a file names, \
`umbra lab noise SCENARIO` in shifted images, `umbra lab ab --kernel A --b-kernel B SCENARIO` on two kernels that are then compared; each has a \
--help of its own."
)]
pub struct LabArgs {
    /// The emulated machine: svm (AMD, in QEMU) or vmx (Intel with EPT and PML, in Bochs).
    #[arg(long, default_value = "svm")]
    pub machine: String,
    /// A kernel of the shelf (default: the shelf's default), or a bzImage of your own.
    #[arg(long)]
    pub kernel: Option<String>,
    /// Where the modules of a kernel of your own are (`make modules_install INSTALL_MOD_PATH=DIR`).
    #[arg(long, value_name = "DIR")]
    pub modules: Option<PathBuf>,
    /// `instructions` (exact) or `wall` (faster, not deterministic).
    #[arg(long, default_value = "instructions")]
    pub clock: String,
    /// The machine's CPUs, 1 to 8 (default: 1, with the clock wall 2).
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub cpus: Option<u32>,
    /// A module parameter, as `kvm.tdp_mmu=0`; may be repeated.
    #[arg(long = "param")]
    pub params: Vec<String>,
    /// Words for the lab kernel's command line, as no5lvl.
    #[arg(long)]
    pub append: Option<String>,
    /// KiB that pad the lab's image: the same work, shifted, to see the noise.
    #[arg(long, default_value_t = 0, hide = true, value_parser = clap::value_parser!(u64).range(0..=65536))]
    pub pad: u64,
    /// The scenario and its options.
    #[command(flatten)]
    pub run: RunArgs,
}

impl RunArgs {
    /// The options as words, in the order and spelling that [`Cli`] parses, without `--out` and `--firmware`, which concern files of
    /// the machine outside.
    #[must_use]
    pub fn to_words(&self) -> Vec<String> {
        let mut words = vec![self.scenario.clone()];
        for (name, value) in self.config() {
            let value = match value {
                Value::String(text) => text,
                other => other.to_string(),
            };
            words.push(format!("--{name}={value}"));
        }
        if let Some(script) = &self.script {
            words.push(format!("--script={INLINE}{}", script.text));
        }
        words
    }

    /// Every option that was given or has a default here, by its name on the command line. Files are not part of it: the caller adds them by
    /// hash; and it adds the defaults that depend on scenario and host.
    #[must_use]
    pub fn config(&self) -> BTreeMap<String, Value> {
        let mut config: BTreeMap<String, Value> = BTreeMap::from([
            ("memory".into(), self.memory.into()),
            ("slots".into(), self.slots.into()),
            ("vcpus".into(), self.vcpus.into()),
            ("rounds".into(), self.rounds.into()),
            ("pattern".into(), self.pattern.to_string().into()),
            ("seed".into(), self.seed.into()),
            ("write-percent".into(), self.write_percent.into()),
            ("accesses-per-page".into(), self.accesses_per_page.into()),
            ("guest-page".into(), self.guest_page.clone().into()),
        ]);
        config.extend(self.nested.given());
        for (name, value) in [("irqchip", &self.irqchip), ("guest-paging", &self.guest_paging)] {
            config.extend(value.as_ref().map(|value| (name.to_owned(), value.clone().into())));
        }
        config.extend(self.rate.map(|rate| ("rate".to_owned(), rate.into())));
        if let Some(backing) = &self.backing {
            config.insert("backing".into(), backing.clone().into());
        }
        if !self.tracker.is_empty() {
            config.insert("tracker".into(), self.tracker.join(",").into());
        }
        if !self.toggle.is_empty() {
            config.insert("toggle".into(), self.toggle.join(",").into());
        }
        if self.role_log == Some(Switch::Off) {
            config.insert("role-log".into(), "off".into());
        }
        if let Some(chunk) = self.chunk {
            config.insert("chunk".into(), chunk.into());
        }
        config.extend(self.shadow.given());
        if self.scenario == "roots" {
            config.insert("smis".into(), self.smis.into());
        }
        if self.scenario == "soak" {
            config.insert("seconds".into(), self.seconds.into());
        }
        if let Some(inject) = &self.inject {
            config.insert("inject".into(), inject.clone().into());
        }
        config
    }
}

/// Parses the command line of this process. Help and version are printed by the parser itself.
///
/// # Errors
/// [`Failure::Input`] with the parser's complaint in one line.
pub fn parse<I: IntoIterator<Item = String>>(words: I) -> Result<Cli, Failure> {
    use clap::error::ErrorKind;
    let mut words: Vec<String> = words.into_iter().collect();
    // `lab` takes a scenario, and these are none: they are commands of their own under names that the parser can tell apart.
    if let [_, lab, name, ..] = &words[..]
        && lab == "lab"
        && matches!(name.as_str(), "matrix" | "history" | "noise" | "ab")
    {
        words[1] = format!("lab {}", words.remove(2));
    }
    Cli::try_parse_from(words).map_err(|error| {
        if matches!(
            error.kind(),
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
        ) {
            error.exit()
        }
        let text = error.render().to_string();
        // The complaint ends at the first empty line; usage and hints follow it.
        let complaint: Vec<&str> = text.lines().take_while(|line| !line.trim().is_empty()).map(str::trim).collect();
        Failure::Input(format!(
            "{} (umbra --help shows all options)",
            complaint.join(" ").trim_start_matches("error: ")
        ))
    })
}

/// What a word for `--script` begins with that is the script itself.
const INLINE: &str = "text:";
/// More than any script has.
const LONGEST_SCRIPT: u64 = 4 << 20;

/// A script, read where the words are parsed: inside the lab the file is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScriptText {
    /// Its file, as messages name it.
    pub name: String,
    /// What it says.
    pub text: String,
}

impl ScriptText {
    /// What a Record says about it.
    #[must_use]
    pub fn digest(&self) -> String {
        format!("sha256:{}", sha256(self.text.as_bytes()))
    }
}

fn read_script(word: &str) -> Result<ScriptText, String> {
    if let Some(text) = word.strip_prefix(INLINE) {
        return Ok(ScriptText { name: "text".to_owned(), text: text.to_owned() });
    }
    let mut text = String::new();
    std::fs::File::open(word)
        .and_then(|file| std::io::Read::read_to_string(&mut std::io::Read::take(file, LONGEST_SCRIPT), &mut text))
        .map_err(|error| error.to_string())?;
    Ok(ScriptText { name: word.to_owned(), text })
}

/// Bytes, with an optional K, M, G or T (powers of 1024).
fn parse_bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        Some((at, 'T' | 't')) => (&text[..at], 40),
        _ => (text, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| "not a size; write bytes, or a number with K, M, G or T".to_owned())
}

fn parse_percent(text: &str) -> Result<f64, String> {
    let percent =
        text.trim_end_matches('%').parse::<f64>().ok().filter(|percent| percent.is_finite() && *percent >= 0.0);
    percent.ok_or_else(|| "not a percentage; write 0.5 for half a percent".to_owned())
}

fn parse_kind(text: &str) -> Result<pattern::Kind, String> {
    text.parse().map_err(|_| format!("not a pattern; there are {}", pattern::NAMES.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_args(words: &[&str]) -> RunArgs {
        let words = ["umbra", "run"].iter().chain(words).map(ToString::to_string);
        match parse(words).unwrap().command {
            Command::Run(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn words_parse_to_what_they_came_from() {
        let args = run_args(&[
            "dirty-log",
            "--memory",
            "16M",
            "--pattern",
            "hotspot:10/90",
            "--tracker",
            "ring,clear",
            "--chunk",
            "64",
            "--backing",
            "shmem",
            "--nesting",
            "svm,plain",
            "--alias",
            "3",
            "--accessed-dirty",
            "preset",
        ]);
        let words = args.to_words();
        let again = run_args(&words.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(again.config(), args.config());
        assert_eq!(again.memory, 16 << 20);
        assert_eq!(again.tracker, ["ring", "clear"]);
        assert_eq!((&again.nested, again.shadow.alias), (&args.nested, Some(3)));
        assert_eq!(again.nested.nesting, ["svm", "plain"]);
        assert_eq!(run_args(&["dirty-log"]).nested, NestedArgs::default());
    }

    #[test]
    fn complaints_are_one_line() {
        for words in
            [["run", "x", "--pattern", "zigzag"], ["run", "x", "--memory", "many"], ["run", "x", "--vcpus", "-1"]]
        {
            let words = std::iter::once("umbra").chain(words).map(str::to_owned);
            let failure = parse(words).unwrap_err();
            assert!(matches!(failure, Failure::Input(_)));
            assert!(!failure.to_string().contains('\n'), "{failure}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_bytes("64M"), Ok(64 << 20));
        assert_eq!(parse_bytes("4096"), Ok(4096));
        for bad in ["", "M", "1.5G", "99999999999T", "-1"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }
}
