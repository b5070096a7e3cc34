//! A spec: which runs a matrix has. TOML with axes; each combination of their values is a run.
//!
//! ```toml
//! boot = "each"                     # default "shared": what has kernel, machine and parameters in common runs in one boot
//! [axes]                            # of every run; a list is an axis, a single value is the same everywhere
//! scenario = "dirty-log"
//! kernel = ["6.1", "6.12"]
//! "kvm.eager_page_split" = ["Y", "N"]
//! [[run]]                           # none, or several: axes that replace or add to those above
//! tracker = ["bitmap", "clear+init-set"]
//! [run.known]                       # figures of the same work from elsewhere, which this run is held against (report/known.rs)
//! ```
//!
//! An axis is an option of `umbra lab` by its name, or a module's parameter.

use crate::cli::{self, Cli, Command, LabArgs};
use crate::failure::Failure;
use crate::report::known::Known;
use crate::scenario;
use clap::CommandFactory as _;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;
use toml::Value;

/// More runs than anybody waits for: a spec that has them is a mistake.
const MOST: usize = 4096;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    #[serde(default)]
    boot: Boot,
    #[serde(default)]
    axes: BTreeMap<String, Value>,
    #[serde(default)]
    run: Vec<Run>,
}

/// One `[[run]]`.
#[derive(Debug, Default, Deserialize)]
struct Run {
    known: Option<Known>,
    #[serde(flatten)]
    axes: BTreeMap<String, Value>,
}

/// What shares a boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Boot {
    /// What has kernel, machine and parameters in common.
    #[default]
    Shared,
    /// Nothing: a boot for each run.
    Each,
}

/// A spec, expanded.
#[derive(Debug)]
pub struct Spec {
    /// What shares a boot.
    pub boot: Boot,
    /// Its runs, in order.
    pub runs: Vec<LabArgs>,
    /// For each run what is known of it from elsewhere.
    pub known: Vec<Option<Known>>,
}

impl Spec {
    /// Reads the spec in a file.
    ///
    /// # Errors
    /// [`Failure::Input`], one line that names the file and what is wrong in it.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let refuse = |why: &dyn std::fmt::Display| Failure::Input(format!("{}: {why}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|error| refuse(&error))?;
        Self::parse(&text).map_err(|why| refuse(&why))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let text: Text = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(0, |span| text[..span.start].lines().count().max(1));
            format!("line {line}: {}", error.message().replace('\n', " "))
        })?;
        if text.axes.is_empty() && text.run.is_empty() {
            return Err("it names no run; give it [axes] or a [[run]], as images/specs/history.toml does".to_owned());
        }
        let tables = if text.run.is_empty() { vec![Run::default()] } else { text.run };
        let (mut runs, mut figures) = (Vec::new(), Vec::new());
        for Run { known, axes: own } in tables {
            if let Some(known) = &known {
                known.check()?;
            }
            let mut axes = text.axes.clone();
            axes.extend(own);
            for words in combinations(&axes)? {
                if runs.len() == MOST {
                    return Err(format!("more than {MOST} runs"));
                }
                runs.push(run(&words)?);
                figures.push(known.clone());
            }
        }
        Ok(Self { boot: text.boot, runs, known: figures })
    }
}

/// The options that can be an axis: those of `umbra lab`, without what concerns files outside.
fn options() -> Vec<String> {
    let command = Cli::command();
    let lab = command.get_subcommands().find(|command| command.get_name() == "lab");
    let names = lab.into_iter().flat_map(clap::Command::get_arguments).filter_map(clap::Arg::get_long);
    let mut names: Vec<_> =
        names.filter(|name| !matches!(*name, "out" | "param" | "help" | "pad")).map(str::to_owned).collect();
    names.push("scenario".to_owned());
    names.sort();
    names
}

/// Axes in the order in which they vary: what needs another boot comes first, so that a table reads in blocks.
fn order(name: &str) -> (u8, &str) {
    let rank = match name {
        "scenario" => 0,
        "kernel" => 1,
        "modules" | "machine" | "clock" | "cpus" | "append" => 2,
        _ if name.contains('.') => 3,
        "tracker" => 5,
        _ => 4,
    };
    (rank, name)
}

/// Every combination of the values, as pairs of axis and value.
fn combinations(axes: &BTreeMap<String, Value>) -> Result<Vec<Vec<(String, String)>>, String> {
    let known = options();
    let mut names: Vec<&String> = axes.keys().collect();
    names.sort_by_key(|name| order(name));
    let mut all = vec![Vec::new()];
    for name in names {
        if !name.contains('.') && !known.contains(name) {
            let known = known.join(", ");
            return Err(format!(
                "axis {name}: there is no such axis; there are {known}, and parameters as \"kvm.tdp_mmu\""
            ));
        }
        let values = match &axes[name] {
            Value::Array(values) if values.is_empty() => return Err(format!("axis {name}: it has no value")),
            Value::Array(values) => values.iter().collect(),
            one => vec![one],
        };
        let values = values.into_iter().map(|value| text(name, value)).collect::<Result<Vec<_>, _>>()?;
        if all.len().saturating_mul(values.len()) > MOST {
            return Err(format!("more than {MOST} runs"));
        }
        all = all
            .into_iter()
            .flat_map(|row: Vec<(String, String)>| {
                values.iter().map(move |value| {
                    let mut row = row.clone();
                    row.push((name.clone(), value.clone()));
                    row
                })
            })
            .collect();
    }
    Ok(all)
}

fn text(name: &str, value: &Value) -> Result<String, String> {
    Ok(match value {
        Value::String(text) => text.clone(),
        Value::Integer(number) => number.to_string(),
        Value::Boolean(true) => "Y".to_owned(),
        Value::Boolean(false) => "N".to_owned(),
        other => return Err(format!("axis {name}: {} is no value of an axis", other.type_str())),
    })
}

/// The command line that a combination stands for, checked as far as that needs no boot.
fn run(pairs: &[(String, String)]) -> Result<LabArgs, String> {
    let mut words = vec!["umbra".to_owned(), "lab".to_owned()];
    let mut scenario = "dirty-log";
    for (name, value) in pairs {
        match name.as_str() {
            "scenario" => scenario = value,
            _ if name.contains('.') => words.push(format!("--param={name}={value}")),
            _ => words.push(format!("--{name}={value}")),
        }
    }
    words.push(scenario.to_owned());
    let Command::Lab(args) = cli::parse(words).map_err(|failure| failure.to_string())?.command else {
        return Err(format!("scenario {scenario}: not one that the lab runs"));
    };
    scenario::check(&args.run).map_err(|failure| failure.to_string())?;
    Ok(args)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_is_a_run_in_order() {
        let text = "[axes]\nkernel = [\"6.1\", \"6.12\"]\nmemory = \"4M\"\n\"kvm.tdp_mmu\" = [true, false]\n\
            [[run]]\ntracker = [\"bitmap\", \"clear\"]\n[[run]]\nkernel = \"7.2\"\n\"kvm.tdp_mmu\" = 1\nvcpus = 2\n";
        let spec = Spec::parse(text).unwrap();
        assert_eq!((spec.boot, spec.runs.len()), (Boot::Shared, 9));
        let said: Vec<_> = spec
            .runs
            .iter()
            .map(|run| (run.kernel.as_deref(), run.params.as_slice(), run.run.tracker.as_slice()))
            .collect();
        assert_eq!(said[0], (Some("6.1"), &["kvm.tdp_mmu=Y".to_owned()][..], &["bitmap".to_owned()][..]));
        assert_eq!(said[1].2, ["clear"]);
        assert_eq!(said[2].1, ["kvm.tdp_mmu=N"]);
        assert_eq!(said[4].0, Some("6.12"));
        assert_eq!((said[8].0, said[8].1, spec.runs[8].run.vcpus), (Some("7.2"), &["kvm.tdp_mmu=1".to_owned()][..], 2));
        assert!(spec.runs.iter().all(|run| run.run.memory == 4 << 20 && run.run.scenario == "dirty-log"));
        assert_eq!(Spec::parse("boot = \"each\"\n[axes]\nmemory = \"4M\"").unwrap().boot, Boot::Each);
    }

    #[test]
    fn what_means_nothing_is_refused_in_one_line() {
        for (text, part) in [
            ("[axes]\nflavour = \"x\"", "axis flavour: there is no such axis; there are access"),
            ("[axes]\nout = \"x\"", "axis out: there is no such axis"),
            ("[axes]\nmemory = []", "axis memory: it has no value"),
            ("[axes]\nmemory = 1.5", "axis memory: float is no value"),
            ("[axes]\nmemory = \"much\"", "not a size"),
            ("[axes]\nbacking = \"floppy\"", "--backing floppy"),
            ("[axes]\nscenario = \"dirty-lag\"", "dirty-lag: there is no such scenario"),
            ("[axis]\nmemory = 1", "line 1: unknown field `axis`"),
            (
                "[[run]]\n[run.known]\nsource = \"x\"\nwithin = 3\nper = \"page\"\nfigures.bitmap.\"dirty x\" = 1",
                "known: dirty x",
            ),
            ("boot = \"never\"", "unknown variant `never`"),
            ("[axes", "line 1"),
            ("", "it names no run"),
            ("boot = \"each\"\n[axes]", "it names no run"),
        ] {
            let said = Spec::parse(text).unwrap_err();
            assert!(said.contains(part) && !said.contains('\n'), "{text}: {said}");
        }
        let numbers: Vec<String> = (0..100).map(|number| number.to_string()).collect();
        let axis = numbers.join(",");
        let text = format!("[axes]\nseed = [{axis}]\nrounds = [{axis}]");
        assert_eq!(Spec::parse(&text).unwrap_err(), "more than 4096 runs");
    }

    #[test]
    fn the_specs_of_the_project_are_good() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../images/specs");
        let mut seen = 0;
        for entry in std::fs::read_dir(directory).unwrap() {
            let spec = Spec::read(&entry.unwrap().path()).unwrap();
            assert!(!spec.runs.is_empty());
            seen += 1;
        }
        assert!(seen >= 2);
    }
}
