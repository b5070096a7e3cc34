//! Runs in the lab: two boots of the same jobs, everything asserted on their Records.
//!
//! What is asserted to the digit or to a few percent holds for the pinned kernel package (images/kernels.toml); with another of the
//! series only truth and exactness are checked, and a line says so.

use std::sync::OnceLock;
use umbra::Failure;
use umbra::cli::{self, Command, RunArgs};
use umbra::ground::Clock;
use umbra::lab::emulator::Emulator;
use umbra::lab::{self, Machine, shelf};
use umbra::progress::Progress;
use umbra::report::record::{Record, Row};

/// The kernel that the figures of FIGURES were measured on.
const PINNED: &str = "6.12.111-1~deb12u1";

/// The jobs of one boot.
const JOBS: &[&[&str]] = &[
    &["dirty-log"],
    &["dirty-log", "--memory", "16M", "--backing", "anonymous"],
    &["dirty-log", "--memory", "16M", "--pattern", "empty", "--tracker", "bitmap,clear"],
    &[
        "dirty-log",
        "--memory",
        "15M",
        "--slots",
        "3",
        "--vcpus",
        "2",
        "--pattern",
        "random",
        "--write-percent",
        "25",
        "--guest-page",
        "4k",
    ],
    &[
        "dirty-log",
        "--memory",
        "16M",
        "--backing",
        "hugetlb",
        "--tracker",
        "clear+init-set",
        "--chunk",
        "512",
        "--guest-page",
        "2m",
    ],
    &["dirty-log", "--memory", "4M", "--tracker", "clear", "--inject", "lose-page"],
    &["model", "--memory", "16M", "--leaf", "2m", "--split", "shatter"],
];

fn args(words: &[&str]) -> RunArgs {
    match cli::parse(["umbra", "run"].iter().chain(words).map(ToString::to_string)).expect("good words").command {
        Command::Run(args) => args,
        other => panic!("{other:?}"),
    }
}

fn boot(clock: Clock, jobs: &[&[&str]], params: &[&str]) -> Vec<Result<Record, Failure>> {
    let progress = Progress::stderr();
    let kernel = shelf::shelf().kernel(None).expect("a default kernel").ensure(&progress).expect("the default kernel");
    let machine = Machine {
        emulator: Emulator::Qemu,
        kernel,
        clock,
        cpus: None,
        params: params.iter().map(|param| param.parse().expect("a parameter")).collect(),
        init: umbra_tests::binary(),
        append: String::new(),
    };
    let jobs: Vec<_> = jobs.iter().map(|words| args(words)).collect();
    lab::boot(&machine, &jobs, &progress).expect("the lab boots")
}

/// The Records of two boots of [`JOBS`].
fn twice() -> &'static [Vec<Record>; 2] {
    static RECORDS: OnceLock<[Vec<Record>; 2]> = OnceLock::new();
    RECORDS.get_or_init(|| {
        // On two cores both boots fit side by side.
        std::thread::scope(|scope| {
            let boots = [(); 2].map(|()| {
                scope.spawn(|| {
                    let results = boot(Clock::Instructions, JOBS, &[]);
                    results.into_iter().map(|result| result.expect("a Record")).collect::<Vec<_>>()
                })
            });
            boots.map(|boot| boot.join().expect("a boot"))
        })
    })
}

fn row<'a>(record: &'a Record, name: &str) -> &'a Row {
    record.measured().find(|row| row.name == name).unwrap_or_else(|| panic!("no row {name}"))
}

/// A phase of the timed pass; the cheapest of the rounds from `from` on.
fn timed(row: &Row, phase: &str, from: u64) -> u64 {
    let rounds = row.phases.iter().filter(|p| p.pass == "timed" && p.phase == phase && p.round >= from);
    rounds.map(|p| p.value).min().unwrap_or_else(|| panic!("{} has no {phase}", row.name))
}

#[test]
fn two_boots_agree_to_the_instruction() {
    let [first, second] = twice();
    for (first, second) in first.iter().zip(second) {
        assert_eq!(first.to_json(), second.to_json());
        assert_eq!(first.host.clock, "instructions");
        assert!(first.host.deterministic && first.host.image_sha256.is_some() && first.host.kernel_package.is_some());
    }
}

#[test]
fn every_page_is_right() {
    let [records, _] = twice();
    for record in &records[..5] {
        assert_eq!(record.faults(), [""; 0], "{:?}", record.config);
        for row in record.measured() {
            for round in &row.truth.rounds {
                let pages = round.pages;
                // With anonymous memory, and with huge pages that KVM splits eagerly, only `initially all set` over-reports.
                let all = record.config["memory"].as_u64().unwrap() / 4096;
                let expected = if row.name == "clear+init-set" && round.round == 1 { all - pages.written } else { 0 };
                assert_eq!(pages.explained, expected, "{} round {}", row.name, round.round);
                assert_eq!((pages.missed, pages.extra), (0, 0), "{}", row.name);
            }
        }
    }
    let quarter = &records[3];
    for row in quarter.measured() {
        for round in &row.truth.rounds {
            assert_eq!(round.pages.written, 3840 / 4, "{} round {}", row.name, round.round);
        }
    }
}

#[test]
fn a_lost_page_is_caught_in_the_lab() {
    let [records, _] = twice();
    let faults = records[5].faults();
    assert!(faults.iter().any(|fault| fault.contains("round 2") && fault.contains("slot 1")), "{faults:?}");
}

#[test]
fn windows_are_clean_and_rounds_repeat() {
    let [records, _] = twice();
    for row in records[0].measured() {
        for phase in row.phases.iter().filter(|phase| phase.pass == "timed") {
            assert!(phase.clean, "{} {} {}", row.name, phase.phase, phase.round);
        }
        let dirty: Vec<u64> = row
            .phases
            .iter()
            .filter(|p| p.pass == "timed" && p.phase == "dirty" && p.round > 1)
            .map(|p| p.value)
            .collect();
        let (least, most) = (dirty.iter().min().unwrap(), dirty.iter().max().unwrap());
        // A timer tick more or less in 26 million instructions; see docs/findings.md for what was seen (0.06%).
        assert!(most - least <= least / 500, "{}: rounds 2 and 3 took {dirty:?}", row.name);
    }
}

#[test]
fn the_harness_adds_nothing() {
    let [records, _] = twice();
    for row in records[2].measured() {
        // A dirty phase without an access: entering the guest, finding an empty plan, coming back.
        let empty = timed(row, "dirty", 1);
        assert!(empty <= 4_000, "{}: {empty} instructions in an empty round", row.name);
    }
}

/// What the peer (`dirty_log_perf_test`, its main thread not spinning) takes for the same work on this kernel: instructions for 16384
/// pages, as docs/findings.md quotes it. A figure may differ by 2% or 2,000, whichever is more.
const FIGURES: &[(&str, &str, u64, u64)] = &[
    ("bitmap", "enable", 0, 4_708_000),
    ("bitmap", "get", 1, 2_660_000),
    ("bitmap", "disable", 0, 4_750_000),
    ("clear+init-set", "enable", 0, 21_000),
    ("clear+init-set", "get", 1, 3_200),
    ("clear+init-set", "clear", 1, 2_920_000),
    ("clear+init-set", "disable", 0, 4_744_000),
];

#[test]
fn figures_are_those_of_the_peer() {
    let [records, _] = twice();
    let record = &records[0];
    let package = record.host.kernel_package.clone().unwrap_or_default();
    if !package.contains(PINNED) {
        eprintln!("the pinned kernel {PINNED} is gone, this is {package}: figures are not compared");
        return;
    }
    for &(name, phase, from, expected) in FIGURES {
        let value = timed(row(record, name), phase, from);
        let margin = (expected / 50).max(2_000);
        assert!(value.abs_diff(expected) <= margin, "{name} {phase}: {value} instructions, {expected} expected");
    }
    for name in ["bitmap", "clear", "clear+init-set"] {
        let page = timed(row(record, name), "dirty", 2) / 16384;
        assert!((1_500..=1_675).contains(&page), "{name}: {page} instructions for a page written again");
    }
    // The first round after init-set faults nowhere: all pages are reported anyway, so none is protected.
    assert!(timed(row(record, "clear+init-set"), "dirty", 1) / 16384 < 20);
    // Three rounds of 16384 pages, each with one write-protection fault that KVM repairs without its lock; none in the first after init-set.
    assert_eq!(row(record, "bitmap").counters["pf_fast"].value, 3 * 16384);
    assert_eq!(row(record, "clear+init-set").counters["pf_fast"].value, 2 * 16384);
    assert_eq!(row(record, "bitmap").counters["pages_2m_split"].value, 32);
    assert_eq!(row(record, "bitmap").counters["pages_2m_remapped"].value, 32);
}

#[test]
fn the_shadow_mmu_is_measured_in_instructions() {
    let [records, _] = twice();
    let record = &records[6];
    assert_eq!((record.faults().len(), record.measured().count()), (0, 7));
    assert_eq!((&*record.host.ground, &*record.host.clock), ("lab", "instructions"));
    // A trapped write costs more than one that the hardware tracks.
    let later = |name| timed(row(record, name), "dirty", 2);
    assert!(later("write-protect") > later("dirty-bit"), "{} {}", later("write-protect"), later("dirty-bit"));
    // The observed pass times each of three rounds' accesses: with traps most of them take one, without hardly any does.
    let stall = |name| row(record, name).stall.as_ref().expect("each access was timed");
    assert!(record.measured().all(|row| stall(&row.name).count == 3 * 4096 && stall(&row.name).unit == "instructions"));
    assert!(
        stall("write-protect").p50 > stall("dirty-bit").p50,
        "{:?} {:?}",
        stall("write-protect"),
        stall("dirty-bit")
    );
    assert!(stall("dirty-bit").max > 10 * stall("dirty-bit").p50, "the split of a huge leaf: {:?}", stall("dirty-bit"));
}

/// Two CPUs, no instruction clock: vCPUs write while the controller harvests; and huge mappings that KVM drops to split them, whose
/// over-reports are predicted.
#[test]
fn the_fast_machine_loses_nothing() {
    let jobs: &[&[&str]] = &[
        &["soak", "--memory", "4M", "--vcpus", "2", "--seconds", "5"],
        &[
            "dirty-log",
            "--memory",
            "8M",
            "--write-percent",
            "25",
            "--pattern",
            "random",
            "--tracker",
            "bitmap,clear,ring",
        ],
    ];
    let records: Vec<_> = boot(Clock::Nanoseconds, jobs, &["kvm.eager_page_split=0", "kvm.tdp_mmu=0"])
        .into_iter()
        .map(Result::unwrap)
        .collect();
    for record in &records {
        assert_eq!(record.faults(), [""; 0], "{:?}", record.config);
        assert!(!record.host.deterministic && record.host.clock == "nanoseconds");
        assert_eq!((&*record.host.params["kvm.eager_page_split"], &*record.host.params["kvm.tdp_mmu"]), ("N", "N"));
    }
    for row in records[0].measured() {
        assert!(row.counters["harvests"].value > 3 && row.counters["guest_rounds"].value > 3, "{:?}", row.counters);
    }
    for row in records[1].measured() {
        assert!(row.truth.pages.explained > 0, "{}: nothing was mapped by a read", row.name);
    }
}
