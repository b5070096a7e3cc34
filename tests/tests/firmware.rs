//! The firmware's images: under plain QEMU, and under the monitor on this machine's KVM.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use umbra::ground::Clock;
use umbra::guest::{Image, Machine, Plan};
use umbra::kvm::Backing;
use umbra::kvm::clock::Timer;
use umbra_shared::pattern::{Kind, Pattern};
use umbra_shared::{Level, layout};
use umbra_tests::{finish, kvm_here, refused, umbra};

fn image(name: &str) -> PathBuf {
    PathBuf::from(env!("UMBRA_FIRMWARE_DIR")).join(name)
}

/// `qemu -kernel`: the PVH note at work, no monitor near. Returns QEMU's exit code and what the firmware said on COM1.
fn boot_alone(name: &str) -> (Option<i32>, String) {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args([
        "-no-user-config",
        "-machine",
        "q35",
        "-cpu",
        "max",
        "-m",
        "128M",
        "-accel",
        "tcg",
        "-nic",
        "none",
        "-display",
        "none",
    ]);
    qemu.args([
        "-no-reboot",
        "-serial",
        "stdio",
        "-monitor",
        "none",
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=4",
        "-kernel",
    ]);
    qemu.arg(image(name)).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let run = finish(qemu.spawn().expect("qemu-system-x86_64, which make installs"), Duration::from_secs(120));
    (run.code, run.stdout)
}

#[test]
fn the_self_test_passes_and_can_fail() {
    let (code, said) = boot_alone("umbra-firmware");
    // isa-debug-exit ends QEMU with twice the value written, plus one: 0 is written for success.
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains(" passed, 0 failed"), "{said}");
    let (code, said) = boot_alone("one-write-short");
    assert_eq!(code, Some(3), "{said}");
    assert!(!said.contains(" 0 failed"), "{said}");
}

#[test]
fn a_firmware_that_writes_one_page_too_few_is_caught() {
    let file = image("one-write-short");
    let words = ["run", "dirty-log", "--memory", "4M", "--tracker", "clear", "--firmware", &file.to_string_lossy()];
    if !kvm_here() {
        return refused(&words, 3, &["/dev/kvm"]);
    }
    let run = umbra(&words, 60);
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    for part in ["the guest did not write it", "1023 writes where the pattern has 1024", "page 1023 ", "round 1"] {
        assert!(run.stderr.contains(part), "{part:?} is not in {}", run.stderr);
    }
}

/// Runs an image that takes no commands.
fn program(name: &str) -> Result<(String, u64), umbra::guest::Error> {
    let pattern = Pattern { kind: Kind::Sequential, seed: 1, pages: 256, write_percent: 100, accesses_per_page: 1 };
    Machine::run_program(&Plan {
        pattern,
        slots: layout::slots(256, 1, Level::K4).expect("one slot of 1 MiB").collect(),
        vcpus: 1,
        backing: Backing::Anonymous,
        guest_page: Level::K4,
        irqchip: false,
        mode: umbra_shared::paging::Mode::Long,
        pace: 0,
        nested: None,
        shadow: None,
        bus: None,
        journals: false,
        smm: None,
        image: Arc::new(Image::load(Some(&image(name))).expect("an image of ours")),
        timer: Timer::new(Clock::Nanoseconds),
        patience: Duration::from_secs(120),
    })
}

#[test]
fn a_program_written_to_hermit_abi_runs() {
    if !kvm_here() {
        assert!(matches!(program("hermit-hello"), Err(umbra::guest::Error::Kvm(_))));
        return;
    }
    let (output, code) = program("hermit-hello").unwrap();
    assert_eq!(code, 7, "{output}");
    assert_eq!(output, "hello from a hermit-abi program\nmemory: yes\ntime: yes\n");
}

#[test]
fn an_exception_is_a_report_that_names_the_place() {
    let error = program("hermit-fault").unwrap_err().to_string();
    if !kvm_here() {
        return assert!(error.contains("/dev/kvm"), "{error}");
    }
    for part in ["vCPU 0", "exception 14", "#PF", "CR2 0x700000000000", "read_nowhere", "ring 3"] {
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
}
