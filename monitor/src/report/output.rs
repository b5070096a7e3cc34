//! `--out`: the Record's file, whose place is tried before the run and filled after it.

use super::Record;
use crate::failure::Failure;
use std::fs::Permissions;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use tempfile::{Builder, NamedTempFile};

/// A place that could be written before the run.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
}

impl Output {
    /// Makes sure that `path` can be written, by a temporary file beside it that is gone again when this returns: nothing is left
    /// behind if the run is interrupted.
    ///
    /// # Errors
    /// [`Failure::Input`] if it cannot.
    pub fn prepare(path: &Path) -> Result<Self, Failure> {
        let output = Self { path: path.to_owned() };
        if path.is_dir() {
            return Err(output.refused(&std::io::ErrorKind::IsADirectory.into()));
        }
        match output.temporary() {
            Ok(_) => Ok(output),
            Err(error) => Err(output.refused(&error)),
        }
    }

    /// Writes the Record. The file has its name only when it is whole.
    ///
    /// # Errors
    /// [`Failure::Check`] if the disk is full or the directory has gone.
    pub fn write(&self, record: &Record) -> Result<(), Failure> {
        self.fill(record).map_err(|error| Failure::Check(format!("--out {}: {error}", self.path.display())))
    }

    fn fill(&self, record: &Record) -> std::io::Result<()> {
        let mut file = self.temporary()?;
        file.write_all(record.to_json().as_bytes())?;
        file.persist(&self.path)?;
        Ok(())
    }

    fn temporary(&self) -> std::io::Result<NamedTempFile> {
        let directory = self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // A Record is no secret; the umask still applies.
        Builder::new().permissions(Permissions::from_mode(0o666)).tempfile_in(directory)
    }

    fn refused(&self, error: &std::io::Error) -> Failure {
        Failure::Input(format!(
            "--out {}: {error} (name a file in a directory that you may write)",
            self.path.display()
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_written_is_refused_before_the_run() {
        let directory = tempfile::tempdir().unwrap();
        for bad in [directory.path().join("missing/x.json"), directory.path().to_owned()] {
            let failure = Output::prepare(&bad).unwrap_err();
            assert!(matches!(failure, Failure::Input(_)) && failure.to_string().starts_with("--out"), "{failure}");
        }
        Output::prepare(&directory.path().join("x.json")).unwrap();
        assert_eq!(directory.path().read_dir().unwrap().count(), 0, "preparing leaves nothing");
    }
}
