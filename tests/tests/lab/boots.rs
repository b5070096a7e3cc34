//! The five boots that all lab runs of the tests share, two at a time. Each is begun when a test first asks for one of its Records, or, where all tests
//! run, as soon as any does.
//!
//! | boot | machine | what is had from it |
//! | --- | --- | --- |
//! | first, second | svm, 6.12 from the shelf, then the same kernel as if it were the user's own; one matrix, killed between them | every figure on AMD; up to [`SHIFT`] both are equal to the instruction, behind it the same work is shifted |
//! | dropping | svm, 5.10, whose TDP MMU drops roots | what a lost root costs |
//! | intel | vmx, 6.12 | EPT, its log, nested VMX |
//! | wall | svm, 6.12 without the instruction clock, KVM's older MMU, no eager splitting | what is true at any speed: concurrent harvests, edits, a malicious L1; and runs that fail |

use crate::{figures, matrix, nested, roots, vmx};
use std::panic::catch_unwind;
use std::path::PathBuf;
use std::sync::{Once, OnceLock};
use std::thread;
use umbra::Failure;
use umbra::cli::{self, Command, RunArgs};
use umbra::ground::Clock;
use umbra::lab::emulator::Emulator;
use umbra::lab::{self, Machine, shelf};
use umbra::progress::Progress;
use umbra::report::record::{Record, Row};

/// The kernel package that the figures were measured on.
pub const PINNED: &str = "6.12.111-1~deb12u1";

/// The runs between which the first two boots differ: in one digit of the image, and from there on in time and in what memory was used.
pub const SHIFT: [&str; 2] = ["model --memory 2M --strategy log", "model --memory 4M --strategy log"];

/// Which boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boot {
    First,
    Second,
    Dropping,
    Intel,
    Wall,
}

/// What a boot gave, a result for each of its jobs; nothing if it failed, which is told on standard error when it does.
type Results = Option<Vec<Result<Record, Failure>>>;

impl Boot {
    /// Its runs, as `umbra run` takes them.
    pub fn jobs(self) -> Vec<&'static str> {
        match self {
            Self::First | Self::Second => {
                // The plan with all runs is a part of the image, so the two differ in nothing else.
                let shift = SHIFT[usize::from(self == Self::Second)];
                let before = [figures::JOBS, nested::JOBS, roots::JOBS].concat();
                [&before[..], &[shift], matrix::JOBS].concat()
            }
            Self::Dropping => roots::JOBS[..roots::COMMON].to_vec(),
            Self::Intel => vmx::JOBS.to_vec(),
            Self::Wall => [figures::FAST, nested::FAST, roots::BROKEN].concat(),
        }
    }

    fn results(self) -> &'static [Result<Record, Failure>] {
        static LANES: Once = Once::new();
        static MATRIX: OnceLock<Results> = OnceLock::new();
        static OTHERS: [OnceLock<Results>; 3] = [const { OnceLock::new() }; 3];
        // Whoever runs one test by name waits for its boot alone.
        if std::env::args().skip(1).all(|word| word.starts_with('-')) {
            LANES.call_once(|| {
                for lane in [&[Self::First][..], &[Self::Intel, Self::Dropping, Self::Wall]] {
                    thread::spawn(move || lane.iter().for_each(|boot| drop(catch_unwind(|| boot.results()))));
                }
            });
        }
        let caught =
            |run: &dyn Fn() -> Vec<Result<Record, Failure>>| catch_unwind(std::panic::AssertUnwindSafe(run)).ok();
        let results = match self {
            Self::First | Self::Second => {
                let both = MATRIX.get_or_init(|| caught(&|| matrix::both().records.iter().cloned().map(Ok).collect()));
                let jobs = self.jobs().len();
                both.as_ref().map(|both| if self == Self::First { &both[..jobs] } else { &both[jobs..2 * jobs] })
            }
            Self::Intel => OTHERS[0].get_or_init(|| caught(&|| self.boot("6.12", Emulator::Bochs, &[]))).as_deref(),
            // Its default is still the older MMU.
            Self::Dropping => {
                OTHERS[1].get_or_init(|| caught(&|| self.boot("5.10", Emulator::Qemu, &["kvm.tdp_mmu=1"]))).as_deref()
            }
            Self::Wall => {
                let params = ["kvm.eager_page_split=0", "kvm.tdp_mmu=0"];
                OTHERS[2].get_or_init(|| caught(&|| self.boot("6.12", Emulator::Qemu, &params))).as_deref()
            }
        };
        results.unwrap_or_else(|| panic!("the boot {self:?} failed"))
    }

    /// Boots it by the library.
    fn boot(self, kernel: &str, emulator: Emulator, params: &[&str]) -> Vec<Result<Record, Failure>> {
        let progress = Progress::stderr();
        let kernel = shelf::shelf().kernel(Some(kernel)).expect("a kernel").ensure(&progress).expect("the kernel");
        let clock = if self == Self::Wall { Clock::Nanoseconds } else { Clock::Instructions };
        let params = params.iter().map(|param| param.parse().expect("a parameter")).collect();
        let (init, append) = (umbra_tests::binary(), String::new());
        // With two at the wall clock's pace, on a busy host, one boot in a dozen had a guest or a kernel that broke (docs/findings.md).
        let cpus = (self == Self::Wall).then_some(1);
        let machine = Machine { emulator, kernel, clock, cpus, params, init, append };
        let jobs: Vec<_> = self.jobs().into_iter().map(args).collect();
        lab::boot(&machine, &jobs, &progress).expect("the lab boots")
    }

    /// What came of a run, whatever it is.
    pub fn result(self, job: &str) -> &'static Result<Record, Failure> {
        let at = self.jobs().iter().position(|words| *words == job);
        &self.results()[at.unwrap_or_else(|| panic!("{self:?} has no run {job}"))]
    }

    /// The Record of a run.
    pub fn record(self, job: &str) -> &'static Record {
        self.result(job).as_ref().unwrap_or_else(|failure| panic!("{job}: {failure}"))
    }

    /// The Record of a run whose truth holds.
    pub fn good(self, job: &str) -> &'static Record {
        let record = self.record(job);
        assert_eq!(record.faults(), [""; 0], "{job}");
        record
    }
}

/// The options of a run. A firmware is named by its file's name.
pub fn args(job: &str) -> RunArgs {
    let words = ["umbra", "run"].into_iter().chain(job.split_whitespace()).map(str::to_owned);
    let Command::Run(mut args) = cli::parse(words).expect("good words").command else { panic!("{job} is no run") };
    args.firmware = args.firmware.map(|name| PathBuf::from(env!("UMBRA_FIRMWARE_DIR")).join(name));
    args
}

/// Whether figures can be held against those of the kernel that they were measured on; a line says it if not.
pub fn is_pinned(record: &Record) -> bool {
    let package = record.host.kernel_package.as_deref().unwrap_or_default();
    let pinned = package.contains(PINNED);
    if !pinned {
        eprintln!("the pinned kernel {PINNED} is gone, this is {package}: figures are not compared");
    }
    pinned
}

/// A phase of the timed pass; the cheapest of the rounds from `from` on.
pub fn timed(row: &Row, phase: &str, from: u64) -> u64 {
    let rounds = row.phases.iter().filter(|p| p.pass == "timed" && p.phase == phase && p.round >= from);
    rounds.map(|p| p.value).min().unwrap_or_else(|| panic!("{} has no {phase}", row.name))
}
