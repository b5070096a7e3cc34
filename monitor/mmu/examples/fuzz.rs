//! The stateful test as a program: `fuzz [SEED=..] [N=..] [DEFECT=..] [REPLAY=file]`.
//!
//! Without arguments 10,000,000 operations from seed 1. A failure prints a script; `REPLAY=file` runs it again.

use std::process::ExitCode;

use umbra_mmu::stateful::{parse_script, print_script, run, search};
use umbra_mmu::{Defect, Defects};

fn main() -> ExitCode {
    let (mut seed, mut operations, mut defects, mut replay) = (1, 10_000_000, Defects::default(), None);
    for argument in std::env::args().skip(1) {
        let known = match argument.split_once('=') {
            Some(("SEED", value)) => value.parse().map(|value| seed = value).is_ok(),
            Some(("N", value)) => value.parse().map(|value| operations = value).is_ok(),
            Some(("DEFECT", value)) => Defect::ALL
                .iter()
                .find(|(_, name)| *name == value)
                .map(|(defect, _)| defects = Defects::only(*defect))
                .is_some(),
            Some(("REPLAY", value)) => {
                replay = Some(value.to_owned());
                true
            }
            _ => false,
        };
        if !known {
            eprintln!("fuzz: cannot use `{argument}`: give SEED=number, N=number, DEFECT=name or REPLAY=file");
            return ExitCode::from(2);
        }
    }
    if defects != Defects::default() && !cfg!(feature = "defects") {
        eprintln!("fuzz: this build has no defects: build with --features defects");
        return ExitCode::from(2);
    }
    match replay {
        Some(path) => replay_file(&path, defects),
        None => search_from(seed, operations, defects),
    }
}

fn replay_file(path: &str, defects: Defects) -> ExitCode {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string());
    match text.and_then(|text| parse_script(&text)) {
        Err(error) => {
            eprintln!("fuzz: {path}: {error}");
            ExitCode::from(2)
        }
        Ok((episode, script)) => {
            println!("{:#?}", episode.setup());
            match run(episode, defects, &script) {
                Ok(steps) => {
                    println!("{steps} operations without a divergence");
                    ExitCode::SUCCESS
                }
                Err(divergence) => {
                    println!("operation {}: {}", divergence.step, divergence.what);
                    ExitCode::from(1)
                }
            }
        }
    }
}

fn search_from(seed: u64, operations: u64, defects: Defects) -> ExitCode {
    let mut shown = 0;
    let found = search(seed, operations, defects, |done| {
        if done / 1_000_000 > shown {
            shown = done / 1_000_000;
            eprintln!("{done} operations");
        }
    });
    match found {
        Ok(done) => {
            println!("{done} operations from seed {seed} without a divergence");
            ExitCode::SUCCESS
        }
        Err(finding) => {
            println!("# {}", finding.divergence.what);
            println!("# after {} operations; replay with REPLAY=file", finding.after);
            print!("{}", print_script(finding.episode, &finding.script));
            ExitCode::from(1)
        }
    }
}
