//! The trackers outside KVM (`pagemap`, `pagemap-2step`, `uffd-wp`, `soft-dirty`, `mincore`) on this machine's /dev/kvm. Where there is none, or the kernel
//! lacks what a tracker needs, every test checks that `umbra` says so.

use umbra::report::{Record, Rows};
use umbra_tests::{kvm_here, record, refused, umbra};

const OUTSIDE: [&str; 5] = ["pagemap", "pagemap-2step", "uffd-wp", "soft-dirty", "mincore"];

/// Those of them that this machine has; for the others, that a run by name ends with 3 and says what is missing. None without KVM.
fn here() -> Vec<&'static str> {
    if !kvm_here() {
        refused(&["run", "dirty-log", "--tracker", "pagemap"], 3, &["/dev/kvm"]);
        return Vec::new();
    }
    let all = record(&["run", "dirty-log", "--memory", "1M", "--rounds", "1", "--tracker", "all"], 60);
    assert_eq!(all.rows.len(), 9);
    let missing = |name: &str| all.rows.iter().any(|row| matches!(row, Rows::NotHere { name: row, .. } if row == name));
    for name in OUTSIDE.into_iter().filter(|name| missing(name)) {
        let part = match name {
            "soft-dirty" => "CONFIG_MEM_SOFT_DIRTY",
            "mincore" => panic!("mincore is everywhere"),
            _ => "userfaultfd needs",
        };
        let run = umbra(&["run", "dirty-log", "--memory", "1M", "--tracker", name], 60);
        assert_eq!(run.code, Some(3), "{name}: {}", run.stderr);
        assert!(part == "userfaultfd needs" || run.stderr.contains(part), "{name}: {}", run.stderr);
        assert!(run.stderr.contains(name) && run.stderr.contains("is missing here"), "{name}: {}", run.stderr);
    }
    OUTSIDE.into_iter().filter(|name| !missing(name)).collect()
}

fn dirty_log(trackers: &[&str], words: &[&str]) -> Record {
    let trackers = trackers.join(",");
    record(&[&["run", "dirty-log", "--tracker", &trackers], words].concat(), 240)
}

#[test]
fn what_is_reported_is_what_was_written() {
    let trackers = here();
    if trackers.is_empty() {
        return;
    }
    for backing in ["anonymous", "thp", "shmem"] {
        let words =
            ["--memory", "8M", "--slots", "3", "--pattern", "random", "--write-percent", "25", "--backing", backing];
        let record = dirty_log(&trackers, &words);
        assert_eq!(record.measured().count(), trackers.len());
        for row in record.measured() {
            let pages = row.truth.pages;
            assert_eq!((pages.written, pages.missed, pages.extra), (6 * 512, 0, 0), "{backing} {}", row.name);
            match row.name.as_str() {
                // Every page is resident, in every round.
                "mincore" => assert_eq!(pages.reported, 6 * 2048, "{backing}"),
                // Huge pages have one bit each.
                "soft-dirty" if backing == "thp" => assert!(pages.reported >= pages.written),
                // A memfd's huge pages, where the system's default asks for them, have one mark each.
                "pagemap" | "pagemap-2step" if backing == "shmem" => assert!(pages.reported >= pages.written),
                _ => assert_eq!((pages.reported, pages.explained), (pages.written, 0), "{backing} {}", row.name),
            }
        }
        let counter = |row: &str, name: &str| {
            record.measured().find(|found| found.name == row).map(|row| row.counters[name].value)
        };
        // Three rounds of 512 pages in the observed pass, a fault each.
        assert!(counter("uffd-wp", "uffd_wp_faults").is_none_or(|faults| faults == 3 * 512), "{backing}");
        assert!(counter("pagemap", "pagemap_scans").is_none_or(|scans| scans >= 9), "{backing}");
    }
}

#[test]
fn the_vms_slots_are_never_set_to_log() {
    for row in dirty_log_of_one("pagemap-2step") {
        // KVM's log write-protects and repairs that on its fast path; here only the host's protection is at work, and each fault of it takes the slow one.
        assert_eq!(row.counters.get("pf_fast").map_or(0, |fast| fast.value), 0);
        assert!(row.counters.get("pf_fixed").is_none_or(|fixed| fixed.value >= 3 * 1024), "{:?}", row.counters);
    }
}

fn dirty_log_of_one(tracker: &'static str) -> Vec<umbra::report::Row> {
    if !here().contains(&tracker) {
        return Vec::new();
    }
    let record = dirty_log(&[tracker], &["--memory", "4M", "--backing", "anonymous"]);
    record.measured().cloned().collect()
}

#[test]
fn no_write_of_two_vcpus_is_lost() {
    let trackers = here();
    if trackers.is_empty() {
        return;
    }
    for backing in ["anonymous", "thp", "shmem"] {
        let names = trackers.join(",");
        let words = ["run", "soak", "--memory", "8M", "--vcpus", "2", "--slots", "2", "--seconds", "8"];
        let record = record(&[&words[..], &["--backing", backing, "--tracker", &names]].concat(), 120);
        for row in record.measured() {
            assert_eq!(row.truth.pages.missed, 0, "{backing} {}", row.name);
            umbra_tests::soaked(row, 2);
        }
    }
}

#[test]
fn a_lost_page_is_seen() {
    for tracker in here() {
        let words =
            ["run", "dirty-log", "--memory", "4M", "--slots", "2", "--tracker", tracker, "--inject", "lose-page"];
        let run = umbra(&words, 60);
        assert_eq!(run.code, Some(1), "{tracker}: {}", run.stderr);
        assert!(run.stderr.contains("was not reported") && run.stderr.contains(tracker), "{tracker}: {}", run.stderr);
        let words = ["run", "soak", "--memory", "8M", "--seconds", "2", "--tracker", tracker, "--inject", "lose-page"];
        let run = umbra(&words, 60);
        assert_eq!(run.code, Some(1), "{tracker}: {}{}", run.stdout, run.stderr);
    }
}

#[test]
fn an_extra_page_is_seen() {
    for tracker in here().into_iter().filter(|&tracker| tracker != "mincore") {
        let words = ["--memory", "4M", "--backing", "anonymous", "--tracker", tracker, "--inject", "extra-page"];
        let run = umbra(&[&["run", "dirty-log"], &words[..]].concat(), 60);
        assert_eq!(run.code, Some(1), "{tracker}: {}", run.stderr);
        assert!(run.stderr.contains("not written") && run.stderr.contains(tracker), "{tracker}: {}", run.stderr);
    }
}

#[test]
fn the_snapshot_table_has_a_row_for_each_tracker() {
    let trackers = here();
    if trackers.is_empty() {
        return;
    }
    let run = umbra(&["run", "snapshot", "--memory", "2M", "--rounds", "2"], 240);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    for tracker in OUTSIDE.iter().chain(&["bitmap", "clear", "clear+init-set", "ring"]) {
        let mut lines = run.stdout.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let row = lines.find(|line| line.first() == Some(tracker) && line.len() == 11);
        let not_here = format!("{tracker}: not here: ");
        match row {
            Some(row) => assert_eq!(row[10], "0", "{tracker} lost pages: {}", run.stdout),
            None => assert!(run.stdout.contains(&not_here), "{tracker}: {}", run.stdout),
        }
    }
    let run = umbra(&["run", "snapshot", "--memory", "1M", "--tracker", "pagemap,ring", "--inject", "lose-page"], 120);
    assert_eq!(run.code, Some(1), "{}", run.stdout);
}
