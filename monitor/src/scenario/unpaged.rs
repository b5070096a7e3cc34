//! The rows `...:unpaged` of `roots`: bits that can only change while paging is off, so that what CR0.PG itself costs must be told from them. The guest
//! leaves long mode, touches its pages, changes the bit there and back, and touches them again before it switches paging on.

use super::roots::{Faults, Run};
use crate::failure::Failure;
use crate::guest::Plan;
use crate::kvm;
use umbra_shared::layout::{self, LEGACY_BASE};
use umbra_shared::pattern::Pattern;
use umbra_shared::protocol::Command;
use umbra_shared::toggle::Toggle;
use umbra_shared::{Level, PAGE_SIZE};

/// The machine: without paging, 32-bit code reaches 4 GiB, of which 3 may be memory.
///
/// # Errors
/// [`Failure::NotHere`] for more memory than that.
pub fn plan(plan: Plan) -> Result<Plan, Failure> {
    let pages = plan.pattern.pages;
    let room = (layout::LEGACY_LIMIT - LEGACY_BASE) / PAGE_SIZE;
    let slots = layout::slots_at(LEGACY_BASE, pages, 1, Level::K4).filter(|_| pages <= room);
    let slots = slots.ok_or_else(|| kvm::Error::Capability {
        capability: "memory below 3 GiB",
        consequence: format!("without paging the guest reaches {room} pages of it, and there are {pages}"),
    })?;
    Ok(Plan { slots: slots.collect(), ..plan })
}

/// Makes both touches and the change of each round.
///
/// # Errors
/// Those of the guest.
pub fn row(run: &mut Run, toggle: Toggle) -> Result<(), Failure> {
    let (pages, rounds) = (run.setup.plan.pattern.pages, run.setup.rounds);
    let mut most: Option<Faults> = None;
    for round in 1..=rounds {
        run.step("unpaged", round, rounds);
        let command = |command, argument| run.machine.command_of(0..1, command, argument);
        command(Command::Unpaged, round << 32 | toggle as u64)?;
        run.log("cr0.pg")?;
        run.check_log_begins();
        let before = run.faults()?;
        let command = |command, argument| run.machine.command_of(0..1, command, argument);
        let change = command(Command::GoOn, 0)?;
        let touch = command(Command::GoOn, 0)?;
        let faults = run.faults()?.since(before);
        let name = run.row.name.clone();
        run.log(&name)?;
        run.check_log(round, faults)?;
        run.machine.command_of(0..1, Command::GoOn, 0)?;
        run.log("cr0.pg")?;
        let ticks = run.machine.mailbox(0)?.ticks;
        run.phase_by_guest("toggle", round, ticks, change.clean);
        run.phase("refault", round, touch.length(), touch.clean);
        run.row.truth.pages.written += pages;
        most = Some(faults.most(most.unwrap_or_default()));
    }
    run.count_faults(most);
    let wrong = (0..pages).find(|&page| run.machine.vm().first_word(page) != Some(Pattern::stamp(rounds, page)));
    if let Some(page) = wrong {
        let (name, pass) = (&run.row.name, run.pass.name());
        let fault = format!("toggle {name}, {pass} pass: page {page} does not hold what was written there last");
        run.row.truth.faults.push(fault);
    }
    Ok(())
}
