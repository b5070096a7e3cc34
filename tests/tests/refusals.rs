//! Bad input: one clear line that names the thing, its value and the remedy, and the right exit code.

use std::os::unix::fs::PermissionsExt as _;
use umbra_tests::{command, finish, kvm_here, refused};

#[test]
fn words_that_mean_nothing() {
    refused(&["run", "dirty-lag"], 2, &["dirty-lag", "dirty-log"]);
    refused(&["run", "dirty-log", "--tracker", "guess"], 2, &["guess", "bitmap"]);
    refused(&["run", "dirty-log", "--tracker", "ring-1000"], 2, &["ring-1000", "power of two"]);
    refused(&["run", "dirty-log", "--tracker", "ring-128"], 2, &["ring-128", "256"]);
    refused(&["run", "dirty-log", "--pattern", "zigzag"], 2, &["zigzag", "sequential"]);
    refused(&["run", "dirty-log", "--pattern", "stride:0"], 2, &["stride:0"]);
    refused(&["run", "dirty-log", "--backing", "floppy"], 2, &["floppy", "hugetlb"]);
    refused(&["run", "dirty-log", "--guest-page", "3k"], 2, &["3k", "4k or 2m"]);
    refused(&["run", "dirty-log", "--inject", "chaos"], 2, &["chaos", "lose-page"]);
    refused(&["run", "dirty-log", "--nonsense"], 2, &["--nonsense"]);
    refused(&["run", "dirty-log", "--write-percent", "101"], 2, &["101"]);
}

#[test]
fn modes_and_rates_that_there_are_none_of() {
    refused(&["run", "dirty-log", "--guest-paging", "16bit"], 2, &["16bit", "pae", "32bit"]);
    refused(&["run", "dirty-log", "--guest-paging", "32bit", "--guest-page", "2m"], 2, &["32bit", "4k"]);
    refused(&["run", "dirty-log", "--guest-paging", "pae", "--memory", "3G"], 2, &["pae", "below 3 GiB"]);
    refused(&["run", "model", "--guest-paging", "pae"], 2, &["--guest-paging", "model"]);
    refused(&["run", "dirty-log", "--rate", "5"], 2, &["--rate", "dirty-rate"]);
    refused(&["run", "dirty-rate", "--rate", "0"], 2, &["0"]);
    refused(&["run", "collapse", "--vcpus", "2"], 2, &["--vcpus 2", "collapse"]);
    refused(&["run", "dirty-log", "--irqchip", "apic"], 2, &["apic", "kernel"]);
}

#[test]
fn numbers_out_of_range() {
    refused(&["run", "dirty-log", "--memory", "0"], 2, &["--memory 0"]);
    refused(&["run", "dirty-log", "--memory", "5000"], 2, &["5000", "4096"]);
    refused(&["run", "dirty-log", "--memory", "1T"], 2, &["1048576M", "this host has"]);
    refused(&["run", "dirty-log", "--memory", "much"], 2, &["much"]);
    refused(&["run", "dirty-log", "--memory", "3M", "--guest-page", "2m"], 2, &["2097152"]);
    refused(&["run", "dirty-log", "--vcpus", "0"], 2, &["--vcpus 0"]);
    refused(&["run", "dirty-log", "--vcpus", "9"], 2, &["--vcpus 9", "8"]);
    refused(&["run", "dirty-log", "--slots", "0"], 2, &["--slots 0"]);
    refused(&["run", "dirty-log", "--slots", "33"], 2, &["--slots 33", "32"]);
    refused(&["run", "dirty-log", "--memory", "8K", "--slots", "3"], 2, &["--slots 3"]);
    refused(&["run", "dirty-log", "--rounds", "0"], 2, &["--rounds 0"]);
    refused(&["run", "dirty-log", "--chunk", "100"], 2, &["--chunk 100", "64"]);
}

#[test]
fn files_that_cannot_be_written_are_named_before_the_run() {
    let begin = std::time::Instant::now();
    refused(&["run", "dirty-log", "--out", "/nonexistent/x.json"], 2, &["--out /nonexistent/x.json"]);
    refused(&["run", "dirty-log", "--out", "/"], 2, &["--out /"]);
    refused(&["lab", "dirty-log", "--out", "/nonexistent/x.json"], 2, &["--out /nonexistent/x.json"]);
    assert!(begin.elapsed().as_secs() < 30, "a run was made before the file was tried");
}

#[test]
fn firmware_that_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = directory.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_string_lossy().into_owned()
    };
    let refuse = |path: &str, part: &str| refused(&["run", "dirty-log", "--firmware", path], 2, &["--firmware", part]);
    refuse("/nonexistent/fw.elf", "No such file");
    refuse("/dev/zero", "larger than");
    refuse(&file("text", b"hello"), "not an ELF file");
    let own = std::fs::read(umbra_tests::binary()).unwrap();
    refuse(&file("cut", &own[..48]), "broken ELF file");
    let mut other = own.clone();
    other[18] = 183;
    refuse(&file("arm", &other), "x86-64");
    // A file that is a good ELF file for this machine, but linked elsewhere: this very program.
    refused(&["run", "dirty-log", "--firmware", &file("own", &own)], 2, &["--firmware"]);
}

#[test]
fn huge_pages_that_are_not_reserved() {
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").unwrap_or_default();
    if free.trim() == "0" && kvm_here() {
        refused(&["run", "dirty-log", "--backing", "hugetlb"], 2, &["hugetlb", "nr_hugepages"]);
    }
}

/// Standard output that takes nothing: a reader that is gone is no failure, a full disk is one, and neither is a panic.
#[test]
fn output_that_nobody_takes() {
    let mut gone = command(&["list"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let run = finish(gone.stdout(writer).spawn().unwrap(), std::time::Duration::from_secs(30));
    assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
    let mut full = command(&["list"]);
    let device = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let run = finish(full.stdout(device).spawn().unwrap(), std::time::Duration::from_secs(30));
    assert_eq!((run.code, run.stderr.trim_end().lines().count()), (Some(1), 1), "{}", run.stderr);
    assert!(run.stderr.contains("standard output: No space left"), "{}", run.stderr);
}

/// As another user, who may not open /dev/kvm; and where there is no /dev/kvm at all.
#[test]
fn no_kvm() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let copy = directory.path().join("umbra");
    std::fs::copy(umbra_tests::binary(), &copy).unwrap();
    if !rustix::process::geteuid().is_root() {
        assert!(kvm_here(), "neither root nor allowed to use /dev/kvm: run this test as one of the two");
        return;
    }
    let run = |program: &str, words: &[&str]| {
        let mut as_other = std::process::Command::new(program);
        as_other.args(words).arg(&copy).args(["run", "dirty-log", "--memory", "1M"]);
        as_other
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped());
        finish(as_other.spawn().unwrap(), std::time::Duration::from_secs(30))
    };
    if kvm_here() {
        let mode = std::fs::metadata("/dev/kvm").unwrap().permissions().mode();
        if mode & 0o006 == 0 {
            let denied = run("setpriv", &["--reuid=65534", "--regid=65534", "--clear-groups"]);
            assert_eq!(denied.code, Some(3), "{}", denied.stderr);
            assert!(denied.stderr.contains("/dev/kvm: permission denied"), "{}", denied.stderr);
        }
    }
    let missing = run("unshare", &["--mount", "sh", "-c", "mount -t tmpfs none /dev && exec \"$0\" \"$@\""]);
    assert_eq!(missing.code, Some(3), "{}", missing.stderr);
    assert!(missing.stderr.contains("/dev/kvm does not exist"), "{}", missing.stderr);
}

#[test]
fn help_and_lists_are_no_errors() {
    for words in [&["--help"][..], &["--version"], &["list"], &["probe"], &["probe", "--json"], &["kernels", "list"]] {
        let run = finish(command(words).spawn().unwrap(), std::time::Duration::from_secs(30));
        assert_eq!(run.code, Some(0), "{words:?}: {}", run.stderr);
        assert!(!run.stdout.is_empty());
    }
    let probe = umbra_tests::umbra(&["probe", "--json"], 30);
    let probe: serde_json::Value = serde_json::from_str(&probe.stdout).unwrap();
    assert_eq!(probe["kvm_error"].is_null(), kvm_here());
    assert_eq!(probe["scenarios"][0]["name"], "dirty-log");
}

#[test]
fn labs_that_there_are_none_of() {
    refused(&["lab", "--machine", "pdp11", "dirty-log"], 2, &["pdp11", "svm and vmx"]);
    refused(&["lab", "--clock", "sundial", "dirty-log"], 2, &["sundial", "instructions"]);
    refused(&["lab", "--machine", "vmx", "--clock", "wall", "dirty-log"], 2, &["wall", "vmx", "instructions"]);
    refused(&["lab", "--kernel", "2.4", "dirty-log"], 2, &["2.4", "6.12"]);
    refused(&["kernels", "fetch", "2.4"], 2, &["2.4", "6.12"]);
    refused(&["lab", "--param", "nonsense", "dirty-log"], 2, &["nonsense"]);
    refused(&["lab", "--param", "floppy.speed=1", "dirty-log"], 2, &["floppy"]);
    // What is wrong with the scenario's own options is said before the boot.
    refused(&["lab", "dirty-lag"], 2, &["dirty-lag"]);
    refused(&["lab", "dirty-log", "--tracker", "ring-7"], 2, &["ring-7"]);
}
