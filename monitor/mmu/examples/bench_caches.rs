//! Seed 002's question: a descriptor cache of minimum 513 with capacity 1,026, or with 553?
//!
//! An eager split of 2 MiB leaves, without aliases, with some, and with many; KVM's descriptors (128 bytes, one entry
//! inline), and Umbra's layout that needs none for a first alias. How often a cache is refilled, and what lies idle in it
//! afterwards, 40 tables included.

use umbra_mmu::tables::Tables;
use umbra_mmu::track::strategy;
use umbra_mmu::walker::{PlainMemory, Walker};
use umbra_mmu::{Access, CacheSize, Caches, Config, Format, Frame, Mmu, Request, RootRole, Slot, Slots, Split};
use umbra_shared::{Gfn, L2Gfn, Level};

/// 64 huge leaves.
const PAGES: u64 = 64 * 512;
const TABLES: u64 = 512;

/// Splits the huge leaves of a range in which every `every`th page is also mapped by a 4 KiB leaf elsewhere (0: none).
/// Splits, refills, bytes left in the caches, descriptors' and maps' bytes.
fn run(every: u64, capacity: u32, desc_bytes: u32, inline_two: bool) -> Result<[u64; 4], String> {
    let strategy = strategy("write-protect").ok_or("no such strategy")?;
    let caches = Caches {
        pages: CacheSize { min: 1, capacity: 40 },
        descs: CacheSize { min: 513, capacity },
        desc_bytes,
        inline_two,
    };
    let frames = PAGES + TABLES;
    let config = Config { split: Split::Eager, caches, ..Config::new(frames, strategy) };
    let slots = [Slot::identity(PAGES), Slot { base: Gfn(PAGES), first: Frame(PAGES), ..Slot::identity(TABLES) }];
    Slots::new(&slots, frames)?;
    let mut mmu = Mmu::new(config, &slots).map_err(|error| error.to_string())?;
    let mut walker = Walker::new(PlainMemory::new(frames, PAGES), 6);
    let mut tables = Tables::new(Format::EPT, PAGES, frames);
    for page in (0..PAGES).step_by(512) {
        tables.map(&mut walker.memory, L2Gfn(page), Gfn(page), Level::M2, Access::ALL, true);
    }
    let aliased = |page: &u64| every != 0 && page.is_multiple_of(every);
    for page in (0..PAGES).filter(aliased) {
        tables.map(&mut walker.memory, L2Gfn(PAGES + page), Gfn(page), Level::K4, Access::ALL, true);
    }
    let root = mmu.load_root(&mut walker.env(), RootRole::new(Format::EPT), tables.address());
    let root = root.map_err(|error| error.to_string())?;
    for page in (0..PAGES).step_by(512) {
        walker.execute(&mut mmu, root, L2Gfn(page), Request::READ, (0, 0));
    }
    for page in (0..PAGES).filter(aliased) {
        walker.execute(&mut mmu, root, L2Gfn(PAGES + page), Request::READ, (0, 0));
    }
    mmu.start(&mut walker.env()).map_err(|error| error.to_string())?;
    mmu.audit()?;
    let (stats, memory) = (mmu.stats(), mmu.memory_in_use());
    Ok([stats.shattered, stats.topups, memory.cache_bytes, memory.rmap_bytes])
}

fn main() -> Result<(), String> {
    println!("64 huge leaves split; descriptor cache: minimum 513");
    println!(
        "{:<22} {:>10} {:>8} {:>9} {:>7} {:>8} {:>12} {:>12}",
        "pages with an alias", "desc bytes", "inline", "capacity", "splits", "refills", "left, bytes", "rmap bytes"
    );
    for (name, every) in [("none", 0), ("one in 64", 64), ("one in 8", 8), ("all", 1)] {
        for (desc_bytes, inline_two) in [(128, false), (64, true)] {
            for capacity in [1026, 553] {
                let [splits, refills, cache, rmap] = run(every, capacity, desc_bytes, inline_two)?;
                let inline = if inline_two { 2 } else { 1 };
                println!(
                    "{name:<22} {desc_bytes:>10} {inline:>8} {capacity:>9} {splits:>7} {refills:>8} {cache:>12} {rmap:>12}"
                );
            }
        }
    }
    Ok(())
}
