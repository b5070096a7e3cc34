//! What the integration tests share: running the `umbra` that `make build` has left, and reading what it says.
//!
//! A test never leaves a process: every run has a time limit, at whose end it is killed and the test fails.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use umbra::report::Record;
use umbra::report::record::Row;

/// The binary under test: `target/umbra`, or what `UMBRA_BIN` names.
///
/// # Panics
/// If it is not there.
#[must_use]
pub fn binary() -> PathBuf {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/umbra");
    let binary = std::env::var_os("UMBRA_BIN").map_or(default, PathBuf::from);
    assert!(binary.exists(), "{} is missing: run make build first", binary.display());
    binary
}

/// A finished run.
#[derive(Debug)]
pub struct Run {
    /// The exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// A command of `umbra` with these words.
#[must_use]
pub fn command(words: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.args(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Waits for `child`, at most `limit`.
///
/// # Panics
/// At the limit, after the child was killed.
#[must_use]
pub fn finish(mut child: Child, limit: Duration) -> Run {
    let mut pipes = (child.stdout.take(), child.stderr.take());
    let reader = |pipe: Option<Box<dyn std::io::Read + Send>>| {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            pipe.map(|mut pipe| pipe.read_to_end(&mut text));
            String::from_utf8_lossy(&text).into_owned()
        })
    };
    let stdout = reader(pipes.0.take().map(|pipe| Box::new(pipe) as _));
    let stderr = reader(pipes.1.take().map(|pipe| Box::new(pipe) as _));
    let begin = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("waiting for a child of ours") {
            break status;
        }
        if begin.elapsed() > limit {
            child.kill().expect("killing a child of ours");
            child.wait().expect("waiting for a child of ours");
            panic!("umbra did not end within {limit:?}: {}", stderr.join().unwrap_or_default());
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    Run { code: status.code(), stdout: stdout.join().unwrap_or_default(), stderr: stderr.join().unwrap_or_default() }
}

/// Runs `umbra` with these words, at most `seconds`.
///
/// # Panics
/// If it cannot be started, and at the limit.
#[must_use]
pub fn umbra(words: &[&str], seconds: u64) -> Run {
    finish(command(words).spawn().expect("starting umbra"), Duration::from_secs(seconds))
}

/// Runs `umbra` with these words and `--out`, and reads the Record. No page was missed, and none was extra.
///
/// # Panics
/// If it does not end with 0.
#[must_use]
pub fn record(words: &[&str], seconds: u64) -> Record {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("record.json");
    let run = umbra(&[words, &["--out", &path.to_string_lossy()]].concat(), seconds);
    assert_eq!(run.code, Some(0), "{words:?}: {}\n{}", run.stderr, run.stdout);
    serde_json::from_str(&std::fs::read_to_string(path).expect("the Record")).expect("a Record")
}

/// A measured row by its name.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn row<'a>(record: &'a Record, name: &str) -> &'a Row {
    record.measured().find(|row| row.name == name).unwrap_or_else(|| panic!("no row {name}"))
}

/// What a row counted under this name.
///
/// # Panics
/// If it did not.
#[must_use]
pub fn count(row: &Row, name: &str) -> u64 {
    row.counters.get(name).unwrap_or_else(|| panic!("{} has no {name}: {:?}", row.name, row.counters)).value
}

/// Whether this machine's /dev/kvm can be used by this process.
#[must_use]
pub fn kvm_here() -> bool {
    umbra::kvm::vm::open().is_ok()
}

/// Asserts what bad input deserves: that exit code, one line, and all of `parts` in it.
///
/// # Panics
/// If it is otherwise.
pub fn refused(words: &[&str], code: i32, parts: &[&str]) {
    let run = umbra(words, 60);
    assert_eq!(run.code, Some(code), "{words:?}: {}", run.stderr);
    assert_eq!(run.stderr.trim_end().lines().count(), 1, "{words:?}: one line, not {:?}", run.stderr);
    for part in parts {
        assert!(run.stderr.contains(part), "{words:?}: {part:?} is not in {:?}", run.stderr);
    }
}

/// What a row of `edits` has to have: that many edits, most of which made an invalidation due, and probes of either outcome that differ nowhere.
///
/// # Panics
/// If it has not.
pub fn edited(row: &Row, edits: u64) {
    let count = |name: &str| count(row, name);
    assert!((edits..edits + 8).contains(&count("edits")), "{}: {} edits", row.name, count("edits"));
    assert!(count("due") * 2 > count("epochs") && count("epochs") < count("edits"), "{}: {:?}", row.name, row.counters);
    assert!(count("probes") > 4 * edits && count("violations") > edits / 2, "{}: {:?}", row.name, row.counters);
    assert!(count("probes") > 2 * count("violations"), "{}: {:?}", row.name, row.counters);
    assert_eq!(count("different"), 0, "{}", row.name);
    let pages = row.truth.pages;
    assert_eq!((pages.missed, pages.extra), (0, 0), "{}", row.name);
    assert!(pages.written > edits / 2 || !row.name.starts_with("umbra:"), "{}: {pages:?}", row.name);
}

/// What a row of `edits --race` has to have: that many edits, accesses of every kind beside them, some of which depended on who was faster, and nothing
/// that differed from what had to be, by L1's pages and by L2's.
///
/// # Panics
/// If it has not.
pub fn raced(row: &Row, edits: u64) {
    let count = |name: &str| count(row, name);
    assert!(count("edits") >= edits && count("due") * 2 > count("epochs"), "{}: {:?}", row.name, row.counters);
    for (name, least) in [("reads", edits), ("writes", edits), ("violations", edits / 4), ("raced", edits / 100)] {
        assert!(count(name) > least, "{}: {:?}", row.name, row.counters);
    }
    assert!(count("overwritten") * 4 < count("writes"), "{}: {:?}", row.name, row.counters);
    assert_eq!(count("different"), 0, "{}", row.name);
    let l2 = row.truth.l2.as_ref().map(|l2| l2.pages).unwrap_or_default();
    for pages in [row.truth.pages, l2] {
        assert_eq!((pages.missed, pages.extra), (0, 0), "{}", row.name);
        assert_eq!(pages.reported, pages.written + pages.explained, "{}", row.name);
        assert!(pages.explained * 20 <= pages.written, "{}: {pages:?}", row.name);
        assert!(pages.written > edits / 4 || !row.name.starts_with("umbra:"), "{}: {pages:?}", row.name);
    }
}

/// What a row of `soak` has to have, however slow the machine is: `soak` goes on until there were four harvests, and four rounds of each of `vcpus`.
///
/// # Panics
/// If it has not.
pub fn soaked(row: &Row, vcpus: u64) {
    let (harvests, rounds) = (count(row, "harvests"), count(row, "guest_rounds"));
    assert!(harvests >= 4 && rounds >= 4 * vcpus, "{}: {harvests} harvests, {rounds} rounds", row.name);
}

/// What a row of `hostile` has to have: cases of both kinds, most of whose probes could be foretold, at least `compared` of them, and nothing that went
/// wrong. Where KVM shadows the table, the cases about Umbra's control page are counted and not made, and L2 gets beyond L1's memory.
///
/// # Panics
/// If it has not.
pub fn besieged(row: &Row, compared: u64) {
    let is_kvms = !row.name.starts_with("umbra:");
    let count = |name: &str| count(row, name);
    assert_eq!(count("faults"), 0, "{}", row.name);
    let control = if is_kvms { "not_here" } else { "control_pages" };
    assert!(
        count(control) * 20 > count("cases") && count(control) * 5 < count("cases"),
        "{}: {:?}",
        row.name,
        row.counters
    );
    assert!(!is_kvms || count("beyond") > 0, "{}: {:?}", row.name, row.counters);
    assert!(
        count("compared") * 2 > count("probes")
            && count("compared") >= compared
            && count("probes") > 5 * count("cases"),
        "{}: {:?}",
        row.name,
        row.counters
    );
    assert!(count("told") * 4 > count("probes") && count("told") < count("probes"), "{}: {:?}", row.name, row.counters);
    // Every L1 that may have broken itself is replaced, and no other; few cases are of that kind.
    let (exposed, machines) = (count("exposed"), count("machines"));
    assert!((exposed..=exposed + 1).contains(&machines), "{}: {:?}", row.name, row.counters);
    assert!((is_kvms || exposed > 0) && exposed * 5 < count("cases"), "{}: {:?}", row.name, row.counters);
    assert!(count("guest_deaths") <= exposed, "{}: {:?}", row.name, row.counters);
}
