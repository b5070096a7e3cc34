//! Memory in use, to the byte, against a counting allocator; and the bounds per page.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use umbra_mmu::model::{AliasKind, Model, ModelConfig, NoHooks};
use umbra_mmu::track::{STRATEGIES, strategy};
use umbra_mmu::{Caches, Config, Format, Split};
use umbra_shared::Level;

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged; counting touches no memory of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Drops the MMU of `model` and compares what that freed with what it said.
fn check_to_the_byte(model: Model, what: &str) {
    let said = model.mmu.memory_in_use();
    let Model { mmu, .. } = model;
    let before = LIVE.load(Ordering::Relaxed);
    drop(mmu);
    let freed = before - LIVE.load(Ordering::Relaxed);
    assert_eq!(freed as u64, said.total(), "{what}: {said:?}");
}

fn model(pages: u64, leaf: Level, aliases: u64, mmu: Config) -> Model {
    let mut config = ModelConfig::new(pages, Format::EPT, leaf, mmu);
    config.aliases = aliases;
    config.alias_kind = AliasKind::Contiguous;
    Model::new(config).unwrap()
}

/// One test, since the counter is the whole process's.
#[test]
fn memory_is_known_to_the_byte_and_bounded_per_page() {
    for tracked in STRATEGIES {
        for (leaf, aliases) in [(Level::K4, 1), (Level::K4, 5), (Level::M2, 3)] {
            let split = if tracked.compares() { Split::Shatter } else { Split::EagerClear };
            let mmu = Config { split, ..Config::new(1, tracked) };
            let mut model = model(4096, leaf, aliases, mmu);
            model.populate(&mut NoHooks).unwrap();
            model.enable().unwrap();
            model.retouch(&mut NoHooks).unwrap();
            model.harvest().unwrap();
            model.clear(512).unwrap();
            model.retouch(&mut NoHooks).unwrap();
            check_to_the_byte(model, tracked.name());
        }
    }

    let pages = 1 << 18;
    let write_protect = strategy("write-protect").unwrap();
    for (aliases, bound) in [(1, 17.0), (2, 25.0)] {
        let mmu = Config { caches: Caches { desc_bytes: 16, ..Caches::default() }, ..Config::new(1, write_protect) };
        let mut model = model(pages, Level::K4, aliases, mmu);
        model.populate(&mut NoHooks).unwrap();
        model.enable().unwrap();
        let bytes = model.mmu.memory_in_use().total();
        let per_page = f64::from(u32::try_from(bytes / 1024).unwrap()) / 256.0;
        println!("{aliases} aliases: {per_page:.3} bytes an L1 page, tracking on");
        assert!(per_page <= bound, "{per_page} bytes an L1 page with {aliases} aliases");
        assert!(per_page > 15.0, "{per_page} bytes cannot hold an entry and a reverse map");
        check_to_the_byte(model, "dense");
    }
}
