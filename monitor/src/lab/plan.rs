//! What the lab's PID 1 is to do: one file in the image, written outside and read inside.

use super::module::Param;
use crate::cli::{self, Command, RunArgs};
use crate::failure::Failure;
use crate::ground::Clock;
use crate::kvm::clock::settle;
use crate::report::snapshot::PERCENTS;
use crate::scenario;
use crate::track::{self, OF_KVM};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// The plan's place in the image.
pub const FILE: &str = "umbra/plan.json";

/// Pages of hugetlb, in bytes.
pub const HUGE: u64 = 2 << 20;

/// One boot.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The clock that phases are measured by.
    pub clock: Clock,
    /// How many of the machine's nanoseconds an instruction takes.
    pub nanoseconds_per_instruction: u32,
    /// The modules, in the order in which they are loaded.
    pub modules: Vec<String>,
    /// Their parameters.
    pub params: Vec<Param>,
    /// What runs, one after the other.
    pub jobs: Vec<Job>,
}

/// One run of a scenario.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    words: Vec<String>,
    /// A firmware of the user's, by its path inside.
    firmware: Option<PathBuf>,
    /// Huge pages to reserve before the job.
    pub huge_pages: u64,
    /// Virtual time that the job may take.
    pub limit: Duration,
}

impl Job {
    /// The job that runs `args`, in a machine whose instructions take so many nanoseconds. A firmware of the user's travels as a file.
    #[must_use]
    pub fn new(args: &RunArgs, firmware: Option<PathBuf>, nanoseconds: u32) -> Self {
        let slots = u64::try_from(args.slots).unwrap_or(u64::MAX);
        let huge_pages =
            // Each slot may end inside a huge page.
            if args.backing.as_deref() == Some("hugetlb") { args.memory.div_ceil(HUGE).saturating_add(slots) } else { 0 };
        // Of the effort only the firmware's own seconds are the machine's already, and these may be counted twice.
        let limit = nanoseconds * (Duration::from_secs(60) + effort(args));
        Self { words: args.to_words(), firmware, huge_pages, limit }
    }

    /// The options that PID 1's child runs.
    ///
    /// # Errors
    /// [`Failure::Input`] as the command line would give it outside.
    pub fn args(&self) -> Result<RunArgs, Failure> {
        let words = ["umbra", "run"].into_iter().map(str::to_owned).chain(self.words.iter().cloned());
        match cli::parse(words)?.command {
            Command::Run(mut args) => {
                args.firmware.clone_from(&self.firmware);
                Ok(args)
            }
            _ => Err(Failure::Input("the lab's job is not a run".to_owned())),
        }
    }
}

/// Generously, the virtual time that a run needs: a second for four MiB and round of four rows (measured: less than 0.2), the waits before each
/// window, and what `soak` was given.
#[must_use]
pub fn effort(args: &RunArgs) -> Duration {
    let mib = (args.memory >> 20).saturating_mul(args.shadow.alias.unwrap_or(1));
    let (rows, rounds) = (rows(args), args.rounds.max(1));
    let touches = mib
        .saturating_mul(rounds)
        .saturating_mul(1 + args.accesses_per_page / 16)
        .saturating_mul(rows.div_ceil(OF_KVM.len() as u64));
    // Before each window the machine comes to rest. A row whose windows are not clean is tried again, and then it is observed.
    let windows = rounds.saturating_mul(3).saturating_add(6);
    let passes = rows.saturating_mul(u64::from(scenario::tries(Clock::Instructions)) + 1);
    let rest = u64::try_from(settle(Clock::Instructions).as_millis()).unwrap_or(u64::MAX);
    let waits = windows.saturating_mul(passes).saturating_mul(rest).div_ceil(1000);
    // A row for each toggle, and several with several vCPUs, of four machines at most that come to rest in between; a script of a hundred and more, twice;
    // a thousandth of a second for an SMI.
    let toggles = 200_u64.saturating_mul(rounds.saturating_add(args.vcpus as u64)).saturating_add(args.smis / 1000);
    let toggles = if args.scenario == "roots" { toggles } else { 0 };
    // Rows of up to sixteen ways to run an L2, each with machines that come to rest; an edit or a hostile case takes less than a twentieth of a second.
    let edits = if scenario::has_edits(&args.scenario) { args.nested.edits.unwrap_or(2000) } else { 0 };
    let ways = if scenario::has_l2(&args.scenario) { edits.saturating_add(100).saturating_mul(16) / 20 } else { 0 };
    // An absurd size is refused inside; it must not overflow here.
    let seconds = (touches / 4).saturating_add(waits).saturating_add(args.seconds + toggles).saturating_add(ways);
    Duration::from_secs(seconds.min(1 << 20))
}

/// Rows of a run with trackers: one for each of them and for each share of writes, or way to stop.
fn rows(args: &RunArgs) -> u64 {
    let trackers = if args.tracker.is_empty() {
        scenario::ALL
            .iter()
            .find(|scenario| scenario.name == args.scenario)
            .map_or(0, |scenario| scenario.trackers.len())
    } else {
        args.tracker.iter().map(|word| if word == "all" { track::ALL.len() } else { 1 }).sum()
    };
    let each = match args.scenario.as_str() {
        "snapshot" => PERCENTS.len(),
        "collapse" => 2,
        _ => 1,
    };
    trackers.saturating_mul(each).max(1) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_runs_the_options_it_was_made_of() {
        let words = ["umbra", "run", "dirty-log", "--memory=6M", "--slots=2", "--backing=hugetlb", "--tracker=clear"];
        let Command::Run(args) = cli::parse(words.map(str::to_owned)).unwrap().command else { panic!() };
        let job = Job::new(&args, Some("/umbra/firmware/0/fw.elf".into()), 1);
        assert_eq!(job.huge_pages, 5);
        let text = serde_json::to_vec(&job).unwrap();
        assert_eq!(Job::new(&args, None, 20).limit, 20 * job.limit);
        let inside = serde_json::from_slice::<Job>(&text).unwrap().args().unwrap();
        assert_eq!(inside.config(), args.config());
        assert_eq!(inside.firmware, Some("/umbra/firmware/0/fw.elf".into()));
    }

    /// 173 s were too few for 36 rows, half of which were tried again: 34 were done. With every row tried three times they wait for 108 s alone.
    #[test]
    fn a_row_has_time_for_its_waits() {
        let limit = |words: &[&str]| {
            let words = ["umbra", "run"].iter().chain(words).map(|&word| word.to_owned());
            let Command::Run(args) = cli::parse(words).unwrap().command else { panic!() };
            Job::new(&args, None, 1).limit.as_secs()
        };
        assert!(limit(&["snapshot", "--memory=16M"]) >= 60 + 108 + 108);
        assert!(limit(&["dirty-log", "--memory=1M", "--rounds=100"]) >= 4 * 4 * 306 / 20);
        let tracked = |tracker| limit(&["dirty-log", "--memory=16M", tracker]);
        assert!(tracked("--tracker=all") > tracked("--tracker=bitmap,clear"));
        assert!(
            limit(&["dirty-log", "--rounds=18446744073709551615"]) <= 60 + (1 << 20),
            "an absurd number is no overflow"
        );
    }
}
