//! The `umbra` command.

use std::io::Write as _;
use std::process::ExitCode;
use umbra::cli::{self, Cli, Command, KernelsCommand, RunArgs};
use umbra::ground::Ground;
use umbra::lab::{self, shelf};
use umbra::probe::{self, Probe};
use umbra::progress::Progress;
use umbra::report::{Output, Record, table};
use umbra::{Failure, scenario};

fn main() -> ExitCode {
    if lab::init::inside() {
        lab::init::main();
    }
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
        Command::Probe { json: false } => show(&Probe::run().to_text())?,
        Command::Probe { json: true } => show(&(Probe::run().to_json()? + "\n"))?,
        Command::List => show(&(probe::list() + &shelf::list()?))?,
        Command::Run(args) => return measure(args, |progress| scenario::run(args, Ground::Kvm, progress)),
        Command::Lab(args) => return measure(&args.run, |progress| lab::run(args, progress)),
        Command::Kernels { command: KernelsCommand::List } => show(&shelf::list()?)?,
        Command::Kernels { command: KernelsCommand::Fetch { kernels } } => {
            show(&shelf::fetch(kernels, &Progress::stderr())?)?;
        }
    }
    Ok(())
}

/// Prints `text`. A reader who has seen enough (`| head`) is no failure; a full disk is one.
fn show(text: &str) -> Result<(), Failure> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::Check(format!("standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// Makes a Record, writes it, shows it, and fails if its truth did not hold. Whether `--out` can be written is known before the run.
fn measure(args: &RunArgs, run: impl FnOnce(&Progress) -> Result<Record, Failure>) -> Result<(), Failure> {
    scenario::check(args)?;
    let output = args.out.as_deref().map(Output::check).transpose()?;
    let progress = Progress::stderr();
    let record = run(&progress);
    drop(progress);
    let record = record?;
    // Neither the file nor the table is lost when the other cannot be written.
    let written = output.map_or(Ok(()), |output| output.write(&record.to_json()));
    show(&table::render(&record)).and(written)?;
    let faults = record.faults();
    if faults.is_empty() {
        Ok(())
    } else {
        Err(Failure::Check(format!("the truth did not hold\n{}", faults.join("\n"))))
    }
}
