//! The row `smm:storm` of `roots`: SMIs strike vCPUs while they write in rounds of dirty logging. No page may be missed, every register must come
//! back, and SMM's own writes must be in the log of SMM's own view and nowhere else.
//!
//! The first round has no SMI: its length is what the others' is held against. It ends after the round with the last of the SMIs.

use super::Setup;
use super::check::Check;
use super::pass::{Case, Ending, ExplainedBy, Pass};
use crate::failure::Failure;
use crate::guest::smis::Smis;
use crate::guest::{Machine, Plan};
use crate::pages::PageSet;
use crate::progress::Progress;
use crate::report::record::{Counter, Phase, Row};
use crate::track::Kind;
use crate::truth::Verdict;
use kvm_bindings::{kvm_regs, kvm_sregs};
use std::collections::BTreeMap;
use std::time::Duration;
use umbra_shared::PAGE_SIZE;
use umbra_shared::protocol::Command;
use umbra_shared::smm::{self, View};

/// Between two SMIs, at least.
const PACE: Duration = Duration::from_micros(50);
/// Rounds without a single SMI after which the guest is too fast for them.
const FRUITLESS: u64 = 1000;

/// Measures the row.
pub fn row(setup: &Setup, name: &str, progress: &Progress) -> Result<Row, Failure> {
    let plan = Plan { smm: Some(View::Own), ..setup.plan.clone() };
    let kind = Kind::Bitmap;
    let case = Case {
        setup,
        plan: &plan,
        name: name.to_owned(),
        kind,
        explained_by: ExplainedBy::L1,
        begin: |_| Ok(()),
        ending: Ending::Stopped,
    };
    let machine = Machine::new(&plan, None, |vm| kind.prepare(vm))?;
    let mut tracker = kind.build(&machine, None)?;
    let mut check = Check::new(&case, Pass::Timed);
    machine.command(Command::Populate, 0)?;
    check.populated();
    tracker.start(&machine)?;
    machine.vm().log_smram()?;
    let mut storm = Storm {
        machine: &machine,
        smis: Smis::default(),
        ledgers: Vec::new(),
        row: Row { name: name.to_owned(), ..Row::default() },
    };
    let mut reported = PageSet::new(plan.map().l1_pages());
    let (mut round, mut done, mut fruitless) = (0, 0, 0);
    while done < setup.smis && fruitless < FRUITLESS {
        round += 1;
        progress.step(&format!("{name}: round {round}, {done} of {} SMIs", setup.smis));
        machine.command(Command::Plan, round)?;
        let most = if round == 1 { 0 } else { setup.smis - done };
        // Where rounds are equal to the instruction, one SMI that comes before its vCPU runs would do so for ever: it comes later and later.
        let pace = PACE * (1 + u32::try_from(fruitless % 64).unwrap_or(0));
        storm.round(round, pace, most)?;
        let writes = machine.writes()?;
        tracker.harvest(&machine)?;
        reported.clear();
        tracker.report(&machine, &mut reported);
        check.reported(round, writes, &mut reported, &machine);
        let now = storm.smis.interrupted.len() as u64;
        fruitless = if now == done && round > 1 { fruitless + 1 } else { 0 };
        done = now;
    }
    tracker.stop(&machine)?;
    for vcpu in 0..plan.vcpus {
        if !machine.smram_is_closed(vcpu)? {
            storm.smis.faults.push(format!("vCPU {vcpu}'s SMRAM changed memory that is not SMM's"));
        }
    }
    if done < setup.smis {
        storm.smis.faults.push(format!("only {done} SMIs of {} struck: the guest's rounds are too short", setup.smis));
    }
    for fault in &storm.smis.faults {
        check.fault(fault);
    }
    let few = storm.in_write_loop(round);
    if let Some(few) = few {
        check.fault(&few);
    }
    storm.row.truth = check.finish(&machine);
    Ok(storm.row)
}

/// What a storm keeps from round to round.
struct Storm<'a> {
    machine: &'a Machine,
    smis: Smis,
    /// SMIs that each vCPU's handler had counted at the end of the last round.
    ledgers: Vec<u64>,
    row: Row,
}

impl Storm<'_> {
    /// One round of the guest, with `most` SMIs at most, one every `pace`.
    fn round(&mut self, round: u64, pace: Duration, most: u64) -> Result<(), Failure> {
        let before = self.registers()?;
        self.ledgers = self.handled()?;
        let window = self.machine.command_under_smis(Command::Timed, pace, most, &mut self.smis)?;
        self.row.phases.push(Phase {
            phase: "dirty".to_owned(),
            round,
            pass: Pass::Timed.name().to_owned(),
            value: window.length(),
            unit: self.machine.unit().to_owned(),
            clean: window.clean,
        });
        for (vcpu, (before, after)) in before.into_iter().zip(self.registers()?).enumerate() {
            if before != after {
                self.smis.faults.push(format!("round {round}: vCPU {vcpu} came out of it with other registers"));
            }
        }
        self.check_log(round)
    }

    /// What a vCPU is at a doorbell: whatever ran since, these are the same at the next one.
    fn registers(&self) -> Result<Vec<(u64, u64, u64, kvm_sregs)>, Failure> {
        let of = |(registers, system): (kvm_regs, kvm_sregs)| (registers.rip, registers.rsp, registers.rflags, system);
        Ok(self.machine.registers()?.into_iter().map(of).collect())
    }

    fn handled(&self) -> Result<Vec<u64>, Failure> {
        let ledgers = (0..self.machine.vcpus()).map(|vcpu| Ok(self.machine.smm_ledger(vcpu)?.handled));
        ledgers.collect()
    }

    /// The log of SMM's view must hold the pages that the CPU and the handler wrote since the last round, and no other.
    fn check_log(&mut self, round: u64) -> Result<(), Failure> {
        let Some(mut bitmap) = self.machine.vm().smram_bitmap() else { return Ok(()) };
        bitmap.get(self.machine.vm().fd())?;
        let mut reported = PageSet::new(bitmap.pages());
        reported.add_slot(0, bitmap.pages(), bitmap.words());
        let (mut written, mut explained) = (PageSet::new(bitmap.pages()), PageSet::new(bitmap.pages()));
        for (vcpu, (before, now)) in self.ledgers.iter().zip(self.handled()?).enumerate() {
            let page = |offset: u64| (vcpu as u64 * smm::SMRAM_BYTES + offset) / PAGE_SIZE;
            for smi in *before..now {
                let entry = smm::LOG + smi % smm::LOG_ENTRIES * 8;
                for offset in [smm::LEDGER, smm::SAVE_STATE, entry] {
                    written.insert(page(offset));
                }
            }
            if now > *before {
                // The handler's code is first mapped by a fetch while logging is on, which KVM counts as a write, as it does in every view: once where
                // roots are kept, after each teardown else.
                explained.insert(page(smm::ENTRY));
            }
        }
        let verdict = Verdict::of(&written, &reported, &explained);
        if verdict.pages.missed > 0 || verdict.pages.extra > 0 {
            let list = |set: &PageSet| set.iter().collect::<Vec<_>>();
            self.smis.faults.push(format!(
                "round {round}: the log of SMM's view lacks pages {:?} that SMM wrote and has {:?} that it did not",
                list(&verdict.missed),
                list(&verdict.extra)
            ));
        }
        self.add("smram_pages_written", verdict.pages.written);
        self.add("smram_pages_logged", verdict.pages.reported);
        self.add("smram_pages_explained", verdict.pages.explained);
        Ok(())
    }

    fn add(&mut self, name: &str, value: u64) {
        let counter = self.row.counters.entry(name.to_owned()).or_insert_with(|| Counter {
            value: 0,
            source: "umbra".to_owned(),
            pass: Pass::Timed.name().to_owned(),
        });
        counter.value += value;
    }

    /// Counts the SMIs by the function that they interrupted; what is wrong if too few of them struck the write loop.
    fn in_write_loop(&mut self, rounds: u64) -> Option<String> {
        let mut places: BTreeMap<String, u64> = BTreeMap::new();
        for &(_, rip) in &self.smis.interrupted {
            *places.entry(self.machine.symbol(rip)).or_default() += 1;
        }
        let all = self.smis.interrupted.len() as u64;
        let in_loop: u64 = places.iter().filter(|(name, _)| name.ends_with("::timed")).map(|(_, count)| count).sum();
        self.add("rounds", rounds);
        self.add("smis", all);
        self.add("smis_in_write_loop", in_loop);
        for (name, count) in places {
            self.add(&format!("smis_at {name}"), count);
        }
        (in_loop * 10 < all * 9).then(|| format!("only {in_loop} of {all} SMIs struck inside the write loop"))
    }
}
