//! The shelf of kernels when the archive or the disk fails: one line, the right exit code, and a cache that the next try can use. A script stands
//! in for apt; what it serves is no kernel.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use umbra_tests::{Run, binary, finish};

/// A package's entry in the index, as `apt-cache show` prints it. The hash is that of the five bytes that the script serves.
const SHOWN: &str = "echo 'Package: linux-image-x'; echo 'Version: 1'; echo \"SHA256: $hash\"";
const HASH_OF_WORDS: &str = "dba36bffa5cab0f922d087a3aeb179f9d4e745df40b323e1b1471402848c8a3e";

/// Puts an apt into `directory` whose `show` and `download` do as the words say, and gives a command that finds it and has its cache there.
fn with_apt(directory: &Path, program: &str, show: &str, download: &str) -> Command {
    let bin = directory.join("bin");
    fs::create_dir_all(&bin).unwrap();
    let script = format!(
        "#!/bin/sh\nhash={HASH_OF_WORDS}\ncase \"$*\" in\n\
         *indextargets*) echo 'Debian|Debian|http://mirror.example/debian/|/x:1'; echo 'Debian|Debian-Security|http://mirror.example/debian-security/|/x:2';;\n\
         *' show '*) {show};;\n*' download '*) {download};;\n*) :;;\nesac\n"
    );
    for name in ["apt-get", "apt-cache"] {
        fs::write(bin.join(name), &script).unwrap();
        fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new(program);
    command.env("PATH", path).env("UMBRA_CACHE", directory.join("cache"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs `umbra kernels fetch` with such an apt.
fn fetch(directory: &Path, show: &str, download: &str) -> Run {
    let umbra = binary();
    let mut command = with_apt(directory, umbra.to_str().unwrap(), show, download);
    finish(command.args(["kernels", "fetch", "6.12"]).spawn().unwrap(), Duration::from_secs(60))
}

/// Exit code 3 with `part` in the last line, the progress lines before it being about this kernel; and nothing half done in the cache.
fn fails(directory: &Path, run: &Run, part: &str) {
    assert_eq!(run.code, Some(3), "{}", run.stderr);
    let lines: Vec<&str> = run.stderr.lines().collect();
    let (last, steps) = lines.split_last().expect("a line");
    assert!(last.contains(part), "{part:?} is not in {last:?}");
    assert!(steps.iter().all(|step| step.starts_with("umbra: kernel 6.12: ")), "{}", run.stderr);
    let left = |name: &str| fs::read_dir(directory.join("cache").join(name)).map_or(0, Iterator::count);
    assert_eq!((left("kernels"), left("apt/download")), (0, 0), "the cache is not clean: {}", run.stderr);
}

#[test]
fn a_package_that_vanished() {
    let directory = tempfile::tempdir().unwrap();
    let run = fetch(directory.path(), ":", "exit 100");
    fails(directory.path(), &run, "kernel package not found: neither linux-image-6.12");
}

#[test]
fn a_file_with_another_hash() {
    let directory = tempfile::tempdir().unwrap();
    let run = fetch(directory.path(), SHOWN, "printf other > linux-image-x_1_amd64.deb");
    fails(directory.path(), &run, "linux-image-x=1 cannot be downloaded: its hash is not the signed index's");
}

#[test]
fn a_download_that_is_cut() {
    let directory = tempfile::tempdir().unwrap();
    let cut = "printf wo > linux-image-x_1_amd64.deb; echo 'E: Failed to fetch linux-image-x: connection reset' >&2; exit 100";
    let run = fetch(directory.path(), SHOWN, cut);
    fails(
        directory.path(),
        &run,
        "linux-image-x=1 cannot be downloaded: Failed to fetch linux-image-x: connection reset",
    );
}

#[test]
fn a_package_that_is_no_kernel() {
    let directory = tempfile::tempdir().unwrap();
    // The hash is right, the contents are five letters.
    let run = fetch(directory.path(), SHOWN, "printf words > linux-image-x_1_amd64.deb");
    assert_eq!(run.code, Some(3), "{}", run.stderr);
    let kernels = directory.path().join("cache/kernels");
    assert_eq!(fs::read_dir(kernels).map_or(0, Iterator::count), 0, "{}", run.stderr);
}

/// A file system of 64 KiB, for which a mount namespace of one's own is needed.
#[test]
fn a_disk_that_is_full() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not root: no file system can be mounted here, so the full disk is not tried");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let big = "head -c 1000000 /dev/zero > linux-image-x_1_amd64.deb || exit 100";
    // The file system goes with its namespace, so what is left on it is looked at inside.
    let line = "mkdir -p $UMBRA_CACHE && mount -t tmpfs -o size=64k none $UMBRA_CACHE && \"$0\" kernels fetch 6.12; code=$?; \
        ls $UMBRA_CACHE/apt/download $UMBRA_CACHE/kernels >&2; exit $code";
    let mut unshare = with_apt(directory.path(), "unshare", SHOWN, big);
    unshare.args(["--mount", "sh", "-c", line]).arg(binary());
    let run = finish(unshare.spawn().unwrap(), Duration::from_secs(60));
    assert_eq!(run.code, Some(3), "{}", run.stderr);
    assert!(run.stderr.contains("cannot be downloaded") && run.stderr.contains("No space left"), "{}", run.stderr);
    assert!(!run.stderr.contains("x_1_amd64.deb"), "the file stayed: {}", run.stderr);
}
