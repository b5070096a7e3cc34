//! The one place that knows QEMU's command line.

use super::child::Child;
use super::emulator::{End, about, file};
use crate::failure::Failure;
use crate::ground::Clock;
use std::fs;
use std::path::Path;
use std::process::Command;

const PROGRAM: &str = "qemu-system-x86_64";
const PACKAGE: &str = "qemu-system-x86";

/// The line of QEMU's log that stands for a triple fault (its `excp_helper.c`). `-d cpu_reset` writes it; that mask costs
/// nothing while no CPU is reset.
const TRIPLE_FAULT: &str = "Triple fault";

/// Main loop and CPUs take turns, see monitor/preload/turns.rs;
const TURNS: &[u8] = include_bytes!(env!("UMBRA_TURNS"));
/// its name among the machine's files.
const LIBRARY: &str = "turns.so";

/// Name and version, as the Record has them.
///
/// # Errors
/// [`Failure::NotHere`] when QEMU is not installed or does not run.
pub fn version() -> Result<String, Failure> {
    let text = about(PROGRAM, PACKAGE, "--version")?;
    match text.lines().next().map(|line| line.replace("emulator version ", "")) {
        Some(line) if !line.is_empty() => Ok(line),
        _ => Err(Failure::NotHere(format!("{PROGRAM} does not say which version it is"))),
    }
}

/// What the kernel is told where time is the host's, who may be busy. It counts its timer's interrupts for some ten ticks of the time-stamp counter, and
/// panics over fewer than five ("IO-APIC + timer doesn't work!", `timer_irq_works` in `arch/x86/kernel/apic/io_apic.c`): so it does not. And it watches that
/// counter, and patches itself when it finds it not to be trusted.
pub const APPEND_ON_THE_WALL: &str = "no_timer_check tsc=reliable";

/// What an end was, as the log tells it.
#[must_use]
pub fn end(log: &str) -> Option<End> {
    log.lines().any(|line| line == TRIPLE_FAULT).then_some(End::TripleFault)
}

/// The machine svm: AMD SVM with nested paging and SMM in software emulation.
///
/// Under the instruction clock one virtual nanosecond is one executed instruction and nothing in the machine depends on the host:
/// `sleep=off` skips idle time instead of waiting for it, the RTC follows the virtual clock, the seed fixes what QEMU draws, QEMU's threads take
/// turns (but for a wait of 100 ms of the host's, see there), and the guest has no RDRAND. The serial ports are files, because a write to a file never makes the guest wait for a reader.
///
/// # Errors
/// [`Failure::NotHere`] when QEMU is not installed or a file cannot be written.
pub fn svm(directory: &Path, clock: Clock, cpus: u32, kernel: &Path, append: &str) -> Result<Command, Failure> {
    let mut command = Child::command(PROGRAM, PACKAGE)?;
    command.args(["-no-user-config", "-machine", "q35", "-cpu", "max,+svm,+npt,-rdrand,-rdseed", "-m", "4G"]);
    match clock {
        Clock::Instructions => {
            fs::write(directory.join(LIBRARY), TURNS).map_err(super::Error::Scratch)?;
            // With a slash the name is a path: below the directory that QEMU runs in.
            command.env("LD_PRELOAD", format!("./{LIBRARY}"));
            command.args(["-accel", "tcg", "-icount", "shift=0,sleep=off"]);
        }
        Clock::Nanoseconds => {
            command.args(["-accel", "tcg,thread=multi"]);
        }
    }
    command.arg("-smp").arg(cpus.to_string());
    command.args(["-seed", "42", "-rtc", "base=2024-01-01,clock=vm"]);
    command.args(["-nic", "none", "-display", "none", "-monitor", "none", "-no-reboot"]);
    command.args(["-d", "cpu_reset", "-D", file::LOG]);
    for port in [file::CONSOLE, file::MESSAGES] {
        command.arg("-serial").arg(format!("file:{port}"));
    }
    command.arg("-kernel").arg(kernel).args(["-initrd", file::INITRD, "-append", append]);
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_decides_about_icount() {
        let directory = tempfile::tempdir().unwrap();
        let words = |clock| {
            let command = svm(directory.path(), clock, 2, Path::new("/k"), "no5lvl").unwrap();
            command.get_args().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>()
        };
        let exact = words(Clock::Instructions);
        assert!(exact.contains(&"shift=0,sleep=off".to_owned()));
        assert_eq!(exact.last().unwrap(), "no5lvl");
        let fast = words(Clock::Nanoseconds);
        assert!(!fast.contains(&"-icount".to_owned()) && fast.contains(&"tcg,thread=multi".to_owned()));
    }

    /// A QEMU that was built otherwise could call other functions, and nobody would take turns.
    #[test]
    fn the_library_takes_the_place_of_what_qemu_calls() {
        let turns = goblin::elf::Elf::parse(TURNS).unwrap();
        let qemu = fs::read(crate::lab::child::find(PROGRAM).expect("QEMU")).unwrap();
        let qemu = goblin::elf::Elf::parse(&qemu).unwrap();
        let ours = turns.dynsyms.iter().filter(|symbol| symbol.st_value != 0);
        let mut names: Vec<_> = ours.filter_map(|symbol| turns.dynstrtab.get_at(symbol.st_name)).collect();
        names.sort_unstable();
        assert_eq!(names, ["ppoll", "pthread_cond_broadcast", "pthread_cond_signal", "pthread_cond_wait"]);
        for name in names {
            let called = |other: &goblin::elf::Sym| qemu.dynstrtab.get_at(other.st_name) == Some(name);
            assert!(qemu.dynsyms.iter().any(|other| other.is_import() && called(&other)), "{name}");
        }
        assert_eq!(turns.libraries, [""; 0]);
    }
}
