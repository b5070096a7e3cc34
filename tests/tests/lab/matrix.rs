//! The matrix, comparison, a kernel of one's own. One spec of two boots, killed between them; what needs no machine is tried on the shadow MMU's Records.

use crate::boots::{Boot, SHIFT};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use umbra::lab::shelf;
use umbra::progress::Progress;
use umbra::report::record::{Record, Rows};
use umbra_tests::{Run, command, count, finish, record, refused, row, umbra};

/// The runs behind the shift: work that is compared, the scenarios that watch what tracking leaves behind, and the guest's older paging modes.
pub const JOBS: &[&str] = &[
    WORK,
    COLLAPSE,
    RATE,
    "dirty-log --memory 4M --tracker bitmap,clear --guest-paging pae --backing anonymous --slots 2 --pattern random --write-percent 50",
    "dirty-log --memory 4M --tracker bitmap,clear --guest-paging 32bit --backing anonymous --slots 2 --pattern random --write-percent 50",
];
const WORK: &str = "dirty-log --memory 4M --tracker bitmap,clear";
const COLLAPSE: &str = "collapse --memory 4M --tracker bitmap";
const RATE: &str = "dirty-rate --memory 4M --rate 50 --tracker bitmap,pagemap-2step --strategy write-protect";

fn words(path: &Path) -> &str {
    path.to_str().expect("a path of words")
}

/// Writes one Record as `--out` does.
fn write(directory: &Path, name: &str, record: &Record) -> PathBuf {
    let path = directory.join(name);
    fs::write(&path, record.to_json()).expect("a file");
    path
}

/// The Record with every timed phase of its first row longer by `thousandths`.
fn grown(record: &Record, thousandths: u64) -> Record {
    let mut other = record.clone();
    let Some(Rows::Measured(row)) = other.rows.first_mut() else { panic!("a measured row") };
    for phase in row.phases.iter_mut().filter(|phase| phase.pass == "timed") {
        phase.value += phase.value * thousandths / 1000;
    }
    other
}

/// The spec: the shelf's kernel, the same kernel as if it were the user's own, and a parameter that no kernel has.
fn spec(directory: &Path) -> PathBuf {
    let kernel = shelf::shelf().kernel(None).expect("a default").ensure(&Progress::stderr()).expect("the kernel");
    let image = kernel.vmlinuz();
    let modules = image.parent().expect("a directory");
    let own = format!("kernel = \"{}\"\nmodules = \"{}\"\n", words(&image), words(modules));
    let mut text = String::new();
    for (boot, kernel) in [(Boot::First, "kernel = \"6.12\"\n"), (Boot::Second, &own)] {
        for job in boot.jobs() {
            let mut job = job.split_whitespace();
            let scenario = job.next().expect("a scenario");
            writeln!(text, "[[run]]\n{kernel}scenario = \"{scenario}\"").expect("a string");
            while let (Some(option), Some(value)) = (job.next(), job.next()) {
                let axis = option.strip_prefix("--").expect("an option");
                writeln!(text, "{axis} = \"{value}\"").expect("a string");
            }
        }
    }
    text += "[[run]]\nkernel = \"6.12\"\n\"kvm.no_such_parameter\" = \"1\"\n";
    let path = directory.join("spec.toml");
    fs::write(&path, text).expect("a spec");
    path
}

fn matrix(spec: &Path, out: &Path) -> Child {
    command(&["lab", "matrix", "--spec", words(spec), "--boots", "1", "--out", words(out)]).spawn().expect("umbra")
}

/// What came of the matrix.
pub struct Outcome {
    /// The end of the second try.
    run: Run,
    /// The Records: those of both boots, and of what was skipped.
    pub records: Vec<Record>,
    /// Whether the output was there when the first try was killed, and what was done when the second one had ended.
    left: [bool; 2],
}

/// The matrix, killed as soon as one boot is done (the other one has begun then), and begun again.
pub fn both() -> &'static Outcome {
    static OUTCOME: OnceLock<Outcome> = OnceLock::new();
    OUTCOME.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a directory");
        let (spec, out) = (spec(directory.path()), directory.path().join("m.json"));
        let part = directory.path().join("m.json.part");
        let mut killed = matrix(&spec, &out);
        let begun = Instant::now();
        while !fs::read(&part).is_ok_and(|bytes| bytes.contains(&b'\n')) {
            let goes_on = begun.elapsed() < LIMIT && killed.try_wait().expect("its state").is_none();
            assert!(goes_on, "the first boot does not end well: {}", finish(killed, Duration::ZERO).stderr);
            std::thread::sleep(Duration::from_millis(20));
        }
        killed.kill().expect("a kill");
        killed.wait().expect("its end");
        let whole = out.exists();
        let run = finish(matrix(&spec, &out), LIMIT);
        let records = fs::read(&out).unwrap_or_else(|error| panic!("{error}: {}\n{}", run.stderr, run.stdout));
        Outcome { run, records: serde_json::from_slice(&records).expect("Records"), left: [whole, part.exists()] }
    })
}

/// One boot takes four minutes on a quiet machine, and several times that on a busy one.
const LIMIT: Duration = Duration::from_secs(3000);

#[test]
fn a_matrix_goes_on_where_it_was_killed() {
    let Outcome { run, records, left } = both();
    assert_eq!(*left, [false, false], "an output before its time, or a part of what is complete");
    assert_eq!(run.code, Some(0), "{}\n{}", run.stderr, run.stdout);
    // What was done is not done again.
    assert!(run.stderr.contains("boot 1 of 1") && !run.stderr.contains("boot 2"), "{}", run.stderr);
    // What no kernel has is skipped with its reason, and is no row.
    assert!(run.stdout.contains("not here: --param kvm.no_such_parameter=1"), "{}", run.stdout);
    let skipped = records.last().expect("a Record");
    assert!(matches!(&skipped.rows[..], [Rows::NotHere { .. }]));
    assert_eq!(records.len(), 2 * Boot::First.jobs().len() + 1);
}

#[test]
fn a_kernel_of_ones_own_is_named_by_its_files() {
    let (shelf, own) = (Boot::First.good(WORK), Boot::Second.good(WORK));
    let package = own.host.kernel_package.as_deref().unwrap_or_default();
    assert!(package.starts_with("own 6.12") && package.contains("modules "), "{package}");
    assert_eq!(own.host.kernel, shelf.host.kernel);
}

/// Two boots: what ran in both before the shift is equal to the instruction.
#[test]
fn two_boots_agree_to_the_instruction() {
    let (first, second) = (Boot::First.jobs(), Boot::Second.jobs());
    let shift = first.iter().zip(&second).position(|(first, second)| first != second).expect("a shift");
    assert_eq!((first[shift], second[shift]), (SHIFT[0], SHIFT[1]));
    assert!(shift > 10);
    for job in &first[..shift] {
        let mut second = Boot::Second.record(job).clone();
        let first = Boot::First.record(job);
        assert_eq!(first.host.clock, "instructions");
        assert!(first.host.deterministic && first.host.image_sha256.is_some() && first.host.kernel_package.is_some());
        // The same bytes, but for a digit of the plan, by another name.
        second.host.kernel_package.clone_from(&first.host.kernel_package);
        second.host.image_sha256.clone_from(&first.host.image_sha256);
        assert_eq!(first.to_json(), second.to_json(), "{job}");
    }
}

/// The same work, in another place and at another time.
#[test]
fn what_is_merely_shifted_is_equal_and_a_thousandth_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let (first, second) = (Boot::First.good(WORK), Boot::Second.good(WORK));
    assert_ne!(first.host.image_sha256, second.host.image_sha256, "the second image is not shifted");
    compares(directory.path(), first, second);
}

#[test]
fn older_paging_modes_are_measured() {
    for job in &JOBS[3..] {
        let record = Boot::First.good(job);
        let mode = record.config["guest-paging"].as_str().expect("a mode");
        assert!(job.contains(mode));
        for row in record.measured() {
            // Three rounds of two passes, half of 1024 pages each.
            assert_eq!(row.truth.pages.written, 6 * 512, "{mode} {}", row.name);
        }
    }
}

/// Two huge mappings are split for the log, and there again when the guest has touched its pages afterwards; then nothing faults.
#[test]
fn huge_pages_come_back() {
    let collapse = Boot::First.good(COLLAPSE);
    let names: Vec<&str> = collapse.measured().map(|row| row.name.as_str()).collect();
    assert_eq!(names, ["bitmap", "bitmap cancelled"]);
    for row in collapse.measured() {
        let counted = |name: &str| count(row, name);
        let huge = ["pages_2m_before", "pages_2m_logging", "pages_2m_settled"].map(counted);
        assert_eq!((huge, counted("pf_settled")), ([2, 0, 2], 0), "{}", row.name);
    }
}

/// KVM's log, the pagemap and the shadow MMU find the rate to 2%; sampling has a row. What the shadow MMU split is whole again only if it collapses.
#[test]
fn rates_are_right() {
    let record = Boot::First.good(RATE);
    for row in record.measured() {
        let rate = row.rate.as_ref().expect("a rate");
        assert!(rate.found > 0 && rate.certain > 0 && rate.certain <= rate.possible, "{}: {rate:?}", row.name);
        if row.name != "sampling" {
            assert!(rate.error_permille.abs() <= 20, "{}: {rate:?}", row.name);
        }
    }
    let huge = |name: &str| {
        let row = row(record, name);
        (count(row, "pages_2m_before"), count(row, "pages_2m_left"))
    };
    assert_eq!(huge("umbra:write-protect no collapse"), (2, 0));
    assert_eq!(huge("umbra:write-protect in-place"), (2, 2));
    assert_eq!(record.measured().count(), 5);
}

/// `a` and `b` are the same work in images that are merely shifted.
fn compares(directory: &Path, a: &Record, b: &Record) {
    let (in_a, in_b) = (write(directory, "a.json", a), write(directory, "b.json", b));
    let shifted = umbra(&["compare", words(&in_a), words(&in_b), "--fail-over", "0.01"], 30);
    assert_eq!(shifted.code, Some(0), "a shifted image is no difference: {}\n{}", shifted.stderr, shifted.stdout);
    assert!(shifted.stdout.contains(" 0 differ"), "{}", shifted.stdout);

    let more = write(directory, "more.json", &grown(b, 1));
    let flagged = umbra(&["compare", words(&in_a), words(&more), "--fail-over", "0.05"], 30);
    assert_eq!(flagged.code, Some(1), "{}", flagged.stdout);
    assert!(flagged.stderr.contains("bitmap: dirty 2+ costs +0.1"), "{}", flagged.stderr);
    assert!(!flagged.stderr.contains("clear:"), "only one row grew: {}", flagged.stderr);

    // One image twice is equal to the instruction, and one instruction is a difference.
    let same = umbra(&["compare", words(&in_a), words(&in_a), "--fail-over", "0"], 30);
    assert_eq!(same.code, Some(0), "{}", same.stderr);
    let mut other = a.clone();
    let Some(Rows::Measured(row)) = other.rows.first_mut() else { panic!("a row") };
    row.phases.iter_mut().find(|phase| phase.phase == "enable").expect("a phase").value += 1;
    let other = write(directory, "other.json", &other);
    assert_eq!(umbra(&["compare", words(&in_a), words(&other), "--fail-over", "0"], 30).code, Some(1));
}

#[test]
fn records_without_a_clock_compare_exactly() {
    let directory = tempfile::tempdir().unwrap();
    let model =
        |more: &[&str]| record(&[&["run", "model", "--memory", "4M", "--strategy", "twin"], more].concat(), 120);
    let a = model(&[]);
    let (in_a, in_b) = (write(directory.path(), "a.json", &a), write(directory.path(), "b.json", &grown(&a, 500)));
    let said = umbra(&["compare", words(&in_a), words(&in_b)], 30);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    assert!(said.stdout.contains("Events, not time") && !said.stdout.contains("Wall-clock"), "{}", said.stdout);
    assert_eq!(umbra(&["compare", words(&in_a), words(&in_b), "--fail-over", "1"], 30).code, Some(1));

    let other = write(directory.path(), "c.json", &model(&["--rounds", "2"]));
    refused(
        &["compare", words(&in_a), words(&other)],
        2,
        &["cannot be compared", "config rounds is 3", "2 in the other"],
    );
    refused(&["compare", words(&in_a), "/nonexistent.json"], 2, &["/nonexistent.json", "No such file"]);
}

#[test]
fn specs_and_kernels_that_are_none_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let spec = directory.path().join("s.toml");
    let refuse = |text: &str, parts: &[&str]| {
        fs::write(&spec, text).unwrap();
        refused(&["lab", "matrix", "--spec", words(&spec)], 2, parts);
    };
    refuse("[axes]\nflavour = \"strange\"\n", &["s.toml", "axis flavour", "there is no such axis", "backing"]);
    refuse("[axes]\nkernel = \"2.4\"\n", &["2.4", "not on the shelf"]);
    refuse("[axes\n", &["s.toml", "line 1"]);
    fs::write(directory.path().join("bzImage"), "no kernel").unwrap();
    let image = directory.path().join("bzImage");
    refused(&["lab", "--kernel", words(&image), "dirty-log"], 2, &["not a bzImage", "no boot header"]);
    refused(&["lab", "ab", "--kernel", words(&image), "dirty-log"], 2, &["not a bzImage"]);
    refused(&["lab", "ab", "--kernel", "6.12", "--b-kernel", "2.4", "dirty-log"], 2, &["kernel 2.4"]);
    // A real kernel, built without KVM for this machine as far as its modules tell.
    let kernel = shelf::shelf().kernel(None).expect("a default").ensure(&Progress::stderr()).expect("the kernel");
    for module in kernel.modules().iter().filter(|module| module.name != "kvm_amd") {
        fs::copy(kernel.module(module), directory.path().join(format!("{}.ko", module.name))).unwrap();
    }
    let image = kernel.vmlinuz();
    let own = ["lab", "--kernel", words(&image), "--modules", words(directory.path()), "dirty-log"];
    refused(&own, 2, &["no kvm-amd", "neither kvm_amd.ko nor a modules.builtin"]);
}
