//! A kernel of the user's own: a bzImage and, where KVM is not built in, its modules. What it lacks is said before the boot, from its
//! configuration if that lies near, else from what can be seen.

use super::digest;
use super::module::{Module, canonical};
use crate::failure::Failure;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What is wrong with a kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("{what} {}: {why}", path.display())]
    Unreadable {
        /// The option.
        what: &'static str,
        /// Its value.
        path: PathBuf,
        /// Why not.
        why: std::io::Error,
    },
    /// Another file.
    #[error("--kernel {}: not a bzImage for x86-64 (a kernel tree leaves it at arch/x86/boot/bzImage): {why}", path.display())]
    NotKernel {
        /// The file.
        path: PathBuf,
        /// What is missing in it.
        why: &'static str,
    },
    /// Options that are off.
    #[error("--kernel {}: Linux {release} lacks what the lab needs: {missing} (its configuration is {})", path.display(), config.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Its release.
        release: String,
        /// The options.
        missing: String,
        /// Where that stands.
        config: PathBuf,
    },
    /// No KVM.
    #[error("--kernel {}: no kvm-amd: {why}", path.display())]
    NoKvm {
        /// The file.
        path: PathBuf,
        /// Where it was looked for.
        why: String,
    },
    /// Modules of another kernel.
    #[error("--modules {}: {module} is of Linux {found}, and --kernel is {release}", path.display())]
    OtherRelease {
        /// The directory.
        path: PathBuf,
        /// The module.
        module: String,
        /// Its kernel.
        found: String,
        /// The kernel that boots.
        release: String,
    },
    /// A module that is packed.
    #[error("--modules {}: {why}", path.display())]
    Module {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Input(error.to_string())
    }
}

/// What the lab's PID 1 cannot do without. Each is `y`, or `m` where that is said.
const NEEDED: &[(&str, &str)] = &[
    ("SERIAL_8250_CONSOLE", "the console and the way out"),
    ("BLK_DEV_INITRD", "the initramfs"),
    ("BINFMT_ELF", "PID 1"),
    ("PROC_FS", "/proc"),
    ("SYSFS", "/sys"),
    ("DEVTMPFS", "/dev"),
    ("TMPFS", "/tmp"),
    ("MODULES", "KVM as a module"),
    ("TRANSPARENT_HUGEPAGE", "--backing thp"),
    ("KVM_AMD", "KVM"),
];

/// A bzImage as its header describes it (Documentation/arch/x86/boot.rst).
#[derive(Debug)]
struct Header {
    release: String,
}

impl Header {
    fn read(image: &[u8]) -> Result<Self, &'static str> {
        let half = |at: usize| Some(u16::from_le_bytes(image.get(at..at + 2)?.try_into().ok()?));
        if half(0x1fe) != Some(0xaa55) || image.get(0x202..0x206) != Some(b"HdrS") {
            return Err("it has no boot header");
        }
        // Protocol 2.12 has xloadflags; bit 0 is a 64-bit entry point.
        if half(0x206).unwrap_or(0) < 0x20c || half(0x236).unwrap_or(0) & 1 == 0 {
            return Err("it has no 64-bit entry point");
        }
        let version = usize::from(half(0x20e).unwrap_or(0)) + 0x200;
        let text = image.get(version..).unwrap_or_default().split(|&byte| byte == 0).next().unwrap_or_default();
        // "6.12.0-rc1 (user@host) #1 SMP ...": nothing but the release leaves here.
        let release = String::from_utf8_lossy(text).split(' ').next().unwrap_or_default().to_owned();
        if release.is_empty() { Err("its header names no release") } else { Ok(Self { release }) }
    }
}

/// A kernel of the user's own, read and found fit.
#[derive(Clone, Debug)]
pub struct Own {
    /// The bzImage.
    pub path: PathBuf,
    /// Its release.
    pub release: String,
    sha256: String,
    modules: Vec<(Module, Vec<u8>)>,
}

impl Own {
    /// Reads the kernel at `path`; `directory` has its modules, wherever below it. `roots` are the modules that are needed.
    ///
    /// # Errors
    /// [`Error`], one line for all that is missing.
    pub fn read(path: &Path, directory: Option<&Path>, roots: &[&str]) -> Result<Self, Error> {
        let image =
            std::fs::read(path).map_err(|why| Error::Unreadable { what: "--kernel", path: path.into(), why })?;
        let header = Header::read(&image).map_err(|why| Error::NotKernel { path: path.into(), why })?;
        let config = configuration(path, directory, &header.release);
        if let Some((place, text)) = &config {
            let missing = missing(text);
            if !missing.is_empty() {
                let missing = missing.join(", ");
                return Err(Error::Config {
                    path: path.into(),
                    release: header.release,
                    missing,
                    config: place.clone(),
                });
            }
        }
        let mut own =
            Self { path: path.into(), release: header.release, sha256: digest::of(&image), modules: Vec::new() };
        if let Some(directory) = directory {
            let tree = Tree::new(directory)?;
            for root in roots {
                own.load(&tree, root)?;
            }
        } else {
            // Without a directory KVM has to be built in, and its parameters are not known.
            let builtin = config.as_ref().is_some_and(|(_, text)| value(text, "KVM_AMD") == Some("y"));
            if !builtin {
                let why = match config {
                    Some(_) => {
                        "it is built as a module, and --modules DIR is missing (make modules_install INSTALL_MOD_PATH=DIR)"
                    }
                    None => {
                        "--modules DIR is missing, and no configuration beside the kernel says that KVM is built in"
                    }
                };
                return Err(Error::NoKvm { path: path.into(), why: why.into() });
            }
        }
        Ok(own)
    }

    fn load(&mut self, tree: &Tree, name: &str) -> Result<(), Error> {
        let name = canonical(name);
        if self.modules.iter().any(|(module, _)| module.name == name) || tree.builtin.contains(&name) {
            return Ok(());
        }
        let Some(file) = tree.files.get(&name) else {
            let why = format!("{} has neither {name}.ko nor a modules.builtin that lists it", tree.directory.display());
            return Err(Error::NoKvm { path: self.path.clone(), why });
        };
        let refuse = |why: String| Error::Module { path: file.clone(), why };
        let elf = super::entry::unpack(file).map_err(|failure| refuse(failure.to_string()))?;
        let module = Module::read(&elf).ok_or_else(|| refuse("not a kernel module".into()))?;
        if let Some(found) = Module::release(&elf).filter(|found| *found != self.release) {
            let (path, release) = (tree.directory.clone(), self.release.clone());
            return Err(Error::OtherRelease { path, module: module.name, found, release });
        }
        for needed in module.depends.clone() {
            self.load(tree, &needed)?;
        }
        self.modules.push((module, elf));
        Ok(())
    }

    /// The modules, in the order in which they are loaded.
    #[must_use]
    pub fn modules(&self) -> &[(Module, Vec<u8>)] {
        &self.modules
    }

    /// Name, version and hash as the Record has them: no path.
    #[must_use]
    pub fn package(&self) -> (String, String, String) {
        ("own".to_owned(), self.release.clone(), self.sha256.clone())
    }

    /// One hash over all modules, where there are any.
    #[must_use]
    pub fn modules_package(&self) -> Option<String> {
        let mut all = String::new();
        for (module, elf) in &self.modules {
            all.push_str(&module.name);
            all.push_str(&digest::of(elf));
        }
        (!all.is_empty()).then(|| format!("modules {}", digest::of(all.as_bytes())))
    }
}

/// A directory of modules.
struct Tree {
    directory: PathBuf,
    files: BTreeMap<String, PathBuf>,
    builtin: Vec<String>,
}

impl Tree {
    fn new(directory: &Path) -> Result<Self, Error> {
        if let Err(why) = std::fs::read_dir(directory) {
            return Err(Error::Unreadable { what: "--modules", path: directory.into(), why });
        }
        let mut tree = Self { directory: directory.into(), files: BTreeMap::new(), builtin: Vec::new() };
        for file in super::entry::walk(directory) {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name == "modules.builtin" {
                let text = std::fs::read_to_string(&file).unwrap_or_default();
                tree.builtin.extend(text.lines().filter_map(stem));
            } else if let Some(stem) = stem(&name) {
                tree.files.entry(stem).or_insert(file);
            }
        }
        Ok(tree)
    }
}

/// `kvm_amd` for `kernel/arch/x86/kvm/kvm-amd.ko` and `.ko.xz`.
fn stem(path: &str) -> Option<String> {
    let name = path.rsplit('/').next()?;
    let (stem, end) = name.split_once('.')?;
    matches!(end, "ko" | "ko.xz").then(|| canonical(stem))
}

/// The configuration of the kernel at `path`, if it lies where one is expected.
fn configuration(path: &Path, modules: Option<&Path>, release: &str) -> Option<(PathBuf, String)> {
    // arch/x86/boot/bzImage is four levels below .config.
    let tree = path.ancestors().nth(4).filter(|_| path.parent().is_some_and(|boot| boot.ends_with("boot")));
    let beside = path.parent().map(|parent| parent.join(format!("config-{release}")));
    let inside = modules.map(|directory| directory.join("build/.config"));
    [tree.map(|tree| tree.join(".config")), beside, inside]
        .into_iter()
        .flatten()
        .find_map(|place| std::fs::read_to_string(&place).ok().map(|text| (place, text)))
}

fn value<'a>(config: &'a str, option: &str) -> Option<&'a str> {
    config.lines().find_map(|line| line.strip_prefix("CONFIG_")?.strip_prefix(option)?.strip_prefix('='))
}

fn missing(config: &str) -> Vec<String> {
    let builtin = value(config, "KVM_AMD") == Some("y");
    NEEDED
        .iter()
        .filter(|(option, _)| match *option {
            "KVM_AMD" => !matches!(value(config, option), Some("y" | "m")),
            "MODULES" => !builtin && value(config, option) != Some("y"),
            _ => value(config, option) != Some("y"),
        })
        .map(|(option, purpose)| format!("CONFIG_{option} ({purpose})"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first KiB of an image as the header has it.
    fn image(release: &str) -> Vec<u8> {
        let mut image = vec![0; 0x1000];
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x236] = 1;
        image[0x20e..0x210].copy_from_slice(&0x200_u16.to_le_bytes());
        let text = format!("{release} (someone@somewhere) #1 SMP\0");
        image[0x400..0x400 + text.len()].copy_from_slice(text.as_bytes());
        image
    }

    const CONFIG: &str = "CONFIG_SERIAL_8250_CONSOLE=y\nCONFIG_BLK_DEV_INITRD=y\nCONFIG_BINFMT_ELF=y\nCONFIG_PROC_FS=y\nCONFIG_SYSFS=y\n\
        CONFIG_DEVTMPFS=y\nCONFIG_TMPFS=y\nCONFIG_MODULES=y\nCONFIG_TRANSPARENT_HUGEPAGE=y\nCONFIG_KVM_AMD=m\n";

    #[test]
    fn a_header_is_read_and_others_are_refused() {
        assert_eq!(Header::read(&image("6.19.0-rc1+")).unwrap().release, "6.19.0-rc1+");
        assert_eq!(Header::read(b"\x7fELF").unwrap_err(), "it has no boot header");
        let mut old = image("x");
        old[0x236] = 0;
        assert_eq!(Header::read(&old).unwrap_err(), "it has no 64-bit entry point");
        assert_eq!(Header::read(&image("")).unwrap_err(), "its header names no release");
    }

    #[test]
    fn what_a_configuration_lacks_is_one_line() {
        assert!(missing(CONFIG).is_empty());
        assert!(missing(&CONFIG.replace("KVM_AMD=m", "KVM_AMD=y").replace("MODULES=y", "MODULES=n")).is_empty());
        let poor =
            CONFIG.replace("CONFIG_BLK_DEV_INITRD=y\n", "").replace("CONFIG_KVM_AMD=m", "# CONFIG_KVM_AMD is not set");
        assert_eq!(missing(&poor), ["CONFIG_BLK_DEV_INITRD (the initramfs)", "CONFIG_KVM_AMD (KVM)"]);
    }

    #[test]
    fn a_tree_is_known_by_its_configuration() {
        let tree = tempfile::tempdir().unwrap();
        let boot = tree.path().join("arch/x86/boot");
        std::fs::create_dir_all(&boot).unwrap();
        let kernel = boot.join("bzImage");
        std::fs::write(&kernel, image("6.19.0")).unwrap();
        let said =
            |modules: Option<&Path>| Own::read(&kernel, modules, &["kvm-amd"]).map(|_| ()).unwrap_err().to_string();
        assert!(said(None).contains("no kvm-amd: --modules DIR is missing"), "{}", said(None));
        std::fs::write(tree.path().join(".config"), CONFIG.replace("CONFIG_SYSFS=y\n", "")).unwrap();
        assert!(said(None).contains("Linux 6.19.0 lacks what the lab needs: CONFIG_SYSFS (/sys)"), "{}", said(None));
        std::fs::write(tree.path().join(".config"), CONFIG).unwrap();
        assert!(said(None).contains("built as a module, and --modules DIR is missing"), "{}", said(None));
        let modules = tempfile::tempdir().unwrap();
        assert!(said(Some(modules.path())).contains("has neither kvm_amd.ko nor"), "{}", said(Some(modules.path())));
        std::fs::write(modules.path().join("modules.builtin"), "kernel/arch/x86/kvm/kvm-amd.ko\n").unwrap();
        let own = Own::read(&kernel, Some(modules.path()), &["kvm-amd"]).unwrap();
        assert!(own.modules().is_empty() && own.package().1 == "6.19.0" && own.modules_package().is_none());
        std::fs::write(modules.path().join("modules.builtin"), "").unwrap();
        std::fs::write(modules.path().join("kvm-amd.ko"), "no ELF").unwrap();
        assert!(said(Some(modules.path())).contains("not a kernel module"), "{}", said(Some(modules.path())));
        std::fs::write(tree.path().join(".config"), CONFIG.replace("KVM_AMD=m", "KVM_AMD=y")).unwrap();
        assert!(Own::read(&kernel, None, &["kvm-amd"]).is_ok());
    }
}
