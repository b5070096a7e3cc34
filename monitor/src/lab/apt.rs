//! Debian packages by apt: with a sources list and a state directory of Umbra's own, from the mirror and with the keyring of the
//! system's own configuration. apt checks every signature and hash; nothing of the system's apt is changed.

use super::child::{Child, Ended, run};
use crate::failure::Failure;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A package that the archive has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The hash of its file, from the signed index.
    pub sha256: String,
}

impl Package {
    /// The package that has this one's modules, where a kernel comes in two: from Debian's 7.x on.
    #[must_use]
    pub fn modules(&self) -> Option<String> {
        self.name.strip_prefix("linux-binary-unsigned-").map(|rest| format!("linux-modules-{rest}"))
    }
}

/// Why there is no package.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system's apt configuration has no Debian mirror.
    #[error(
        "apt's configuration names no Debian mirror for {0}: the lab's kernels are Debian packages; a `deb` line (or `apt-get update`) brings it"
    )]
    NoMirror(String),
    /// The package is not there.
    #[error("kernel package not found: neither {pinned} nor any {series} is in {suites}{because}")]
    NotFound {
        /// The pinned package.
        pinned: String,
        /// The pattern of its series.
        series: String,
        /// The suites that were searched.
        suites: String,
        /// What apt said, when it could not read them all.
        because: String,
    },
    /// apt could not download it.
    #[error("{package} cannot be downloaded: {why}")]
    Download {
        /// The package.
        package: String,
        /// What apt said.
        why: String,
    },
    /// The state directory cannot be written.
    #[error("{}: {why}; UMBRA_CACHE names another directory", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// Why not.
        why: std::io::Error,
    },
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::NotHere(error.to_string())
    }
}

/// A mirror of the system's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mirror {
    uri: String,
    security: bool,
    /// The field `Signed-By` with its value, or nothing where apt's own keyrings serve.
    signed_by: String,
}

/// apt, with its own state below one directory.
pub struct Apt {
    directory: PathBuf,
    suites: String,
}

impl Apt {
    /// Prepares the state directory for `suites`.
    ///
    /// # Errors
    /// [`Error::NoMirror`], [`Error::State`], or apt is not installed.
    pub fn new(directory: &Path, suites: &[String]) -> Result<Self, Failure> {
        for name in ["lists/partial", "archives/partial", "download"] {
            let path = directory.join(name);
            std::fs::create_dir_all(&path).map_err(|why| Error::State { path, why })?;
        }
        let sources = sources(&mirrors()?, suites)?;
        // Hooks of the system's configuration act on the system's state, so they are not for us.
        let clear = "#clear APT::Update::Pre-Invoke;\n#clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n";
        for (name, text) in [("umbra.sources", sources.as_str()), ("apt.conf", clear)] {
            let path = directory.join(name);
            std::fs::write(&path, text).map_err(|why| Error::State { path, why })?;
        }
        Ok(Self { directory: directory.to_owned(), suites: suites.join(", ") })
    }

    /// A command of apt's family that works on this state.
    fn command(&self, program: &str) -> Result<Command, Failure> {
        let mut command = Child::command(program, "apt")?;
        let at = |name: &str| self.directory.join(name).display().to_string();
        command.arg("-c").arg(self.directory.join("apt.conf"));
        for option in [
            format!("Dir::Etc::SourceList={}", at("umbra.sources")),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            format!("Dir::State::Lists={}", at("lists")),
            format!("Dir::Cache={}", self.directory.display()),
            format!("Dir::Cache::Archives={}", at("archives")),
            "APT::Architecture=amd64".to_owned(),
            // The state may lie where apt's own download user cannot go.
            "APT::Sandbox::User=root".to_owned(),
            "APT::Get::AllowUnauthenticated=false".to_owned(),
            "Acquire::AllowInsecureRepositories=false".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
            // Descriptions of applications are most of an index and of no use here.
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        Ok(command)
    }

    fn run(&self, program: &str, words: &[&str]) -> Result<Ended, Failure> {
        run(self.command(program)?.args(words), &self.directory.join("download"))
    }

    /// The pinned package, else the newest of its series.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn find(&self, pinned: (&str, &str), series: &str) -> Result<Package, Failure> {
        // A suite that is gone or a mirror that is away matters only when the package is then missing.
        let update = self.run("apt-get", &["update"])?;
        if let Some(package) = self.show(&format!("{}={}", pinned.0, pinned.1))? {
            return Ok(package);
        }
        let (start, _) = series.split_once('*').unwrap_or((series, ""));
        let names = self.run("apt-cache", &["pkgnames", start])?.text();
        if let Some(name) = newest(names.lines(), series)
            && let Some(package) = self.show(&name)?
        {
            return Ok(package);
        }
        let because =
            if update.stderr.trim().is_empty() { String::new() } else { format!(" (apt: {})", update.complaint()) };
        let pinned = format!("{} {}", pinned.0, pinned.1);
        Err(Error::NotFound { pinned, series: series.to_owned(), suites: self.suites.clone(), because }.into())
    }

    /// The package that has the modules of `image`, of the same version; `None` where they are in it.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn find_modules(&self, image: &Package) -> Result<Option<Package>, Failure> {
        let Some(name) = image.modules() else { return Ok(None) };
        if let Some(package) = self.show(&format!("{name}={}", image.version))? {
            return Ok(Some(package));
        }
        let pinned = format!("{name} {}", image.version);
        let (series, suites, because) = (name, self.suites.clone(), String::new());
        Err(Error::NotFound { pinned, series, suites, because }.into())
    }

    fn show(&self, package: &str) -> Result<Option<Package>, Failure> {
        Ok(parse_show(&self.run("apt-cache", &["show", "--no-all-versions", package])?.text()))
    }

    /// Downloads a package into the state directory. What an interrupted download left is continued by apt; what it cannot
    /// continue is fetched again.
    ///
    /// # Errors
    /// [`Error::Download`].
    pub fn download(&self, package: &Package) -> Result<PathBuf, Failure> {
        let wanted = format!("{}={}", package.name, package.version);
        let mut why = String::new();
        for _ in 0..2 {
            let ended = self.run("apt-get", &["download", &wanted])?;
            if ended.status.success() {
                let file = self.downloads(&format!("{}_", package.name)).pop();
                match file.map(|file| (super::digest::of_file(&file), file)) {
                    Some((Ok(sha256), file)) if sha256 == package.sha256 => return Ok(file),
                    _ => "its hash is not the signed index's".clone_into(&mut why),
                }
            } else {
                why = ended.complaint();
            }
            self.forget_downloads();
        }
        Err(Error::Download { package: wanted, why }.into())
    }

    /// Removes downloaded files.
    pub fn forget_downloads(&self) {
        for file in self.downloads("") {
            // What cannot be removed is replaced by the next download.
            let _ = std::fs::remove_file(file);
        }
    }

    fn downloads(&self, start: &str) -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(self.directory.join("download")) else { return Vec::new() };
        entries
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(start))
            .map(|entry| entry.path())
            .collect()
    }
}

/// The Debian mirrors of the system's configuration.
fn mirrors() -> Result<Vec<Mirror>, Failure> {
    let mut command = Child::command("apt-get", "apt")?;
    let format = "$(ORIGIN)|$(LABEL)|$(REPO_URI)|$(SOURCESENTRY)";
    command.args(["indextargets", "--format", format, "Created-By: Packages"]);
    let targets = run(&mut command, Path::new("/"))?.text();
    Ok(parse_targets(&targets, |entry| {
        let (file, _) = entry.rsplit_once(':')?;
        std::fs::read_to_string(file).ok()
    }))
}

/// Reads the lines of indextargets; `source` gives the text of the file that an entry came from.
fn parse_targets(targets: &str, source: impl Fn(&str) -> Option<String>) -> Vec<Mirror> {
    let mut mirrors: Vec<Mirror> = Vec::new();
    for line in targets.lines() {
        let [origin, label, uri, entry] = line.split('|').collect::<Vec<_>>()[..] else { continue };
        // Before the first `apt-get update` there is no label (the name stands unreplaced); then the customary path must do.
        let unknown = origin.is_empty() || origin.starts_with('$');
        let path = uri.trim_end_matches('/');
        let main = (origin == "Debian" && label == "Debian") || (unknown && path.ends_with("/debian"));
        let security =
            (origin == "Debian" && label == "Debian-Security") || (unknown && path.ends_with("/debian-security"));
        if (main || security) && !mirrors.iter().any(|mirror| mirror.security == security) {
            let signed_by = source(entry).and_then(|text| signed_by(&text, uri)).unwrap_or_default();
            mirrors.push(Mirror { uri: uri.to_owned(), security, signed_by });
        }
    }
    mirrors
}

/// The field `Signed-By` of the entry for `uri` in a sources file of either format.
fn signed_by(text: &str, uri: &str) -> Option<String> {
    let same = |word: &str| word.trim_end_matches('/') == uri.trim_end_matches('/');
    // One line: deb [signed-by=FILE arch=amd64] URI SUITE COMPONENT...
    let one_line =
        text.lines().filter(|line| line.trim_start().starts_with("deb")).find(|line| line.split_whitespace().any(same));
    if let Some(line) = one_line {
        let options = line.split_once('[')?.1.split_once(']')?.0;
        let file = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="))?;
        return Some(format!("Signed-By: {}\n", file.replace(',', " ")));
    }
    // deb822: a field's value may continue on lines that begin with a space (a key may stand there itself).
    let stanza = text.split("\n\n").find(|stanza| stanza.split_whitespace().any(same))?;
    let mut lines = stanza.lines().skip_while(|line| !line.to_ascii_lowercase().starts_with("signed-by:"));
    let mut field = format!("{}\n", lines.next()?);
    for line in lines.take_while(|line| line.starts_with([' ', '\t'])) {
        field.push_str(line);
        field.push('\n');
    }
    Some(field)
}

/// The sources list for `suites`.
fn sources(mirrors: &[Mirror], suites: &[String]) -> Result<String, Error> {
    let mut text = String::new();
    for suite in suites {
        let security = suite.ends_with("-security");
        if let Some(mirror) = mirrors.iter().find(|mirror| mirror.security == security) {
            let Mirror { uri, signed_by, .. } = mirror;
            let _ = write!(text, "Types: deb\nURIs: {uri}\nSuites: {suite}\nComponents: main\n{signed_by}\n");
        }
    }
    if text.is_empty() { Err(Error::NoMirror(suites.join(", "))) } else { Ok(text) }
}

/// The newest of the names that match `series`, by the numbers that its `*` stands for.
fn newest<'a>(names: impl Iterator<Item = &'a str>, series: &str) -> Option<String> {
    let (start, end) = series.split_once('*')?;
    let numbers = |name: &str| -> Option<Vec<u64>> {
        let middle = name.strip_prefix(start)?.strip_suffix(end)?;
        // Another flavour of the same series (rt, say) is another kernel. In `7.3*` the star may stand for nothing, or for `.4+deb13`.
        if middle.starts_with(|c: char| !c.is_ascii_digit() && c != '.') || middle.contains('-') {
            return None;
        }
        Some(middle.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect())
    };
    names.filter_map(|name| Some((numbers(name)?, name))).max().map(|(_, name)| name.to_owned())
}

/// The first stanza of `apt-cache show` that has a file (a package that is merely installed has none).
fn parse_show(text: &str) -> Option<Package> {
    text.split("\n\n").find_map(|stanza| {
        let field = |name: &str| {
            stanza.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(": ")?.trim().to_owned()))
        };
        Some(Package { name: field("Package")?, version: field("Version")?, sha256: field("SHA256")? })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "Types: deb\n# a comment\nURIs: http://mirror.example/debian\nSuites: bookworm\nSigned-By: /k/main.gpg\n\n\
        Types: deb\nURIs: http://mirror.example/debian-security\nSuites: bookworm-security\nSigned-By:\n BEGIN\n .\n END\nComponents: main\n";

    #[test]
    fn mirrors_and_keyrings_come_from_the_system() {
        let targets = "Docker|Docker|http://other.example/|/x.list:1\n\
            Debian|Debian|http://mirror.example/debian/|/x.sources:1\n\
            Debian|Debian-Security|http://mirror.example/debian-security/|/x.sources:2\n";
        let mirrors = parse_targets(targets, |_| Some(DEB822.to_owned()));
        assert_eq!(mirrors.len(), 2);
        assert_eq!(mirrors[0].signed_by, "Signed-By: /k/main.gpg\n");
        assert_eq!(mirrors[1].signed_by, "Signed-By:\n BEGIN\n .\n END\n");
        let text = sources(&mirrors, &["bookworm-security".into(), "bookworm-backports".into()]).unwrap();
        assert!(
            text.starts_with("Types: deb\nURIs: http://mirror.example/debian-security/\nSuites: bookworm-security\n")
        );
        assert!(text.contains("URIs: http://mirror.example/debian/\nSuites: bookworm-backports\n"));
    }

    #[test]
    fn one_line_entries_are_read() {
        let list = "# deb http://mirror.example/debian old\ndeb [arch=amd64 signed-by=/k/a.gpg] http://mirror.example/debian bookworm main\n";
        assert_eq!(signed_by(list, "http://mirror.example/debian/").unwrap(), "Signed-By: /k/a.gpg\n");
        assert_eq!(signed_by("deb http://mirror.example/debian bookworm main", "http://mirror.example/debian/"), None);
    }

    #[test]
    fn without_lists_the_path_tells_a_mirror() {
        let mirrors = parse_targets("$(ORIGIN)|$(LABEL)|http://mirror.example/debian/|/x:1\n", |_| None);
        assert_eq!(mirrors.len(), 1);
        let error = sources(&mirrors, &["bookworm-security".into()]).unwrap_err();
        assert!(matches!(error, Error::NoMirror(_)), "{error}");
        assert!(parse_targets("Ubuntu|Ubuntu|http://mirror.example/ubuntu/|/x:1\n", |_| None).is_empty());
    }

    #[test]
    fn the_newest_is_by_number_and_of_the_same_flavour() {
        let names = [
            "linux-image-6.12.9+deb12-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64-dbg",
            "linux-image-6.12.119+deb12-rt-cloud-amd64",
            "linux-image-6.12-cloud-amd64",
        ];
        let series = "linux-image-6.12.*-cloud-amd64";
        assert_eq!(newest(names.into_iter(), series).unwrap(), "linux-image-6.12.117+deb12-cloud-amd64");
        assert_eq!(newest(["linux-image-6.1.0-56-cloud-amd64"].into_iter(), series), None);
        let names = ["linux-binary-unsigned-7.3-cloud-amd64", "linux-binary-unsigned-7.3.4+deb13-cloud-amd64"];
        let series = "linux-binary-unsigned-7.3*-cloud-amd64";
        assert_eq!(newest(names.into_iter(), series).unwrap(), names[1]);
        assert_eq!(newest(names[..1].iter().copied(), series).unwrap(), names[0]);
        assert_eq!(newest(["linux-binary-unsigned-7.3-rt-cloud-amd64"].into_iter(), series), None);
    }

    #[test]
    fn a_split_kernel_names_its_modules() {
        let package = |name: &str| Package { name: name.into(), version: "1".into(), sha256: "ff".into() };
        let split = package("linux-binary-unsigned-7.2.13+deb14-cloud-amd64");
        assert_eq!(split.modules().unwrap(), "linux-modules-7.2.13+deb14-cloud-amd64");
        assert_eq!(package("linux-image-6.12.111+deb12-cloud-amd64").modules(), None);
    }

    #[test]
    fn a_package_without_a_file_is_passed_over() {
        let text = "Package: a\nVersion: 1\n\nPackage: a\nVersion: 2\nSHA256: ff\n\n";
        let package = Package { name: "a".into(), version: "2".into(), sha256: "ff".into() };
        assert_eq!(parse_show(text), Some(package));
        assert_eq!(parse_show("N: nothing\n"), None);
    }
}
