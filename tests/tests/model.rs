//! The shadow MMU on its walker, over the command line. No KVM is needed, and nothing depends on the host.

use umbra_tests::{record, refused, umbra};

#[test]
fn every_strategy_holds_the_truth_in_every_format() {
    for (format, leaf, alias, kind) in [
        ("ept", "4k", "1", "contiguous"),
        ("ept", "2m", "3", "scattered"),
        ("npt", "2m", "2", "shared-tables"),
        ("pae", "4k", "4", "contiguous"),
        ("32bit", "4k", "2", "scattered"),
        ("32bit", "2m", "1", "contiguous"),
    ] {
        for (split, collapse) in [("lazy", "none"), ("shatter", "lazy"), ("eager-clear", "in-place")] {
            let words =
                ["run", "model", "--memory", "8M", "--pattern", "random", "--write-percent", "30", "--format", format];
            let more =
                ["--leaf", leaf, "--alias", alias, "--alias-kind", kind, "--split", split, "--collapse", collapse];
            let record = record(&[&words[..], &more].concat(), 120);
            assert_eq!((&*record.host.ground, &*record.host.clock, record.host.deterministic), ("model", "none", true));
            assert!(record.measured().count() >= 5, "{format} {leaf} {split}: rows are missing");
            for row in record.measured() {
                let pages = row.truth.pages;
                assert!(pages.written > 0 && pages.reported >= pages.written, "{format} {leaf} {split} {}", row.name);
                assert_eq!((pages.missed, pages.extra), (0, 0), "{format} {leaf} {split} {}", row.name);
                assert!(row.counters["worst_faults"].value <= 2, "{format} {leaf} {split} {}", row.name);
                assert!(row.memory.is_some_and(|bytes| bytes.table_bytes > 0 && bytes.rmap_bytes > 0));
            }
        }
    }
}

#[test]
fn two_runs_give_the_same_record() {
    let words = ["run", "model", "--memory", "4M", "--alias", "64", "--strategy", "combined", "--split", "eager-clear"];
    let (first, second) = (record(&words, 60), record(&words, 60));
    assert_eq!(first.to_json(), second.to_json());
    // A fault for each block of 64 pages and alias, not for each page.
    let combined = first.measured().next().expect("a row");
    let faults: Vec<u64> =
        combined.phases.iter().filter(|p| p.phase == "dirty" && p.round > 1).map(|p| p.value).collect();
    assert_eq!(faults, [1024, 1024]);
}

#[test]
fn nonsense_is_refused() {
    refused(&["run", "model", "--strategy", "guess"], 2, &["guess", "write-protect"]);
    refused(&["run", "model", "--split", "never"], 2, &["never", "eager-clear"]);
    refused(&["run", "model", "--roots", "quota=3"], 2, &["quota=3", "16"]);
    refused(&["run", "model", "--roots", "some"], 2, &["some", "quota=N"]);
    refused(&["run", "model", "--format", "pae", "--leaf", "1g"], 2, &["largest"]);
    refused(&["run", "model", "--alias", "0"], 2, &["alias"]);
    refused(&["run", "model", "--cache", "9"], 2, &["--cache 9", "MINIMUM/CAPACITY"]);
    refused(&["run", "model", "--extent", "3"], 2, &["3", "power of two"]);
    refused(&["run", "model", "--memory", "5000"], 2, &["5000"]);
    refused(&["run", "model", "--tracker", "clear"], 2, &["--tracker"]);
    // Elsewhere the shadow MMU's options would have no effect.
    refused(&["run", "dirty-log", "--split", "lazy"], 2, &["dirty-log", "model"]);
}

#[test]
fn a_larger_run_says_what_it_does() {
    let words = [
        "run",
        "model",
        "--memory",
        "256M",
        "--strategy",
        "write-protect,log",
        "--accesses-per-page",
        "4",
        "--rounds",
        "12",
    ];
    let run = umbra(&words, 200);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert!(
        run.stdout.contains("65536 L1 pages (256 MiB)") && run.stdout.contains("umbra lab model"),
        "{}",
        run.stdout
    );
}
