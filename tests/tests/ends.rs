//! What is left of an L2 after each of its ends: no window, no descriptor, no thread. The one test of its program, since it counts this process's.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::time::Duration;
use umbra::ground::Clock;
use umbra::guest::{Image, Machine, Plan};
use umbra::kvm::Backing;
use umbra::kvm::clock::Timer;
use umbra::nested::source::{self, Kind};
use umbra::nested::{FirstReads, Means, Mechanism, Options, RootPolicy};
use umbra_shared::nested::{AliasKind, Flags, Format, Map, Nested, Way};
use umbra_shared::paging::Mode;
use umbra_shared::pattern::{self, Pattern};
use umbra_shared::protocol::Command;
use umbra_shared::{Level, layout};
use umbra_tests::kvm_here;

const PAGES: u64 = 512;

fn plan(source: Kind) -> Plan {
    let map = Map::new(PAGES, Level::K4, 2, AliasKind::Contiguous, 1).expect("a map");
    let (way, format, flags) = (Way::Umbra, Format::Ept, Flags::Unused);
    let pages = map.l2_pages();
    Plan {
        pattern: Pattern { kind: pattern::Kind::Random, seed: 1, pages, write_percent: 50, accesses_per_page: 1 },
        slots: layout::slots(PAGES, 1, Level::K4).expect("a slot").collect(),
        vcpus: 2,
        backing: Backing::Anonymous.shared(),
        guest_page: Level::K4,
        irqchip: false,
        mode: Mode::Long,
        pace: 0,
        nested: Some(Nested { way, map, format, flags, fill_batch: 1, remaps: 0 }),
        shadow: Some(Options {
            means: Means { strategy: "log", mechanism: Mechanism::KvmBitmap },
            source,
            extent: 8,
            twins: 4,
            pieces: true,
            first_reads: FirstReads::Exact,
            roots: RootPolicy::Keep,
            log_roots: false,
        }),
        bus: None,
        journals: false,
        smm: None,
        image: Arc::new(Image::load(None).expect("the firmware")),
        timer: Timer::new(Clock::Nanoseconds),
        patience: Duration::from_secs(120),
    }
}

/// What this process has: descriptors by what they are, threads by name, mappings where windows lie (monitor/src/nested/reserve.rs).
fn possessions() -> (Vec<String>, Vec<String>, Vec<String>) {
    let entries = |path: &str| fs::read_dir(path).expect("procfs").flatten();
    let descriptors = entries("/proc/self/fd").filter_map(|entry| fs::read_link(entry.path()).ok());
    let mut descriptors: Vec<_> = descriptors.map(|target| target.to_string_lossy().into_owned()).collect();
    let names = entries("/proc/self/task").filter_map(|entry| fs::read_to_string(entry.path().join("comm")).ok());
    let mut threads: Vec<_> = names.collect();
    let maps = fs::read_to_string("/proc/self/maps").expect("procfs");
    let start = |line: &str| u64::from_str_radix(line.split('-').next().unwrap_or_default(), 16).unwrap_or(0);
    let windows = maps.lines().filter(|line| (16 << 40..32 << 40).contains(&start(line))).map(str::to_owned).collect();
    // The directory that was read is one of them, whatever its number.
    descriptors.retain(|target| !target.starts_with("/proc/"));
    descriptors.sort();
    threads.sort();
    (descriptors, threads, windows)
}

/// KVM's own helper threads end a little later than their VM.
fn settle(before: &(Vec<String>, Vec<String>, Vec<String>), end: &str) {
    let mut now = possessions();
    for _ in 0..200 {
        if now == *before {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
        now = possessions();
    }
    let more: BTreeSet<_> = now.0.iter().chain(&now.1).chain(&now.2).collect();
    panic!("{end}: {before:?} before, {now:?} after, {more:?} in all");
}

fn sources() -> Vec<Kind> {
    Kind::ALL.into_iter().filter(|kind| kind.open().is_ok()).collect()
}

#[test]
fn nothing_is_left_of_an_l2() {
    if !kvm_here() {
        return assert!(!std::path::Path::new("/dev/kvm").exists() || umbra::kvm::vm::open().is_err());
    }
    let sources = sources();
    assert!(!sources.is_empty(), "{:?}", source::first(&Kind::ALL, None).err());
    // What is made once, and stays: a signal's handler, the firmware's symbols.
    drop(Machine::new(&plan(sources[0]), None, |_| Ok(())).expect("a machine"));
    std::thread::sleep(Duration::from_millis(200));
    let before = possessions();
    assert_eq!(before.2, [""; 0], "windows of a machine that is gone");
    for kind in sources {
        let machine = || Machine::new(&plan(kind), None, |_| Ok(())).expect("a machine");

        let rested = machine();
        rested.command(Command::Populate, 0).expect("L2 writes");
        assert!(possessions().2.len() > 1 && possessions().1.len() > before.1.len(), "{kind}: nothing to lose");
        drop(rested);
        settle(&before, &format!("{kind}: at rest"));

        // The vCPU threads are in the middle of L2, or of a fault of its.
        for milliseconds in [0, 1, 3, 10, 30, 100] {
            let running = machine();
            running.begin(Command::FreeRun, 1).expect("L2 begins");
            std::thread::sleep(Duration::from_millis(milliseconds));
            drop(running);
            settle(&before, &format!("{kind}: killed after {milliseconds} ms"));
        }

        let broken = machine();
        let error = broken.command(Command::Provoke, u64::MAX).expect_err("there is no such case").to_string();
        assert!(error.contains("panicked"), "{kind}: {error}");
        drop(broken);
        settle(&before, &format!("{kind}: after a panic of L1's"));

        let private = Plan { backing: Backing::Anonymous, ..plan(kind) };
        assert!(Machine::new(&private, None, |_| Ok(())).is_err(), "{kind}: private memory cannot be mapped twice");
        settle(&before, &format!("{kind}: never begun"));
    }
}
