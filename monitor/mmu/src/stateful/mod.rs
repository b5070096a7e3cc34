//! The stateful test: random operations on an MMU under the software walker, side by side with the reference.
//!
//! An *episode* draws a configuration from its seed and runs a script of operations against it. After every operation
//! the invariant's two halves, the truth of the dirty pages and all counts are checked. A script that fails shrinks to
//! a short one, which its text replays.

mod draw;
mod op;
mod shrink;
mod world;

pub use draw::{Episode, Rng};
pub use op::{Op, parse_script, print_script};
pub use shrink::shrink;
pub use world::World;

use crate::defects::Defects;

/// A failed check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Divergence {
    /// The operation after which it showed, from 0.
    pub step: usize,
    /// What does not hold.
    pub what: String,
}

/// Runs `script` on the configuration that `episode` draws. Gives the operations that were run.
///
/// # Errors
/// The first check that failed.
pub fn run(episode: Episode, defects: Defects, script: &[Op]) -> Result<usize, Divergence> {
    let mut world = World::new(episode, defects).map_err(|what| Divergence { step: 0, what })?;
    for (step, &op) in script.iter().enumerate() {
        world.step(step, op).map_err(|what| Divergence { step, what })?;
    }
    world.end().map_err(|what| Divergence { step: script.len(), what })?;
    Ok(script.len())
}

/// What a search found.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The configuration.
    pub episode: Episode,
    /// The shrunk script.
    pub script: Vec<Op>,
    /// What fails when it is replayed.
    pub divergence: Divergence,
    /// Operations run until the first failure.
    pub after: u64,
}

/// Operations of one episode.
pub const EPISODE: usize = 1500;

/// Runs episodes from `seed` until `operations` were run or a check fails. `progress` hears the operations so far.
///
/// # Errors
/// The first failure, shrunk.
pub fn search(
    seed: u64,
    operations: u64,
    defects: Defects,
    mut progress: impl FnMut(u64),
) -> Result<u64, Box<Finding>> {
    let mut done = 0;
    let mut number = 0;
    while done < operations {
        let episode = Episode::new(seed, number);
        let script = episode.script(EPISODE);
        match run(episode, defects, &script) {
            Ok(steps) => done += steps as u64,
            Err(divergence) => {
                let after = done + divergence.step as u64;
                let (script, divergence) = shrink(episode, defects, &script, divergence);
                return Err(Box::new(Finding { episode, script, divergence, after }));
            }
        }
        number += 1;
        progress(done);
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::defects::Defect;

    #[test]
    fn random_operations_agree_with_the_reference() {
        if let Err(finding) = search(1, 300_000, Defects::default(), |_| {}) {
            panic!("{}\n{}", finding.divergence.what, print_script(finding.episode, &finding.script));
        }
    }

    #[test]
    fn every_defect_is_caught() {
        let mut escaped = Vec::new();
        for &(defect, name) in Defect::ALL {
            let started = std::time::Instant::now();
            match search(7, 2_000_000, Defects::only(defect), |_| {}) {
                Ok(done) => escaped.push(format!("{name} ({done} operations)")),
                Err(finding) => {
                    assert!(run(finding.episode, Defects::only(defect), &finding.script).is_err(), "{name} replays");
                    let clean = run(finding.episode, Defects::default(), &finding.script);
                    assert!(clean.is_ok(), "{name}: its script passes without it: {clean:?}");
                    println!(
                        "{name}: after {} operations, {} ms, shrunk to {}: {}",
                        finding.after,
                        started.elapsed().as_millis(),
                        finding.script.len(),
                        finding.divergence.what
                    );
                }
            }
        }
        assert!(escaped.is_empty(), "not caught: {escaped:?}");
    }

    #[test]
    fn scripts_survive_their_text() {
        let episode = Episode::new(3, 5);
        let script = episode.script(50);
        let text = print_script(episode, &script);
        assert_eq!(parse_script(&text), Ok((episode, script)));
        assert!(parse_script("episode 1 2\nfly 1 2 3").unwrap_err().contains("fly"));
    }
}
