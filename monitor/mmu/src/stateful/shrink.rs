//! Shrinking: a failing script with everything taken out that it fails without.

use super::{Divergence, Episode, Op, run};
use crate::defects::Defects;

/// Replays at most: shrinking ends in seconds.
const REPLAYS: u32 = 1500;

/// The shortest script found that still fails (in whatever way), with its failure.
#[must_use]
pub fn shrink(episode: Episode, defects: Defects, script: &[Op], failure: Divergence) -> (Vec<Op>, Divergence) {
    let mut best: Vec<Op> = script.iter().copied().take(failure.step + 1).collect();
    let mut failure = failure;
    let mut replays = 0;
    let mut chunk = (best.len() / 2).max(1);
    loop {
        let mut start = 0;
        let mut any = false;
        while start < best.len() && replays < REPLAYS {
            let end = (start + chunk).min(best.len());
            let candidate: Vec<Op> = best[..start].iter().chain(&best[end..]).copied().collect();
            replays += 1;
            match run(episode, defects, &candidate) {
                Err(divergence) => {
                    best = candidate;
                    best.truncate(divergence.step + 1);
                    failure = divergence;
                    any = true;
                }
                Ok(_) => start = end,
            }
        }
        if replays >= REPLAYS || chunk == 1 && !any {
            return (best, failure);
        }
        chunk = if any { chunk } else { (chunk / 2).max(1) };
        chunk = chunk.min(best.len().max(1));
    }
}
