//! What L1 is told about an access of L2 that its table does not permit: the cases of [`umbra_shared::violation`], provoked one by one under KVM's own
//! nesting, beside what Umbra's shadow MMU would reflect for the same entries. Exit reason, exit qualification and the entry's accessed and dirty
//! flags have to be the same, bit by bit. What is excused, and why, says `as_bochs_says`.

use super::Setup;
use super::l1_cpu::{EPT_MISCONFIGURATION as MISCONFIGURATION, EPT_VIOLATION as VIOLATION};
use super::l2::Nesting;
use crate::failure::Failure;
use crate::guest::{Machine, Plan};
use crate::kvm::capabilities::{self, NestedEpt};
use crate::progress::Progress;
use crate::report::Record;
use crate::report::record::{Counter, Row};
use std::collections::BTreeMap;
use std::fmt;
use umbra_mmu::guest::Reflection;
use umbra_mmu::track::strategy;
use umbra_mmu::walker::PlainMemory;
use umbra_mmu::{Config, Env, Format, Frame, Kind, L1Memory as _, Mmu, NoMapper, Outcome, Request, RootRole, Slot};
use umbra_shared::Level;
use umbra_shared::nested::{Report, Way};
use umbra_shared::paging::ADDRESS_MASK;
use umbra_shared::paging::ept::qualification;
use umbra_shared::protocol::Command;
use umbra_shared::violation::{Access, CASES, Case, PROBE};

/// Differences that are named one by one.
const NAMED: usize = 16;

/// What L1 finds after an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Exit reason and qualification, `None` where the access was done.
    told: Option<(u64, u64)>,
    /// The case's entry without its address.
    entry: u64,
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.told {
            None => write!(f, "permitted")?,
            Some((VIOLATION, qualification)) => write!(f, "violation {qualification:#x}")?,
            Some((MISCONFIGURATION, 0)) => write!(f, "misconfiguration")?,
            Some((reason, qualification)) => write!(f, "exit reason {reason} ({qualification:#x})")?,
        }
        write!(f, ", entry {:#x}", self.entry)
    }
}

/// Runs the scenario.
pub fn run(setup: &Setup, progress: &Progress) -> Result<Record, Failure> {
    let Some(l2) = &setup.l2 else { return Err(Failure::Input("violations: its options are missing".into())) };
    let mut rows = Vec::new();
    for nesting in l2.ways_here(crate::host::vendor()).into_iter().filter(|way| *way != Nesting::Plain) {
        let name = nesting.to_string();
        let row = match nesting {
            Nesting::Vmx => row(setup, &name, progress),
            other => Err(Failure::NotHere(format!("{other}: the list of cases is EPT's, which vmx has"))),
        };
        rows.push(Setup::or_not_here(&name, row)?);
    }
    setup.record_of(rows, |name| l2.named(name))
}

fn row(setup: &Setup, name: &str, progress: &Progress) -> Result<Row, Failure> {
    let offered = capabilities::nested_vmx()?;
    let Some(l2) = &setup.l2 else { return Err(Failure::Input("violations: its options are missing".into())) };
    let plan = Plan { nested: Some(l2.nested(Way::Vmx)), vcpus: 1, ..setup.plan.clone() };
    progress.step(&format!("{name}: boot"));
    let machine = Machine::new(&plan, None, |_| Ok(()))?;
    let mut counts =
        BTreeMap::from([("cases", 0), ("permitted", 0), ("violations", 0), ("misconfigurations", 0), ("excused", 0)]);
    let mut row = Row { name: name.to_owned(), ..Row::default() };
    let (mut different, mut before) = (0, machine.nested_report()?);
    progress.step(&format!("{name}: {} cases", CASES.len()));
    for (number, case) in (0..).zip(&CASES) {
        if case.accessed_dirty && !offered.accessed_dirty {
            continue;
        }
        // Nothing is timed, so nothing need settle.
        machine.begin(Command::Provoke, number)?;
        machine.finish_all(Command::Provoke)?;
        let report = machine.nested_report()?;
        let (found, fault) = answer_of_kvm(case, &before, &report);
        before = report;
        let expected = answer_of_umbra(case, offered)?;
        *counts.entry("cases").or_default() += 1;
        let kind = match found.told {
            None => "permitted",
            Some((MISCONFIGURATION, _)) => "misconfigurations",
            Some(_) => "violations",
        };
        *counts.entry(kind).or_default() += 1;
        let excused = setup.in_lab() && as_bochs_says(case, expected) == Some(found);
        *counts.entry("excused").or_default() += u64::from(excused);
        let difference = (found != expected && !excused).then(|| format!("KVM says {found}, Umbra {expected}"));
        for what in fault.into_iter().chain(difference) {
            different += 1;
            if different <= NAMED {
                row.truth.faults.push(format!("case {number}, {}: {what}", describe(case)));
            }
        }
    }
    if different > NAMED {
        row.truth.faults.push(format!("and {} more differences", different - NAMED));
    }
    counts.insert("different", different as u64);
    for (counter, value) in counts {
        let counted = Counter { value, source: "umbra".to_owned(), pass: "observed".to_owned() };
        row.counters.insert(counter.to_owned(), counted);
    }
    Ok(row)
}

/// What L1 reports, and what is wrong with it whatever Umbra says: an address that is not the one that was accessed.
fn answer_of_kvm(case: &Case, before: &Report, report: &Report) -> (Answer, Option<String>) {
    let entry = report.probed_entry & !ADDRESS_MASK;
    if report.violations == before.violations {
        return (Answer { told: None, entry }, None);
    }
    let address = report.last_address;
    let expected = PROBE | address & ((1 << 30) - 1) & !0xfff | case.access.offset();
    let fault = (address != expected).then(|| format!("L1 is told of L2's address {address:#x}, not {expected:#x}"));
    (Answer { told: Some((report.last_code, report.last_qualification)), entry }, fault)
}

/// The one thing in which the lab's processor is not as the manual has it. Where accessed and dirty flags are in use, a walk of L2's own tables counts as a
/// write, and a violation by it sets bits 0 *and* 1 of the qualification (SDM 3C, table 28-7, note 1). Bochs 2.7 makes a write of it
/// (`translate_guest_physical` in its cpu/paging.cc) and sets bit 1 alone. KVM passes on what the processor told it of the access.
fn as_bochs_says(case: &Case, expected: Answer) -> Option<Answer> {
    match expected.told {
        Some((VIOLATION, bits)) if case.accessed_dirty && case.access == Access::Walk => {
            Some(Answer { told: Some((VIOLATION, bits & !qualification::READ)), ..expected })
        }
        _ => None,
    }
}

/// Where the walker's copy of the tables is: EPT12's root first, then the tables below it, then the page.
const ROOT: u64 = 1;
const PAGE: u64 = 5;
const FRAMES: u64 = 512;
const LEVELS: [Level; 4] = [Level::T512, Level::G1, Level::M2, Level::K4];

/// What Umbra's shadow MMU makes of the same entries.
fn answer_of_umbra(case: &Case, offered: NestedEpt) -> Result<Answer, Failure> {
    let broken = |error: umbra_mmu::MmuError| Failure::Check(format!("the shadow MMU: {error}"));
    let Some(strategy) = strategy("write-protect") else {
        return Err(Failure::Check("the shadow MMU has no strategy write-protect".into()));
    };
    let caps = offered.into();
    let mut memory = PlainMemory::new(FRAMES, 0);
    let l2 = PROBE | PAGE << 12;
    let mut place = (Frame(ROOT), 0);
    for (table, level) in (ROOT + 1..).zip(LEVELS.into_iter().filter(|level| *level >= case.leaf)) {
        let offset = (l2 >> level.shift() & 511) * 8;
        let to = if level == case.leaf { PAGE << 12 & !(level.bytes() - 1) } else { table << 12 };
        memory.write(Frame(table - 1), offset, case.entry(level, to));
        if level == case.at {
            place = (Frame(table - 1), offset);
        }
    }
    let mut mmu =
        Mmu::new(Config { caps, ..Config::new(FRAMES, strategy) }, &[Slot::identity(FRAMES)]).map_err(broken)?;
    let mut mapper = NoMapper;
    let mut env = Env { memory: &mut memory, mapper: &mut mapper };
    let format = Format::Ept { five_levels: false, accessed_dirty: case.accessed_dirty };
    let root = mmu.load_root(&mut env, RootRole::new(format), ROOT << 12).map_err(broken)?;
    let request = match case.access {
        Access::Read => Request::of(Kind::Read),
        Access::Write => Request::of(Kind::Write),
        Access::Execute => Request::of(Kind::Execute),
        Access::Walk => Request::TABLE_WALK,
    };
    let told = match mmu.fault(&mut env, root, l2 | case.access.offset(), request).map_err(broken)? {
        Outcome::Mapped { .. } => None,
        Outcome::Reflected(Reflection::EptViolation(qualification)) => Some((VIOLATION, qualification)),
        Outcome::Reflected(Reflection::EptMisconfiguration) => Some((MISCONFIGURATION, 0)),
        other => return Err(Failure::Check(format!("the shadow MMU answers {} with {other:?}", describe(case)))),
    };
    let (frame, offset) = place;
    Ok(Answer { told, entry: memory.read(frame, offset) & !ADDRESS_MASK })
}

fn describe(case: &Case) -> String {
    let flags = if case.accessed_dirty { "with" } else { "without" };
    format!(
        "{} where the entry of level {} (leaf: {}) has {:#x}, {flags} flags in use",
        case.access.name(),
        case.at.number(),
        case.leaf.number(),
        case.address_bits | case.bits
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFERED: NestedEpt =
        NestedEpt { address_bits: 40, execute_only: true, giant_pages: true, accessed_dirty: true };

    fn answer(case: Case) -> Answer {
        answer_of_umbra(&case, OFFERED).unwrap()
    }

    /// SDM 3C, table 28-7: bit 1 the write, bits 5:3 what the entry permits, bits 7 and 8 a linear address and not on its walk.
    #[test]
    fn the_walker_answers_as_the_manual_says() {
        let leaf =
            |bits, access| Case { leaf: Level::K4, at: Level::K4, bits, address_bits: 0, accessed_dirty: true, access };
        let told = |case| answer(case).told;
        assert_eq!(told(leaf(0x335, Access::Write)), Some((VIOLATION, 0x1aa)));
        assert_eq!(told(leaf(0x331, Access::Walk)), Some((VIOLATION, 0x8b)));
        assert_eq!(told(leaf(0x332, Access::Write)), Some((MISCONFIGURATION, 0)));
        assert_eq!(answer(leaf(0x37, Access::Read)), Answer { told: None, entry: 0x137 });
        assert_eq!(answer(leaf(0x37, Access::Write)), Answer { told: None, entry: 0x337 });
    }

    #[test]
    fn the_list_has_cases_of_every_kind() {
        let answers: Vec<Answer> = CASES.map(answer).to_vec();
        let count =
            |reason: Option<u64>| answers.iter().filter(|it| it.told.map(|(reason, _)| reason) == reason).count();
        assert!(count(None) > 20 && count(Some(VIOLATION)) > 40 && count(Some(MISCONFIGURATION)) > 20, "{answers:?}");
        assert_eq!(count(None) + count(Some(VIOLATION)) + count(Some(MISCONFIGURATION)), CASES.len());
    }

    #[test]
    fn bochs_is_excused_for_the_read_of_a_page_walk_and_for_nothing_else() {
        for case in &CASES {
            let expected = answer(*case);
            let walk = case.access == Access::Walk && case.accessed_dirty;
            match as_bochs_says(case, expected) {
                Some(said) => {
                    assert!(walk, "{case:?}");
                    let (_, bits) = expected.told.unwrap();
                    assert_eq!(said, Answer { told: Some((VIOLATION, bits ^ 1)), ..expected });
                }
                None => assert!(!walk || expected.told.is_none_or(|(reason, _)| reason != VIOLATION), "{case:?}"),
            }
        }
    }

    #[test]
    fn an_address_that_was_not_accessed_is_noticed() {
        let case = &CASES[0];
        let report = Report { violations: 1, last_code: 48, last_address: PROBE | 0x12_3018, ..Report::default() };
        let (_, fault) = answer_of_kvm(case, &Report::default(), &report);
        assert!(fault.is_some_and(|fault| fault.contains("0x8000123018")), "{case:?}");
    }
}
