//! Runs on this machine's /dev/kvm. Where there is none, every test checks that `umbra` says so.

use rustix::process::{Pid, Signal};
use std::process::Stdio;
use std::time::{Duration, Instant};
use umbra::hostmm::userfault::{Mode, Userfault};
use umbra::report::Record;
use umbra_tests::{command, finish, kvm_here, record, refused, umbra};

/// A run whose truth held, or `None` where there is no KVM (and `umbra` said that).
fn measured(words: &[&str]) -> Option<Record> {
    let words = [&["run"], words].concat();
    if !kvm_here() {
        refused(&words, 3, &["/dev/kvm"]);
        return None;
    }
    Some(record(&words, 120))
}

#[test]
fn every_tracker_reports_what_was_written() {
    for backing in ["anonymous", "thp", "shmem"] {
        let Some(record) = measured(&["dirty-log", "--memory", "16M", "--backing", backing]) else { return };
        assert_eq!(record.measured().count(), 4, "{backing}");
        for row in record.measured() {
            let pages = row.truth.pages;
            // Three rounds of 4096 pages in each of two passes.
            assert_eq!((pages.written, pages.missed, pages.extra), (6 * 4096, 0, 0), "{backing} {}", row.name);
            assert_eq!(pages.reported, pages.written + pages.explained, "{backing} {}", row.name);
            assert!(row.stall.as_ref().is_some_and(|stall| stall.count == 3 * 4096 && stall.p50 <= stall.max));
        }
    }
}

/// Needs root, to become somebody who is not: in a mount namespace of its own, /dev/kvm is one that everybody may open.
const AS_NOBODY: &str = r#"mknod -m 666 "$1/kvm" c 10 232 && mount --bind "$1/kvm" /dev/kvm || exit 99; shift
exec setpriv --reuid=65534 --regid=65534 --clear-groups --bounding-set=-all --no-new-privs "$@""#;

/// /dev/kvm is all that L2 needs: no tracefs, no userfaultfd of the kernel's faults, no thread.
#[test]
fn an_unprivileged_user_runs_l2() {
    if !kvm_here() {
        return refused(&["run", "nested", "--nesting", "umbra"], 3, &["/dev/kvm"]);
    }
    let directory = tempfile::Builder::new().permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755)).tempdir();
    let directory = directory.expect("a temporary directory");
    let (place, umbra) = (directory.path().to_string_lossy(), directory.path().join("umbra"));
    std::fs::copy(umbra_tests::binary(), &umbra).expect("a copy that everybody may start");
    let words = ["-m", "--propagation", "private", "sh", "-c", AS_NOBODY, "sh", &place];
    let l2 =
        "run nested --nesting umbra --memory 2M --alias 2 --rounds 2 --vcpus 2 --pattern random --write-percent 40";
    let mut command = std::process::Command::new("unshare");
    command.args(words).arg(&umbra).args(l2.split(' '));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let run = finish(command.spawn().expect("unshare(1) of util-linux"), Duration::from_secs(120));
    if run.code == Some(99) || run.stderr.contains("unshare") {
        // Not root: then every other test here is an unprivileged user's.
        return assert_ne!(rustix::process::getuid().as_raw(), 0, "{}", run.stderr);
    }
    if umbra::nested::source::Kind::Poison.open().is_err() {
        assert_eq!(run.code, Some(3), "{}", run.stderr);
        return assert!(run.stderr.contains("UFFD_FEATURE_POISON"), "{}", run.stderr);
    }
    assert_eq!(run.code, Some(0), "{}\n{}", run.stderr, run.stdout);
    assert!(run.stdout.contains("umbra:log@kvm-clear"), "{}", run.stdout);
    // Nor does it take more to watch pages, where the kernel has that.
    let watched = run.stdout.contains("umbra:log@pagemap: not here: UFFD_FEATURE_WP_ASYNC");
    assert_eq!(!watched, Userfault::open(Mode::Asynchronous).is_ok(), "{}", run.stdout);
    assert!(run.stdout.contains("umbra:log@pagemap"), "{}", run.stdout);
    // What this user may not have is named.
    assert!(run.stdout.contains("umbra:twin@uffd-wp: not here: userfaultfd is missing here"), "{}", run.stdout);
}

#[test]
fn slots_with_gaps_and_several_vcpus() {
    let words =
        ["dirty-log", "--memory", "15M", "--slots", "3", "--vcpus", "4", "--pattern", "random", "--chunk", "128"];
    let Some(record) = measured(&words) else { return };
    for row in record.measured() {
        assert_eq!((row.truth.pages.missed, row.truth.pages.extra), (0, 0), "{}", row.name);
        assert_eq!(row.truth.pages.written, 6 * 3840, "{}", row.name);
    }
}

#[test]
fn every_pattern_and_guest_page_size() {
    for (pattern, page) in
        [("sequential", "2m"), ("stride:37", "4k"), ("hotspot:10/90", "4k"), ("clusters:16", "2m"), ("empty", "4k")]
    {
        let words = ["dirty-log", "--memory", "8M", "--pattern", pattern, "--guest-page", page, "--seed", "7"];
        let Some(record) = measured(&words) else { return };
        for row in record.measured() {
            assert_eq!((row.truth.pages.missed, row.truth.pages.extra), (0, 0), "{pattern} {}", row.name);
            assert_eq!(row.truth.pages.written == 0, pattern == "empty");
        }
    }
}

#[test]
fn a_quarter_of_the_accesses_is_a_quarter() {
    let Some(record) = measured(&["dirty-log", "--memory", "16M", "--write-percent", "25"]) else { return };
    for row in record.measured() {
        for round in &row.truth.rounds {
            assert_eq!((round.pages.written, round.pages.missed, round.pages.extra), (1024, 0, 0), "{}", row.name);
        }
    }
    let run = umbra(&["run", "dirty-log", "--memory", "16M", "--write-percent", "25", "--tracker", "clear"], 60);
    assert!(run.stdout.contains("1024 of 4096 accesses a round write (25%)"), "{}", run.stdout);
}

#[test]
fn full_rings_are_counted() {
    let Some(record) = measured(&["dirty-log", "--memory", "16M", "--tracker", "ring-1024,ring-65536"]) else { return };
    let full: Vec<u64> = record.measured().map(|row| row.counters["ring_full_exits"].value).collect();
    // Three rounds of 4096 entries through 1024 (KVM keeps some of them in reserve); 65536 never fill.
    assert!(full[0] >= 9 && full[1] == 0, "{full:?}");
}

#[test]
fn injected_faults_are_caught_and_named() {
    if !kvm_here() {
        return refused(&["run", "dirty-log", "--inject", "lose-page"], 3, &["/dev/kvm"]);
    }
    for tracker in ["bitmap", "clear", "clear+init-set", "ring"] {
        for (fault, word) in [("lose-page", "was not reported"), ("extra-page", "not written")] {
            let words = ["run", "dirty-log", "--memory", "4M", "--slots", "2", "--tracker", tracker, "--inject", fault];
            let run = umbra(&words, 60);
            assert_eq!(run.code, Some(1), "{tracker} {fault}: {}", run.stderr);
            for part in ["page ", "slot ", "round 2", tracker, word] {
                assert!(run.stderr.contains(part), "{tracker} {fault}: {part:?} is not in {}", run.stderr);
            }
        }
    }
}

#[test]
fn no_write_is_lost_while_the_controller_harvests() {
    let Some(record) = measured(&["soak", "--memory", "8M", "--vcpus", "2", "--slots", "2", "--seconds", "5"]) else {
        return;
    };
    for row in record.measured() {
        assert_eq!(row.truth.pages.missed, 0, "{}", row.name);
        umbra_tests::soaked(row, 2);
    }
}

#[test]
fn the_soak_can_fail() {
    if !kvm_here() {
        return refused(&["run", "soak"], 3, &["/dev/kvm"]);
    }
    let words = [
        "run",
        "soak",
        "--memory",
        "8M",
        "--seconds",
        "1",
        "--tracker",
        "clear",
        "--write-percent",
        "5",
        "--inject",
        "lose-page",
    ];
    let run = umbra(&words, 60);
    assert_eq!(run.code, Some(1), "{}{}", run.stdout, run.stderr);
    assert!(run.stderr.contains("clear") && run.stderr.contains("page "), "{}", run.stderr);
}

#[test]
fn an_interrupted_run_leaves_nothing() {
    if !kvm_here() {
        return refused(&["run", "soak"], 3, &["/dev/kvm"]);
    }
    for signal in [Signal::INT, Signal::TERM] {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("record.json").to_string_lossy().into_owned();
        let run = command(&["run", "soak", "--memory", "8M", "--vcpus", "2", "--seconds", "60", "--out", &out])
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(700));
        rustix::process::kill_process(Pid::from_child(&run), signal).unwrap();
        let begin = Instant::now();
        // The VM, its memory and its threads are the process's own, so they end with it.
        let run = finish(run, Duration::from_secs(20));
        assert!(run.code.is_none() || run.code == Some(130), "{signal:?}: {run:?}");
        assert!(begin.elapsed() < Duration::from_secs(10), "{signal:?}");
        assert_eq!(directory.path().read_dir().unwrap().count(), 0, "{signal:?} left a file");
    }
}

#[test]
fn the_table_is_plain_text() {
    let Some(_) = measured(&["dirty-log", "--memory", "1M", "--tracker", "bitmap"]) else { return };
    let run = umbra(&["run", "dirty-log", "--memory", "1M", "--tracker", "bitmap"], 60);
    assert!(!run.stdout.contains('\u{1b}') && !run.stderr.contains('\u{1b}'), "escape sequences without a terminal");
    assert!(run.stdout.contains("missed") && run.stdout.contains("bitmap"), "{}", run.stdout);
}
