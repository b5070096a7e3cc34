//! The instrument: matrix, comparison, a kernel of one's own. Two boots of one spec, and a third that is killed at once; what needs no machine
//! is tried on the shadow MMU's Records.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};
use umbra::lab::shelf;
use umbra::progress::Progress;
use umbra::report::record::{Record, Rows};
use umbra_tests::{command, finish, record, refused, umbra};

/// The work that both boots do.
const WORK: &[&str] = &["dirty-log", "--memory", "4M", "--tracker", "bitmap,clear"];

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

/// The spec: the shelf's kernel, the same kernel as if it were the user's own with a second run in its boot (so its image is shifted), and a
/// parameter that no kernel has.
fn spec(directory: &Path) -> PathBuf {
    let kernel = shelf::shelf().kernel(None).expect("a default").ensure(&Progress::stderr()).expect("the kernel");
    let image = kernel.vmlinuz();
    let modules = image.parent().expect("a directory");
    let own = format!("kernel = \"{}\"\nmodules = \"{}\"\n", words(&image), words(modules));
    let text = format!(
        "[axes]\nmemory = \"4M\"\ntracker = \"bitmap,clear\"\n\n[[run]]\nkernel = \"6.12\"\n\n[[run]]\n{own}\n[[run]]\n{own}\
         memory = \"2M\"\n\n[[run]]\nkernel = \"6.12\"\n\"kvm.no_such_parameter\" = \"1\"\n"
    );
    let path = directory.join("spec.toml");
    fs::write(&path, text).expect("a spec");
    path
}

fn matrix(spec: &Path, out: &Path) -> Child {
    command(&["lab", "matrix", "--spec", words(spec), "--boots", "1", "--out", words(out)]).spawn().expect("umbra")
}

#[test]
fn a_matrix_goes_on_where_it_was_killed_and_shifted_images_are_equal() {
    let directory = tempfile::tempdir().unwrap();
    let (spec, out) = (spec(directory.path()), directory.path().join("m.json"));
    let part = directory.path().join("m.json.part");

    // Killed as soon as one boot is done: the other one has begun then.
    let mut killed = matrix(&spec, &out);
    let begun = Instant::now();
    while !fs::read(&part).is_ok_and(|bytes| bytes.contains(&b'\n')) {
        assert!(begun.elapsed() < Duration::from_secs(300), "the first boot does not end");
        assert!(killed.try_wait().unwrap().is_none(), "the matrix ended: {}", finish(killed, Duration::ZERO).stderr);
        std::thread::sleep(Duration::from_millis(20));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(!out.exists());

    let run = finish(matrix(&spec, &out), Duration::from_secs(300));
    assert_eq!(run.code, Some(0), "{}\n{}", run.stderr, run.stdout);
    // What was done is not done again.
    assert!(run.stderr.contains("boot 1 of 1") && !run.stderr.contains("boot 2"), "{}", run.stderr);
    assert!(!part.exists(), "what is complete needs no part");
    // What no kernel has is skipped with its reason, and is no row.
    assert!(run.stdout.contains("not here: --param kvm.no_such_parameter=1"), "{}", run.stdout);

    let records: Vec<Record> = serde_json::from_slice(&fs::read(&out).unwrap()).unwrap();
    let [shelf, own, _, skipped] = &records[..] else { panic!("{} Records", records.len()) };
    assert!(matches!(&skipped.rows[..], [Rows::NotHere { .. }]));
    let package = own.host.kernel_package.as_deref().unwrap_or_default();
    assert!(package.starts_with("own 6.12") && package.contains("modules "), "{package}");
    assert_eq!(own.host.kernel, shelf.host.kernel);
    assert_ne!(own.host.image_sha256, shelf.host.image_sha256, "the second image is not shifted");
    compares(directory.path(), shelf, own);
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
    refused(&[&["lab", "ab", "--kernel", words(&image)], WORK].concat(), 2, &["not a bzImage"]);
    refused(&[&["lab", "ab", "--kernel", "6.12", "--b-kernel", "2.4"], WORK].concat(), 2, &["kernel 2.4"]);
}
