//! What KVM's own MMU takes, in bytes: its page tables, their headers, and the lists of its reverse maps, from the slab allocator's statistics.
//!
//! Every page table has a header (`struct kvm_mmu_page`), so that headers count tables on kernels that do not count these themselves (`SecPageTables`, since
//! Linux 6.1). Caches that were merged with others have no line of their own: `slab_nomerge` on the kernel's command line keeps them apart. The allocator
//! counts whole slabs of a CPU as in use, so that these are given back first (`shrink`, where it lets us).

use std::collections::BTreeMap;
use std::fs;
use umbra_shared::PAGE_SIZE;

/// Caches of kvm.ko, and the counter that each becomes.
const CACHES: [(&str, &str); 2] = [("kvm_mmu_page_header", HEADERS), ("pte_list_desc", LISTS)];

/// Bytes of shadow pages' headers.
pub const HEADERS: &str = "kvm_header_bytes";
/// Bytes of the reverse maps' lists.
pub const LISTS: &str = "kvm_pte_list_bytes";
/// Bytes of page tables: a page for each header.
pub const TABLES: &str = "kvm_table_bytes";
/// Bytes of page tables as the kernel counts them.
pub const SECONDARY: &str = "kvm_sec_page_table_bytes";

/// All of them.
pub const NAMES: [&str; 4] = [TABLES, HEADERS, LISTS, SECONDARY];

/// Where a counter of this module comes from, as the Record says it.
#[must_use]
pub fn source(counter: &str) -> &'static str {
    if counter == SECONDARY { "meminfo" } else { "slabinfo" }
}

/// What is in use now, over all VMs of this host. Empty where it cannot be known: /proc/slabinfo is root's.
#[must_use]
pub fn read() -> BTreeMap<String, u64> {
    let mut bytes = BTreeMap::new();
    for (cache, _) in CACHES {
        // Where it cannot be done, a figure may be a slab too large.
        let _ = fs::write(format!("/sys/kernel/slab/{cache}/shrink"), "1");
    }
    let slabs = fs::read_to_string("/proc/slabinfo").unwrap_or_default();
    for (cache, counter) in CACHES {
        let Some((objects, size)) = cache_of(&slabs, cache) else { continue };
        bytes.insert(counter.to_owned(), objects * size);
        if counter == HEADERS {
            bytes.insert(TABLES.to_owned(), objects * PAGE_SIZE);
        }
    }
    // The counters of the CPUs are added up now, not in a second.
    let _ = fs::read("/proc/sys/vm/stat_refresh");
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = memory.lines().find_map(|line| line.strip_prefix("SecPageTables:"));
    if let Some(Ok(kilobytes)) = line.map(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>()) {
        bytes.insert(SECONDARY.to_owned(), kilobytes << 10);
    }
    bytes
}

/// Objects in use, and the size of one (slabinfo(5)).
fn cache_of(slabs: &str, name: &str) -> Option<(u64, u64)> {
    let mut words = slabs.lines().find(|line| line.split(' ').next() == Some(name))?.split_whitespace().skip(1);
    let objects = words.next()?.parse().ok()?;
    let size = words.nth(1)?.parse().ok()?;
    Some((objects, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_is_read_and_a_merged_one_is_not_there() {
        let text = "slabinfo - version: 2.1\n# name <active_objs> ...\n\
            kvm_mmu_page_header    273    273    184   21    1 : tunables    0    0    0 : slabdata     13     13      0\n";
        assert_eq!(cache_of(text, "kvm_mmu_page_header"), Some((273, 184)));
        assert_eq!(cache_of(text, "pte_list_desc"), None);
    }
}
