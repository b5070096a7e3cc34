//! The `umbra` command.

use std::process::ExitCode;
use umbra::{Failure, cli};

fn main() -> ExitCode {
    match cli::parse(std::env::args()).and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("umbra: {failure}");
            failure.exit_code()
        }
    }
}

fn run(cli: cli::Cli) -> Result<(), Failure> {
    let _ = cli;
    Ok(())
}
