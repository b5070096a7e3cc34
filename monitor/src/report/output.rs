//! `--out`: whether the file can be written is known before the run, and it is written whole or not at all.

use crate::failure::Failure;
use std::fs::{self, File, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// Where the Record goes.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    /// A device or a pipe is written to; a file is replaced.
    special: bool,
}

impl Output {
    /// Checks that the file can be written. Nothing is left behind, and a file that is there stays as it is.
    ///
    /// # Errors
    /// [`Failure::Input`] that says why not.
    pub fn check(path: &Path) -> Result<Self, Failure> {
        let refuse = |why: &dyn std::fmt::Display| Failure::Input(format!("--out {}: {why}", path.display()));
        let special = match fs::metadata(path) {
            Ok(found) if found.is_dir() => return Err(refuse(&"is a directory")),
            Ok(found) => {
                File::options().append(true).open(path).map_err(|error| refuse(&error))?;
                !found.is_file()
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
            Err(error) => return Err(refuse(&error)),
        };
        let output = Self { path: path.to_owned(), special };
        if !special && !output.parent().is_dir() {
            return Err(refuse(&"its directory does not exist"));
        }
        if !special {
            output.scratch().map_err(|error| refuse(&error.kind()))?;
        }
        Ok(output)
    }

    fn parent(&self) -> &Path {
        match self.path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        }
    }

    /// A file beside the one that is wanted, which is gone when it is dropped.
    fn scratch(&self) -> std::io::Result<tempfile::NamedTempFile> {
        tempfile::Builder::new().prefix(".umbra-").permissions(Permissions::from_mode(0o666)).tempfile_in(self.parent())
    }

    /// Writes the file.
    ///
    /// # Errors
    /// [`Failure::Check`]: it could be written before the run, and now it cannot.
    pub fn write(&self, text: &str) -> Result<(), Failure> {
        let write = || -> std::io::Result<()> {
            if self.special {
                return File::options().append(true).open(&self.path)?.write_all(text.as_bytes());
            }
            // A link's target is replaced, not the link.
            let place = fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
            let mut file = Self { path: place.clone(), special: false }.scratch()?;
            file.write_all(text.as_bytes())?;
            file.persist(place)?;
            Ok(())
        };
        write().map_err(|error| Failure::Check(format!("--out {}: {error}", self.path.display())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checked_file_is_written_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.json");
        let output = Output::check(&path).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "a check leaves nothing");
        output.write("{}\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{}\n");
        Output::check(&path).unwrap().write("[]\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "[]\n");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        assert_ne!(fs::metadata(&path).unwrap().permissions().mode() & 0o044, 0, "others may read it");
    }

    #[test]
    fn what_cannot_be_written_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        for path in [directory.path().to_owned(), directory.path().join("no/such/a.json"), "/proc/a.json".into()] {
            let failure = Output::check(&path).unwrap_err();
            assert!(matches!(failure, Failure::Input(_)));
            assert!(failure.to_string().starts_with("--out /"), "{failure}");
        }
    }

    #[test]
    fn a_device_is_written_to() {
        Output::check(Path::new("/dev/null")).unwrap().write("{}").unwrap();
        assert!(Path::new("/dev/null").exists());
    }
}
