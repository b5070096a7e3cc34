//! Scripts of changes with memory growing alongside: the built-in boot, or `--script FILE`.
//!
//! ```text
//! # a comment
//! grow 3         three more parts of the memory are touched for the first time; all parts of the script are the whole memory
//! cr0.wp         a toggle, as --toggle names it, there and back; then everything that was touched so far is touched again
//! ```

use super::toggles::{By, Change, Toggling};
use crate::cli::ScriptText;
use crate::failure::Failure;

/// The changes of a Linux boot.
const BOOT: &str = include_str!("../../../images/scripts/linux-boot");
/// More than any boot has: a script that is longer is a mistake.
const MOST: usize = 100_000;

/// A step of a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// So many more parts of the memory are in use.
    Grow(u64),
    /// Something changes, there and back.
    Toggle(Change),
}

/// A script that makes sense.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Script {
    /// Its steps.
    pub steps: Vec<Step>,
    /// Parts that the memory is in.
    parts: u64,
}

impl Script {
    /// The script that was given, or the built-in boot.
    ///
    /// # Errors
    /// [`Failure::Input`] that names the file, the line, and what would be right.
    pub fn read(given: Option<&ScriptText>) -> Result<Self, Failure> {
        let Some(script) = given else { return Self::parse(BOOT).map_err(Failure::Input) };
        Self::parse(&script.text).map_err(|why| Failure::Input(format!("--script {}: {why}", script.name)))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let (mut steps, mut parts) = (Vec::new(), 0_u64);
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let step = step(line).map_err(|why| format!("line {number}: {why}"))?;
            if let Step::Grow(more) = step {
                parts = parts.saturating_add(more);
            }
            steps.push(step);
            if steps.len() > MOST {
                return Err(format!("more than {MOST} steps"));
            }
        }
        if parts == 0 {
            return Err("it has no `grow`, so there would be nothing to touch".into());
        }
        Ok(Self { steps, parts })
    }

    /// Pages in use once `grown` parts of `pages` are.
    #[must_use]
    pub fn pages(&self, grown: u64, pages: u64) -> u64 {
        u64::try_from(u128::from(pages) * u128::from(grown) / u128::from(self.parts)).unwrap_or(pages)
    }

    /// The toggles in it, each once.
    #[must_use]
    pub fn changes(&self) -> Vec<Change> {
        let mut changes = Vec::new();
        for step in &self.steps {
            if let Step::Toggle(change) = step
                && !changes.contains(change)
            {
                changes.push(*change);
            }
        }
        changes
    }
}

fn step(line: &str) -> Result<Step, String> {
    if let Some(parts) = line.strip_prefix("grow ") {
        return match parts.trim().parse() {
            Ok(parts @ 1..=1_000_000) => Ok(Step::Grow(parts)),
            _ => Err(format!("{line}: a number from 1 to 1000000 follows `grow`")),
        };
    }
    match line {
        "cr0.pg=0" => {
            return Err(
                "cr0.pg=0: 64-bit code cannot switch paging off; `cr0.pg` goes through 32-bit code and back".into()
            );
        }
        "smi" => {
            return Err("smi: without SMRAM the CPU would find no handler; `smm` and `smm:shared` bring one".into());
        }
        _ => {}
    }
    let toggling: Toggling = line.parse().map_err(|why: String| why.trim_start_matches("--toggle ").to_owned())?;
    match toggling.change {
        _ if toggling.by != By::First => {
            Err(format!("{line}: a script is the first vCPU's (leave @all or @once away)"))
        }
        Change::Nested | Change::SmiStorm | Change::Script | Change::TwelveRoles | Change::Unpaged(_) => {
            Err(format!("{line}: a row of its own, no step of a script"))
        }
        change => Ok(Step::Toggle(change)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_shared::toggle::Toggle;

    #[test]
    fn the_boot_has_the_changes_that_were_counted() {
        let script = Script::read(None).unwrap();
        let count = |of: fn(Change) -> bool| {
            script.steps.iter().filter(|step| matches!(step, Step::Toggle(change) if of(*change))).count()
        };
        let slots = count(|change| matches!(change, Change::SlotDelete | Change::SlotMove));
        let cr0 = count(|change| matches!(change, Change::Firmware(Toggle::Cr0Wp | Toggle::Cr0Pg)));
        assert_eq!((slots, cr0, count(|_| true)), (14, 85, 106));
        assert_eq!((script.pages(0, 4096), script.pages(106, 4096)), (0, 4096));
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_line() {
        for (text, part) in [
            ("grow 1\ncr0.pw", "line 2: cr0.pw: there is no such toggle"),
            ("grow", "line 1: grow"),
            ("grow 0", "line 1: grow 0: a number"),
            ("cr0.wp", "no `grow`"),
            ("grow 1\n\n# x\ncr0.pg=0 # off", "line 4: cr0.pg=0: 64-bit code"),
            ("grow 1\nsmi", "line 2: smi: without SMRAM"),
            ("grow 1\ncr0.wp@all", "line 2: cr0.wp@all: a script is the first vCPU's"),
            ("grow 1\nsmm:storm", "line 2: smm:storm: a row of its own"),
        ] {
            let why = Script::parse(text).unwrap_err();
            assert!(why.contains(part), "{text:?}: {why}");
        }
        assert_eq!(Script::parse("grow 2 # x\n smm").unwrap().steps.len(), 2);
    }
}
