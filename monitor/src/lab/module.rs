//! Kernel modules: what their `.modinfo` section says, and the parameters that a user gives them.

use crate::failure::Failure;
use goblin::elf::Elf;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A kernel module's own description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Module {
    /// Its name, with underscores, as in /sys/module.
    pub name: String,
    /// The modules that must be loaded before it.
    pub depends: Vec<String>,
    /// The parameters that it knows.
    pub params: Vec<String>,
}

impl Module {
    /// Reads the description from a module's file. `None` when it is not a kernel module.
    #[must_use]
    pub fn read(elf: &[u8]) -> Option<Self> {
        let text = modinfo(elf)?;
        let mut module = Self { name: String::new(), depends: Vec::new(), params: Vec::new() };
        for entry in text.split(|&byte| byte == 0) {
            match std::str::from_utf8(entry).ok().and_then(|entry| entry.split_once('=')) {
                Some(("name", name)) => name.clone_into(&mut module.name),
                Some(("depends", names)) => {
                    module.depends = names.split(',').filter(|name| !name.is_empty()).map(canonical).collect();
                }
                Some(("parmtype", param)) => module.params.extend(param.split(':').next().map(str::to_owned)),
                _ => {}
            }
        }
        module.params.sort();
        (!module.name.is_empty()).then_some(module)
    }

    /// The release of the kernel that a module was built for: the first word of its `vermagic`.
    #[must_use]
    pub fn release(elf: &[u8]) -> Option<String> {
        let text = modinfo(elf)?;
        let magic = text.split(|&byte| byte == 0).find_map(|entry| entry.strip_prefix(b"vermagic="))?;
        String::from_utf8_lossy(magic).split(' ').next().map(str::to_owned)
    }
}

/// The section `.modinfo`: strings `NAME=VALUE` that end with 0.
fn modinfo(elf: &[u8]) -> Option<&[u8]> {
    let parsed = Elf::parse(elf).ok()?;
    let mut sections = parsed.section_headers.iter();
    let section = sections.find(|section| parsed.shdr_strtab.get_at(section.sh_name) == Some(".modinfo"))?;
    elf.get(section.file_range()?)
}

/// A module's name as the kernel writes it: `kvm-amd` is `kvm_amd`.
#[must_use]
pub fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// A module parameter, given as `kvm.tdp_mmu=0`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Param {
    /// The module, with underscores.
    pub module: String,
    /// The parameter.
    pub name: String,
    /// Its value.
    pub value: String,
}

impl fmt::Display for Param {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}={}", self.module, self.name, self.value)
    }
}

/// Why a parameter is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParamError {
    /// It is not written as a parameter.
    #[error("--param {0}: not a parameter; write MODULE.NAME=VALUE, as kvm.tdp_mmu=0")]
    Malformed(String),
    /// The lab does not load this module.
    #[error("--param {param}: the lab loads no module {module}; there are {loaded}")]
    UnknownModule {
        /// The parameter.
        param: String,
        /// Its module.
        module: String,
        /// The modules that are loaded.
        loaded: String,
    },
    /// The module does not have this parameter.
    #[error("--param {param}: {kernel}'s {module} has no parameter {name}; it has {known}")]
    UnknownName {
        /// The parameter.
        param: String,
        /// The kernel's name on the shelf.
        kernel: String,
        /// The module.
        module: String,
        /// The name that is not there.
        name: String,
        /// The names that are.
        known: String,
    },
}

impl From<ParamError> for Failure {
    fn from(error: ParamError) -> Self {
        Self::Input(error.to_string())
    }
}

impl FromStr for Param {
    type Err = ParamError;

    fn from_str(text: &str) -> Result<Self, ParamError> {
        let word = |part: &str| {
            !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
        };
        // The kernel splits a module's options at spaces and strips quotes, so a value holds neither.
        let value_is_plain = |value: &str| {
            !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"' && byte != b'\'')
        };
        text.split_once('=')
            .and_then(|(key, value)| Some((key.split_once('.')?, value)))
            .filter(|((module, name), value)| word(module) && word(name) && value_is_plain(value))
            .map(|((module, name), value)| Self {
                module: canonical(module),
                name: name.to_owned(),
                value: value.to_owned(),
            })
            .ok_or_else(|| ParamError::Malformed(text.to_owned()))
    }
}

impl Param {
    /// Checks that one of `modules` has this parameter.
    ///
    /// # Errors
    /// [`ParamError`] that names what there is instead.
    pub fn check(&self, kernel: &str, modules: &[Module]) -> Result<(), ParamError> {
        let module = modules.iter().find(|module| module.name == self.module).ok_or_else(|| {
            let names: Vec<&str> = modules.iter().map(|module| module.name.as_str()).collect();
            ParamError::UnknownModule { param: self.to_string(), module: self.module.clone(), loaded: names.join(", ") }
        })?;
        if module.params.contains(&self.name) {
            return Ok(());
        }
        Err(ParamError::UnknownName {
            param: self.to_string(),
            kernel: kernel.to_owned(),
            module: self.module.clone(),
            name: self.name.clone(),
            known: if module.params.is_empty() { "none".to_owned() } else { module.params.join(", ") },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_read_and_written() {
        let param: Param = "kvm-amd.npt=0".parse().unwrap();
        assert_eq!(param.to_string(), "kvm_amd.npt=0");
        for bad in ["", "kvm", "kvm.x", "kvm=1", ".x=1", "kvm.=1", "kvm.x=", "kvm.x=1 2", "kvm.x=\"1\"", "k m.x=1"] {
            assert_eq!(bad.parse::<Param>(), Err(ParamError::Malformed(bad.to_owned())), "{bad}");
        }
    }

    #[test]
    fn parameters_are_held_against_the_modules() {
        let modules = [
            Module { name: "irqbypass".into(), depends: vec![], params: vec![] },
            Module { name: "kvm".into(), depends: vec!["irqbypass".into()], params: vec!["tdp_mmu".into()] },
        ];
        let check = |text: &str| text.parse::<Param>().unwrap().check("6.12", &modules).map_err(|e| e.to_string());
        assert_eq!(check("kvm.tdp_mmu=0"), Ok(()));
        let unknown = check("kvm.tdp=0").unwrap_err();
        assert!(unknown.contains("6.12's kvm has no parameter tdp; it has tdp_mmu"), "{unknown}");
        let unknown = check("xen.tdp=0").unwrap_err();
        assert!(unknown.contains("no module xen; there are irqbypass, kvm"), "{unknown}");
    }

    #[test]
    fn what_is_no_module_is_refused() {
        assert_eq!(Module::read(b"\x7fELF"), None);
        assert_eq!(Module::read(&std::fs::read("/proc/self/exe").unwrap()), None);
        assert_eq!(Module::release(b"\x7fELF"), None);
    }
}
