//! Many runs in the lab: several boots at a time, what can share a boot in one, and finished boots kept for the next try.

pub mod spec;
mod store;

use super::{Machine, boot_image, digest, image, initramfs, interrupt, limits, plan};
use crate::cli::{LabArgs, RunArgs};
use crate::failure::Failure;
use crate::progress::Progress;
use crate::report::record::{Record, Rows, SCHEMA};
use crate::report::{Host, Output};
use spec::Boot;
use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use store::Store;

/// How the boots of a matrix share the machine that they run on.
#[derive(Clone, Copy, Debug)]
pub struct Boots {
    /// Lab machines that run at a time.
    pub at_a_time: u64,
    /// What shares a boot.
    pub sharing: Boot,
}

/// One boot of the matrix: what runs in it, by the numbers of the runs.
struct Group {
    name: String,
    runs: Vec<usize>,
    machine: Machine,
    image: initramfs::Image,
    key: String,
}

/// What a matrix left.
pub struct Outcome {
    /// The Records, in the order of the runs. A run that its kernel cannot do has one that says why.
    pub records: Vec<Record>,
    /// Runs that broke, a line each. Their Records are missing.
    pub broken: Vec<String>,
}

/// Makes all runs. With `out`, finished boots are kept beside that file until every run has its Record; then the list is written there.
///
/// # Errors
/// [`Failure::Input`] for what no kernel could run, [`Failure::NotHere`] when the lab itself cannot be had or not one run could be made, and
/// [`Failure::Interrupted`].
pub fn run(runs: &[LabArgs], boots: Boots, out: Option<&Path>, progress: Arc<Progress>) -> Result<Outcome, Failure> {
    let begun = Instant::now();
    interrupt::watch()?;
    let output = out.map(Output::check).transpose()?;
    let store = out.map(Store::open).transpose()?;
    let mut results: Vec<Option<Result<Record, Failure>>> = runs.iter().map(|_| None).collect();
    let mut groups = VecDeque::new();
    for numbers in shared(runs, boots.sharing) {
        match prepare(runs, numbers.clone(), &progress) {
            Ok(group) => match store.as_ref().and_then(|store| store.get(&group.key)) {
                Some(records) if records.len() == numbers.len() => {
                    for (number, record) in numbers.into_iter().zip(records) {
                        results[number] = Some(Ok(record.clone()));
                    }
                }
                _ => groups.push_back(group),
            },
            Err(Failure::NotHere(why)) => {
                for number in numbers {
                    results[number] = Some(Ok(skipped(&runs[number], &why)));
                }
            }
            Err(other) => return Err(other),
        }
    }
    let work = Work {
        runs,
        all: groups.len(),
        state: Mutex::new(State { groups, begun: 0, spent: Duration::ZERO, results, store, stop: None }),
        progress,
    };
    std::thread::scope(|scope| {
        for _ in 0..boots.at_a_time {
            scope.spawn(|| work.boot_until_done());
        }
    });
    let (all, state) = (work.all, work.state.into_inner().unwrap_or_else(PoisonError::into_inner));
    if all > 1 && state.stop.is_none() {
        eprintln!("umbra: {}", pace(all, boots.at_a_time, begun.elapsed(), state.spent));
    }
    finish(state, runs, output)
}

/// How long the boots took together, and how near that is to what so many at a time can do at best.
fn pace(boots: usize, at_a_time: u64, all: Duration, sum: Duration) -> String {
    #[allow(clippy::cast_precision_loss)] // A machine has few CPUs.
    let best = sum.as_secs_f64() / at_a_time as f64;
    let (all, sum) = (all.as_secs_f64(), sum.as_secs_f64());
    format!("{boots} boots took {all:.0} s, {:.2} times their {sum:.0} s shared by {at_a_time}", all / best.max(1e-3))
}

fn finish(state: State, runs: &[LabArgs], output: Option<Output>) -> Result<Outcome, Failure> {
    let State { results, store, stop, .. } = state;
    if let Some(failure) = stop {
        if let (Failure::Interrupted, Some(store)) = (&failure, &store) {
            eprintln!("umbra: what was finished is in {}; the same command goes on from there", store.path().display());
        }
        return Err(failure);
    }
    let mut outcome = Outcome { records: Vec::new(), broken: Vec::new() };
    for (result, args) in results.into_iter().zip(runs) {
        match result {
            Some(Ok(record)) => outcome.records.push(record),
            Some(Err(failure)) => outcome.broken.push(format!("{}: {failure}", describe(args))),
            None => outcome.broken.push(format!("{}: it was not run", describe(args))),
        }
    }
    if outcome.records.iter().all(|record| record.measured().next().is_none()) && outcome.broken.is_empty() {
        let why = outcome.records.first().and_then(|record| match record.rows.first() {
            Some(Rows::NotHere { not_here, .. }) => Some(not_here.clone()),
            _ => None,
        });
        return Err(Failure::NotHere(why.unwrap_or_else(|| "no run could be made".to_owned())));
    }
    if let Some(output) = output.filter(|_| outcome.broken.is_empty()) {
        output.write(&crate::report::file::list(&outcome.records))?;
        if let Some(store) = store {
            store.remove();
        }
    }
    Ok(outcome)
}

/// Numbers of runs that share a boot, in the order of the first of each.
fn shared(runs: &[LabArgs], sharing: Boot) -> Vec<Vec<usize>> {
    let machine = |args: &LabArgs| {
        let LabArgs { machine, kernel, modules, clock, cpus, params, append, pad, run: _ } = args.clone();
        (machine, kernel, modules, clock, cpus, params, append, pad)
    };
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (number, args) in runs.iter().enumerate() {
        let same = |group: &&mut Vec<usize>| sharing == Boot::Shared && machine(&runs[group[0]]) == machine(args);
        match groups.iter_mut().find(same) {
            Some(group) => group.push(number),
            None => groups.push(vec![number]),
        }
    }
    groups
}

/// Gets the kernel and builds the image, whose hash is the better part of the key. What a kernel lacks is [`Failure::NotHere`].
fn prepare(runs: &[LabArgs], numbers: Vec<usize>, progress: &Progress) -> Result<Group, Failure> {
    let args = &runs[numbers[0]];
    let machine = match Machine::new(args, progress) {
        // A parameter that this kernel does not have.
        Err(Failure::Input(why)) if why.contains(" has no parameter ") => return Err(Failure::NotHere(why)),
        other => other?,
    };
    let jobs: Vec<RunArgs> = numbers.iter().map(|&number| runs[number].run.clone()).collect();
    let image = image(&machine, &jobs, args.pad)?;
    let parts = [
        &machine.emulator.version()?,
        &machine.kernel.package(),
        &image.sha256,
        &args.machine,
        &args.clock,
        &machine.cpus().to_string(),
        &machine.append,
    ];
    let key = digest::of(parts.map(String::as_str).join("\n").as_bytes());
    Ok(Group { name: boot_name(args, jobs.len()), runs: numbers, machine, image, key })
}

fn boot_name(args: &LabArgs, jobs: usize) -> String {
    let mut words = machine_words(args);
    words.extend(args.append.clone());
    format!("{}, {jobs} run{}", words.join(" "), if jobs == 1 { "" } else { "s" })
}

/// The machine and its kernel as a line names them.
fn machine_words(args: &LabArgs) -> Vec<String> {
    let mut words = vec![args.machine.clone(), format!("kernel {}", args.kernel.as_deref().unwrap_or("by default"))];
    words.extend(args.params.iter().cloned());
    words
}

/// A run as a line names it.
fn describe(args: &LabArgs) -> String {
    let run = &args.run;
    let mut words = machine_words(args);
    words.push(run.scenario.clone());
    words.extend((!run.tracker.is_empty()).then(|| run.tracker.join(",")));
    words.extend(run.backing.clone());
    words.join(" ")
}

/// The Record of a run that was not made, and why.
fn skipped(args: &LabArgs, why: &str) -> Record {
    let params = args.params.iter().filter_map(|param| param.split_once('='));
    let host = Host {
        ground: "lab".into(),
        kernel: args.kernel.clone().unwrap_or_default(),
        clock: if args.clock == "wall" { "nanoseconds".into() } else { args.clock.clone() },
        params: params.map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
        ..Host::default()
    };
    Record {
        schema: SCHEMA,
        scenario: args.run.scenario.clone(),
        host,
        config: args.run.config(),
        rows: vec![Rows::NotHere { name: "all".into(), not_here: why.to_owned() }],
    }
}

struct State {
    groups: VecDeque<Group>,
    begun: usize,
    /// The time of all boots so far, one after the other.
    spent: Duration,
    results: Vec<Option<Result<Record, Failure>>>,
    store: Option<Store>,
    /// What ends the whole matrix.
    stop: Option<Failure>,
}

struct Work<'a> {
    runs: &'a [LabArgs],
    all: usize,
    state: Mutex<State>,
    progress: Arc<Progress>,
}

impl Work<'_> {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What each of the threads does.
    fn boot_until_done(&self) {
        loop {
            let (group, name) = {
                let mut state = self.state();
                if state.stop.is_some() {
                    return;
                }
                // The longest first, so that no long one is alone at the end.
                let effort =
                    |group: &Group| group.runs.iter().map(|&run| plan::effort(&self.runs[run].run)).sum::<Duration>();
                let longest = (0..state.groups.len()).rev().max_by_key(|&at| effort(&state.groups[at]));
                let Some(group) = longest.and_then(|at| state.groups.remove(at)) else { return };
                state.begun += 1;
                let name = format!("boot {} of {}: {}", state.begun, self.all, group.name);
                if state.begun == 1 {
                    self.progress.step(&name);
                } else {
                    self.progress.beside(&name);
                }
                (group, name)
            };
            let jobs: Vec<RunArgs> = group.runs.iter().map(|&run| self.runs[run].run.clone()).collect();
            let begun = Instant::now();
            let results =
                boot_image(&group.machine, &jobs, &group.image, limits(&group.machine, &jobs), &self.inside(name));
            self.state().spent += begun.elapsed();
            self.take(group, results);
        }
    }

    /// Progress of one boot. Of two at a time only the beginnings are lines; a terminal's spinner shows what is done now.
    fn inside(&self, name: String) -> Progress {
        let outer = Arc::clone(&self.progress);
        Progress::Sink(Mutex::new(Box::new(move |step| {
            if matches!(*outer, Progress::Bar(_)) {
                outer.step(&format!("{name}: {step}"));
            }
        })))
    }

    fn take(&self, group: Group, results: Result<Vec<Result<Record, Failure>>, Failure>) {
        let mut state = self.state();
        let results = match results {
            Ok(results) => results,
            Err(stop @ (Failure::Interrupted | Failure::NotHere(_))) => {
                state.stop.get_or_insert(stop);
                return;
            }
            Err(broken) => group.runs.iter().map(|_| Err(Failure::Check(broken.to_string()))).collect(),
        };
        let results: Vec<_> = results
            .into_iter()
            .zip(&group.runs)
            .map(|(result, &run)| match result {
                Err(Failure::NotHere(why)) => Ok(skipped(&self.runs[run], &why)),
                other => other,
            })
            .collect();
        let done: Vec<Record> = results.iter().filter_map(|result| result.as_ref().ok().cloned()).collect();
        for (&run, result) in group.runs.iter().zip(results) {
            state.results[run] = Some(result);
        }
        if done.len() == group.runs.len()
            && let Some(store) = &mut state.store
            && let Err(failure) = store.put(group.key, done)
        {
            state.stop.get_or_insert(failure);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Command, parse};

    fn args(words: &str) -> LabArgs {
        match parse(["umbra", "lab"].into_iter().chain(words.split(' ')).map(str::to_owned)).unwrap().command {
            Command::Lab(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_has_the_machine_in_common_shares_a_boot() {
        let runs = [
            args("dirty-log --kernel 6.1"),
            args("dirty-log --kernel 6.12"),
            args("dirty-log --kernel 6.1 --memory 4M"),
            args("dirty-log --kernel 6.1 --param kvm.tdp_mmu=0"),
            args("soak --kernel 6.12"),
            args("soak --kernel 6.12 --clock wall"),
            args("soak --kernel 6.12 --append no5lvl"),
        ];
        assert_eq!(shared(&runs, Boot::Shared), [vec![0, 2], vec![1, 4], vec![3], vec![5], vec![6]]);
        assert_eq!(shared(&runs, Boot::Each).len(), runs.len());
    }

    #[test]
    fn the_pace_is_told_as_a_ratio() {
        let seconds = Duration::from_secs;
        assert_eq!(pace(40, 2, seconds(110), seconds(200)), "40 boots took 110 s, 1.10 times their 200 s shared by 2");
    }

    #[test]
    fn a_run_that_was_not_made_says_why_in_its_record() {
        let record = skipped(&args("dirty-log --kernel 5.10 --param kvm.eager_page_split=N"), "no such parameter");
        assert_eq!(record.host.kernel, "5.10");
        assert_eq!(record.host.params["kvm.eager_page_split"], "N");
        assert!(matches!(&record.rows[..], [Rows::NotHere { not_here, .. }] if not_here == "no such parameter"));
    }
}
