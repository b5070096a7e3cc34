//! 1 TiB of L2 in 2 MiB leaves, one in ten of them split and dirtied by the walker.

use std::time::Instant;

use umbra_mmu::model::{Model, ModelConfig, NoHooks, PageAccess};
use umbra_mmu::track::strategy;
use umbra_mmu::{Config, Format, Split};
use umbra_shared::Level;

#[test]
fn a_terabyte_is_set_up_split_and_harvested_in_bounds() {
    let begun = Instant::now();
    let pages = 1u64 << 28;
    let mmu = Config { split: Split::Shatter, ..Config::new(1, strategy("write-protect").unwrap()) };
    let mut model = Model::new(ModelConfig::new(pages, Format::EPT, Level::M2, mmu)).unwrap();
    let huge = (0..pages).step_by(512);
    let mapped = model.round(huge.clone().map(|page| PageAccess { page, write: false }), &mut NoHooks).unwrap();
    model.enable().unwrap();
    let setup = begun.elapsed();
    let dirtied = huge.step_by(10).map(|page| PageAccess { page: page + page / 512 % 512, write: true });
    let written = dirtied.clone().count() as u64;
    let phase = model.round(dirtied, &mut NoHooks).unwrap();
    assert_eq!(phase.stats.shattered, written);
    model.harvest().unwrap();
    assert_eq!(model.collect().count, written);
    let memory = model.mmu.memory_in_use();
    println!("setup {setup:?}, {written} leaves split and dirtied, {memory:?}");
    // A second or so, as the line above says; what a busy machine makes of it is no figure, the work is: a fault and a walk
    // for each leaf, a table for each GiB.
    assert_eq!((mapped.stats.faults, mapped.stats.mapped), (pages / 512, pages / 512));
    assert!(mapped.stats.pages_made <= pages / 512 / 512 + 4, "{:?}", mapped.stats);
    assert!(memory.total() < 1 << 30, "{memory:?}");
}
