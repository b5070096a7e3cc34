//! The shelf: the kernels that the lab can boot, and the cache that they are unpacked into.

use super::apt::Apt;
use super::entry::{Entry, Flaw};
use super::{child, interrupt};
use crate::failure::Failure;
use crate::progress::Progress;
use rustix::fs::{FlockOperation, flock};
use serde::Deserialize;
use std::fmt::Write as _;
use std::fs::File;
use std::path::PathBuf;

/// The modules that the lab's machines need; what these depend on comes along.
pub(super) const MODULES: [&str; 2] = ["kvm-amd", "kvm-intel"];

/// The shelf's list.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shelf {
    /// The kernel that is booted unless another one is asked for.
    pub default: String,
    #[serde(rename = "kernel")]
    kernels: Vec<Kernel>,
}

impl Shelf {
    /// All kernels, from the oldest to the newest.
    #[must_use]
    pub fn kernels(&self) -> &[Kernel] {
        &self.kernels
    }
}

/// A kernel on the shelf.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// Its name on the shelf.
    pub name: String,
    /// The pinned package.
    pub package: String,
    /// The pinned version.
    pub version: String,
    /// Names of packages that serve when the pinned one is gone: `*` stands for the numbers.
    pub series: String,
    /// The suites that have it.
    pub suites: Vec<String>,
    /// What it is good for.
    pub about: String,
}

/// Why the shelf cannot deliver.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such kernel.
    #[error(
        "kernel {name}: not on the shelf; there are {known} (umbra kernels list), or a bzImage of your own by its path"
    )]
    Unknown {
        /// The name.
        name: String,
        /// The names that are there.
        known: String,
    },
    /// There is no place for the cache.
    #[error("no directory for the cache: HOME is not set; UMBRA_CACHE names one")]
    NoCache,
    /// The cache cannot be written.
    #[error("{}: {why}; UMBRA_CACHE names another directory", path.display())]
    Cache {
        /// Where.
        path: PathBuf,
        /// Why not.
        why: std::io::Error,
    },
    /// The entry is damaged again right after it was built.
    #[error("kernel {name}: {flaw} although it was just unpacked; is the disk full?")]
    Damaged {
        /// The kernel.
        name: String,
        /// What is wrong.
        flaw: Flaw,
    },
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Unknown { .. } => Self::Input(error.to_string()),
            _ => Self::NotHere(error.to_string()),
        }
    }
}

/// The shelf that this binary was built with.
///
/// # Panics
/// Never: a test reads the same text.
#[must_use]
pub fn shelf() -> Shelf {
    toml::from_str(include_str!("../../../images/kernels.toml")).expect("images/kernels.toml was tested")
}

impl Shelf {
    /// The kernel of this name, or the default one.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the names that there are.
    pub fn kernel(&self, name: Option<&str>) -> Result<&Kernel, Error> {
        let name = name.unwrap_or(&self.default);
        self.kernels.iter().find(|kernel| kernel.name == name).ok_or_else(|| Error::Unknown {
            name: name.to_owned(),
            known: self.kernels.iter().map(|kernel| kernel.name.as_str()).collect::<Vec<_>>().join(", "),
        })
    }
}

/// The directory of everything that can be fetched again: `$UMBRA_CACHE`, else `umbra` below `$XDG_CACHE_HOME` or `~/.cache`.
fn cache() -> Result<PathBuf, Error> {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let directory = from("UMBRA_CACHE")
        .or_else(|| from("XDG_CACHE_HOME").map(|directory| directory.join("umbra")))
        .or_else(|| from("HOME").map(|home| home.join(".cache/umbra")))
        .ok_or(Error::NoCache)?;
    // apt and dpkg work in directories of their own.
    std::path::absolute(&directory).map_err(|why| Error::Cache { path: directory, why })
}

impl Kernel {
    fn wanted(&self) -> String {
        format!("{} {}", self.package, self.version)
    }

    fn directory(&self) -> Result<PathBuf, Error> {
        Ok(cache()?.join("kernels").join(&self.name))
    }

    /// The kernel in the cache, fetched and unpacked if it is not there, or repaired if it is damaged. When it is not the
    /// pinned one, that is said on stderr.
    ///
    /// # Errors
    /// The package is not found or cannot be downloaded, the cache cannot be written, or the user interrupts.
    pub fn ensure(&self, progress: &Progress) -> Result<Entry, Failure> {
        interrupt::watch()?;
        let (directory, wanted) = (self.directory()?, self.wanted());
        let entry = match Entry::open(&directory, &wanted) {
            Ok(entry) => entry,
            Err(_) => self.fetch(progress)?,
        };
        if let Some(instead) = entry.instead() {
            eprintln!(
                "umbra: kernel {}: the archive no longer has {wanted}; using {instead}, so figures may differ",
                self.name
            );
        }
        Ok(entry)
    }

    fn fetch(&self, progress: &Progress) -> Result<Entry, Failure> {
        let cache = cache()?;
        let (directory, wanted) = (self.directory()?, self.wanted());
        let kernels = cache.join("kernels");
        std::fs::create_dir_all(&kernels).map_err(|why| Error::Cache { path: kernels.clone(), why })?;
        let _lock = lock(&cache.join("lock"), progress)?;
        match Entry::open(&directory, &wanted) {
            // Someone else fetched it while this process waited for the lock.
            Ok(entry) => return Ok(entry),
            Err(Flaw::Absent) => {}
            Err(flaw) => eprintln!("umbra: kernel {} in the cache: {flaw}; fetching it again", self.name),
        }
        // With the lock held, what is half built belongs to a process that is gone.
        for entry in std::fs::read_dir(&kernels).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(".new-") {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        progress.step(&format!("kernel {}: reading the archive's index", self.name));
        let apt = Apt::new(&cache.join("apt"), &self.suites)?;
        let package = apt.find((&self.package, &self.version), &self.series)?;
        let mut packages = Vec::new();
        for package in [Some(package.clone()), apt.find_modules(&package)?].into_iter().flatten() {
            progress.step(&format!("kernel {}: downloading {} {}", self.name, package.name, package.version));
            let deb = apt.download(&package)?;
            packages.push((package, deb));
        }
        progress.step(&format!("kernel {}: unpacking", self.name));
        Entry::build(&directory, &wanted, &packages, &MODULES)?;
        apt.forget_downloads();
        Entry::open(&directory, &wanted).map_err(|flaw| Error::Damaged { name: self.name.clone(), flaw }.into())
    }
}

/// Waits for the cache's lock, which the kernel takes back when the file is closed.
fn lock(path: &std::path::Path, progress: &Progress) -> Result<File, Failure> {
    let cache = |why| Error::Cache { path: path.to_owned(), why };
    let file = File::options().create(true).truncate(false).write(true).open(path).map_err(cache)?;
    let mut told = false;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                if !told {
                    progress.step("another umbra is fetching a kernel; waiting for it");
                }
                told = true;
                interrupt::check()?;
                std::thread::sleep(child::TICK);
            }
            Err(error) => return Err(cache(error.into()).into()),
        }
    }
}

/// `umbra kernels list`.
///
/// # Errors
/// There is no place for a cache.
pub fn list() -> Result<String, Failure> {
    let shelf = shelf();
    let mut text = String::new();
    for kernel in &shelf.kernels {
        let state = match Entry::open(&kernel.directory()?, &kernel.wanted()) {
            Ok(entry) => entry.instead().map_or_else(|| "in the cache".to_owned(), |it| format!("in the cache: {it}")),
            Err(flaw) => flaw.to_string(),
        };
        let default = if kernel.name == shelf.default { " (default)" } else { "" };
        let _ = writeln!(text, "{}{default}: {}\n  {} ({state})", kernel.name, kernel.about, kernel.wanted());
    }
    Ok(text)
}

/// `umbra kernels fetch`: the named kernels, all of them, or the default one.
///
/// # Errors
/// As [`Kernel::ensure`].
pub fn fetch(names: &[String], progress: &Progress) -> Result<String, Failure> {
    let shelf = shelf();
    let mut kernels = Vec::new();
    for name in names {
        if name == "all" {
            kernels.extend(&shelf.kernels);
        } else {
            kernels.push(shelf.kernel(Some(name))?);
        }
    }
    if kernels.is_empty() {
        kernels.push(shelf.kernel(None)?);
    }
    let (mut text, mut failed) = (String::new(), None);
    for kernel in kernels {
        match kernel.ensure(progress) {
            Ok(entry) => {
                let _ = writeln!(text, "{}: {}", kernel.name, entry.package());
            }
            // One that has vanished is no reason to go without the others.
            Err(failure @ Failure::NotHere(_)) if names.len() != 1 || names[0] == "all" => {
                eprintln!("umbra: kernel {}: {failure}", kernel.name);
                failed = Some(Failure::NotHere(format!("kernel {}: not fetched", kernel.name)));
            }
            Err(failure) => return Err(failure),
        }
    }
    match failed {
        Some(failure) if text.is_empty() => Err(failure),
        Some(failure) => {
            eprint!("{text}");
            Err(failure)
        }
        None => Ok(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shelf_is_well_formed() {
        let shelf = shelf();
        assert!(shelf.kernel(None).is_ok());
        for kernel in &shelf.kernels {
            let (start, end) = kernel.series.split_once('*').expect("a series has a star");
            assert!(kernel.package.starts_with(start) && kernel.package.ends_with(end), "{}", kernel.package);
            assert!(!kernel.suites.is_empty() && !kernel.about.is_empty());
        }
    }

    #[test]
    fn an_unknown_kernel_is_bad_input() {
        let failure = Failure::from(shelf().kernel(Some("2.4")).unwrap_err());
        assert!(matches!(failure, Failure::Input(_)));
        assert!(
            failure.to_string().starts_with("kernel 2.4: not on the shelf; there are 5.10, 6.1, 6.12"),
            "{failure}"
        );
    }

    #[test]
    fn a_held_lock_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let held = lock(&path, &Progress::Silent).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| lock(&path, &Progress::Silent).map(|_| std::time::Instant::now()));
            std::thread::sleep(child::TICK * 5);
            let released = std::time::Instant::now();
            drop(held);
            assert!(waiting.join().unwrap().unwrap() >= released);
        });
    }
}
