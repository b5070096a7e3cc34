//! What a run leaves: the Record (JSON), and its table on the terminal.

mod boots;
pub mod compare;
mod counters;
pub mod file;
pub mod known;
pub mod output;
mod rate;
pub mod record;
mod roots;
pub mod series;
pub mod snapshot;
pub mod table;

pub use output::Output;
pub use record::{Host, Phase, Record, Row, Rows};
