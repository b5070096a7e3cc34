//! Random edits of L1's table, and a malicious L1, on this machine's KVM. nested.rs and vmx.rs have the lab's.

use umbra_tests::{kvm_here, record, refused};

/// The same on this host, with two vCPUs that edit and probe in turn; and a walker that misses an epoch is noticed.
#[test]
fn random_edits_are_seen_by_l2_on_this_host() {
    if !kvm_here() {
        return refused(&["run", "edits", "--nesting", "umbra"], 3, &["/dev/kvm"]);
    }
    for options in [
        "--memory 4M --alias 2 --vcpus 2",
        "--memory 2M --format npt --edits 300 --seed 2",
        "--memory 4M --alias 3 --alias-kind scattered --accessed-dirty clear --extent 8 --edits 300 --seed 3",
    ] {
        let words: Vec<_> = ["run", "edits", "--nesting", "umbra"].into_iter().chain(options.split(' ')).collect();
        let record = record(&words, 120);
        assert_eq!(record.faults(), [""; 0], "{options}");
        assert!(record.measured().count() >= 2, "{options}");
        let edits = if options.contains("--edits 300") { 300 } else { 500 };
        for row in record.measured() {
            umbra_tests::edited(row, edits);
        }
    }
    let lost = ["--nesting", "umbra", "--memory", "2M", "--strategy", "log", "--inject", "lose-edit"];
    let run = umbra_tests::umbra(&[&["run", "edits"], &lost[..]].concat(), 120);
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    assert!(run.stderr.contains("epoch 3, probe") && run.stderr.contains("the walker says"), "{}", run.stderr);
}

/// Edits that race L2s of other vCPUs, under each way to track that this host has.
#[test]
fn edits_that_race_l2_leave_it_nothing_of_the_old_table() {
    if !kvm_here() {
        return refused(&["run", "edits", "--race", "--vcpus", "2", "--nesting", "umbra"], 3, &["/dev/kvm"]);
    }
    for options in [
        "--memory 4M --alias 2 --vcpus 2 --edits 600",
        "--memory 2M --format npt --vcpus 2 --edits 600 --seed 2 --strategy log,twin",
        "--memory 4M --alias 3 --alias-kind scattered --accessed-dirty clear --extent 8 --vcpus 3 --edits 600 --seed 3 --strategy log",
    ] {
        let words = ["run", "edits", "--race", "--nesting", "umbra"].into_iter().chain(options.split(' '));
        let record = record(&words.collect::<Vec<_>>(), 300);
        assert_eq!(record.faults(), [""; 0], "{options}");
        assert!(record.measured().count() > 0, "{options}");
        for row in record.measured() {
            umbra_tests::raced(row, 600);
        }
    }
}

/// Each check of a race fails where it has to: L1 or the monitor does wrong.
#[test]
fn what_goes_wrong_in_a_race_is_caught() {
    if !kvm_here() {
        return;
    }
    for (fault, found) in [
        ("lose-invalidation", "lead_to: []"),
        ("late-invalidation", "lead_to: []"),
        ("lose-transfer", "differs from its copy"),
        ("lose-page", "differs from its copy"),
    ] {
        let words = "run edits --race --vcpus 2 --memory 4M --alias 2 --nesting umbra --strategy log --inject";
        let words: Vec<_> = words.split(' ').chain([fault]).collect();
        let run = umbra_tests::umbra(&words, 120);
        assert_eq!(run.code, Some(1), "{fault}: {}", run.stderr);
        assert!(run.stderr.contains(found), "{fault}: {}", run.stderr);
    }
}

/// Cases of a malicious L1 on this host; and a page that EPT02 does not grant is noticed.
#[test]
fn a_malicious_l1_gets_nothing_but_what_its_table_says() {
    if !kvm_here() {
        return refused(&["run", "hostile"], 3, &["/dev/kvm"]);
    }
    for options in [
        "--memory 4M --alias 2 --strategy log --mechanism kvm-clear --edits 1600",
        "--memory 2M --alias 3 --strategy log --mechanism kvm-bitmap --edits 500 --format npt --seed 5 --vcpus 2",
    ] {
        let words: Vec<_> = ["run", "hostile"].into_iter().chain(options.split(' ')).collect();
        let record = record(&words, 300);
        assert_eq!(record.faults(), [""; 0], "{options}");
        for row in record.measured() {
            umbra_tests::besieged(row, 2000);
        }
    }
    let stray = ["--memory", "2M", "--edits", "10", "--strategy", "log", "--inject", "stray-page"];
    let run = umbra_tests::umbra(&[&["run", "hostile"], &stray[..]].concat(), 120);
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    assert!(
        run.stderr.contains("case 3 (--seed 1 --edits 4)") && run.stderr.contains("EPT02 has None"),
        "{}",
        run.stderr
    );
    // An L1 that ends though it did nothing that would break it is the monitor's fault; one that may have broken itself is not. Either way another goes on.
    let broken =
        ["--memory", "2M", "--edits", "64", "--strategy", "log", "--mechanism", "kvm-clear", "--inject", "break-l1"];
    let run = umbra_tests::umbra(&[&["run", "hostile"], &broken[..]].concat(), 120);
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    assert!(run.stderr.contains("L1 ended, and nothing let L2 write L1's own memory"), "{}", run.stderr);
    let count = |name: &str| {
        let line = run.stdout.lines().find(|line| line.trim_start().starts_with(&format!("{name} (umbra)")));
        line.and_then(|line| line.split_whitespace().last()?.parse::<u64>().ok())
            .unwrap_or_else(|| panic!("{name}: {}", run.stdout))
    };
    assert_eq!((count("cases"), count("faults")), (64, 1), "{}", run.stdout);
    assert!(count("guest_deaths") > 0 && count("guest_deaths") == count("exposed"), "{}", run.stdout);
    assert_eq!(run.stderr.lines().filter(|line| line.contains("L1 ended")).count(), 1, "{}", run.stderr);
}
