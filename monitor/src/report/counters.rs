//! What the rows counted, as tables on the terminal.

use super::record::Row;
use super::table::{heading_cell, plain_table, right};
use comfy_table::{Cell, Table};
use std::collections::BTreeSet;

/// Columns of a terminal that a table may take.
const WIDTH: usize = 160;
/// Columns between two cells' texts.
const GAP: usize = 3;

/// Counters: a line each, a column for each row of the Record; more than one table where they would be too wide.
pub fn tables(rows: &[&Row]) -> Vec<Table> {
    let names = names(rows);
    let widest = |lengths: &mut dyn Iterator<Item = usize>| lengths.max().unwrap_or(0) + GAP;
    let first = widest(&mut names.iter().map(|(name, source)| name.len() + source.len() + GAP));
    let longest = |row: &&Row| row.counters.values().map(|counter| counter.value.to_string().len()).max().unwrap_or(0);
    let column = widest(&mut rows.iter().map(|row| row.name.len().max(longest(row))));
    let columns = (WIDTH.saturating_sub(first) / column).max(1);
    // As many in each as can be.
    let columns = rows.len().div_ceil(rows.len().div_ceil(columns).max(1)).max(1);
    rows.chunks(columns).filter_map(table).collect()
}

/// Names and sources. A counter that is 0 in every row says nothing.
fn names<'a>(rows: &[&'a Row]) -> BTreeSet<(&'a String, &'a String)> {
    let counted = rows.iter().flat_map(|row| &row.counters).filter(|(_, counter)| counter.value > 0);
    counted.map(|(name, counter)| (name, &counter.source)).collect()
}

fn table(rows: &[&Row]) -> Option<Table> {
    let names = names(rows);
    if names.is_empty() {
        return None;
    }
    let mut table = plain_table();
    let mut header = vec![heading_cell("counted (source)")];
    header.extend(rows.iter().map(|row| heading_cell(&row.name)));
    table.set_header(header);
    for (name, source) in names {
        let mut cells = vec![Cell::new(format!("{name} ({source})"))];
        let values =
            rows.iter().map(|row| row.counters.get(name).map_or_else(|| "-".to_owned(), |c| c.value.to_string()));
        cells.extend(values.map(right));
        table.add_row(cells);
    }
    Some(table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::record::Counter;

    fn row(name: &str) -> Row {
        let counter = |value| Counter { value, source: "umbra".to_owned(), pass: "observed".to_owned() };
        let counters = [("edits".to_owned(), counter(7)), ("missing".to_owned(), counter(0))].into();
        Row { name: name.to_owned(), counters, ..Row::default() }
    }

    #[test]
    fn a_table_fits_a_terminal() {
        let rows: Vec<Row> = (0..9).map(|number| row(&format!("umbra:write-protect@uffd-wp-{number}"))).collect();
        let tables = tables(&rows.iter().collect::<Vec<_>>());
        assert_eq!(tables.len(), 3);
        for table in &tables {
            let text = table.to_string();
            assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
            assert!(text.contains("edits (umbra)") && !text.contains("missing"), "{text}");
        }
        assert!(super::tables(&[]).is_empty());
    }
}
