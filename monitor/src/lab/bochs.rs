//! The one place that knows what Bochs needs: its configuration, and a disc to boot from, since it loads no kernel itself.

use super::Error;
use super::child::{Child, run};
use super::emulator::{End, about, file};
use crate::failure::Failure;
use std::fs;
use std::path::Path;
use std::process::Command;

const PROGRAM: &str = "bochs";
/// What brings all of it; apt's recommendations would bring a desktop.
const PACKAGES: &str = "--no-install-recommends bochs bochs-term isolinux syslinux-common xorriso";
const MASTERING: &str = "xorriso";

/// Firmware and boot loader, as Debian's packages install them.
const BIOS: &str = "/usr/share/seabios/bios.bin";
const VGA_BIOS: &str = "/usr/share/seabios/vgabios-stdvga.bin";
/// The files of the boot loader, and the names that it looks for on its disc.
const LOADER: [(&str, &str); 2] =
    [("/usr/lib/ISOLINUX/isolinux.bin", "isolinux.bin"), ("/usr/lib/syslinux/modules/bios/ldlinux.c32", "ldlinux.c32")];
/// What the boot loader says first.
const LOADER_BANNER: &str = "ISOLINUX ";

/// 50 million instructions are a second, and a tick of the TSC is one.
pub const NANOSECONDS_PER_INSTRUCTION: u32 = 20;
/// The kernel cannot find out the TSC's rate, and need not guard against processors that it does not run on.
pub const APPEND: &str = "mitigations=off tsc=reliable tsc_early_khz=50000";

/// In place of `srand`, see monitor/preload/seed.rs.
const SEED: &[u8] = include_bytes!(env!("UMBRA_SEED"));

/// Names of the machine's own files.
mod name {
    pub const CONFIGURATION: &str = "bochsrc";
    pub const COMMANDS: &str = "commands";
    pub const SEED: &str = "seed.so";
    pub const TREE: &str = "disc";
    pub const DISC: &str = "disc.iso";
}

/// Name and version, as the Record has them.
///
/// # Errors
/// [`Failure::NotHere`] names the first part that is not installed.
pub fn version() -> Result<String, Failure> {
    let help = help()?;
    let version = help.lines().find_map(|line| Some(line.split_once("Emulator ")?.1.trim()));
    let version = version.ok_or_else(|| Failure::NotHere(format!("{PROGRAM} does not say which version it is")))?;
    Child::command(MASTERING, PACKAGES)?;
    for path in LOADER.iter().map(|(path, _)| *path).chain([BIOS, VGA_BIOS]) {
        if !Path::new(path).exists() {
            return Err(Failure::NotHere(format!("{path} is not installed; `apt-get install {PACKAGES}` brings it")));
        }
    }
    Ok(format!("Bochs {version}"))
}

fn help() -> Result<String, Failure> {
    about(PROGRAM, PACKAGES, "--help")
}

/// The machine vmx: an Intel processor with EPT, its accessed and dirty bits and PML.
///
/// Bochs executes instructions one by one and counts them: that is its only clock, so nothing depends on the host. The serial ports are
/// files, whose bytes are written as they come.
///
/// # Errors
/// [`Failure::NotHere`] when something is not installed or a file cannot be written.
pub fn vmx(directory: &Path, cpus: u32, kernel: &Path, append: &str) -> Result<Command, Failure> {
    let write = |name: &str, bytes: &[u8]| fs::write(directory.join(name), bytes).map_err(Error::Scratch);
    press(directory, kernel, append)?;
    write(name::SEED, SEED)?;
    write(name::CONFIGURATION, configuration(cpus).as_bytes())?;
    let mut command = Child::command(PROGRAM, PACKAGES)?;
    command.args(["-q", "-f", name::CONFIGURATION]);
    // A Bochs with the debugger waits for a command before it begins; one without knows no such option.
    if help()?.contains("-rc ") {
        write(name::COMMANDS, b"c\n")?;
        command.args(["-rc", name::COMMANDS]);
    }
    // With a slash the name is a path: below the directory that Bochs runs in.
    command.env("LD_PRELOAD", format!("./{}", name::SEED));
    // Its display draws with curses, to a file here.
    command.env("TERM", "xterm");
    Ok(command)
}

/// Makes the disc that the machine boots from.
fn press(directory: &Path, kernel: &Path, append: &str) -> Result<(), Failure> {
    let tree = directory.join(name::TREE);
    let put = || -> std::io::Result<()> {
        fs::create_dir(&tree)?;
        for (path, name) in LOADER {
            fs::copy(path, tree.join(name))?;
        }
        fs::copy(kernel, tree.join("vmlinuz"))?;
        fs::rename(directory.join(file::INITRD), tree.join("initrd"))?;
        fs::write(tree.join("isolinux.cfg"), menu(append))
    };
    put().map_err(Error::Scratch)?;
    let mut command = Child::command(MASTERING, PACKAGES)?;
    command
        // Options of mkisofs, as isolinux's manual gives them.
        .args(["-as", "mkisofs", "-quiet", "-o", name::DISC, "-b", "isolinux.bin", "-c", "boot.cat"])
        .args(["-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", name::TREE])
        // No time of day on the disc.
        .env("SOURCE_DATE_EPOCH", "1700000000");
    let ended = run(&mut command, directory)?;
    if !ended.status.success() {
        return Err(Failure::NotHere(format!("{MASTERING} cannot make a disc: {}", ended.complaint())));
    }
    fs::remove_dir_all(tree).map_err(Error::Scratch)?;
    Ok(())
}

/// The boot loader's configuration. It speaks on the console, so that a boot can be followed.
fn menu(append: &str) -> String {
    format!("SERIAL 0 115200\nDEFAULT lab\nPROMPT 0\nLABEL lab\nLINUX vmlinuz\nINITRD initrd\nAPPEND {append}\n")
}

/// Bochs's own configuration (bochsrc(5)). `panic` is Bochs's word for what it cannot go on after; switching the machine off is one of
/// them. With `reset_on_triple_fault=0` a triple fault is another.
fn configuration(cpus: u32) -> String {
    let (disc, ips) = (name::DISC, 1_000_000_000 / NANOSECONDS_PER_INSTRUCTION);
    let (console, messages, log) = (file::CONSOLE, file::MESSAGES, file::LOG);
    format!(
        "config_interface: textconfig
display_library: term
cpu: model=corei7_skylake_x, count={cpus}, ips={ips}, reset_on_triple_fault=0
memory: guest=2048, host=2048
romimage: file={BIOS}
vgaromimage: file={VGA_BIOS}
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path={disc}, status=inserted
boot: cdrom
clock: sync=none, time0=1700000000
com1: enabled=1, mode=file, dev={console}
com2: enabled=1, mode=file, dev={messages}
log: {log}
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
"
    )
}

/// What is being done, as the console tells it before Umbra's PID 1 does.
#[must_use]
pub fn booting(console: &str) -> Option<&'static str> {
    let (_, rest) = console.split_once(LOADER_BANNER)?;
    // The kernel's messages begin with the time in brackets.
    Some(if rest.contains("\n[ ") { "the kernel starts" } else { "the boot loader reads the kernel and the image" })
}

/// Whether the boot loader came twice: Bochs cannot be told to end when its machine is reset.
#[must_use]
pub fn began_anew(console: &str) -> bool {
    console.matches(LOADER_BANNER).count() > 1
}

/// What an end was, as the log tells it.
#[must_use]
pub fn end(log: &str) -> Option<End> {
    let (_, what) = log.lines().find_map(|line| line.split_once(">>PANIC<< "))?;
    Some(if what.contains("soft power off") {
        End::SwitchedOff
    } else if what.contains("3rd") && what.contains("exception with no resolution") {
        End::TripleFault
    } else {
        End::Broke(what.trim().to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_can_be_followed() {
        let loader = "\r\nISOLINUX 6.04 20200816  Copyright (C) 1994-2015 H. Peter Anvin et al\r\n";
        assert_eq!(booting(""), None);
        assert_eq!(booting(loader), Some("the boot loader reads the kernel and the image"));
        assert_eq!(booting(&format!("{loader}[    0.1] [Firmware Bug]\r\n")), Some("the kernel starts"));
        assert!(!began_anew(loader) && began_anew(&format!("{loader}[    0.1] x\r\n{loader}")));
    }

    #[test]
    fn one_tick_is_one_instruction() {
        let text = configuration(2);
        assert!(text.contains(" count=2, ips=50000000,"), "{text}");
        // The kernel is told the same rate, in kHz.
        assert!(APPEND.contains("tsc_early_khz=50000"));
        assert!(menu("a b").ends_with("APPEND a b\n"));
    }

    #[test]
    fn the_seed_is_a_library() {
        let library = goblin::elf::Elf::parse(SEED).unwrap();
        let names: Vec<_> =
            library.dynsyms.iter().filter_map(|symbol| library.dynstrtab.get_at(symbol.st_name)).collect();
        assert!(names.contains(&"srand"), "{names:?}");
        assert!(library.libraries.is_empty(), "{:?}", library.libraries);
    }
}
