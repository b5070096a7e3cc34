//! Hostile guests: tables, addresses, roles and orders of operations that no hypervisor would use.
//!
//! Nothing may panic, loop, or grow beyond the stated bound. The tables are random words, pointers to themselves and to
//! each other at any level, and are rewritten under way.

use umbra_shared::{L2Gfn, PAGE_SHIFT};

use crate::access::Request;
use crate::config::{Config, RootPolicy};
use crate::dirty::PageSet;
use crate::format::Format;
use crate::memory::Slot;
use crate::mmu::Mmu;
use crate::role::{ModeBits, RootRole};
use crate::spte::Frame;
use crate::stateful::Rng;
use crate::sync::Invalidation;
use crate::track::STRATEGIES;
use crate::walker::{PlainMemory, Walker};

const FRAMES: u64 = 1024;
const TABLES: u64 = 24;
const QUOTA: u32 = 64;

const FORMATS: [Format; 9] = [
    Format::Ept { five_levels: false, accessed_dirty: true },
    Format::Ept { five_levels: true, accessed_dirty: true },
    Format::Ept { five_levels: false, accessed_dirty: false },
    Format::Npt { five_levels: false, nx: true },
    Format::Npt { five_levels: true, nx: false },
    Format::Pae { nx: true },
    Format::Pae { nx: false },
    Format::Bits32 { pse: true },
    Format::Bits32 { pse: false },
];

/// What a run saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Accesses that were made.
    pub accesses: u64,
    /// Of those, accesses that reached a page.
    pub reached: u64,
    /// Most bytes in use at any check.
    pub most_bytes: u64,
    /// Most work of one access, in entries that the MMU touched.
    pub most_work: u64,
}

/// A word for a table: an entry that may lead anywhere, in EPT's encoding or in that of NPT.
fn word(rng: &mut Rng, ept: bool, own: u64) -> u64 {
    let table = rng.below(TABLES);
    let (down, page) = if ept { (0x107, 0x337) } else { (0x27, 0x67) };
    match rng.below(20) {
        0 => rng.draw(),
        1 => own << 12 | down,
        2..=13 => table << 12 | down,
        14 => table << 12 | 1,
        15 => rng.below(FRAMES + 64) << 12 | page | rng.below(2) << 7,
        16 => rng.below(4) << 21 | page | 0x80,
        17 => page | 0x80,
        18 => (table << 12 | down) << 32 | table << 12 | down,
        _ => rng.below(FRAMES) << 12 | page,
    }
}

/// One guest: its seed draws the configuration, the tables and `steps` operations.
///
/// # Errors
/// What does not hold: the bound on memory or on work, or the audit.
pub fn run(seed: u64, steps: u64) -> Result<Seen, String> {
    let mut rng = Rng(seed);
    let mut config = Config::new(FRAMES, rng.pick(&STRATEGIES));
    config.roots = rng.pick(&[RootPolicy::Quota(QUOTA), RootPolicy::Drop, RootPolicy::Keep, RootPolicy::AddressSpace]);
    config.max_pages = QUOTA;
    config.longest_list = rng.pick(&[2, 16384]);
    config.extent = rng.pick(&[1, 16, 512]);
    config.max_l2_regions = 64;
    config.by_l2 = rng.once_in(3) && { config.strategy.check(&Config { by_l2: true, ..config }).is_ok() };
    config.seed = rng.draw();
    let mut mmu = Mmu::new(config, &[Slot::identity(FRAMES)]).map_err(|error| error.to_string())?;
    let mut memory = PlainMemory::new(FRAMES, 0);
    let main = rng.pick(&FORMATS);
    let ept = main.is_ept();
    for table in 0..TABLES {
        let density = rng.pick(&[1, 1, 2, 20]);
        let fixed = rng.once_in(4).then(|| word(&mut rng, ept, table));
        for offset in (0..4096).step_by(8) {
            if rng.once_in(density) {
                memory.write(Frame(table), offset, fixed.unwrap_or_else(|| word(&mut rng, ept, table)));
            }
        }
    }
    let mut walker = Walker::new(memory, 6);
    let mut found = Seen::default();
    let mut loaded = Vec::new();
    let mut harvested = PageSet::new(FRAMES);
    for step in 0..steps {
        let before = mmu.stats();
        operate(main, &mut rng, &mut mmu, &mut walker, &mut loaded, &mut harvested, &mut found);
        let work = mmu.stats().since(before);
        found.most_work =
            found.most_work.max(work.mapped + work.zapped + work.synced + work.pages_made + work.pages_freed);
        let bytes = mmu.memory_in_use().total();
        found.most_bytes = found.most_bytes.max(bytes);
        if bytes > mmu.memory_bound() {
            return Err(format!("step {step}: {bytes} bytes are above the bound of {}", mmu.memory_bound()));
        }
        if mmu.shadow_pages() > QUOTA {
            return Err(format!("step {step}: {} shadow pages, quota {QUOTA}", mmu.shadow_pages()));
        }
        if step % 256 == 255 {
            mmu.audit().map_err(|what| format!("step {step}: {what}"))?;
        }
    }
    mmu.audit()?;
    Ok(found)
}

fn operate(
    main: Format,
    rng: &mut Rng,
    mmu: &mut Mmu,
    walker: &mut Walker,
    loaded: &mut Vec<(crate::roots::RootId, Format)>,
    harvested: &mut PageSet,
    found: &mut Seen,
) {
    // Refusals are answers too: the guest may ask for anything.
    match rng.below(40) {
        0 => {
            let offset = rng.below(512) * 8;
            let table = rng.below(TABLES);
            let value = word(rng, main.is_ept(), table);
            walker.memory.write(Frame(table), offset, value);
        }
        1 | 2 => {
            let format = if rng.once_in(4) { rng.pick(&FORMATS) } else { main };
            let table = match rng.below(12) {
                0 => rng.draw(),
                1 => rng.below(1 << 20),
                _ => rng.below(TABLES) << 12,
            };
            let role =
                RootRole { smm: rng.once_in(4), mode: ModeBits((rng.draw() & 0xff) as u8), ..RootRole::new(format) };
            if loaded.len() < 8
                && let Ok(root) = mmu.load_root(&mut walker.env(), role, table)
            {
                loaded.push((root, format));
            }
        }
        3 if !loaded.is_empty() => {
            let at = usize::try_from(rng.below(loaded.len() as u64)).unwrap_or(0);
            let (root, _) = loaded.swap_remove(at);
            let _ = mmu.drop_root(&mut walker.env(), root);
        }
        4 => mmu.invalidate(&mut walker.env(), Invalidation::All),
        5 => {
            let table = rng.below(TABLES) << 12;
            mmu.invalidate(&mut walker.env(), Invalidation::Table(table));
        }
        6 => {
            let _ = mmu.start(&mut walker.env());
        }
        7 => {
            let _ = mmu.harvest(&mut walker.env(), harvested);
            let _ = mmu.harvest_l2();
        }
        8 => {
            let first = rng.draw() >> rng.below(64);
            let _ = mmu.clear(&mut walker.env(), Frame(first), rng.draw() >> rng.below(64));
        }
        9 if rng.once_in(3) => {
            let _ = mmu.stop(&mut walker.env());
        }
        _ => {
            let at = usize::try_from(rng.below(loaded.len() as u64)).unwrap_or(0);
            let Some(&(root, format)) = loaded.get(at) else { return };
            let l2 = match rng.below(4) {
                0 => L2Gfn(rng.draw() >> (PAGE_SHIFT + u32::try_from(rng.below(52)).unwrap_or(0))),
                1 => L2Gfn(rng.below(format.frames())),
                _ => L2Gfn(rng.below(2048)),
            };
            let request = rng.pick(&[Request::READ, Request::WRITE, Request::EXECUTE, Request::TABLE_WALK]);
            found.accesses += 1;
            let ended = walker.access(mmu, root, l2, request, format.needed(request));
            if let crate::walker::Ended::Done { frame, .. } = ended {
                found.reached += 1;
                if rng.once_in(8) && format.needed(request) == crate::Access::WRITE {
                    let value = word(rng, main.is_ept(), 0);
                    walker.memory.store(frame, rng.below(4096), value);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_tables_stay_within_bounds() {
        let mut reached = 0;
        let mut accesses = 0;
        for seed in 0..60 {
            let found = run(seed, 3000).unwrap();
            reached += found.reached;
            accesses += found.accesses;
        }
        assert!(reached > accesses / 50, "the tables lead nowhere: {reached} of {accesses}");
        assert!(reached < accesses, "nothing was refused");
    }

    /// Every table entry leads to the table itself, at every level: 512^4 L2 addresses in one page of tables.
    #[test]
    fn a_self_mapping_table_is_walked_and_zapped_in_bounded_work() {
        let mut config = Config::new(FRAMES, STRATEGIES[0]);
        config.max_pages = QUOTA;
        let mut mmu = Mmu::new(config, &[Slot::identity(FRAMES)]).unwrap();
        let mut memory = PlainMemory::new(FRAMES, 0);
        for offset in (0..4096).step_by(8) {
            memory.write(Frame(1), offset, 1 << 12 | 0x107);
        }
        // As a 4 KiB leaf the entry's memory type is UC, which is valid; as a table entry bits 6:3 are clear.
        let mut walker = Walker::new(memory, 6);
        let root = mmu.load_root(&mut walker.env(), RootRole::new(Format::EPT), 0x1000).unwrap();
        let mut rng = Rng(5);
        for _ in 0..20_000 {
            let l2 = L2Gfn(rng.below(1 << 36));
            let ended = walker.access(&mut mmu, root, l2, Request::WRITE, crate::Access::WRITE);
            assert!(matches!(ended, crate::walker::Ended::Done { frame: Frame(1), .. }), "{ended:?}");
        }
        assert!(mmu.shadow_pages() <= 5, "one page a level");
        mmu.invalidate(&mut walker.env(), Invalidation::All);
        mmu.memory_changed(&mut walker.env(), &[]).unwrap();
        assert_eq!(mmu.shadow_pages(), 1, "the root alone is left");
        mmu.audit().unwrap();
    }
}
