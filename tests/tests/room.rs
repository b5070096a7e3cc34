//! L2's windows in a process whose mappings are nearly used up: pages are evicted, and come back by faults. The one test of its program, since it
//! takes most of the mappings that a process can have (`vm.max_map_count`).

use std::fs;
use umbra::cli::{self, Command, RunArgs};
use umbra::ground::Ground;
use umbra::kvm::Backing;
use umbra::kvm::memory::HostMemory;
use umbra::progress::Progress;
use umbra::scenario;
use umbra_tests::kvm_here;

/// Mappings that are left, for everything.
const ROOM: usize = 700;

fn args(words: &str) -> RunArgs {
    let words = ["umbra", "run", "edits"].into_iter().chain(words.split(' ')).map(str::to_owned);
    match cli::parse(words).expect("good words").command {
        Command::Run(args) => args,
        other => panic!("{other:?}"),
    }
}

/// Mappings of one page each, far from each other, until [`ROOM`] are left.
fn take_mappings() -> Vec<HostMemory> {
    let most = fs::read_to_string("/proc/sys/vm/max_map_count").expect("procfs");
    let most: usize = most.trim().parse().expect("a number");
    let taken = fs::read_to_string("/proc/self/maps").expect("procfs").lines().count();
    let count = most.checked_sub(taken + ROOM).expect("room for more mappings than are taken");
    (0..count).map(|_| HostMemory::new(4096, Backing::Anonymous).expect("a page")).collect()
}

#[test]
fn mappings_beyond_what_a_process_can_have_are_evicted() {
    if !kvm_here() {
        return assert!(umbra::kvm::vm::open().is_err());
    }
    let taken = take_mappings();
    for (words, raced) in [
        (
            "--memory 8M --alias 2 --alias-kind scattered --nesting umbra --strategy log --mechanism kvm-clear --edits 300",
            false,
        ),
        (
            "--memory 8M --alias 2 --alias-kind scattered --nesting umbra --strategy log --mechanism kvm-clear --edits 300 --race --vcpus 2",
            true,
        ),
    ] {
        let record = scenario::run(&args(words), Ground::Kvm, &Progress::stderr()).expect("it runs");
        assert_eq!(record.faults(), [""; 0], "{words}");
        assert!(record.measured().count() > 0, "{words}");
        for row in record.measured() {
            if raced {
                umbra_tests::raced(row, 300);
            } else {
                umbra_tests::edited(row, 300);
            }
            let evicted = row.counters["window_evicted_pages"].value;
            assert!(evicted > 1000, "{words}: {}: {evicted} pages were evicted", row.name);
        }
    }
    drop(taken);
}
