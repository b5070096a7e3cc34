//! `umbra probe` and `umbra list`: what this host can do, and what there is.

use crate::kvm::{self, capabilities::Capability};
use crate::track;
use crate::{Failure, host, scenario};
use serde::Serialize;
use std::fmt::Write as _;
use std::fs;
use umbra_shared::pattern;

/// What `umbra probe` found.
#[derive(Debug, Serialize)]
pub struct Probe {
    kernel: String,
    vendor: &'static str,
    /// Why /dev/kvm cannot be used; absent if it can.
    #[serde(skip_serializing_if = "Option::is_none")]
    kvm_error: Option<String>,
    capabilities: Vec<Capability>,
    nested: bool,
    two_dimensional_paging: bool,
    transparent_huge_pages: String,
    shmem_huge_pages: String,
    free_huge_pages_2m: u64,
    userfaultfd: String,
    tracefs: bool,
    trackers: Vec<Place>,
    scenarios: Vec<Place>,
}

/// Where a scenario or tracker can run.
#[derive(Debug, Serialize)]
struct Place {
    name: String,
    here: bool,
    /// What is missing; absent if nothing is.
    #[serde(skip_serializing_if = "Option::is_none")]
    missing: Option<String>,
}

fn first_line(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.lines().next()?.to_owned())
}

/// The word in brackets, as the kernel marks the choice that is in effect.
fn chosen(path: &str) -> String {
    let line = first_line(path).unwrap_or_default();
    line.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or("none", |(word, _)| word).to_owned()
}

fn userfaultfd() -> String {
    if fs::exists("/dev/userfaultfd").unwrap_or(false) && fs::File::open("/dev/userfaultfd").is_ok() {
        return "yes (/dev/userfaultfd)".into();
    }
    match first_line("/proc/sys/vm/unprivileged_userfaultfd").as_deref() {
        Some("1") => "yes".into(),
        Some(_) if rustix::process::geteuid().is_root() => "yes (as root)".into(),
        Some(_) => "no: vm.unprivileged_userfaultfd is 0 and this user is not root".into(),
        None => "no: the kernel has none".into(),
    }
}

impl Probe {
    /// Looks at this host.
    #[must_use]
    pub fn run() -> Self {
        let (capabilities, kvm_error) = match kvm::capabilities::read() {
            Ok(capabilities) => (capabilities, None),
            Err(error) => (Vec::new(), Some(error.to_string())),
        };
        let trackers: Vec<_> = track::ALL
            .iter()
            .map(|kind| {
                let missing = kind.missing();
                Place { name: kind.to_string(), here: missing.is_none(), missing }
            })
            .collect();
        let scenarios = scenario::ALL
            .iter()
            .map(|scenario| Place {
                name: scenario.name.to_owned(),
                here: kvm_error.is_none() || !scenario.needs_kvm(),
                missing: kvm_error.clone().filter(|_| scenario.needs_kvm()),
            })
            .collect();
        let free = first_line("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
        let nested = ["kvm_amd", "kvm_intel"]
            .iter()
            .any(|module| host::parameter(module, "nested").is_some_and(|value| value == "1" || value == "Y"));
        Self {
            kernel: host::kernel_release(),
            vendor: host::vendor(),
            kvm_error,
            capabilities,
            nested,
            two_dimensional_paging: host::two_dimensional_paging(),
            transparent_huge_pages: chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
            shmem_huge_pages: chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
            free_huge_pages_2m: free.and_then(|line| line.trim().parse().ok()).unwrap_or(0),
            userfaultfd: userfaultfd(),
            tracefs: fs::exists("/sys/kernel/tracing/events").unwrap_or(false),
            trackers,
            scenarios,
        }
    }

    /// For a script.
    ///
    /// # Errors
    /// [`Failure::Check`] if it cannot be written as JSON, which does not happen.
    pub fn to_json(&self) -> Result<String, Failure> {
        serde_json::to_string_pretty(self).map_err(|error| Failure::Check(error.to_string()))
    }

    /// For a person.
    #[must_use]
    pub fn to_text(&self) -> String {
        let yes = |is: bool| if is { "yes" } else { "no" };
        let mut text = format!("Linux {}\n", self.kernel);
        if let Some(error) = &self.kvm_error {
            let _ = writeln!(text, "KVM: {error}");
        } else {
            let paging = if self.two_dimensional_paging { "two-dimensional paging" } else { "shadow paging" };
            let _ = writeln!(text, "KVM: {}, {paging}; nested guests: {}", self.vendor, yes(self.nested));
        }
        for Capability { name, meaning, value } in &self.capabilities {
            let _ = writeln!(text, "  {value:>8}  {name}: {meaning}");
        }
        let _ = writeln!(
            text,
            "Huge pages: thp {}, shmem {}, free in hugetlbfs {}\nuserfaultfd: {}\ntracefs: {}",
            self.transparent_huge_pages,
            self.shmem_huge_pages,
            self.free_huge_pages_2m,
            self.userfaultfd,
            if self.tracefs { "mounted" } else { "not mounted (mount -t tracefs none /sys/kernel/tracing)" },
        );
        for (title, places) in [("Trackers", &self.trackers), ("Scenarios", &self.scenarios)] {
            let _ = writeln!(text, "{title}:");
            for place in places {
                let answer = match &place.missing {
                    None => "here, and in the lab".to_owned(),
                    Some(missing) => format!("in the lab; here not: {missing}"),
                };
                let _ = writeln!(text, "  {:<16} {answer}", place.name);
            }
        }
        text
    }
}

/// The text of `umbra list`, without the kernels.
#[must_use]
pub fn list() -> String {
    let mut text = String::from("Scenarios:\n");
    for scenario in scenario::ALL {
        let _ = writeln!(text, "  {:<16} {}", scenario.name, scenario.description);
    }
    text.push_str("Trackers:\n");
    for kind in track::ALL {
        let _ = writeln!(text, "  {:<16} {}", kind.to_string(), kind.description());
    }
    let _ = writeln!(text, "Patterns:\n  {}", pattern::NAMES.join(", "));
    text
}
