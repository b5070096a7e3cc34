//! What the changes of a boot came to, on each kernel and under each cure: the questions of the seed (how many teardowns and roles, how much they
//! mapped, what an extra reference saves, what a quota does), answered from the rows `script` and `12-roles`.

use super::record::{Record, Row};
use super::roots::{count, place, refaults};
use super::table::{heading_cell, plain_table, right, scaled};
use comfy_table::Cell;
use std::collections::BTreeSet;

/// A line of the table: the question, and a record's answer.
type Line = (&'static str, fn(&Answers) -> String);

const LINES: &[Line] = &[
    ("changes of mode and slots", |it| it.script("changes")),
    ("1. of them followed by refaults", |it| it.script("teardowns")),
    ("   roots made, in how many roles", |it| it.roles()),
    ("2. pages that ended roots mapped: in all, most", |it| it.mapped()),
    ("3. refaults", |it| it.script.map_or_else(String::new, refaults)),
    ("   changes and touches, all of it", |it| it.cost()),
    ("   shadow pages, bytes of tables and rmaps", |it| it.script.map_or_else(String::new, held)),
    ("quota: 12 roles in turn, refaults a round", |it| it.twelve.map_or_else(String::new, refaults)),
    ("   shadow pages, bytes of tables and rmaps", |it| it.twelve.map_or_else(String::new, held)),
];

/// The rows that answer.
struct Answers<'a> {
    script: Option<&'a Row>,
    twelve: Option<&'a Row>,
}

impl<'a> Answers<'a> {
    fn of(record: &'a Record) -> Self {
        let row = |name: &str| record.measured().find(|row| row.name == name);
        Self { script: row("script"), twelve: row("12-roles") }
    }

    fn script(&self, counter: &str) -> String {
        self.script.map_or_else(String::new, |row| count(row, counter))
    }

    fn roles(&self) -> String {
        let Some(row) = self.script.filter(|row| !row.roles.is_empty()) else { return "-".to_owned() };
        let names: BTreeSet<&str> = row.roles.iter().map(|life| life.role.as_str()).collect();
        format!("{}, {}", row.roles.len(), names.len())
    }

    fn mapped(&self) -> String {
        let Some(row) = self.script.filter(|row| !row.roles.is_empty()) else { return "-".to_owned() };
        let ended = row.roles.iter().filter(|life| life.ended_by.is_some()).map(|life| life.mapped);
        format!("{}, {}", ended.clone().sum::<u64>(), ended.max().unwrap_or(0))
    }

    fn cost(&self) -> String {
        let phases = self.script.iter().flat_map(|row| &row.phases).filter(|phase| phase.pass == "timed");
        scaled(
            phases.filter(|phase| ["toggle", "refault"].contains(&phase.phase.as_str())).map(|phase| phase.value).sum(),
        )
    }
}

/// What the shadow MMU takes; nothing for KVM's, which does not say.
fn held(row: &Row) -> String {
    row.memory.map_or_else(String::new, |bytes| {
        format!("{}\n{}", count(row, "shadow_pages"), bytes.table_bytes + bytes.rmap_bytes)
    })
}

/// A column for each run that has a boot; nothing if none has.
#[must_use]
pub fn table(records: &[&Record]) -> String {
    let with_boot: Vec<_> = records.iter().filter(|record| Answers::of(record).script.is_some()).collect();
    if with_boot.is_empty() {
        return String::new();
    }
    let mut table = plain_table();
    let mut header = vec![heading_cell("the changes of a boot, every page\nso far touched after each")];
    header.extend(with_boot.iter().map(|record| heading_cell(&place(record))));
    table.set_header(header);
    for (question, answer) in LINES {
        let mut line = vec![Cell::new(question)];
        line.extend(with_boot.iter().map(|record| right(answer(&Answers::of(record)))));
        table.add_row(line);
    }
    format!(
        "\n{table}\n1, 2, 3: the questions of seed 004. Roots: from the role log of the observed pass, where there is one. A slot that is deleted empties \
5.10's root and ends that of later kernels.\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::record::{Bytes, Counter, Host, Phase, RootLife, Rows, SCHEMA};

    fn record(row: Row) -> Record {
        Record {
            schema: SCHEMA,
            scenario: "roots".into(),
            host: Host { kernel: "5.10".into(), ..Host::default() },
            config: [("memory".to_owned(), (1 << 20).into())].into(),
            rows: vec![Rows::Measured(Box::new(row))],
        }
    }

    #[test]
    fn the_questions_are_answered_from_the_row_of_the_boot() {
        let counter = |value| Counter { value, source: "tracepoint".into(), pass: "observed".into() };
        let phase = |phase: &str, value, pass: &str| Phase {
            phase: phase.into(),
            round: 0,
            pass: pass.into(),
            value,
            unit: "instructions".into(),
            clean: true,
        };
        let life = |role: &str, ended_by: Option<&str>, mapped| RootLife {
            role: role.into(),
            ended_by: ended_by.map(str::to_owned),
            mapped,
            ..RootLife::default()
        };
        let script = Row {
            name: "script".into(),
            counters: [
                ("changes".into(), counter(106)),
                ("teardowns".into(), counter(14)),
                ("refaults".into(), counter(77)),
            ]
            .into(),
            phases: vec![
                phase("toggle", 3000, "timed"),
                phase("refault", 4000, "timed"),
                phase("toggle", 9000, "observed"),
            ],
            roles: vec![life("a", Some("x"), 5), life("a", Some("x"), 7), life("b", None, 100)],
            memory: Some(Bytes { table_bytes: 40, rmap_bytes: 2, ..Bytes::default() }),
            ..Row::default()
        };
        let text = table(&[&record(script)]);
        for part in ["106", "14", "3, 2", "12, 7", "77", "7000", "42"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(table(&[&record(Row { name: "cr0.wp".into(), ..Row::default() })]), "");
    }
}
