//! How a command can fail, and with which exit code. Every message is one line for the person who reads it: the thing, its
//! value, the remedy.

use std::process::ExitCode;

/// A command's failure.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A check failed: missed pages, a guest that broke, a lab that did not deliver. Exit code 1.
    #[error("{0}")]
    Check(String),
    /// Bad usage or input. Exit code 2.
    #[error("{0}")]
    Input(String),
    /// This host lacks something; the message names the capability and where it would run. Exit code 3.
    #[error("{0}")]
    NotHere(String),
    /// SIGINT or SIGTERM ended the command. Exit code 130.
    #[error("interrupted")]
    Interrupted,
}

impl Failure {
    /// The process's exit code, as in DESIGN's table.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Check(_) => 1,
            Self::Input(_) => 2,
            Self::NotHere(_) => 3,
            Self::Interrupted => 130,
        })
    }
}
