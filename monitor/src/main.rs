//! The `umbra` command.

use std::process::ExitCode;
use umbra::cli::{self, Cli, Command, RunArgs};
use umbra::ground::Ground;
use umbra::probe::{self, Probe};
use umbra::progress::Progress;
use umbra::report::output::Output;
use umbra::report::{Record, table};
use umbra::{Failure, scenario};

fn main() -> ExitCode {
    match cli::parse(std::env::args()).and_then(|cli| run(&cli)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("umbra: {failure}");
            failure.exit_code()
        }
    }
}

fn run(cli: &Cli) -> Result<(), Failure> {
    match &cli.command {
        Command::Probe { json: false } => print!("{}", Probe::run().to_text()),
        Command::Probe { json: true } => println!("{}", Probe::run().to_json()?),
        Command::List => print!("{}", probe::list()),
        Command::Run(args) => {
            return measure(args, |progress| scenario::run(args, Ground::Kvm, progress));
        }
        Command::Lab(_) | Command::Kernels { .. } => todo!(),
    }
    Ok(())
}

/// Makes a Record, shows it, writes it, and fails if its truth did not hold.
fn measure(args: &RunArgs, run: impl FnOnce(&Progress) -> Result<Record, Failure>) -> Result<(), Failure> {
    let output = args.out.as_deref().map(Output::prepare).transpose()?;
    let progress = Progress::stderr();
    let record = run(&progress);
    drop(progress);
    let record = record?;
    print!("{}", table::render(&record));
    if let Some(output) = output {
        output.write(&record)?;
    }
    let faults = record.faults();
    if faults.is_empty() {
        Ok(())
    } else {
        Err(Failure::Check(format!("the truth did not hold\n{}", faults.join("\n"))))
    }
}
