//! The lab: an emulated machine, AMD's or Intel's, that runs a real Linux kernel with the real KVM, and Umbra as its PID 1.
//!
//! ```text
//!  shelf (apt, entry) --> kernel, modules --+
//!  this binary, plan -----------------------+--> initramfs --> emulator --> watch: COM1 console, COM2 wire --> Records
//!                                                                 |
//!                                                     init: modules, idle, jobs
//! ```
//!
//! The lab knows scenarios only by the command line and the [`Record`].

mod apt;
mod bochs;
pub mod child;
mod console;
mod digest;
pub mod emulator;
pub mod entry;
mod idle;
pub mod init;
pub mod initramfs;
pub mod interrupt;
pub mod matrix;
pub mod module;
pub mod own;
pub mod plan;
mod qemu;
mod quiet;
pub mod shelf;
pub mod watch;
pub mod wire;

use crate::cli::{LabArgs, RunArgs};
use crate::failure::Failure;
use crate::ground::Clock;
use crate::progress::Progress;
use crate::report::Record;
use emulator::Emulator;
use entry::Entry;
use module::{Module, Param};
use plan::{Job, Plan};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use watch::{Limits, Outcome};

/// What boots.
pub struct Machine {
    /// What it runs on.
    pub emulator: Emulator,
    /// The kernel.
    pub kernel: Entry,
    /// The clock.
    pub clock: Clock,
    /// CPUs, if not as many as the clock has by default.
    pub cpus: Option<u32>,
    /// Module parameters.
    pub params: Vec<Param>,
    /// The program that is PID 1: Umbra itself, wherever it is.
    pub init: PathBuf,
    /// Words for the kernel's command line.
    pub append: String,
}

/// What is wrong with what was asked for.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("--machine {0}: there are svm and vmx")]
    Machine(String),
    #[error("--clock {clock}: the machine {machine} has the clock instructions only")]
    ClockOfMachine { machine: &'static str, clock: String },
    #[error("--clock {0}: there are instructions and wall")]
    Clock(String),
    #[error("--firmware {}: {why}", path.display())]
    Firmware { path: PathBuf, why: std::io::Error },
    #[error("{} is not linked statically, so it cannot be the lab's PID 1; `make build` makes it so", _0.display())]
    NotStatic(PathBuf),
    #[error("--modules {}: it goes with a --kernel of your own, a file; the shelf's kernels have theirs", _0.display())]
    NeedlessModules(PathBuf),
    #[error(
        "Linux {0} said nothing on its serial port: it needs CONFIG_SERIAL_8250_CONSOLE, and what else it lacks it cannot say"
    )]
    Mute(String),
    #[error("the lab's files cannot be written: {0}; TMPDIR names another directory")]
    Scratch(std::io::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::NotStatic(_) | Error::Scratch(_) => Self::NotHere(error.to_string()),
            _ => Self::Input(error.to_string()),
        }
    }
}

impl Machine {
    /// The machine that the command line asks for; its kernel is fetched when it is not in the cache.
    ///
    /// # Errors
    /// An unknown machine, clock, kernel or parameter, or the kernel cannot be had.
    pub fn new(args: &LabArgs, progress: &Progress) -> Result<Self, Failure> {
        let emulator = Emulator::of_machine(&args.machine).ok_or_else(|| Error::Machine(args.machine.clone()))?;
        let clock = match args.clock.as_str() {
            "instructions" => Clock::Instructions,
            "wall" => Clock::Nanoseconds,
            other => return Err(Error::Clock(other.to_owned()).into()),
        };
        if !emulator.has(clock) {
            return Err(Error::ClockOfMachine { machine: emulator.machine(), clock: args.clock.clone() }.into());
        }
        let params = args.params.iter().map(|text| text.parse()).collect::<Result<Vec<Param>, _>>()?;
        // The emulator is looked for before anything is downloaded.
        emulator.version()?;
        let kernel = Self::kernel(args, progress)?;
        let append = args.append.clone().unwrap_or_default();
        let mut machine =
            Self { emulator, kernel, clock, cpus: args.cpus, params, init: "/proc/self/exe".into(), append };
        let modules = machine.modules();
        for param in &machine.params {
            if machine.kernel.is_own() && modules.iter().all(|module| module.name != param.module) {
                // Built in: the kernel's own command line has it.
                machine.append = format!("{} {param}", machine.append);
            } else {
                param.check(args.kernel.as_deref().unwrap_or(&shelf::shelf().default), &modules)?;
            }
        }
        machine.append.truncate(machine.append.trim_end().len());
        Ok(machine)
    }

    /// How many CPUs it has. Under the instruction clock several are as exact as one, but nothing gets faster: they take turns.
    fn cpus(&self) -> u32 {
        self.cpus.unwrap_or(match self.clock {
            Clock::Instructions => 1,
            Clock::Nanoseconds => 2,
        })
    }

    /// The modules that are loaded: the kernel's, without those for other machines' processors.
    fn modules(&self) -> Vec<Module> {
        let foreign = |name: &str| Emulator::ALL.iter().any(|other| *other != self.emulator && other.module() == name);
        self.kernel.modules().iter().filter(|module| !foreign(&module.name)).cloned().collect()
    }

    fn mute(&self) -> Error {
        let package = self.kernel.package();
        Error::Mute(package.split(' ').nth(1).unwrap_or_default().to_owned())
    }

    /// The kernel that the command line asks for: the shelf's, or a file.
    fn kernel(args: &LabArgs, progress: &Progress) -> Result<Entry, Failure> {
        let shelf = shelf::shelf();
        let kernel = match (shelf.kernel(args.kernel.as_deref()), &args.kernel) {
            (Err(_), Some(file)) if file.contains('/') || Path::new(file).is_file() => {
                let own = own::Own::read(Path::new(file), args.modules.as_deref(), &shelf::MODULES)?;
                return Ok(Entry::own(&own).map_err(Error::Scratch)?);
            }
            (kernel, _) => kernel?,
        };
        match &args.modules {
            Some(directory) => Err(Error::NeedlessModules(directory.clone()).into()),
            None => kernel.ensure(progress),
        }
    }
}

/// `umbra lab SCENARIO`: one boot, one job.
///
/// # Errors
/// As [`Machine::new`] and [`boot`], and what the scenario itself fails with.
pub fn run(args: &LabArgs, progress: &Progress) -> Result<Record, Failure> {
    let machine = Machine::new(args, progress)?;
    let jobs = std::slice::from_ref(&args.run);
    let mut results = boot_image(&machine, jobs, &image(&machine, jobs, args.pad)?, limits(&machine, jobs), progress)?;
    results.pop().unwrap_or_else(|| Err(watch::Error::Missing(0).into()))
}

/// Boots the machine once and runs the jobs in it, one after the other. Gives a result for each.
///
/// # Errors
/// The machine failed before the first result, or something it needs is missing.
pub fn boot(machine: &Machine, jobs: &[RunArgs], progress: &Progress) -> Result<Vec<Result<Record, Failure>>, Failure> {
    boot_within(machine, jobs, limits(machine, jobs), progress)
}

/// The limits for a boot with these jobs.
fn limits(machine: &Machine, jobs: &[RunArgs]) -> Limits {
    let slowness = machine.emulator.slowness();
    Limits {
        silent: slowness * (Duration::from_secs(60) + 2 * jobs.iter().map(plan::effort).max().unwrap_or_default()),
        wall: slowness * (Duration::from_secs(300) + 8 * jobs.iter().map(plan::effort).sum::<Duration>()),
    }
}

/// [`boot`] within limits.
///
/// # Errors
/// As [`boot`].
pub fn boot_within(
    machine: &Machine,
    jobs: &[RunArgs],
    limits: Limits,
    progress: &Progress,
) -> Result<Vec<Result<Record, Failure>>, Failure> {
    boot_image(machine, jobs, &image(machine, jobs, 0)?, limits, progress)
}

/// Boots an image that was built before.
fn boot_image(
    machine: &Machine,
    jobs: &[RunArgs],
    image: &initramfs::Image,
    limits: Limits,
    progress: &Progress,
) -> Result<Vec<Result<Record, Failure>>, Failure> {
    interrupt::watch()?;
    let emulator = machine.emulator.version()?;
    let scratch = tempfile::Builder::new().prefix("umbra-lab-").tempdir().map_err(Error::Scratch)?;
    let mut command = machine.emulator.prepare(machine, &image.bytes, scratch.path())?;
    let outcome = watch::run(machine.emulator, &mut command, scratch.path(), jobs.len(), limits, progress)?;
    let Outcome { params, results, broke, error, tail } = outcome;
    let mute = machine.kernel.is_own() && tail.is_empty() && matches!(error, Some(watch::Error::Silent { .. }));
    let why = if mute { Some(machine.mute().into()) } else { error.map(Failure::from) };
    // Bad input says all there is to say.
    if !tail.is_empty() && (broke || matches!(why, Some(Failure::Check(_)))) {
        eprintln!("umbra: the lab's console ended with");
        for line in tail {
            eprintln!("  {line}");
        }
    }
    let why = match why {
        Some(failure) if results.iter().all(Option::is_none) => return Err(failure),
        other => other.map_or_else(String::new, |failure| failure.to_string()),
    };
    let complete = |mut record: Record| {
        let host = &mut record.host;
        host.kernel_package = Some(machine.kernel.package());
        host.emulator = Some(emulator.clone());
        host.image_sha256 = Some(image.sha256.clone());
        host.params.extend(params.clone());
        host.params.extend(machine.cpus.map(|cpus| ("cpus".to_owned(), cpus.to_string())));
        if !machine.append.is_empty() {
            host.params.insert("append".to_owned(), machine.append.clone());
        }
        record
    };
    Ok(results
        .into_iter()
        .map(|result| match result {
            Some(result) => result.map(complete).map_err(Failure::from),
            None => Err(Failure::Check(why.clone())),
        })
        .collect())
}

/// The machine's image: PID 1, modules, the plan and the users' firmware files; and `pad` KiB that nobody reads.
fn image(machine: &Machine, jobs: &[RunArgs], pad: u64) -> Result<initramfs::Image, Failure> {
    let read = |path: &Path| std::fs::read(path).map_err(Error::Scratch);
    let init = read(&machine.init)?;
    if !is_static(&init) {
        let path = std::fs::read_link(&machine.init).unwrap_or_else(|_| machine.init.clone());
        return Err(Error::NotStatic(path).into());
    }
    let nanoseconds_per_instruction = machine.emulator.nanoseconds_per_instruction();
    let mut files = BTreeMap::new();
    let mut planned = Vec::new();
    for (number, args) in jobs.iter().enumerate() {
        let firmware = match &args.firmware {
            Some(path) => {
                let bytes = std::fs::read(path).map_err(|why| Error::Firmware { path: path.clone(), why })?;
                // The name stays, since the Record has it; the rest of the path does not.
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let place = format!("umbra/firmware/{number}/{name}");
                files.insert(place.clone(), bytes);
                Some(Path::new("/").join(place))
            }
            None => None,
        };
        planned.push(Job::new(args, firmware, nanoseconds_per_instruction));
    }
    let modules = machine.modules();
    for module in &modules {
        files.insert(format!("umbra/modules/{}.ko", module.name), read(&machine.kernel.module(module))?);
    }
    let modules = modules.into_iter().map(|module| module.name).collect();
    let plan = Plan {
        clock: machine.clock,
        nanoseconds_per_instruction,
        modules,
        params: machine.params.clone(),
        jobs: planned,
    };
    let text = serde_json::to_vec(&plan).map_err(|error| Error::Scratch(error.into()))?;
    files.insert(plan::FILE.to_owned(), text);
    if let Ok(bytes @ 1..) = usize::try_from(pad << 10) {
        files.insert("umbra/pad".to_owned(), vec![0; bytes]);
    }
    Ok(initramfs::build(&init, &files).map_err(Error::Scratch)?)
}

/// Whether a program needs no dynamic loader.
fn is_static(elf: &[u8]) -> bool {
    goblin::elf::Elf::parse(elf).is_ok_and(|elf| elf.interpreter.is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Command, parse};

    fn refused(words: &[&str]) -> Failure {
        let words = ["umbra", "lab", "dirty-log"].iter().chain(words).map(ToString::to_string);
        let Command::Lab(args) = parse(words).unwrap().command else { panic!() };
        Machine::new(&args, &Progress::Silent).map(|_| ()).unwrap_err()
    }

    #[test]
    fn what_cannot_be_booted_is_refused_in_one_line() {
        for (words, line) in [
            (["--machine", "s390"], "--machine s390: there are svm and vmx"),
            (["--clock", "sundial"], "--clock sundial: there are instructions and wall"),
            (
                ["--kernel", "2.4"],
                "kernel 2.4: not on the shelf; there are 5.10, 6.1, 6.12, 7.2, 7.3-rc (umbra kernels list), or a bzImage of your own by its path",
            ),
            (["--param", "x"], "--param x: not a parameter; write MODULE.NAME=VALUE, as kvm.tdp_mmu=0"),
        ] {
            let failure = refused(&words);
            assert!(matches!(failure, Failure::Input(_)));
            assert_eq!(failure.to_string(), line);
        }
    }

    #[test]
    fn a_static_program_is_told_from_others() {
        assert!(is_static(&std::fs::read("/proc/self/exe").unwrap()));
        assert!(!is_static(&std::fs::read("/bin/sh").unwrap()));
        assert!(!is_static(b"#!/bin/sh"));
    }
}
