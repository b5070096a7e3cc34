//! The table of `dirty-rate`: what each tool found, how far that is from the truth, and what it cost the guest.

use super::record::{Rate, Row, Share};
use super::table::{heading_cell, plain_table, right};
use comfy_table::{Cell, Table};

/// A line for each row that has a rate.
#[must_use]
pub(super) fn table(rows: &[&Row]) -> Table {
    let mut table = plain_table();
    let header = [
        "",
        "pages found",
        "written",
        "error",
        "guest's rate while it ran",
        "afterwards",
        "ticks a write: before",
        "while",
        "after",
        "2 MiB: before",
        "left",
    ];
    table.set_header(header.map(heading_cell));
    for row in rows {
        let Some(rate) = &row.rate else { continue };
        let huge =
            |name: &str| row.counters.get(name).map_or_else(|| "-".to_owned(), |counter| counter.value.to_string());
        let cells = [
            rate.found.to_string(),
            written(rate),
            tenths(rate.error_permille),
            tenths(slower(&rate.before, &rate.during)),
            tenths(slower(&rate.before, &rate.after)),
            rate.before.ticks_per_write.to_string(),
            rate.during.ticks_per_write.to_string(),
            rate.after.ticks_per_write.to_string(),
            huge("pages_2m_before"),
            huge("pages_2m_left"),
        ];
        let mut line = vec![Cell::new(&row.name)];
        line.extend(cells.map(right));
        table.add_row(line);
    }
    table
}

fn written(rate: &Rate) -> String {
    if rate.certain == rate.possible {
        rate.certain.to_string()
    } else {
        format!("{} to {}", rate.certain, rate.possible)
    }
}

/// Thousandths as a percentage with its sign.
fn tenths(permille: i64) -> String {
    let sign = if permille < 0 { '-' } else { '+' };
    format!("{sign}{}.{}%", permille.unsigned_abs() / 10, permille.unsigned_abs() % 10)
}

/// By how many thousandths the guest's rate in `other` differs from that in `base`.
fn slower(base: &Share, other: &Share) -> i64 {
    let product = |accesses: u64, time: u64| i128::from(accesses) * i128::from(time);
    let (base, other) = (product(base.accesses, other.time), product(other.accesses, base.time));
    i64::try_from((other - base) * 1000 / base.max(1)).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_compared_over_their_own_times() {
        let share = |accesses, time| Share { accesses, time, ticks_per_write: 0 };
        assert_eq!(slower(&share(1000, 100), &share(2000, 200)), 0);
        assert_eq!(slower(&share(1000, 100), &share(1500, 200)), -250);
        assert_eq!((tenths(-250), tenths(7)), ("-25.0%".to_owned(), "+0.7%".to_owned()));
        assert_eq!(slower(&share(0, 0), &share(5, 1)), 0);
    }
}
