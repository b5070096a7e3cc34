//! What a matrix has finished: a file beside the output, one line of JSON a boot, so that an interrupted matrix goes on where it was.

use crate::failure::Failure;
use crate::report::Record;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// A finished boot.
#[derive(Serialize, Deserialize)]
struct Line {
    /// What decides the result: image, kernel, machine.
    key: String,
    records: Vec<Record>,
}

/// The file.
pub struct Store {
    path: PathBuf,
    file: File,
    done: BTreeMap<String, Vec<Record>>,
}

impl Store {
    /// The store that belongs to the output file `out`. What a kill cut off in it is dropped.
    ///
    /// # Errors
    /// [`Failure::Input`] when it cannot be written.
    pub fn open(out: &Path) -> Result<Self, Failure> {
        let mut name = OsString::from(out.as_os_str());
        name.push(".part");
        let path = PathBuf::from(name);
        let refuse = |why: std::io::Error| Failure::Input(format!("{}: {why}", path.display()));
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            other => other.map_err(refuse)?,
        };
        let mut done = BTreeMap::new();
        let mut whole = 0;
        for line in text.split_inclusive('\n') {
            // A kill leaves half a line at most, and it is the last.
            let Ok(Line { key, records }) = serde_json::from_str(line) else { break };
            if !line.ends_with('\n') {
                break;
            }
            whole += line.len();
            done.insert(key, records);
        }
        let file = File::options().create(true).append(true).open(&path).map_err(refuse)?;
        file.set_len(whole as u64).map_err(refuse)?;
        Ok(Self { path, file, done })
    }

    /// What was finished under this key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Vec<Record>> {
        self.done.get(key)
    }

    /// Keeps a finished boot.
    ///
    /// # Errors
    /// [`Failure::Check`] when it cannot be written: a full disk, say.
    pub fn put(&mut self, key: String, records: Vec<Record>) -> Result<(), Failure> {
        let line = Line { key, records };
        let keep = || -> std::io::Result<()> {
            let mut text = serde_json::to_vec(&line)?;
            text.push(b'\n');
            (&self.file).write_all(&text)?;
            self.file.sync_data()
        };
        keep().map_err(|error| Failure::Check(format!("{}: {error}", self.path.display())))?;
        self.done.insert(line.key, line.records);
        Ok(())
    }

    /// Removes the file: the output is complete.
    pub fn remove(self) {
        // One that stays is only read again.
        let _ = fs::remove_file(&self.path);
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Host, record::SCHEMA};

    fn record(scenario: &str) -> Record {
        Record {
            schema: SCHEMA,
            scenario: scenario.into(),
            host: Host::default(),
            config: BTreeMap::new(),
            rows: Vec::new(),
        }
    }

    #[test]
    fn what_was_finished_is_there_and_half_a_line_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("m.json");
        let mut store = Store::open(&out).unwrap();
        store.put("one".into(), vec![record("a"), record("b")]).unwrap();
        store.put("two".into(), vec![record("c")]).unwrap();
        let path = store.path().to_owned();
        drop(store);
        let text = fs::read(&path).unwrap();
        for cut in 1..text.len() {
            fs::write(&path, &text[..cut]).unwrap();
            let mut store = Store::open(&out).unwrap();
            let first = text.iter().position(|&byte| byte == b'\n').unwrap() + 1;
            assert_eq!(store.get("one").is_some(), cut >= first, "{cut}");
            assert!(store.get("two").is_none());
            store.put("two".into(), vec![record("c")]).unwrap();
            drop(store);
            assert_eq!(Store::open(&out).unwrap().get("two").unwrap()[0].scenario, "c", "{cut}");
        }
        Store::open(&out).unwrap().remove();
        assert!(!path.exists());
    }

    #[test]
    fn a_place_that_cannot_be_written_is_named() {
        let failure = Store::open(Path::new("/nonexistent/m.json")).map(|_| ()).unwrap_err();
        assert!(failure.to_string().starts_with("/nonexistent/m.json.part: "), "{failure}");
    }
}
