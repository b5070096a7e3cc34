//! One kernel in the cache: vmlinuz, the modules and a manifest with the hash of each. An entry is built aside and renamed into
//! place as a whole, so it is complete or absent; one that was damaged afterwards is known by its hashes and built again.

use super::apt::Package;
use super::child::{Child, run};
use super::digest;
use super::module::{Module, canonical};
use super::own::Own;
use crate::failure::Failure;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

/// The layout of an entry. Entries of another one are built again.
const FORMAT: u32 = 2;
const MANIFEST: &str = "manifest.json";
const VMLINUZ: &str = "vmlinuz";

/// What an entry holds, and where it came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    /// The pinned package and version that were wanted.
    wanted: String,
    /// The package that was taken.
    package: String,
    version: String,
    sha256: String,
    /// The package that the modules came from, where it is another one: name, version and hash.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    modules_package: Option<String>,
    /// SHA-256 of every other file of the entry.
    files: BTreeMap<String, String>,
    /// In the order in which they are loaded.
    modules: Vec<Module>,
    /// Whether it is a kernel of the user's own, which lies in no cache.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    own: bool,
}

/// A complete kernel in the cache.
#[derive(Clone, Debug)]
pub struct Entry {
    directory: PathBuf,
    manifest: Manifest,
    /// A kernel of the user's own is copied, so that what boots is what was checked; the copy goes with the last user.
    _copy: Option<Arc<TempDir>>,
}

/// Why an entry cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    /// There is none.
    #[error("not in the cache")]
    Absent,
    /// Its manifest cannot be read, or is of another time.
    #[error("its manifest is not usable")]
    Manifest,
    /// It was made when another version was pinned.
    #[error("it was fetched when {0} was pinned")]
    OtherPin(String),
    /// A file is missing or is not what was unpacked.
    #[error("{0} is damaged")]
    File(String),
}

/// Why a package cannot be unpacked.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("a kernel is made of one package or two")]
    NoPackage,
    #[error("{package} has no {missing}: this package is of no use to the lab")]
    Lacks { package: String, missing: String },
    #[error("{package} cannot be unpacked: {why}")]
    Broken { package: String, why: String },
    #[error("{}: {why}; UMBRA_CACHE names another directory", path.display())]
    Cache { path: PathBuf, why: std::io::Error },
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::NotHere(error.to_string())
    }
}

fn file_name(module: &str) -> String {
    format!("{module}.ko")
}

impl Entry {
    /// Opens the entry in `directory` and checks every hash.
    ///
    /// # Errors
    /// The first [`Flaw`].
    pub fn open(directory: &Path, wanted: &str) -> Result<Self, Flaw> {
        let text = match std::fs::read(directory.join(MANIFEST)) {
            Ok(text) => text,
            Err(_) if directory.exists() => return Err(Flaw::Manifest),
            Err(_) => return Err(Flaw::Absent),
        };
        let manifest: Manifest = serde_json::from_slice(&text).map_err(|_| Flaw::Manifest)?;
        let names = manifest.modules.iter().map(|module| file_name(&module.name));
        let complete = names.chain([VMLINUZ.to_owned()]).all(|name| manifest.files.contains_key(&name));
        if manifest.format != FORMAT || !complete {
            return Err(Flaw::Manifest);
        }
        if manifest.wanted != wanted {
            return Err(Flaw::OtherPin(manifest.wanted));
        }
        for (name, hash) in &manifest.files {
            match digest::of_file(&directory.join(name)) {
                Ok(found) if found == *hash => {}
                _ => return Err(Flaw::File(name.clone())),
            }
        }
        Ok(Self { directory: directory.to_owned(), manifest, _copy: None })
    }

    /// A kernel of the user's own.
    pub(super) fn own(own: &Own) -> std::io::Result<Self> {
        let copy = tempfile::Builder::new().prefix("umbra-kernel-").tempdir()?;
        std::fs::copy(&own.path, copy.path().join(VMLINUZ))?;
        for (module, elf) in own.modules() {
            std::fs::write(copy.path().join(file_name(&module.name)), elf)?;
        }
        let (package, version, sha256) = own.package();
        let manifest = Manifest {
            format: FORMAT,
            wanted: format!("{package} {version}"),
            package,
            version,
            sha256,
            modules_package: own.modules_package(),
            files: BTreeMap::new(),
            modules: own.modules().iter().map(|(module, _)| module.clone()).collect(),
            own: true,
        };
        Ok(Self { directory: copy.path().to_owned(), manifest, _copy: Some(Arc::new(copy)) })
    }

    /// Whether it is a kernel of the user's own rather than of the shelf.
    #[must_use]
    pub fn is_own(&self) -> bool {
        self.manifest.own
    }

    /// Builds the entry in `directory` from the files of one package, or of two: the kernel's and its modules'. `roots` are the modules that
    /// are needed; what they depend on comes along.
    pub(super) fn build(
        directory: &Path,
        wanted: &str,
        packages: &[(Package, PathBuf)],
        roots: &[&str],
    ) -> Result<(), Failure> {
        let cache = |path: &Path| {
            let path = path.to_owned();
            move |why| Error::Cache { path, why }
        };
        let parent = directory.parent().unwrap_or(directory);
        let scratch = tempfile::Builder::new().prefix(".new-").tempdir_in(parent).map_err(cache(parent))?;
        let (tree, new) = (scratch.path().join("tree"), scratch.path().join("entry"));
        std::fs::create_dir(&new).map_err(cache(&new))?;
        for (package, deb) in packages {
            let mut command = Child::command("dpkg-deb", "dpkg")?;
            let ended = run(command.arg("-x").arg(deb).arg(&tree), scratch.path())?;
            if !ended.status.success() {
                return Err(Error::Broken { package: package.name.clone(), why: ended.complaint() }.into());
            }
        }
        let Some((package, _)) = packages.first() else { return Err(Error::NoPackage.into()) };
        let tree = Tree { package: &package.name, files: walk(&tree) };
        let vmlinuz = tree.find("the kernel (boot/vmlinuz)", |name| name.starts_with("vmlinuz"))?;
        let mut files = BTreeMap::new();
        let mut put = |name: String, bytes: &[u8]| {
            std::fs::write(new.join(&name), bytes).map_err(cache(&new))?;
            files.insert(name, digest::of(bytes));
            Ok::<_, Failure>(())
        };
        put(VMLINUZ.to_owned(), &std::fs::read(vmlinuz).map_err(cache(vmlinuz))?)?;
        let mut modules = Vec::new();
        for root in roots {
            tree.load(root, &mut modules)?;
        }
        for (module, elf) in &modules {
            put(file_name(&module.name), elf)?;
        }
        let manifest = Manifest {
            format: FORMAT,
            wanted: wanted.to_owned(),
            package: package.name.clone(),
            version: package.version.clone(),
            sha256: package.sha256.clone(),
            modules_package: packages.get(1).map(|(it, _)| format!("{} {} {}", it.name, it.version, it.sha256)),
            files,
            modules: modules.into_iter().map(|(module, _)| module).collect(),
            own: false,
        };
        let text = serde_json::to_vec_pretty(&manifest)
            .map_err(|why| Error::Broken { package: package.name.clone(), why: why.to_string() })?;
        std::fs::write(new.join(MANIFEST), text).map_err(cache(&new))?;
        match std::fs::remove_dir_all(directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(cache(directory)(error).into()),
            _ => {}
        }
        std::fs::rename(&new, directory).map_err(cache(directory))?;
        Ok(())
    }

    /// The kernel's file.
    #[must_use]
    pub fn vmlinuz(&self) -> PathBuf {
        self.directory.join(VMLINUZ)
    }

    /// The modules, in the order in which they are loaded.
    #[must_use]
    pub fn modules(&self) -> &[Module] {
        &self.manifest.modules
    }

    /// A module's file.
    #[must_use]
    pub fn module(&self, module: &Module) -> PathBuf {
        self.directory.join(file_name(&module.name))
    }

    /// Name, version and SHA-256 of the package, as the Record has them; of both, where the modules have one of their own.
    #[must_use]
    pub fn package(&self) -> String {
        let Manifest { package, version, sha256, modules_package, .. } = &self.manifest;
        let modules = modules_package.as_ref().map_or_else(String::new, |it| format!(", {it}"));
        format!("{package} {version} {sha256}{modules}")
    }

    /// When another package than the pinned one was taken: which one.
    #[must_use]
    pub fn instead(&self) -> Option<String> {
        let taken = format!("{} {}", self.manifest.package, self.manifest.version);
        (taken != self.manifest.wanted).then_some(taken)
    }
}

/// An unpacked package.
struct Tree<'a> {
    package: &'a str,
    files: Vec<PathBuf>,
}

impl Tree<'_> {
    fn find(&self, what: &str, wanted: impl Fn(&str) -> bool) -> Result<&PathBuf, Error> {
        let matches = |file: &&PathBuf| file.file_name().is_some_and(|name| wanted(&name.to_string_lossy()));
        let missing = || Error::Lacks { package: self.package.to_owned(), missing: what.to_owned() };
        self.files.iter().find(matches).ok_or_else(missing)
    }

    /// Appends a module after those that it depends on.
    fn load(&self, name: &str, loaded: &mut Vec<(Module, Vec<u8>)>) -> Result<(), Failure> {
        let name = canonical(name);
        if loaded.iter().any(|(module, _)| module.name == name) {
            return Ok(());
        }
        let file = self.find(&format!("module {name}"), |file| {
            file.split_once('.').is_some_and(|(stem, end)| canonical(stem) == name && matches!(end, "ko" | "ko.xz"))
        })?;
        let broken = |why: String| Error::Broken { package: self.package.to_owned(), why };
        let elf = unpack(file).map_err(|failure| match failure {
            Failure::Interrupted | Failure::NotHere(_) => failure,
            other => broken(other.to_string()).into(),
        })?;
        let module = Module::read(&elf).ok_or_else(|| broken(format!("{name} is not a kernel module")))?;
        for needed in &module.depends {
            self.load(needed, loaded)?;
        }
        loaded.push((module, elf));
        Ok(())
    }
}

/// A module's file, unpacked if it is packed.
///
/// # Errors
/// It cannot be read or unpacked; [`Failure::NotHere`] without xz.
pub(super) fn unpack(file: &Path) -> Result<Vec<u8>, Failure> {
    if file.extension().is_none_or(|extension| extension != "xz") {
        return std::fs::read(file).map_err(|why| Failure::Input(why.to_string()));
    }
    let mut command = Child::command("xz", "xz-utils")?;
    let ended = run(command.arg("-dc").arg(file), Path::new("/"))?;
    if ended.status.success() { Ok(ended.stdout) } else { Err(Failure::Input(ended.complaint())) }
}

/// All regular files below a directory, sorted.
pub(super) fn walk(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => directories.push(entry.path()),
                Ok(kind) if kind.is_file() => files.push(entry.path()),
                _ => {}
            }
        }
    }
    files.sort();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry as `build` leaves it, of invented files.
    fn entry(parent: &Path) -> PathBuf {
        let directory = parent.join("6.12");
        std::fs::create_dir(&directory).unwrap();
        let kvm = Module { name: "kvm".into(), depends: vec![], params: vec![] };
        let mut files = BTreeMap::new();
        for (name, bytes) in [(VMLINUZ, b"kernel".as_slice()), ("kvm.ko", b"module")] {
            std::fs::write(directory.join(name), bytes).unwrap();
            files.insert(name.to_owned(), digest::of(bytes));
        }
        let manifest = Manifest {
            format: FORMAT,
            wanted: "linux 1".into(),
            package: "linux".into(),
            version: "1".into(),
            sha256: "00".into(),
            modules_package: None,
            files,
            modules: vec![kvm],
            own: false,
        };
        std::fs::write(directory.join(MANIFEST), serde_json::to_vec(&manifest).unwrap()).unwrap();
        directory
    }

    fn flaw(directory: &Path) -> Flaw {
        Entry::open(directory, "linux 1").unwrap_err()
    }

    #[test]
    fn a_complete_entry_opens() {
        let parent = tempfile::tempdir().unwrap();
        let opened = Entry::open(&entry(parent.path()), "linux 1").unwrap();
        assert_eq!(opened.package(), "linux 1 00");
        assert_eq!(opened.instead(), None);
    }

    #[test]
    fn damage_is_noticed() {
        let parent = tempfile::tempdir().unwrap();
        assert_eq!(flaw(&parent.path().join("6.12")), Flaw::Absent);
        let directory = entry(parent.path());
        let kvm = directory.join("kvm.ko");
        std::fs::File::options().write(true).open(&kvm).unwrap().set_len(3).unwrap();
        assert_eq!(flaw(&directory), Flaw::File("kvm.ko".into()));
        std::fs::remove_file(&kvm).unwrap();
        assert_eq!(flaw(&directory), Flaw::File("kvm.ko".into()));
        std::fs::write(&kvm, b"modulf").unwrap();
        assert_eq!(flaw(&directory), Flaw::File("kvm.ko".into()));
        std::fs::write(directory.join(MANIFEST), b"{\"format\":1").unwrap();
        assert_eq!(flaw(&directory), Flaw::Manifest);
        std::fs::remove_file(directory.join(MANIFEST)).unwrap();
        assert_eq!(flaw(&directory), Flaw::Manifest);
    }

    #[test]
    fn an_entry_of_another_layout_is_noticed() {
        let parent = tempfile::tempdir().unwrap();
        let directory = entry(parent.path());
        let mut manifest: serde_json::Value =
            serde_json::from_slice(&std::fs::read(directory.join(MANIFEST)).unwrap()).unwrap();
        // The first layout had kvm-amd alone.
        manifest["format"] = 1.into();
        std::fs::write(directory.join(MANIFEST), manifest.to_string()).unwrap();
        assert_eq!(flaw(&directory), Flaw::Manifest);
    }

    #[test]
    fn another_pin_is_noticed() {
        let parent = tempfile::tempdir().unwrap();
        let flaw = Entry::open(&entry(parent.path()), "linux 2").unwrap_err();
        assert_eq!(flaw, Flaw::OtherPin("linux 1".into()));
    }

    #[test]
    fn a_package_without_the_module_is_named() {
        let tree = Tree { package: "linux", files: vec!["/x/kvm.ko.xz".into()] };
        let failure = tree.load("kvm-amd", &mut Vec::new()).unwrap_err();
        assert_eq!(failure.to_string(), "linux has no module kvm_amd: this package is of no use to the lab");
    }
}
