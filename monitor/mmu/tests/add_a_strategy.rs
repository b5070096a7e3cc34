//! docs/mmu.md, "Add a strategy": the worked example, compiled and run against the truth.

use umbra_mmu::model::{Model, ModelConfig, NoHooks, PageAccess};
use umbra_mmu::track::{Leaf, Strategy, Tracking};
use umbra_mmu::{Config, Env, Format, Frame, Mmu, PageSet, Spte, SpteRef};
use umbra_shared::{L2Gfn, Level};

/// The first write to a block of 8 pages traps and marks all that are mapped; the block is open until it is cleared.
#[derive(Debug)]
struct Coarse;

impl Strategy for Coarse {
    fn name(&self) -> &'static str {
        "coarse"
    }

    // 1. Every leaf is closed at the start, and mapped closed later.
    fn arm(&self, _: &Tracking, spte: Spte, _: Level) -> Spte {
        spte.closed()
    }

    fn admit(&self, _: &Tracking, _: Frame, _: Level, _: bool) -> bool {
        false
    }

    // 2. A write opens its neighbours along with the page.
    fn trap(&self, mmu: &mut Mmu, env: &mut Env<'_>, leaf: &Leaf) {
        for offset in 0..8 {
            let at = SpteRef::new(leaf.at.page(), (leaf.at.index() & !7) + offset);
            if mmu.is_closed(at) {
                let l2 = L2Gfn((leaf.l2.0 & !7) + offset as u64);
                mmu.mark_and_open(env, &Leaf { at, l2, ..*leaf });
            }
        }
    }

    // 3. Writes leave no traces: there is nothing to harvest.
    // 4. A cleared page traps again.
    fn rearm(&self, mmu: &mut Mmu, env: &mut Env<'_>, frame: Frame, level: Level) {
        mmu.close_leaves(env, frame, level);
    }
}

#[test]
fn the_example_misses_nothing_and_reports_whole_blocks() {
    let config = ModelConfig::new(1024, Format::EPT, Level::K4, Config::new(1, &Coarse));
    let mut model = Model::new(config).unwrap();
    model.populate(&mut NoHooks).unwrap();
    model.enable().unwrap();
    for round in 0..3u64 {
        let pages: Vec<u64> = (0..1024).filter(|page| (page + round) % 97 == 0).collect();
        let accesses = pages.iter().map(|&page| PageAccess { page, write: true });
        let phase = model.round(accesses, &mut NoHooks).unwrap();
        assert_eq!(phase.stats.wp_faults, pages.len() as u64, "a trap a block");
        model.harvest().unwrap();
        let mut blocks = PageSet::new(1024);
        for &page in &pages {
            blocks.insert_range(Frame(page & !7), 8);
        }
        assert_eq!(model.collect().pages, blocks, "exactly the blocks that were written");
        model.clear(0).unwrap();
    }
    model.disable().unwrap();
    model.mmu.audit().unwrap();
}
