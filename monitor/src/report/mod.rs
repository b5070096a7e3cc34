//! What a run leaves: the Record (JSON), and its table on the terminal.

pub mod record;

pub use record::{Host, Phase, Record, Row, Rows};
