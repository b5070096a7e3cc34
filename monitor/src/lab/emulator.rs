//! The lab's machines. Each is known by the extension that its processor has for KVM, and each needs an emulator of its own: no
//! emulator has both.

use super::child::Child;
use super::{Machine, bochs, qemu};
use crate::failure::Failure;
use crate::ground::Clock;
use std::path::Path;
use std::process::{Command, ExitStatus};

/// Names of a machine's files, in the directory that its emulator runs in.
pub mod file {
    /// The image.
    pub const INITRD: &str = "initramfs.cpio";
    /// What the console said.
    pub const CONSOLE: &str = "com1";
    /// Messages in frames.
    pub const MESSAGES: &str = "com2";
    /// The emulator's own log.
    pub const LOG: &str = "emulator.log";
    /// What the emulator wrote to stdout and stderr.
    pub const OUTPUT: &str = "emulator.out";
}

/// A machine's emulator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emulator {
    /// Of the machine svm: AMD SVM with nested paging and SMM.
    Qemu,
    /// Of the machine vmx: Intel VMX with EPT and PML.
    Bochs,
}

/// What the end of an emulator was, as far as it knows itself.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// The machine switched itself off, or was reset where that ends it.
    SwitchedOff,
    /// The machine had a triple fault.
    TripleFault,
    /// The emulator broke: its last complaint.
    Broke(String),
}

impl Emulator {
    /// All there are.
    pub const ALL: [Self; 2] = [Self::Qemu, Self::Bochs];

    /// The emulator of the machine of this name.
    #[must_use]
    pub fn of_machine(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|emulator| emulator.machine() == name)
    }

    /// The machine's name.
    #[must_use]
    pub const fn machine(self) -> &'static str {
        match self {
            Self::Qemu => "svm",
            Self::Bochs => "vmx",
        }
    }

    /// The emulator's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Qemu => "QEMU",
            Self::Bochs => "Bochs",
        }
    }

    /// KVM's module for the machine's processor.
    #[must_use]
    pub const fn module(self) -> &'static str {
        match self {
            Self::Qemu => "kvm_amd",
            Self::Bochs => "kvm_intel",
        }
    }

    /// Whether the machine has this clock.
    #[must_use]
    pub const fn has(self, clock: Clock) -> bool {
        matches!((self, clock), (Self::Qemu, _) | (Self::Bochs, Clock::Instructions))
    }

    /// How many of the machine's nanoseconds an instruction takes: what needs a second in one machine needs more in a slower one.
    #[must_use]
    pub const fn nanoseconds_per_instruction(self) -> u32 {
        match self {
            Self::Qemu => 1,
            Self::Bochs => bochs::NANOSECONDS_PER_INSTRUCTION,
        }
    }

    /// How many times as long as QEMU the emulator may take, in wall time.
    #[must_use]
    pub const fn slowness(self) -> u32 {
        match self {
            Self::Qemu => 1,
            Self::Bochs => 4,
        }
    }

    /// Name and version, as the Record has them.
    ///
    /// # Errors
    /// [`Failure::NotHere`] names the first package that is missing.
    pub fn version(self) -> Result<String, Failure> {
        match self {
            Self::Qemu => qemu::version(),
            Self::Bochs => bochs::version(),
        }
    }

    /// Writes the machine's files into `directory` and gives the command that runs there.
    ///
    /// # Errors
    /// [`Failure::NotHere`] when something is not installed or a file cannot be written.
    pub(super) fn prepare(self, machine: &Machine, image: &[u8], directory: &Path) -> Result<Command, Failure> {
        std::fs::write(directory.join(file::INITRD), image).map_err(super::Error::Scratch)?;
        let (kernel, words) = (machine.kernel.vmlinuz(), self.append(machine.clock, &machine.append));
        match self {
            Self::Qemu => qemu::svm(directory, machine.clock, machine.cpus(), &kernel, &words),
            Self::Bochs => bochs::vmx(directory, machine.cpus(), &kernel, &words),
        }
    }

    /// The kernel's command line. A panic or an oops ends the machine at once; what it was is on the console.
    fn append(self, clock: Clock, extra: &str) -> String {
        let own = match (self, clock) {
            (Self::Qemu, Clock::Instructions) => "",
            // The kernel counts its timer's interrupts for some ten ticks of the TSC, and panics over fewer than five ("IO-APIC + timer doesn't
            // work!", timer_irq_works in arch/x86/kernel/apic/io_apic.c). On a busy host QEMU may not have run in all of that time.
            (Self::Qemu, Clock::Nanoseconds) => "no_timer_check",
            (Self::Bochs, _) => bochs::APPEND,
        };
        let all = ["console=ttyS0 quiet nokaslr oops=panic panic=-1", own, extra];
        all.into_iter().filter(|words| !words.is_empty()).collect::<Vec<_>>().join(" ")
    }

    /// What is being done, as the console of a machine that is still booting tells it, if it does.
    #[must_use]
    pub(super) fn booting(self, console: &str) -> Option<&'static str> {
        match self {
            Self::Qemu => None,
            Self::Bochs => bochs::booting(console),
        }
    }

    /// Whether the machine has begun anew, which is an end: nobody asked for it.
    #[must_use]
    pub(super) fn began_anew(self, console: &str) -> bool {
        self == Self::Bochs && bochs::began_anew(console)
    }

    /// What an end was, by the files that the emulator left in `directory`.
    #[must_use]
    pub(super) fn end(self, status: ExitStatus, directory: &Path) -> End {
        let read = |name: &str| {
            std::fs::read(directory.join(name))
                .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
                .unwrap_or_default()
        };
        let log = read(file::LOG);
        let end = match self {
            Self::Qemu => qemu::end(&log),
            Self::Bochs => bochs::end(&log),
        };
        end.unwrap_or_else(|| {
            if status.success() {
                return End::SwitchedOff;
            }
            let output = read(file::OUTPUT);
            let line = output.lines().rev().find(|line| !line.trim().is_empty());
            End::Broke(line.unwrap_or("it said nothing").trim().to_owned())
        })
    }
}

/// The first line of what a program says about itself.
///
/// # Errors
/// [`Failure::NotHere`] when it is not installed or does not run.
pub(super) fn about(program: &str, package: &str, flag: &str) -> Result<String, Failure> {
    let ended = super::child::run(Child::command(program, package)?.arg(flag), Path::new("/"))?;
    if ended.status.success() {
        return Ok(ended.text() + &ended.stderr);
    }
    Err(Failure::NotHere(format!("{program} does not run: {}", ended.complaint())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt as _;

    #[test]
    fn machines_are_known_by_their_names() {
        for emulator in Emulator::ALL {
            assert_eq!(Emulator::of_machine(emulator.machine()), Some(emulator));
        }
        assert_eq!(Emulator::of_machine("s390"), None);
        assert!(!Emulator::Bochs.has(Clock::Nanoseconds) && Emulator::Qemu.has(Clock::Nanoseconds));
    }

    #[test]
    fn the_kernel_is_told_what_its_machine_needs() {
        let base = "console=ttyS0 quiet nokaslr oops=panic panic=-1";
        assert_eq!(Emulator::Qemu.append(Clock::Instructions, ""), base);
        assert_eq!(Emulator::Qemu.append(Clock::Instructions, "no5lvl"), format!("{base} no5lvl"));
        assert_eq!(Emulator::Qemu.append(Clock::Nanoseconds, "no5lvl"), format!("{base} no_timer_check no5lvl"));
        assert!(Emulator::Bochs.append(Clock::Instructions, "x").contains(" tsc=reliable "));
    }

    #[test]
    fn an_end_is_told_from_the_files() {
        let directory = tempfile::tempdir().unwrap();
        let end = |emulator: Emulator, code: i32, log: &str, output: &str| {
            std::fs::write(directory.path().join(file::LOG), log).unwrap();
            std::fs::write(directory.path().join(file::OUTPUT), output).unwrap();
            emulator.end(ExitStatus::from_raw(code << 8), directory.path())
        };
        assert_eq!(end(Emulator::Qemu, 0, "", ""), End::SwitchedOff);
        assert_eq!(end(Emulator::Qemu, 0, "CPU Reset\nTriple fault\n", ""), End::TripleFault);
        assert_eq!(end(Emulator::Qemu, 1, "", "no such accelerator\n\n"), End::Broke("no such accelerator".into()));
        let panic = |what: &str| format!("00001i[SYS   ] x\n00002p[ACPI  ] >>PANIC<< {what}\n00003i[SIM   ] y\n");
        assert_eq!(end(Emulator::Bochs, 1, &panic("ACPI control: soft power off"), ""), End::SwitchedOff);
        let triple = panic("exception(): 3rd (13) exception with no resolution");
        assert_eq!(end(Emulator::Bochs, 1, &triple, ""), End::TripleFault);
        let disk = panic("cdrom: read error");
        assert_eq!(end(Emulator::Bochs, 1, &disk, "======\n"), End::Broke("cdrom: read error".into()));
        assert_eq!(end(Emulator::Bochs, 127, "", "bad option\n"), End::Broke("bad option".into()));
    }
}
