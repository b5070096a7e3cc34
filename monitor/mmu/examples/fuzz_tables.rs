//! Hostile guests for as long as it takes: `fuzz_tables [SEED=..] [SECONDS=..] [STEPS=..]`.
//!
//! Each guest is one seed. A panic, a hang (a watchdog in the caller's hands: `timeout`) or a broken bound ends it.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use umbra_mmu::hostile::{Seen, run};

fn main() -> ExitCode {
    let (mut seed, mut seconds, mut steps) = (1u64, 60u64, 4000u64);
    for argument in std::env::args().skip(1) {
        let known = match argument.split_once('=') {
            Some(("SEED", value)) => value.parse().map(|value| seed = value).is_ok(),
            Some(("SECONDS", value)) => value.parse().map(|value| seconds = value).is_ok(),
            Some(("STEPS", value)) => value.parse().map(|value| steps = value).is_ok(),
            _ => false,
        };
        if !known {
            eprintln!("fuzz_tables: cannot use `{argument}`: give SEED=number, SECONDS=number or STEPS=number");
            return ExitCode::from(2);
        }
    }
    let started = Instant::now();
    let mut slowest = (Duration::ZERO, 0);
    let mut total = Seen::default();
    let mut guests = 0u64;
    while started.elapsed() < Duration::from_secs(seconds) {
        let begun = Instant::now();
        match run(seed, steps) {
            Err(what) => {
                println!("SEED={seed} STEPS={steps}: {what}");
                return ExitCode::from(1);
            }
            Ok(found) => {
                total.accesses += found.accesses;
                total.reached += found.reached;
                total.most_bytes = total.most_bytes.max(found.most_bytes);
                total.most_work = total.most_work.max(found.most_work);
            }
        }
        slowest = slowest.max((begun.elapsed(), seed));
        guests += 1;
        seed += 1;
    }
    println!(
        "{guests} guests, {} accesses, {} reached a page; most bytes {}, most work of one step {} entries, slowest guest {} ms (SEED={})",
        total.accesses,
        total.reached,
        total.most_bytes,
        total.most_work,
        slowest.0.as_millis(),
        slowest.1
    );
    ExitCode::SUCCESS
}
