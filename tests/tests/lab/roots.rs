//! Roots: which changes of mode and slots cost a VM its page-table root, on a kernel that keeps roots and on one that does not.

use crate::boots::{self, Boot};
use umbra::host;
use umbra::report::record::{Record, RootLife, Row, Rows};
use umbra_shared::toggle::Toggle;
use umbra_tests::{count, kvm_here, record, refused, row};

/// Pages of every run here.
const PAGES: u64 = 256;

/// The runs: all toggles, and with a second vCPU, which holds the root; and those of 6.12 alone: SMIs under dirty logging, and the shadow MMU.
pub const JOBS: &[&str] = &[ALL, TWO_VCPUS, STORM, CURED];
/// Of those, the ones of 5.10 too.
pub const COMMON: usize = 2;
const ALL: &str = "roots --memory 1M --rounds 1 --smis 20";
const TWO_VCPUS: &str =
    "roots --memory 1M --rounds 2 --vcpus 2 --toggle cr0.wp,efer.nxe@all,efer.nxe@once,cr4.smep@once,smm,slot-delete";
const STORM: &str = "roots --memory 8M --vcpus 2 --toggle smm:storm --smis 200";
const CURED: &str = "roots --memory 1M --rounds 1 --roots keep --toggle none,cr0.wp,smm,slot-delete,12-roles";
/// Handlers that break.
pub const BROKEN: &[&str] = &[HALTS, LOOPS];
const HALTS: &str = "roots --memory 1M --rounds 1 --toggle smm --inject break-smm";
const LOOPS: &str = "roots --memory 1M --rounds 1 --toggle smm --inject loop-smm";

/// The boot of the kernel that keeps roots, and of the one that drops them.
const KEEPING: Boot = Boot::First;
const DROPPING: Boot = Boot::Dropping;

/// Refaults by the tracepoint, in the observed pass alone.
fn refaults(row: &Row) -> u64 {
    let refaults = count(row, "refaults");
    let counter = &row.counters["refaults"];
    assert_eq!((counter.source.as_str(), counter.pass.as_str()), ("tracepoint", "observed"), "{}", row.name);
    refaults
}

fn cheapest(row: &Row, phase: &str) -> u64 {
    boots::timed(row, phase, 0)
}

#[test]
fn a_kernel_that_keeps_roots_faults_nothing_in_again_but_for_slots() {
    let record = KEEPING.good(ALL);
    let names: Vec<_> = record.measured().map(|row| row.name.as_str()).collect();
    for toggle in Toggle::ALL {
        assert!(names.contains(&toggle.name()), "{}", toggle.name());
    }
    for row in toggles(record) {
        let of_slots = row.name.starts_with("slot-");
        assert_eq!(refaults(row), if of_slots { PAGES } else { 0 }, "{}", row.name);
        // A mode that never changed would cost nothing.
        assert!(
            row.name.starts_with("none") || cheapest(row, "toggle") > 2_000,
            "{}: {}",
            row.name,
            cheapest(row, "toggle")
        );
    }
    let missing: Vec<_> =
        record.rows.iter().filter(|row| matches!(row, Rows::NotHere { .. })).map(Rows::name).collect();
    assert_eq!(missing, ["cpuid"], "KVM_SET_CPUID2 after KVM_RUN");
}

#[test]
fn a_kernel_that_drops_roots_faults_every_page_in_again() {
    let record = DROPPING.good(ALL);
    assert_eq!(record.measured().count(), record.rows.len());
    for row in toggles(record) {
        // An L2's tables are shadowed ones, which even this kernel finds again.
        let keeps = row.name == "none" || row.name == "nested" || row.name.ends_with(":unpaged");
        assert_eq!(refaults(row), if keeps { 0 } else { PAGES }, "{}", row.name);
        let again = cheapest(row, "refault");
        // A page costs about 2,700 instructions when it faults and 7 when it does not.
        assert_eq!(again > PAGES * 1_000, !keeps, "{}: {again}", row.name);
    }
}

/// The rows that are a toggle and a touch.
fn toggles(record: &Record) -> impl Iterator<Item = &Row> {
    record.measured().filter(|row| row.name != "script" && row.name != "smm:storm")
}

#[test]
fn a_boot_tears_its_root_down_at_every_change_or_at_those_of_slots_alone() {
    for (boot, teardowns) in [(KEEPING, 14), (DROPPING, 106)] {
        let script = row(boot.good(ALL), "script");
        assert_eq!((count(script, "changes"), count(script, "teardowns")), (106, teardowns));
        assert!(count(script, "refaults") > 0);
    }
}

#[test]
fn the_role_log_has_each_root_with_its_cause_and_its_pages() {
    let row = |boot: Boot, name: &str| row(boot.good(ALL), name);
    // One root for good, whatever the mode: there a TDP root has none of the mode's bits in its role.
    let kept = row(KEEPING, "efer.nxe");
    let mapped: Vec<_> = kept.roles.iter().filter(|root| root.mapped > 0).collect();
    let [root] = &mapped[..] else { panic!("{:?}", kept.roles) };
    assert_eq!((root.role.as_str(), root.mapped), ("level 5 direct nx wp", PAGES));
    assert_eq!((&root.life, &root.ended_by), (&None, &None));
    // Pages mapped at teardown and touched again are as many as the refaults.
    let slots = row(KEEPING, "slot-delete");
    let ended = slots.roles.iter().filter(|root| root.ended_by.as_deref() == Some("slot-delete"));
    assert_eq!(ended.map(|root| root.mapped).sum::<u64>(), refaults(slots), "{:?}", slots.roles);
    // SMM is another address space, and so another root.
    assert!(row(KEEPING, "smm").roles.iter().any(|root| root.role.ends_with("smm") && root.cause == "smm"));
    // 5.10's TDP MMU has no events, so its functions are: the main root goes at each change, and what it mapped is what was faulted in again.
    for dropped in toggles(DROPPING.good(ALL)).filter(|row| refaults(row) > 0) {
        let at_end = |life: &&RootLife| life.ended_by.as_deref() == Some(&dropped.name);
        let mapped: u64 = dropped.roles.iter().filter(at_end).map(|root| root.mapped).sum();
        let of_slots = dropped.name.starts_with("slot-");
        assert_eq!(mapped, if of_slots { 0 } else { refaults(dropped) }, "{}: {:?}", dropped.name, dropped.roles);
        // There a deleted slot empties the root that stays.
        assert!(!of_slots || dropped.roles.iter().any(|root| root.life.is_none()), "{:?}", dropped.roles);
    }
    let texts: Vec<_> = row(DROPPING, "cr0.wp").roles.iter().map(|root| root.role.as_str()).collect();
    assert_eq!(texts, ["level 4 direct", "level 4 direct wp", "level 4 direct"]);
}

#[test]
fn smis_lose_no_page_and_no_register() {
    let row = KEEPING.good(STORM).measured().next().expect("a row");
    let counted = |name: &str| count(row, name);
    assert_eq!(counted("smis"), 200);
    assert!(counted("smis_in_write_loop") >= 180, "{:?}", row.counters);
    assert!(counted("smram_pages_logged") >= counted("smram_pages_written") && counted("smram_pages_written") > 0);
    // This kernel keeps SMM's root: the handler's code is first mapped once, on each vCPU.
    assert_eq!(counted("smram_pages_explained"), 2);
    assert!(row.truth.pages.written >= 2 * 2048);
}

#[test]
fn a_guest_that_breaks_in_smm_is_reported_with_its_state() {
    let failure = Boot::Wall.result(HALTS).as_ref().expect_err("a handler that halts").to_string();
    for part in ["vCPU 0", "halted", "system management mode", "CS base 0x30000"] {
        assert!(failure.contains(part), "{failure}");
    }
    let failure = Boot::Wall.result(LOOPS).as_ref().expect_err("a handler that goes in circles").to_string();
    for part in ["vCPU 0 said nothing for 1 s during a toggle", "0x8000", "system management mode", "CS base 0x30000"] {
        assert!(failure.contains(part), "{failure}");
    }
}

#[test]
fn the_shadow_mmu_has_each_cure_on_the_walker() {
    // Toggles that refault everything under each policy: those of slots always.
    for (policy, mode, smm) in [("drop", true, true), ("address-space", false, true), ("keep", false, false)] {
        let record = record(&["run", "roots", "--memory", "1M", "--roots", policy, "--mechanism", "walker"], 60);
        assert_eq!(record.host.ground, "model");
        for toggle in Toggle::ALL.iter().filter(|toggle| **toggle != Toggle::SmmShared) {
            let row = row(&record, toggle.name());
            let drops = if toggle.is_smm() { smm } else { mode && *toggle != Toggle::None };
            assert_eq!(count(row, "refaults"), if drops { PAGES } else { 0 }, "{policy}: {}", row.name);
        }
        let row = |name: &str| row(&record, name);
        assert_eq!(count(row("slot-delete"), "refaults"), PAGES, "{policy}");
        let teardowns = count(row("script"), "teardowns");
        assert_eq!(teardowns, if mode { 106 } else { 14 }, "{policy}");
        assert!(row("12-roles").memory.is_some_and(|bytes| bytes.table_bytes > 0));
    }
    let quota = ["--rounds", "1", "--roots", "quota=64", "--mechanism", "walker"];
    let bounded = record(&[&["run", "roots", "--memory", "16M"][..], &quota].concat(), 60);
    let twelve = row(&bounded, "12-roles");
    // Each takes 11 pages: five of them fit.
    assert!((33..=64).contains(&count(twelve, "shadow_pages")), "{:?}", twelve.counters);
    assert!(count(twelve, "refaults") > 0);
}

/// An L2 on this machine's KVM makes the changes: what is torn down is what the shadow MMU maps again, which the run itself checks.
#[test]
fn an_l2_has_each_cure() {
    if !kvm_here() {
        return;
    }
    // Toggles of a mode, and SMM, refault everything or nothing; places are VMs that roots have.
    for (policy, mode, smm, places) in
        [("drop", true, true, 1..3), ("address-space", false, true, 1..3), ("keep", false, false, 2..4)]
    {
        let words = ["run", "roots", "--memory", "1M", "--rounds", "2", "--roots", policy];
        let record = record(&words, 120);
        assert_eq!(record.host.ground, "kvm");
        let row = |name: &str| row(&record, name);
        for toggle in Toggle::ALL.iter().filter(|toggle| **toggle != Toggle::SmmShared) {
            let row = row(toggle.name());
            let drops = if toggle.is_smm() { smm } else { mode && *toggle != Toggle::None };
            assert_eq!(count(row, "refaults"), if drops { PAGES } else { 0 }, "{policy}: {}", row.name);
            assert!(places.contains(&count(row, "vms")) || *toggle == Toggle::None, "{policy}: {}", row.name);
        }
        assert_eq!(count(row("slot-delete"), "refaults"), PAGES, "{policy}");
        let teardowns = count(row("script"), "teardowns");
        assert_eq!(teardowns, if mode { 106 } else { 14 }, "{policy}");
        let twelve = count(row("12-roles"), "refaults");
        let expected =
            [("drop", 12), ("address-space", 2), ("keep", 0)].iter().find(|it| it.0 == policy).expect("it").1;
        assert_eq!(twelve, expected * PAGES, "{policy}");
        // The log has each root, with what it mapped at its end.
        let lives = &row("cr0.wp").roles;
        let ended: u64 = lives.iter().filter(|life| life.ended_by.is_some()).map(|life| life.mapped).sum();
        assert_eq!(ended, if mode { 2 * PAGES } else { 0 }, "{policy}: {lives:?}");
        assert!(row("cr0.wp").memory.is_some_and(|bytes| bytes.table_bytes > 0));
    }
    let words =
        ["run", "roots", "--memory", "16M", "--rounds", "1", "--roots", "quota=64", "--toggle", "12-roles,cr0.wp"];
    let bounded = record(&words, 120);
    let row = |name: &str| row(&bounded, name);
    assert!((33..=64).contains(&count(row("12-roles"), "shadow_pages")), "{:?}", row("12-roles").counters);
    assert!(count(row("12-roles"), "refaults") > 0);
    assert_eq!(count(row("cr0.wp"), "refaults"), 0);
}

#[test]
fn a_root_that_is_kept_is_still_mapped_by_kvm() {
    let kept = KEEPING.good(CURED);
    assert_eq!(kept.host.ground, "lab");
    for row in kept.measured() {
        let counter = |name: &str| (row.counters[name].value, row.counters[name].source.as_str());
        let empties = row.name == "slot-delete";
        assert_eq!(counter("refaults"), (if empties { PAGES } else { 0 }, "umbra-mmu"), "{}", row.name);
        // A root that was kept is mapped in KVM's own tables too.
        let (faults, source) = counter("kvm_faults");
        assert_eq!((faults > 0, source), (empties, "tracepoint"), "{}: {faults}", row.name);
        let vms = counter("vms").0;
        assert_eq!(
            vms,
            match row.name.as_str() {
                "none" | "slot-delete" => 1,
                "12-roles" => 12,
                _ => 2,
            },
            "{}",
            row.name
        );
    }
}

#[test]
fn a_second_vcpu_holds_the_root() {
    for (boot, drops) in [(KEEPING, false), (DROPPING, true)] {
        for row in boot.good(TWO_VCPUS).measured() {
            // Where both are in another role at once, nobody holds it. CR4.SMEP is in no role of a TDP root: each comes back to the one it left.
            let all = row.name == "slot-delete" || drops && row.name == "efer.nxe@once";
            assert_eq!(refaults(row), if all { PAGES } else { 0 }, "{}", row.name);
        }
    }
}

#[test]
fn what_makes_no_sense_is_refused_before_there_is_a_guest() {
    refused(&["run", "roots", "--toggle", "cr0.pw"], 2, &["--toggle cr0.pw", "cr0.wp"]);
    refused(&["lab", "roots", "--toggle", "cr0.pw"], 2, &["--toggle cr0.pw", "cr0.wp"]);
    refused(&["run", "roots", "--toggle", "cr0.wp@all"], 2, &["cr0.wp@all", "--vcpus 2"]);
    refused(&["run", "roots", "--toggle", "slot-move@all", "--vcpus", "2"], 2, &["slot-move@all", "@all away"]);
    refused(&["run", "roots", "--toggle", "cr4.la57@once", "--vcpus", "2"], 2, &["cr4.la57@once", "@once away"]);
    refused(&["run", "roots", "--tracker", "clear"], 2, &["roots", "--tracker"]);
    refused(&["run", "dirty-log", "--toggle", "smm"], 2, &["dirty-log", "--toggle"]);
    refused(&["run", "dirty-log", "--inject", "break-smm"], 2, &["break-smm", "roots"]);
    refused(&["run", "roots", "--inject", "lose-page"], 2, &["lose-page", "break-smm"]);
    refused(&["run", "roots", "--roots", "hoard"], 2, &["--roots hoard", "quota=N"]);
    refused(&["run", "roots", "--roots", "keep", "--toggle", "sregs"], 2, &["sregs", "KVM's"]);
    refused(&["run", "roots", "--roots", "keep", "--vcpus", "2"], 2, &["--vcpus 2", "--roots"]);
    refused(&["run", "roots", "--roots", "quota=15"], 2, &["quota=15", "16"]);
    refused(&["run", "roots", "--mechanism", "walker"], 2, &["--mechanism", "--roots"]);
    refused(&["run", "roots", "--roots", "keep", "--mechanism", "mprotect"], 2, &["--mechanism mprotect", "walker"]);
    refused(&["run", "roots", "--roots", "keep", "--nesting", "svm"], 2, &["roots", "--mechanism walker"]);
    refused(&["run", "dirty-log", "--role-log", "off"], 2, &["dirty-log", "--role-log"]);
    refused(&["run", "roots", "--toggle", "12-roles"], 2, &["12-roles", "--roots"]);
    let script = |text: &str, parts: &[&str]| {
        refused(&["run", "roots", "--toggle", "script", "--script", &format!("text:{text}")], 2, parts);
    };
    script("grow 1\ncr0.pg=0", &["--script text: line 2", "64-bit", "cr0.pg"]);
    script("grow 1\nsmi", &["line 2", "SMRAM", "smm"]);
    script("grow 1\ncr0.pw", &["line 2", "cr0.pw", "cr0.wp"]);
    script("cr0.wp", &["grow"]);
    refused(&["run", "roots", "--script", "/nonexistent/boot"], 2, &["--script", "/nonexistent/boot"]);
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
    for toggle in ["smm", "cr0.wp", "cr4.la57:unpaged"] {
        refused(&["run", "roots", "--toggle", toggle], 3, &[toggle, "PVM", "umbra lab roots"]);
    }
    let script = ["run", "roots", "--toggle", "script", "--script", "text:grow 1\ncr4.la57"];
    refused(&script, 3, &["script", "PVM", "umbra lab roots"]);
}
