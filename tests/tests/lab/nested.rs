//! L2: in the lab on KVM's own nested SVM, and what a host without nesting says.
//!
//! Figures hold for the pinned kernel package, as in figures.rs; with another only the truth is checked.

use crate::boots::{self, Boot, args, is_pinned};
use umbra::Failure;
use umbra::hostmm::userfault::{Mode, Userfault};
use umbra::nested::source::Kind;
use umbra_tests::{count, kvm_here, record, refused, row};

/// The runs whose truth holds.
pub const JOBS: &[&str] = &[
    FIRST_TOUCH,
    "nested --memory 8M --tracker clear+init-set --leaf 2m --rounds 2 --nesting svm",
    "nested --memory 4M --tracker bitmap --backing anonymous --accessed-dirty preset --rounds 1 --nesting svm",
    "nested --memory 4M --tracker clear,ring-1024 --alias 3 --alias-kind scattered --pattern random --write-percent 25 --slots 2 --vcpus 2 --strategy log",
    "nested --memory 2M --tracker bitmap --alias 4 --alias-kind shared-tables --rounds 2 --nesting svm --backing anonymous",
    "nested --memory 4M --tracker bitmap --alias 2 --leaf 2m --alias-kind scattered --guest-page 2m --rounds 2 --strategy log",
    "nested --memory 256K --tracker bitmap --fill-batch 1 --rounds 1 --nesting svm",
    "nested --memory 2M --tracker bitmap --fill-batch 1 --rounds 1 --nesting svm --backing anonymous",
    "nested --memory 4M --tracker bitmap --backing anonymous --first-touch logged --first-reads counted --rounds 1 --nesting umbra --mechanism kvm-bitmap",
    "nested --memory 2M --tracker bitmap --backing anonymous --alias-kind scattered --rounds 1 --nesting umbra --mechanism kvm-bitmap",
    "nested --memory 16K --tracker bitmap --backing anonymous --alias 1025 --rounds 1 --nesting svm,umbra --mechanism kvm-bitmap",
    TWIN,
];
const FIRST_TOUCH: &str = "nested --memory 16M --tracker clear --backing anonymous --rounds 2 --strategy log,write-protect --mechanism kvm-bitmap,kvm-clear,pagemap,mprotect";
const TWIN: &str = "nested --memory 16M --tracker bitmap --leaf 2m --rounds 3 --pattern random --write-percent 50 --nesting umbra --strategy twin,twin+log --mechanism mprotect,kvm-clear";
/// What runs without the instruction clock: runs that go wrong, the last of them with a firmware that writes a page too few; 500 random edits of L1's
/// table; a malicious L1, and faults that it must not be blamed for; edits that race L2.
pub const FAST: &[&str] = &[
    LOSES_A_PAGE,
    TWIN_LOSES_A_PAGE,
    PAE,
    ONE_WRITE_SHORT,
    EDITS,
    HOSTILE[0],
    HOSTILE[1],
    HOSTILE_FAULTS[0],
    HOSTILE_FAULTS[1],
    RACE,
];
const LOSES_A_PAGE: &str = "nested --memory 1M --tracker clear --inject lose-page --nesting svm";
const TWIN_LOSES_A_PAGE: &str = "nested --memory 4M --tracker clear --leaf 2m --rounds 2 --nesting umbra --strategy twin --mechanism mprotect --inject lose-page";
const PAE: &str = "nested --memory 1M --tracker clear --format pae --nesting svm";
const ONE_WRITE_SHORT: &str = "nested --memory 1M --tracker clear --nesting svm --firmware one-write-short";
const EDITS: &str = "edits --memory 4M --alias 2 --nesting svm,umbra --strategy log,write-protect";
/// Alone, and with a vCPU that attacks while the other one's L2 probes.
const HOSTILE: [&str; 2] = [
    "hostile --memory 4M --alias 2 --nesting svm,umbra --strategy log,write-protect --mechanism kvm-clear,mprotect --edits 250 --seed 100",
    "hostile --memory 4M --alias 2 --nesting svm,umbra --strategy log --mechanism kvm-clear --edits 150 --seed 300 --vcpus 2",
];
/// KVM maps a page that L1's table does not grant; L1 is broken where nothing let it break itself.
const HOSTILE_FAULTS: [&str; 2] = [
    "hostile --memory 4M --alias 2 --nesting svm --edits 8 --inject stray-page",
    "hostile --memory 4M --alias 2 --nesting svm --edits 8 --inject break-l1",
];
const RACE: &str = "edits --race --vcpus 2 --memory 4M --alias 2 --nesting svm,umbra --strategy log,write-protect --mechanism kvm-clear,mprotect,pagemap";

fn good(job: usize) -> &'static umbra::report::Record {
    Boot::First.good(JOBS[job])
}

/// A phase of the timed pass; the cheapest of the rounds.
fn timed(row: &umbra::report::Row, phase: &str) -> u64 {
    boots::timed(row, phase, 0)
}

#[test]
fn every_page_is_right() {
    for job in JOBS {
        let record = Boot::First.good(job);
        let args = args(job);
        let (pages, aliases) = (args.memory / 4096, args.shadow.alias.unwrap_or(1));
        assert!(record.measured().count() > 0);
        for row in record.measured() {
            let l2 = row.truth.l2.as_ref();
            assert_eq!(l2.is_some(), !row.name.starts_with("plain:") || aliases > 1, "{}: {}", job, row.name);
            let Some(l2) = l2 else { continue };
            for (l1, l2) in row.truth.rounds.iter().zip(&l2.rounds) {
                let l2_writes = pages * aliases * args.write_percent / 100;
                assert_eq!(l2.pages.written, l2_writes, "{}: {} round {}", job, row.name, l2.round);
                // Aliases of one page that are written are one page of L1, and each report of it one of each alias.
                assert!(l1.pages.written <= l2_writes && l1.pages.written * aliases >= l2_writes);
                assert_eq!(l2.pages.reported, l1.pages.reported * aliases);
            }
        }
    }
}

/// 500 edits of EPT12 by epochs: KVM's nested SVM, Umbra's shadow MMU and its software walker agree on every value and every violation.
#[test]
fn l2_sees_the_same_after_random_edits_whoever_shadows_the_table() {
    let record = Boot::Wall.good(EDITS);
    for name in [
        "svm",
        "umbra:log@kvm-bitmap",
        "umbra:log@kvm-clear",
        "umbra:log@kvm-ring",
        "umbra:log@pagemap",
        "umbra:write-protect@mprotect",
        "umbra:write-protect@uffd-wp",
    ] {
        umbra_tests::edited(row(record, name), 500);
    }
}

#[test]
fn a_malicious_l1_meets_the_same_walls_in_the_lab() {
    let rows = [&["svm", "umbra:log@kvm-clear", "umbra:write-protect@mprotect"][..], &["svm", "umbra:log@kvm-clear"]];
    for (job, names) in HOSTILE.iter().zip(rows) {
        let record = Boot::Wall.good(job);
        for name in names {
            umbra_tests::besieged(row(record, name), 1500);
        }
    }
}

/// The checks of KVM's own nesting can fail: by what L2 finds, by where L2's words are, and by an L1 that ends.
#[test]
fn faults_under_kvms_nesting_are_caught() {
    let faults = HOSTILE_FAULTS.map(|job| {
        let record = Boot::Wall.record(job);
        assert_eq!(record.measured().map(|row| &*row.name).collect::<Vec<_>>(), ["svm"]);
        record.faults()
    });
    let has = |faults: &[String], part: &str| faults.iter().any(|fault| fault.contains(part));
    for part in ["and a walk of the table to", "no walk of the table led L2 there"] {
        assert!(has(&faults[0], part), "{part}: {:?}", faults[0]);
    }
    assert!(has(&faults[1], "L1 ended, and nothing let L2 write L1's own memory"), "{:?}", faults[1]);
}

/// Nothing of the old table is left to an L2 that runs meanwhile, on KVM's nested SVM as on Umbra's shadow MMU.
#[test]
fn edits_that_race_l2_leave_it_nothing_of_the_old_table() {
    let record = Boot::Wall.good(RACE);
    for name in ["svm", "umbra:log@kvm-clear", "umbra:write-protect@mprotect", "umbra:log@pagemap"] {
        umbra_tests::raced(row(record, name), 500);
    }
}

#[test]
fn what_can_go_wrong_is_caught() {
    let faults = Boot::Wall.record(LOSES_A_PAGE).faults();
    assert!(faults.iter().any(|fault| fault.contains("svm:clear") && fault.contains("round 2")), "{faults:?}");
    assert!(faults.iter().any(|fault| fault.contains("1 pages of L2 missed")), "{faults:?}");
    let faults = Boot::Wall.record(TWIN_LOSES_A_PAGE).faults();
    assert!(
        faults.iter().any(|fault| fault.contains("umbra:twin@mprotect") && fault.contains("round 2")),
        "{faults:?}"
    );
    assert!(faults.iter().any(|fault| fault.contains("1 pages of L2 missed")), "{faults:?}");
    let faults = Boot::Wall.record(ONE_WRITE_SHORT).faults();
    assert!(faults.iter().any(|fault| fault.contains("255 writes where the pattern has 256")), "{faults:?}");
    assert!(faults.iter().any(|fault| fault.contains("the guest did not write it")), "{faults:?}");
    match Boot::Wall.result(PAE) {
        Err(Failure::NotHere(why)) => assert!(why.contains("svm:clear") && why.contains("64-bit"), "{why}"),
        other => panic!("{other:?}"),
    }
}

/// Each of the eight huge leaves is copied before its first write of a round and compared after it: all that was written is found so, and nothing else.
#[test]
fn copies_tell_what_l2_wrote() {
    let record = Boot::First.good(TWIN);
    for name in ["umbra:twin@mprotect", "umbra:twin+log@kvm-clear"] {
        let row = row(record, name);
        let (l1, l2) = (&row.truth.pages, &row.truth.l2.as_ref().expect("L2's pages are checked").pages);
        // Two passes of three rounds.
        for pages in [l1, l2] {
            assert_eq!((pages.written, pages.missed, pages.extra), (6 * 2048, 0, 0), "{name}");
            assert_eq!((pages.reported, pages.explained, pages.unchanged), (6 * 2048, 0, 0), "{name}");
        }
        // The log's first round finds out that much is written, and the next one copies.
        let (copying, dense) = if name.contains("log") { (2, 8) } else { (3, 0) };
        let counts = ["twins", "twin_pages_compared", "twin_bytes", "made_dense"].map(|name| count(row, name));
        assert_eq!(counts, [copying * 8, copying * 8 * 512, 8 << 21, dense], "{name}");
    }
}

/// What docs/nesting.md and docs/findings.md say, to 3%.
#[test]
fn figures_are_those_of_the_findings() {
    if !is_pinned(good(0)) {
        return;
    }
    let check = |job: usize, name: &str, phase: &str, count: u64, expected: u64| {
        let value = timed(row(good(job), name), phase) / count;
        assert!(value.abs_diff(expected) <= expected * 3 / 100, "{name} {phase}: {value}, {expected} expected");
    };
    for (name, phase, count, expected) in [
        ("plain:clear", "first-touch", 4096, 3066),
        ("plain:clear", "dirty", 4096, 1591),
        ("svm:clear", "enter", 1, 11_417),
        ("svm:clear", "first-touch", 4096, 5409),
        ("svm:clear", "dirty", 4096, 5298),
        ("svm:clear", "retouch", 4096, 5256),
    ] {
        check(0, name, phase, count, expected);
    }
    // An L2 in a VM of its own pays for a write what plain L1 pays.
    for (name, phase, count, expected) in
        [("umbra:log@kvm-clear", "dirty", 4096, 1648), ("umbra:log@kvm-bitmap", "dirty", 4096, 1648)]
    {
        check(0, name, phase, count, expected);
    }
    // A fault of the host's and one of KVM's.
    check(0, "umbra:log@pagemap", "dirty", 4096, 5668);
    // A page of L2 that is mapped by 64; while KVM logs; through a udmabuf, because its neighbours lie elsewhere.
    let below = |job: usize, name: &str, phase: &str, count: u64, limit: u64| {
        let value = timed(row(good(job), name), phase) / count;
        assert!(value <= limit, "{name} {phase}: {value}, at most {limit} expected");
    };
    below(0, "umbra:log@kvm-clear", "first-touch", 4096, 3200);
    below(8, "umbra:log@kvm-bitmap", "first-touch", 1024, 4500);
    below(9, "umbra:log@kvm-bitmap", "first-touch", 512, 9000);
    assert_eq!(count(row(good(9), "umbra:log@kvm-bitmap"), "window_gathered_pages"), 512);
    // Huge leaves on huge pages, eight of them a fault.
    below(11, "umbra:twin@mprotect", "first-touch", 4096, 35);
    below(11, "umbra:twin+log@kvm-clear", "first-touch", 4096, 35);
    // More aliases of a page than KVM keeps.
    below(10, "umbra:log@kvm-bitmap", "second-touch", 4100, 10);
    assert!(timed(row(good(10), "svm:bitmap"), "second-touch") / 4100 > 2000);
    // KVM maps eight at a time where A and D are set beforehand.
    check(2, "svm:bitmap", "first-touch", 1024, 1830);
    // Huge leaves on huge pages.
    assert!(timed(row(good(1), "svm:clear+init-set"), "first-touch") / 2048 < 40);
    // One entry a violation: the more entries a table has, the dearer is the next one.
    let (few, many) = (timed(row(good(6), "svm:bitmap"), "fill") / 64, timed(row(good(7), "svm:bitmap"), "fill") / 512);
    assert!(many > 2 * few && many > 80_000, "{few} with up to 64 entries, {many} with up to 512");
    assert_eq!(["l2_violations", "ept12_entries"].map(|name| count(row(good(7), "svm:bitmap"), name)), [512, 512]);
}

#[test]
fn a_host_without_nesting_says_so() {
    let svm = ["run", "nested", "--memory", "1M", "--tracker", "clear", "--nesting", "svm"];
    if !kvm_here() {
        return refused(&svm, 3, &["/dev/kvm"]);
    }
    if umbra::kvm::capabilities::nested_svm().is_err() {
        refused(&svm, 3, &["svm:clear", "kvm_amd", "umbra lab nested"]);
    }
    if umbra::kvm::capabilities::nested_vmx().is_err() {
        refused(&["run", "nested", "--memory", "1M", "--nesting", "vmx"], 3, &["vmx:clear", "kvm_intel"]);
    }
    let umbra = ["run", "nested", "--nesting", "umbra"];
    refused(&[&umbra[..], &["--format", "pae"]].concat(), 3, &["4 GiB"]);
    refused(&[&umbra[..], &["--backing", "hugetlb"]].concat(), 2, &["--backing hugetlb"]);
}

/// Whether this kernel tells of writes by its page tables, and of faults without a userfaultfd that protects.
fn pagemap_here() -> bool {
    Userfault::open(Mode::Asynchronous).is_ok() && (Kind::Poison.open().is_ok() || Kind::Tracepoint.open().is_ok())
}

/// Umbra's own nesting needs no hardware's, so it runs wherever there is KVM and a fault source.
#[test]
fn l2_runs_on_the_shadow_mmu_of_this_host() {
    if !kvm_here() {
        return refused(&["run", "nested", "--nesting", "umbra"], 3, &["/dev/kvm"]);
    }
    for options in [
        "--memory 4M --rounds 2 --backing anonymous",
        "--memory 2M --alias 3 --alias-kind scattered --pattern random --write-percent 25 --slots 2 --vcpus 2",
        "--memory 4M --leaf 2m --rounds 1 --format npt",
        "--memory 1M --fill-batch 8 --rounds 1 --accessed-dirty clear",
        "--memory 2M --alias 4 --alias-kind shared-tables --rounds 1 --strategy log",
        "--memory 4M --alias 2 --remaps 16",
        "--memory 4M --remaps 8 --pattern random --write-percent 40 --strategy log,write-protect",
        "--memory 8M --leaf 2m --remaps 2 --pattern random --write-percent 30 --alias 2 --strategy log",
        "--memory 4M --leaf 2m --alias 2 --pattern random --write-percent 30 --strategy twin,log --fault-source userfaultfd --vcpus 2",
        "--memory 4M --leaf 2m --remaps 1 --strategy twin,log --fault-source userfaultfd --twins 1",
        "--memory 2M --alias 3 --alias-kind scattered --pattern random --write-percent 25 --vcpus 2 --fault-source poison",
        "--memory 4M --remaps 8 --fill-batch 3 --fault-source poison",
    ] {
        let words: Vec<_> = ["run", "nested", "--nesting", "umbra"].into_iter().chain(options.split(' ')).collect();
        let record = record(&words, 120);
        let args = args(&format!("nested {options}"));
        let l2_writes =
            args.memory / 4096 * args.shadow.alias.unwrap_or(1) * args.write_percent / 100 * args.rounds * 2;
        let measured = record.measured().count();
        assert!(measured >= 2, "{options}");
        let watched = record.measured().any(|row| row.name == "umbra:log@pagemap");
        // Where nothing is read-only, or the tracepoint tells of writes.
        let others = ["--fault-source userfaultfd", "--accessed-dirty clear", "--format npt"];
        if pagemap_here() && !others.iter().any(|other| options.contains(other)) {
            assert!(watched, "{options}");
        }
        if options.contains("twin,log") {
            assert!(measured == 4, "{options}: {:?}", record.measured().map(|row| &row.name).collect::<Vec<_>>());
        }
        for row in record.measured() {
            let l2 = row.truth.l2.as_ref().expect("L2's pages are checked");
            assert_eq!(l2.pages.written, l2_writes, "{options} {}", row.name);
            assert!(count(row, "l2_faults") > 0 && count(row, "window_evicted_pages") == 0);
        }
    }
    if pagemap_here() {
        let words = ["run", "nested", "--nesting", "umbra", "--mechanism", "pagemap", "--fault-source", "userfaultfd"];
        refused(&words, 3, &["umbra:log@pagemap", "registers L2's pages itself"]);
    }
    let lost = ["--nesting", "umbra", "--memory", "1M", "--inject", "lose-page"];
    let run = umbra_tests::umbra(&[&["run", "nested"], &lost[..]].concat(), 120);
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    for part in ["umbra:log@kvm-clear", "round 2", "pages of L2 missed"] {
        assert!(run.stderr.contains(part), "{part:?} is not in {:?}", run.stderr);
    }
}

/// `twin+log` copies what is written densely and logs the rest, and loses nothing when a leaf goes from one to the other.
#[test]
fn leaves_are_tracked_by_their_density() {
    if !kvm_here() {
        return refused(&["run", "nested", "--nesting", "umbra"], 3, &["/dev/kvm"]);
    }
    for (options, dense, copies, cuts) in [
        ("--rounds 3", 4..=4, 8..=8, 0..=0),
        ("--rounds 2 --pattern random --write-percent 5", 0..=0, 0..=0, 0..=0),
        ("--rounds 5 --pattern hotspot:30/95 --write-percent 30 --vcpus 2 --alias 2", 1..=8, 1..=16, 1..=8),
        ("--rounds 4 --remaps 2 --twins 1", 1..=32, 1..=4, 0..=32),
        // What was written, and is read after a slot was cut, is not taken for written again.
        ("--rounds 6 --pattern clusters:700 --write-percent 30 --alias 2 --remaps 1", 1..=16, 1..=24, 1..=16),
    ] {
        let words = "run nested --nesting umbra --memory 8M --leaf 2m --strategy twin+log --fault-source userfaultfd";
        let words: Vec<_> = words.split(' ').chain(options.split(' ')).collect();
        let record = record(&words, 120);
        let names: Vec<_> = record.measured().map(|row| row.name.as_str()).collect();
        let mechanisms = ["kvm-bitmap", "kvm-clear", "kvm-ring"];
        assert_eq!(names, mechanisms.map(|name| format!("umbra:twin+log@{name}")), "{options}");
        for row in record.measured() {
            assert_eq!(row.truth.pages.unchanged, 0, "{options} {}", row.name);
            let count = |name: &str| count(row, name);
            assert!(dense.contains(&count("made_dense")), "{options}: {} times dense", count("made_dense"));
            assert!(copies.contains(&count("twins")), "{options}: {} copies", count("twins"));
            assert!(cuts.contains(&count("slots_cut")), "{options}: {} slots cut", count("slots_cut"));
        }
    }
}

/// `twin` compares: a write of the bytes that were there is predicted, round by round, and nothing else may go unseen.
#[test]
fn what_twin_cannot_see_is_predicted() {
    if !kvm_here() {
        return refused(&["run", "nested", "--nesting", "umbra"], 3, &["/dev/kvm"]);
    }
    let words = "run nested --nesting umbra --memory 4M --leaf 2m --strategy twin,log --fault-source userfaultfd --pattern same:2";
    let record = record(&words.split(' ').collect::<Vec<_>>(), 120);
    let unchanged = |name: &str| {
        let row = row(&record, name);
        let rounds: Vec<u64> = row.truth.rounds.iter().map(|round| round.pages.unchanged).collect();
        (rounds, row.truth.l2.as_ref().map(|l2| l2.pages.unchanged))
    };
    // Populating is round 0. Rounds 0 and 1 write alike, 2 and 3; there are two passes.
    assert_eq!(unchanged("umbra:twin@uffd-wp"), (vec![1024, 0, 1024, 1024, 0, 1024], Some(4096)));
    assert_eq!(unchanged("umbra:log@kvm-clear"), (vec![0; 6], Some(0)));
}

#[test]
fn plain_l1_sees_aliases_everywhere() {
    if !kvm_here() {
        return refused(&["run", "nested"], 3, &["/dev/kvm"]);
    }
    for kind in ["contiguous", "scattered", "shared-tables"] {
        let words = ["run", "nested", "--nesting", "plain", "--memory", "4M", "--alias", "3", "--alias-kind", kind];
        let record =
            record(&[&words[..], &["--pattern", "random", "--write-percent", "25", "--vcpus", "2"]].concat(), 120);
        for row in record.measured() {
            let l2 = row.truth.l2.as_ref().expect("aliases are L2's");
            // Two passes of three rounds.
            assert_eq!(l2.pages.written, 6 * 768, "{kind} {}", row.name);
        }
    }
}

#[test]
fn bad_options_are_refused_in_one_line() {
    for (words, parts) in [
        (vec!["nested", "--alias", "0"], vec!["--alias 0"]),
        (vec!["nested", "--leaf", "1g", "--alias", "2"], vec!["--alias 2", "1g"]),
        (vec!["nested", "--leaf", "1g", "--slots", "2"], vec!["--slots 2", "1g"]),
        (vec!["nested", "--leaf", "2m", "--memory", "3M"], vec!["--memory"]),
        (vec!["nested", "--alias-kind", "braided"], vec!["braided", "scattered"]),
        (vec!["nested", "--alias-kind", "shared-tables", "--memory", "1M"], vec!["--alias-kind", "whole tables"]),
        (vec!["nested", "--nesting", "xen"], vec!["xen", "svm"]),
        (vec!["nested", "--format", "sv39"], vec!["sv39", "npt"]),
        (vec!["nested", "--accessed-dirty", "maybe"], vec!["maybe", "preset"]),
        (vec!["nested", "--alias-kind", "scattered", "--guest-page", "2m"], vec!["--guest-page 2m"]),
        (vec!["nested", "--split", "eager"], vec!["nested", "--split"]),
        (vec!["nested", "--strategy", "log", "--mechanism", "mprotect"], vec!["nothing fits both", "log@kvm-clear"]),
        (vec!["nested", "--fault-source", "oracle"], vec!["oracle", "userfaultfd"]),
        (vec!["nested", "--extent", "3"], vec!["--extent 3"]),
        (vec!["edits", "--race"], vec!["--race with --vcpus 1", "2 or more"]),
        (vec!["nested", "--race", "--vcpus", "2"], vec!["--race", "edits"]),
        (vec!["edits", "--inject", "lose-invalidation"], vec!["lose-invalidation", "edits --race"]),
        (vec!["edits", "--leaf", "2m"], vec!["--leaf 2m", "4k"]),
        (vec!["edits", "--memory", "3M"], vec!["--memory 3145728", "2M"]),
        (vec!["edits", "--fill-batch", "2"], vec!["--fill-batch"]),
        (vec!["nested", "--edits", "2"], vec!["nested", "--edits"]),
        (vec!["hostile", "--inject", "lose-edit"], vec!["lose-edit", "stray-page"]),
        (vec!["edits", "--inject", "lose-page"], vec!["lose-page", "lose-edit"]),
        (vec!["dirty-log", "--fill-batch", "2"], vec!["dirty-log", "--fill-batch", "nested"]),
        (vec!["model", "--nesting", "svm"], vec!["model", "--nesting"]),
    ] {
        refused(&[&["run"], &words[..]].concat(), 2, &parts);
    }
}
