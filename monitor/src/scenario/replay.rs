//! The row `script` of `roots`: a boot's changes with memory growing alongside. After every change all pages so far are touched again.
//!
//! Teardowns are the touches that faulted on pages they had touched before.

use super::Setup;
use super::pass::Pass;
use super::roots::{Faults, Run};
use super::script::Step;
use super::toggles::{By, Toggling};
use crate::failure::Failure;
use crate::kvm;
use umbra_shared::pattern::Pattern;
use umbra_shared::protocol::Command;
use umbra_shared::smm::View;

/// What a replay came to.
#[derive(Default)]
struct Sums {
    toggles: u64,
    touches: u64,
    clean: bool,
    refaults: Faults,
    teardowns: u64,
}

/// Makes both passes' measurement in `run`, a machine that was just booted.
pub fn replay(run: &mut Run) -> Result<(), Failure> {
    let setup = run.setup;
    let script = &setup.script;
    let all = setup.plan.pattern.pages;
    let mut sums = Sums { clean: true, ..Sums::default() };
    let (mut grown, mut used) = (0, 0);
    let changes = script.steps.iter().filter(|step| matches!(step, Step::Toggle(_))).count() as u64;
    let mut round = 0;
    for &step in &script.steps {
        match step {
            Step::Grow(parts) => {
                grown += parts;
                let pages = script.pages(grown, all);
                let (cost, clean, faults) = touch(run, round, pages)?;
                run.log("growth")?;
                sums.touches += cost;
                sums.clean &= clean;
                // An L2's extents reach beyond what it touched: what is mapped here is new, or was mapped ahead.
                sums.again(Faults {
                    kvm: faults.kvm.map(|faults| faults.saturating_sub(pages - used)),
                    shadow: faults.shadow.map(|_| 0),
                });
                used = pages;
            }
            Step::Toggle(change) => {
                round += 1;
                run.step("change", round, changes);
                let toggling = Toggling { change, by: By::First };
                run.about_to(&toggling.to_string())?;
                let (cost, _, clean) = run.change(toggling, round)?;
                sums.toggles += cost;
                run.log(&toggling.to_string())?;
                let (more, clean_touch, faults) = touch(run, round, used)?;
                run.log("touch")?;
                sums.touches += more;
                sums.clean &= clean && clean_touch;
                sums.again(Faults { shadow: faults.shadow.map(|mapped| mapped.min(used)), ..faults });
            }
        }
    }
    run.phase("toggle", 0, sums.toggles, sums.clean);
    run.phase("refault", 0, sums.touches, sums.clean);
    if run.pass == Pass::Observed {
        run.count_faults(Some(sums.refaults));
        let source = if run.l2.is_some() { "umbra-mmu" } else { "umbra" };
        for (name, value) in [("teardowns", sums.teardowns), ("changes", changes)] {
            run.count(name, value, source);
        }
    }
    run.row.truth.pages.written += used;
    let wrong = (0..used).find(|&page| run.machine.vm().first_word(page) != Some(Pattern::stamp(round, page)));
    if let Some(page) = wrong {
        run.row
            .truth
            .faults
            .push(format!("script, {} pass: page {page} does not hold what was written there last", run.pass.name()));
    }
    Ok(())
}

impl Sums {
    /// A touch faulted so often on pages that it had touched before.
    fn again(&mut self, again: Faults) {
        self.refaults = self.refaults.plus(again);
        self.teardowns += u64::from(again.refaults().is_some_and(|faults| faults > 0));
    }
}

/// The first vCPU touches the first `pages`: what it took, whether that is a figure, and its faults where they are counted.
fn touch(run: &mut Run, round: u64, pages: u64) -> Result<(u64, bool, Faults), Failure> {
    let before = run.faults()?;
    let window = run.machine.command_of(0..1, Command::Touch, round << 32 | pages)?;
    let faults = run.faults()?.since(before);
    run.look()?;
    Ok((window.length(), window.clean, faults))
}

/// Whether every change of the script can be made here.
///
/// # Errors
/// That of the first that cannot.
pub fn check(setup: &Setup) -> Result<(), kvm::Error> {
    setup.script.changes().into_iter().try_for_each(|change| Toggling { change, by: By::First }.check())
}

/// What SMM must see for the script.
pub fn smm(setup: &Setup) -> Option<View> {
    setup.script.changes().into_iter().find_map(|change| Toggling { change, by: By::First }.smm())
}
