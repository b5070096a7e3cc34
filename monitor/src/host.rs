//! This host as a Record describes it.

use crate::ground::{Clock, Ground};
use crate::guest::Image;
use crate::report::Host;
use std::collections::BTreeMap;
use std::fs;

/// KVM's vendor modules and what the Record calls them.
const VENDORS: [(&str, &str); 3] = [("kvm_intel", "intel"), ("kvm_amd", "amd"), ("kvm_pvm", "pvm")];

/// Parameters that decide what a measurement means; others are left out, so that Records of different kernels compare.
const PARAMETERS: &[(&str, &[&str])] = &[
    ("kvm", &["tdp_mmu", "eager_page_split", "nx_huge_pages"]),
    ("kvm_amd", &["npt", "nested"]),
    ("kvm_intel", &["ept", "eptad", "pml", "unrestricted_guest", "nested"]),
    ("kvm_pvm", &[]),
];

/// Which of KVM's vendor modules is at work: `intel`, `amd`, `pvm`, or `none`.
#[must_use]
pub fn vendor() -> &'static str {
    VENDORS
        .iter()
        .find(|(module, _)| fs::exists(format!("/sys/module/{module}")).unwrap_or(false))
        .map_or("none", |(_, vendor)| *vendor)
}

/// A module parameter, `None` if the module or the parameter is not there.
#[must_use]
pub fn parameter(module: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/sys/module/{module}/parameters/{name}")).ok()?;
    Some(text.trim().to_owned())
}

/// Whether KVM uses two-dimensional paging (NPT or EPT) here, rather than shadowing the guest's tables.
#[must_use]
pub fn two_dimensional_paging() -> bool {
    let on = |module, name| parameter(module, name).is_some_and(|value| value == "Y" || value == "1");
    match vendor() {
        "amd" => on("kvm_amd", "npt"),
        "intel" => on("kvm_intel", "ept"),
        _ => false,
    }
}

/// Whether the processor itself logs the pages that a guest dirties (Intel's PML), 512 between two exits.
#[must_use]
pub fn page_modification_logging() -> bool {
    parameter("kvm_intel", "pml").is_some_and(|value| value == "Y" || value == "1")
}

/// Whether KVM drops a huge mapping in order to split it, so that its pages fault in one by one.
///
/// With `kvm.eager_page_split` (since Linux 5.18) huge mappings are split before anybody writes. Without it the write itself splits: the
/// TDP MMU then replaces the mapping by a full table (`tdp_mmu_split_huge_page`, since 5.18 too), the older MMU drops it (`drop_large_spte`).
#[must_use]
pub fn drops_huge_mappings() -> bool {
    match parameter("kvm", "eager_page_split").as_deref() {
        Some("Y") => false,
        Some(_) => parameter("kvm", "tdp_mmu").as_deref() != Some("Y"),
        None => true,
    }
}

/// The same for the tables that KVM shadows, those of nested guests among them: there the write itself drops the mapping, unless KVM splits
/// eagerly (since Linux 5.19 here too).
#[must_use]
pub fn drops_huge_shadow_mappings() -> bool {
    parameter("kvm", "eager_page_split").as_deref() != Some("Y")
}

/// Whether a memfd gets huge pages without being asked: `always`, `within_size` or `force` in effect (Documentation/admin-guide/mm/transhuge.rst).
#[must_use]
pub fn huge_shmem() -> bool {
    let modes = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    ["[always]", "[within_size]", "[force]"].iter().any(|mode| modes.contains(mode))
}

/// Bytes of memory in all, `None` if /proc does not say.
#[must_use]
pub fn memory_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kilobytes| kilobytes << 10)
}

/// The kernel's release.
#[must_use]
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

fn cpu_model() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model.map_or("unknown", |(_, name)| name.trim()).to_owned()
}

/// Levels of the tables that KVM builds for a guest: with NPT those of the host's own paging (Linux, `kvm_mmu_get_tdp_level`).
fn paging_levels(vendor: &str) -> Option<u32> {
    if vendor != "amd" || !two_dimensional_paging() {
        return None;
    }
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let flags = text.lines().find(|line| line.starts_with("flags"))?;
    Some(if flags.split_whitespace().any(|flag| flag == "la57") { 5 } else { 4 })
}

/// Describes this host. The lab adds what only its outside knows.
#[must_use]
pub fn describe(ground: Ground, image: &Image) -> Host {
    let vendor = vendor();
    let params: BTreeMap<_, _> = PARAMETERS
        .iter()
        .flat_map(|(module, names)| names.iter().map(move |name| (*module, *name)))
        .filter_map(|(module, name)| Some((format!("{module}.{name}"), parameter(module, name)?)))
        .collect();
    Host {
        ground: ground.name().to_owned(),
        kernel: kernel_release(),
        vendor: vendor.to_owned(),
        cpu_model: cpu_model(),
        paging_levels: paging_levels(vendor),
        params,
        clock: ground.clock().unit().to_owned(),
        deterministic: ground == Ground::Lab(Clock::Instructions),
        umbra: env!("CARGO_PKG_VERSION").to_owned(),
        firmware_sha256: image.sha256.clone(),
        ..Host::default()
    }
}
