//! The `umbra` command.

use std::cell::RefCell;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use umbra::cli::{self, BootArgs, Cli, Command, KernelsCommand, LabArgs, RunArgs};
use umbra::ground::Ground;
use umbra::lab::matrix::spec::{Boot, Spec};
use umbra::lab::matrix::{self, Boots};
use umbra::lab::{self, shelf};
use umbra::probe::{self, Probe};
use umbra::progress::Progress;
use umbra::report::record::Rows;
use umbra::report::{Output, Record, compare, file, known, series, table};
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
        Command::LabMatrix { spec, boots, out } => {
            let spec = Spec::read(spec)?;
            let pinned: Vec<String> = shelf::shelf().kernels().iter().map(|kernel| kernel.version.clone()).collect();
            let over = RefCell::new(Vec::new());
            many(&spec.runs, boots, spec.boot, out.as_deref(), &|records| {
                let (text, lines) = known::table(records, &spec.known, &pinned);
                over.replace(lines);
                series::matrix(records) + &text
            })?;
            return none_over(&over.into_inner());
        }
        Command::LabHistory { kernels, boots, lab } => {
            return many(&history(kernels, lab)?, boots, Boot::Shared, lab.run.out.as_deref(), &series::matrix);
        }
        Command::LabNoise { images, boots, lab } => return noise(*images, boots, lab),
        Command::LabAb { b_kernel, b_modules, b_params, fail_over, boots, lab } => {
            let mut b = lab.clone();
            if b_kernel.is_some() {
                (b.kernel, b.modules) = (b_kernel.clone(), None);
            }
            b.modules = b_modules.clone().or(b.modules);
            b.params.extend(b_params.iter().cloned());
            return ab(&[lab.clone(), b], boots, *fail_over);
        }
        Command::Compare { a, b, fail_over } => {
            let comparison = compare::compare(&file::read(a)?, &file::read(b)?, *fail_over)?;
            show(&comparison.text)?;
            none_over(&comparison.over)?;
        }
        Command::Kernels { command: KernelsCommand::List } => show(&shelf::list()?)?,
        Command::Kernels { command: KernelsCommand::Fetch { kernels } } => {
            show(&shelf::fetch(kernels, &Progress::stderr())?)?;
        }
    }
    Ok(())
}

/// Makes many runs and shows their Records as `render` does. Their truth has to hold as that of one.
fn many(
    runs: &[LabArgs],
    boots: &BootArgs,
    sharing: Boot,
    out: Option<&Path>,
    render: &dyn Fn(&[Record]) -> String,
) -> Result<(), Failure> {
    let progress = Arc::new(Progress::stderr());
    let outcome = matrix::run(runs, Boots { at_a_time: boots.boots, sharing }, out, progress)?;
    show(&render(&outcome.records))?;
    let faults = outcome.records.iter().flat_map(Record::faults);
    let faults: Vec<String> = outcome.broken.iter().cloned().chain(faults).collect();
    none_over(&faults)
}

/// The same run on each of the kernels.
fn history(kernels: &[String], lab: &LabArgs) -> Result<Vec<LabArgs>, Failure> {
    scenario::check(&lab.run)?;
    let shelf = shelf::shelf();
    let names: Vec<String> = if kernels.is_empty() {
        shelf.kernels().iter().map(|kernel| kernel.name.clone()).collect()
    } else {
        kernels.to_vec()
    };
    Ok(names.into_iter().map(|name| LabArgs { kernel: Some(name), ..lab.clone() }).collect())
}

/// The same run in images that are shifted by 43 KiB each.
fn noise(images: u64, boots: &BootArgs, lab: &LabArgs) -> Result<(), Failure> {
    scenario::check(&lab.run)?;
    let runs: Vec<_> = (0..images).map(|image| LabArgs { pad: 43 * image, ..lab.clone() }).collect();
    let over = RefCell::new(Vec::new());
    many(&runs, boots, Boot::Shared, lab.run.out.as_deref(), &|records| {
        let (text, lines) = series::noise_of(records);
        over.replace(lines);
        text
    })?;
    none_over(&over.into_inner())
}

/// The same scenario on two machines, a boot each, and what differs.
fn ab(runs: &[LabArgs; 2], boots: &BootArgs, limit: Option<f64>) -> Result<(), Failure> {
    scenario::check(&runs[0].run)?;
    let progress = Arc::new(Progress::stderr());
    let boots = Boots { at_a_time: boots.boots, sharing: Boot::Each };
    let outcome = matrix::run(runs, boots, runs[0].run.out.as_deref(), progress)?;
    none_over(&outcome.broken)?;
    for (letter, record) in ["A", "B"].into_iter().zip(&outcome.records) {
        if let (None, Some(Rows::NotHere { not_here, .. })) = (record.measured().next(), record.rows.first()) {
            return Err(Failure::NotHere(format!("{letter}: {not_here}")));
        }
    }
    let comparison = compare::compare(&outcome.records[..1], &outcome.records[1..], limit)?;
    show(&comparison.text)?;
    none_over(&comparison.over)
}

/// Exit code 1 where a check has anything to say.
fn none_over(lines: &[String]) -> Result<(), Failure> {
    if lines.is_empty() { Ok(()) } else { Err(Failure::Check(lines.join("\n"))) }
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
