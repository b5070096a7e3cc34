//! Roots: which changes of mode and slots cost a VM its page-table root, on a kernel that keeps roots and on one that does not. A boot of the
//! lab each.

use std::sync::OnceLock;
use umbra::Failure;
use umbra::cli::{self, Command, RunArgs};
use umbra::ground::Clock;
use umbra::host;
use umbra::lab::emulator::Emulator;
use umbra::lab::{self, Machine, shelf};
use umbra::progress::Progress;
use umbra::report::record::{Record, Row, Rows};
use umbra_shared::toggle::Toggle;
use umbra_tests::{kvm_here, record, refused};

/// Pages of every run here.
const PAGES: u64 = 256;

/// The jobs of either boot: all toggles, and with a second vCPU, which holds the root.
const JOBS: [&str; 2] =
    ["--memory 1M --rounds 1", "--memory 1M --rounds 2 --vcpus 2 --toggle cr0.wp,efer.nxe@all,smm,slot-delete"];

fn args(words: &str) -> RunArgs {
    let words = ["umbra", "run", "roots"].into_iter().chain(words.split_whitespace()).map(str::to_owned);
    match cli::parse(words).expect("good words").command {
        Command::Run(args) => args,
        other => panic!("{other:?}"),
    }
}

fn boot(kernel: &str) -> Vec<Result<Record, Failure>> {
    let progress = Progress::stderr();
    let kernel = shelf::shelf().kernel(Some(kernel)).expect("a kernel").ensure(&progress).expect("the kernel");
    let machine = Machine {
        emulator: Emulator::Qemu,
        kernel,
        clock: Clock::Instructions,
        // 5.10's default is still the older MMU.
        params: vec!["kvm.tdp_mmu=1".parse().expect("a parameter")],
        init: umbra_tests::binary(),
        append: String::new(),
    };
    lab::boot(&machine, &JOBS.map(args), &progress).expect("the lab boots")
}

fn keeping() -> &'static [Result<Record, Failure>] {
    static RESULTS: OnceLock<Vec<Result<Record, Failure>>> = OnceLock::new();
    RESULTS.get_or_init(|| boot("6.12"))
}

fn dropping() -> &'static [Result<Record, Failure>] {
    static RESULTS: OnceLock<Vec<Result<Record, Failure>>> = OnceLock::new();
    RESULTS.get_or_init(|| boot("5.10"))
}

fn good(results: &'static [Result<Record, Failure>], job: usize) -> &'static Record {
    let record = results[job].as_ref().unwrap_or_else(|failure| panic!("{}: {failure}", JOBS[job]));
    assert_eq!(record.faults(), [""; 0], "{}", JOBS[job]);
    record
}

/// Refaults by the tracepoint, in the observed pass alone.
fn refaults(row: &Row) -> u64 {
    let counter = row.counters.get("refaults").unwrap_or_else(|| panic!("{} counted nothing", row.name));
    assert_eq!((counter.source.as_str(), counter.pass.as_str()), ("tracepoint", "observed"), "{}", row.name);
    counter.value
}

fn cheapest(row: &Row, phase: &str) -> u64 {
    let rounds = row.phases.iter().filter(|p| p.pass == "timed" && p.phase == phase);
    rounds.map(|p| p.value).min().unwrap_or_else(|| panic!("{} has no {phase}", row.name))
}

#[test]
fn a_kernel_that_keeps_roots_faults_nothing_in_again_but_for_slots() {
    let record = good(keeping(), 0);
    let names: Vec<_> = record.measured().map(|row| row.name.as_str()).collect();
    for toggle in Toggle::ALL {
        assert!(names.contains(&toggle.name()), "{}", toggle.name());
    }
    for row in record.measured() {
        let of_slots = row.name.starts_with("slot-");
        assert_eq!(refaults(row), if of_slots { PAGES } else { 0 }, "{}", row.name);
        // A mode that never changed would cost nothing.
        assert!(row.name == "none" || cheapest(row, "toggle") > 2_000, "{}: {}", row.name, cheapest(row, "toggle"));
    }
    let missing: Vec<_> =
        record.rows.iter().filter(|row| matches!(row, Rows::NotHere { .. })).map(Rows::name).collect();
    assert_eq!(missing, ["cpuid"], "KVM_SET_CPUID2 after KVM_RUN");
}

#[test]
fn a_kernel_that_drops_roots_faults_every_page_in_again() {
    let record = good(dropping(), 0);
    assert_eq!(record.measured().count(), record.rows.len());
    for row in record.measured() {
        assert_eq!(refaults(row), if row.name == "none" { 0 } else { PAGES }, "{}", row.name);
        let again = cheapest(row, "refault");
        // A page costs about 2,700 instructions when it faults and 7 when it does not.
        assert_eq!(again > PAGES * 1_000, row.name != "none", "{}: {again}", row.name);
    }
}

#[test]
fn a_second_vcpu_holds_the_root() {
    for results in [keeping(), dropping()] {
        for row in good(results, 1).measured() {
            assert_eq!(refaults(row), if row.name == "slot-delete" { PAGES } else { 0 }, "{}", row.name);
        }
    }
}

#[test]
fn what_makes_no_sense_is_refused_before_there_is_a_guest() {
    refused(&["run", "roots", "--toggle", "cr0.pw"], 2, &["--toggle cr0.pw", "cr0.wp"]);
    refused(&["lab", "roots", "--toggle", "cr0.pw"], 2, &["--toggle cr0.pw", "cr0.wp"]);
    refused(&["run", "roots", "--toggle", "cr0.wp@all"], 2, &["cr0.wp@all", "--vcpus 2"]);
    refused(&["run", "roots", "--toggle", "slot-move@all", "--vcpus", "2"], 2, &["slot-move@all", "@all away"]);
    refused(&["run", "roots", "--tracker", "clear"], 2, &["roots", "--tracker"]);
    refused(&["run", "dirty-log", "--toggle", "smm"], 2, &["dirty-log", "--toggle"]);
}

#[test]
fn a_pvm_host_does_its_part_and_names_the_lab_for_the_rest() {
    if !kvm_here() {
        return refused(&["run", "roots"], 3, &["/dev/kvm"]);
    }
    if host::vendor() != "pvm" {
        return;
    }
    let record = record(&["run", "roots", "--memory", "1M", "--rounds", "1"], 60);
    assert_eq!(record.faults(), [""; 0]);
    let names: Vec<_> = record.measured().map(|row| row.name.as_str()).collect();
    assert_eq!(names, ["sregs", "slot-delete", "slot-move"]);
    for toggle in ["smm", "cr0.wp"] {
        refused(&["run", "roots", "--toggle", toggle], 3, &[toggle, "PVM", "umbra lab roots"]);
    }
}
