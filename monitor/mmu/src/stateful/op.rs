//! Operations, and their text.

use std::fmt::Write as _;

use super::Episode;

macro_rules! ops {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// What an operation does. Its three numbers pick among what there is at that moment.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Action {
            $($(#[$doc])* $name,)*
        }

        impl Action {
            const ALL: &[(Self, &'static str)] = &[$((Self::$name, $text),)*];
        }
    };
}

ops! {
    /// L2 accesses an address.
    Access = "access",
    /// L1 changes an entry, and invalidates nothing.
    Edit = "edit",
    /// L1 changes an entry and invalidates what the architecture demands.
    Remap = "remap",
    /// L1 invalidates.
    Invalidate = "invalidate",
    /// A vCPU loads a root.
    Load = "load",
    /// A vCPU lets go of a root.
    Drop = "drop",
    /// L2 is in another role: its vCPU loads that one's root, then lets go of the one before.
    ChangeRole = "change-role",
    /// Tracking starts.
    Start = "start",
    /// Dirty pages are reported.
    Harvest = "harvest",
    /// Some reported pages are cleared.
    Clear = "clear",
    /// All reported pages are cleared.
    ClearAll = "clear-all",
    /// Tracking stops.
    Stop = "stop",
    /// L1's memory map changes.
    Slots = "slots",
    /// Only so many allocations succeed from now on.
    Starve = "starve",
    /// Allocations succeed again.
    Feed = "feed",
    /// L2 writes a run of neighbouring pages.
    Sweep = "sweep",
    /// Pages are mapped that L2 has not touched.
    Prefetch = "prefetch",
}

/// One operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Op {
    /// What it does.
    pub action: Action,
    /// Numbers that pick.
    pub a: u32,
    /// As `a`.
    pub b: u32,
    /// As `a`.
    pub c: u32,
}

/// A script as text: `episode SEED NUMBER`, then an operation a line.
#[must_use]
pub fn print_script(episode: Episode, script: &[Op]) -> String {
    let mut text = format!("episode {} {}\n", episode.seed, episode.number);
    for op in script {
        let name = Action::ALL.iter().find(|(action, _)| *action == op.action).map_or("?", |(_, name)| name);
        // Writing to a string does not fail.
        let _ = writeln!(text, "{name} {} {} {}", op.a, op.b, op.c);
    }
    text
}

/// Reads what [`print_script`] wrote. Empty lines and lines that begin with `#` are skipped.
///
/// # Errors
/// Names the line that cannot be read.
pub fn parse_script(text: &str) -> Result<(Episode, Vec<Op>), String> {
    let mut episode = None;
    let mut script = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let mut words = line.split_whitespace();
        let name = words.next().unwrap_or_default();
        let numbers: Vec<u64> = words.map_while(|word| word.parse().ok()).collect();
        let bad = || format!("cannot read `{line}`: expected `episode SEED NUMBER` or `OPERATION A B C`");
        if name == "episode" {
            let [seed, number] = numbers[..] else { return Err(bad()) };
            episode = Some(Episode { seed, number });
            continue;
        }
        let action = Action::ALL.iter().find(|(_, text)| *text == name).ok_or_else(bad)?.0;
        let [a, b, c] = numbers[..] else { return Err(bad()) };
        let narrow = |number: u64| u32::try_from(number).map_err(|_| bad());
        script.push(Op { action, a: narrow(a)?, b: narrow(b)?, c: narrow(c)? });
    }
    Ok((episode.ok_or("no line `episode SEED NUMBER`")?, script))
}
