//! The lab machine's console (COM1): what it says about a death, and its last lines.

/// Lines of the console that are shown after a failure.
const TAIL: usize = 20;

/// Why the kernel died, if it did.
#[must_use]
pub fn panic(console: &str) -> Option<String> {
    const MARK: &str = "Kernel panic - not syncing: ";
    // The first one: what follows it are consequences.
    let reason = console.lines().find_map(|line| Some(line.split_once(MARK)?.1.trim()))?;
    let code =
        reason.strip_prefix("Attempted to kill init! exitcode=0x").and_then(|code| u32::from_str_radix(code, 16).ok());
    Some(match code {
        // As wait(2) has it: a signal in the low bits, else an exit code above them.
        Some(code) if code & 0x7f != 0 => format!("{reason} (Umbra's PID 1 was killed by signal {})", code & 0x7f),
        Some(code) => format!("{reason} (Umbra's PID 1 ended with exit code {})", code >> 8),
        None if reason.contains("Unable to mount root fs") => {
            format!("{reason} (it did not unpack the lab's image: without CONFIG_BLK_DEV_INITRD there is no initramfs)")
        }
        None if reason.contains("No working init found") => {
            format!("{reason} (it did not start the lab's PID 1: CONFIG_BINFMT_ELF and a 64-bit kernel are needed)")
        }
        None => reason.to_owned(),
    })
}

/// The last lines, without control characters.
#[must_use]
pub fn tail(console: &str) -> Vec<String> {
    let lines: Vec<String> = console
        .lines()
        .map(|line| line.chars().filter(|c| !c.is_control()).collect::<String>().trim_end().to_owned())
        .filter(|line| !line.is_empty())
        .collect();
    lines[lines.len().saturating_sub(TAIL)..].to_vec()
}

/// The last line of the kernel's log that is about a module: why it was refused.
#[must_use]
pub fn about_module<'a>(log: &'a [String], module: &str) -> Option<&'a str> {
    // The kernel writes both `kvm_amd: ` and, from inside the module, `kvm_amd: SVM not supported` or `kvm-amd: `.
    let starts = [format!("{module}: "), format!("{}: ", module.replace('_', "-"))];
    log.iter().rev().find(|line| starts.iter().any(|start| line.starts_with(start))).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_found() {
        assert_eq!(panic("[    0.0] Linux\n[    1.0] all is well\n"), None);
        let oops = "[ 2.1] BUG: unable to handle page fault\n[    2.2] Kernel panic - not syncing: Fatal exception\r\n[ 2.3] ---[ end Kernel panic - not syncing: Fatal exception ]---";
        assert_eq!(panic(oops).unwrap(), "Fatal exception");
        let killed = "[    2.2] Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b\n";
        assert!(panic(killed).unwrap().ends_with("(Umbra's PID 1 was killed by signal 11)"));
        let ended = "[    2.2] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100\n";
        let rootless = "[ 1.0] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\n";
        assert!(panic(rootless).unwrap().contains("CONFIG_BLK_DEV_INITRD"));
        assert!(panic(ended).unwrap().ends_with("(Umbra's PID 1 ended with exit code 1)"));
    }

    #[test]
    fn the_tail_is_short_and_printable() {
        let console = (0..100).map(|line| format!("\u{1b}[0mline {line}\r\n")).collect::<Vec<_>>().join("\n");
        let tail = tail(&console);
        assert_eq!(tail.len(), TAIL);
        assert_eq!(tail[TAIL - 1], "[0mline 99");
    }

    #[test]
    fn a_module_complaint_is_found() {
        let log = ["kvm: x", "kvm_amd: Unknown symbol kvm_foo (err -2)", "random: crng init done"].map(str::to_owned);
        assert_eq!(about_module(&log, "kvm_amd"), Some("kvm_amd: Unknown symbol kvm_foo (err -2)"));
        assert_eq!(about_module(&log, "irqbypass"), None);
    }
}
