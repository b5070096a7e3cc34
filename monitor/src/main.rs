//! The `umbra` command.

use std::process::ExitCode;
use umbra::cli::{self, Cli, Command, KernelsCommand, RunArgs};
use umbra::ground::Ground;
use umbra::lab::{self, shelf};
use umbra::progress::Progress;
use umbra::report::{Output, Record};
use umbra::{Failure, scenario};

fn main() -> ExitCode {
    if lab::init::inside() {
        lab::init::main();
    }
    match cli::parse(std::env::args()).and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("umbra: {failure}");
            failure.exit_code()
        }
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    match cli.command {
        Command::Run(args) => measured(&args, |progress| scenario::run(&args, Ground::Kvm, progress)),
        Command::Lab(args) => measured(&args.run, |progress| lab::run(&args, progress)),
        Command::Kernels { command: KernelsCommand::List } => {
            print!("{}", shelf::list()?);
            Ok(())
        }
        Command::Kernels { command: KernelsCommand::Fetch { kernels } } => {
            print!("{}", shelf::fetch(&kernels, &Progress::stderr())?);
            Ok(())
        }
        Command::Probe { .. } | Command::List => Err(Failure::Input("not built yet".to_owned())),
    }
}

/// Runs what gives a Record; whether `--out` can be written is known before it.
fn measured(args: &RunArgs, run: impl FnOnce(&Progress) -> Result<Record, Failure>) -> Result<(), Failure> {
    let output = args.out.as_deref().map(Output::check).transpose()?;
    let record = run(&Progress::stderr())?;
    let text = record.to_json();
    if let Some(output) = output {
        return output.write(&text);
    }
    print!("{text}");
    Ok(())
}
