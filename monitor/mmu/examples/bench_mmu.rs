//! What each operation costs, in instructions: `bench_mmu [MIB=64,1024] [ROOM=10] [OP=name]`.
//!
//! Callgrind counts two runs of this program, one that prepares and one that prepares and operates; the difference over
//! the number of units is the figure. A loop is in both, with an empty call in the first, and nothing is dropped at the
//! end. Limits are issue 4's; ROOM is the per cent that they may be exceeded by.

use std::hint::black_box;
use std::process::{Command, ExitCode};

use umbra_mmu::model::{AliasKind, Model, ModelConfig, NoHooks, PageAccess};
use umbra_mmu::track::strategy;
use umbra_mmu::{
    Access, CacheSize, Collapse, Config, Env, Format, Frame, Mmu, MmuError, ModeBits, NoMapper, Outcome, PageSet,
    Request, RootId, RootRole, Split,
};
use umbra_shared::{L2Gfn, Level, PAGE_SHIFT};

struct Op {
    name: &'static str,
    unit: &'static str,
    limit: f64,
    /// The largest L2 it is measured with.
    up_to_mib: u64,
    /// Units in so many L2 pages.
    units: fn(u64) -> u64,
    run: fn(u64, bool) -> Model,
}

const fn op(name: &'static str, unit: &'static str, limit: f64, run: fn(u64, bool) -> Model) -> Op {
    Op { name, unit, limit, up_to_mib: 16 << 10, units: |pages| pages, run }
}

const OPS: &[Op] = &[
    op("fault-4k", "page", 600.0, fault),
    op("wp-fault", "fault", 150.0, wp_fault),
    op("harvest-dirty", "dirty page", 40.0, harvest_dirty),
    op("harvest-clean", "clean page", 4.0, harvest_clean),
    op("shatter", "entry", 15.0, shatter),
    op("eager-split", "entry", 15.0, eager_split),
    Op { units: |pages| pages / ALIASES, ..op("protect-64-aliases", "L1 page", 2000.0, protect_aliases) },
    Op { units: |_| CHANGES, ..op("kept-root", "role change", 200.0, kept_root) },
    op("collapse-lazy", "entry", 15.0, |pages, operate| collapse(pages, operate, Collapse::Lazy)),
    op("collapse-in-place", "entry", 15.0, |pages, operate| collapse(pages, operate, Collapse::InPlace)),
    Op {
        up_to_mib: 1 << 20,
        units: |pages| sparse(pages).count() as u64,
        ..op("sparse-fault", "written page", NONE, sparse_fault)
    },
    Op {
        up_to_mib: 1 << 20,
        units: |pages| sparse(pages).count() as u64 / 16 * 512,
        ..op("sparse-harvest", "small page", NONE, sparse_harvest)
    },
    op("clear-wp", "page", NONE, clear_wp),
    op("resync", "entry", NONE, resync),
];

/// No limit; the figure must not grow with L2 all the same.
const NONE: f64 = f64::INFINITY;
const ALIASES: u64 = 64;
const CHANGES: u64 = 10_000;

fn model(pages: u64, leaf: Level, name: &str, with: impl Fn(&mut ModelConfig)) -> Model {
    let strategy = strategy(name).expect("a strategy of the crate");
    let mut config = ModelConfig::new(pages, Format::EPT, leaf, Config::new(1, strategy));
    with(&mut config);
    Model::new(config).expect("a configuration that makes sense")
}

/// As [`model`], with all of L2 mapped, by a fault for 512 pages, and tracking on.
fn tracked(pages: u64, leaf: Level, name: &str, with: impl Fn(&mut ModelConfig)) -> Model {
    let mut model = mapped(pages, leaf, name, with);
    model.enable().expect("enabled");
    model
}

fn mapped(pages: u64, leaf: Level, name: &str, with: impl Fn(&mut ModelConfig)) -> Model {
    let mut model = model(pages, leaf, name, |config| {
        config.mmu.extent = if leaf == Level::K4 { 512 } else { 1 };
        with(config);
    });
    let reads = (0..model.l2_pages()).step_by(512).map(|page| PageAccess { page, write: false });
    model.round(reads, &mut NoHooks).expect("mapped");
    model
}

fn env<'a>(model: &'a mut Model, mapper: &'a mut NoMapper) -> (&'a mut Mmu, Env<'a>) {
    (&mut model.mmu, Env { memory: &mut model.walker.memory, mapper })
}

type Fault = for<'a, 'b, 'c> fn(&'a mut Mmu, &'b mut Env<'c>, RootId, u64, Request) -> Result<Outcome, MmuError>;

fn write(model: &mut Model, pages: impl Iterator<Item = u64>, operate: bool) {
    let fault: Fault =
        black_box(if operate { Mmu::fault } else { |_, _, _, _, _| Ok(Outcome::Mapped { level: Level::K4 }) });
    let root = model.root().0;
    let mut mapper = NoMapper;
    let (mmu, mut env) = env(model, &mut mapper);
    for page in pages {
        let outcome = fault(mmu, &mut env, root, page << PAGE_SHIFT, Request::WRITE);
        assert!(matches!(outcome, Ok(Outcome::Mapped { .. })));
    }
}

fn fault(pages: u64, operate: bool) -> Model {
    let mut model = model(pages, Level::K4, "write-protect", |_| {});
    write(&mut model, 0..pages, operate);
    model
}

fn wp_fault(pages: u64, operate: bool) -> Model {
    let mut model = tracked(pages, Level::K4, "write-protect", |_| {});
    write(&mut model, 0..pages, operate);
    model
}

fn harvest(pages: u64, operate: bool, every: u64) -> Model {
    let mut model = tracked(pages, Level::K4, "dirty-bit", |_| {});
    let root = model.root().0;
    for page in (0..pages).step_by(usize::try_from(every).unwrap_or(usize::MAX)) {
        black_box(model.mmu.hardware_walk(root, L2Gfn(page), Access::WRITE)).expect("walked");
    }
    read_out(&mut model, pages, operate);
    model
}

fn read_out(model: &mut Model, pages: u64, operate: bool) {
    let mut set = PageSet::new(pages);
    if operate {
        let mut mapper = NoMapper;
        let (mmu, mut env) = env(model, &mut mapper);
        assert!(mmu.harvest(&mut env, &mut set).is_ok_and(|count| count > 0));
    }
    std::mem::forget(set);
}

fn harvest_dirty(pages: u64, operate: bool) -> Model {
    harvest(pages, operate, 1)
}

fn harvest_clean(pages: u64, operate: bool) -> Model {
    harvest(pages, operate, u64::MAX)
}

fn shatter(pages: u64, operate: bool) -> Model {
    let mut model = tracked(pages, Level::M2, "write-protect", |config| config.mmu.split = Split::Shatter);
    write(&mut model, (0..pages).step_by(512), operate);
    model
}

fn eager_split(pages: u64, operate: bool) -> Model {
    let mut model = mapped(pages, Level::M2, "write-protect", |config| config.mmu.split = Split::Eager);
    if operate {
        let mut mapper = NoMapper;
        let (mmu, mut env) = env(&mut model, &mut mapper);
        mmu.start(&mut env).expect("started");
        assert_eq!(mmu.stats().shattered, pages / 512);
    }
    model
}

fn protect_aliases(pages: u64, operate: bool) -> Model {
    let mut model = tracked(pages / ALIASES, Level::K4, "write-protect", |config| {
        (config.aliases, config.alias_kind) = (ALIASES, AliasKind::Contiguous);
    });
    write(&mut model, 0..pages, true);
    model.harvest().expect("harvested");
    let before = model.mmu.stats().protect_pages;
    if operate {
        clear(&mut model, pages);
        assert_eq!(model.mmu.stats().protect_pages - before, pages);
    }
    model
}

fn clear(model: &mut Model, pages: u64) {
    let mut mapper = NoMapper;
    let (mmu, mut env) = env(model, &mut mapper);
    mmu.clear(&mut env, Frame(0), pages).expect("cleared");
}

type Load = for<'a, 'b, 'c> fn(&'a mut Mmu, &'b mut Env<'c>, RootRole, u64) -> Result<RootId, MmuError>;
type Drop = for<'a, 'b, 'c> fn(&'a mut Mmu, &'b mut Env<'c>, RootId) -> Result<(), MmuError>;

fn kept_root(pages: u64, operate: bool) -> Model {
    let mut model = mapped(pages, Level::K4, "write-protect", |_| {});
    let (mut root, table) = model.root();
    let roles = [RootRole::new(Format::EPT), RootRole { mode: ModeBits(1), ..RootRole::new(Format::EPT) }];
    let mut mapper = NoMapper;
    let (mmu, mut env) = env(&mut model, &mut mapper);
    let other = mmu.load_root(&mut env, roles[1], table).expect("loaded");
    mmu.drop_root(&mut env, other).expect("dropped");
    let load: Load = black_box(if operate { Mmu::load_root } else { |_, _, _, _| Ok(RootId::default()) });
    let drop: Drop = black_box(if operate { Mmu::drop_root } else { |_, _, _| Ok(()) });
    for change in 0..CHANGES {
        let next = load(mmu, &mut env, roles[usize::from(change % 2 == 0)], table).expect("loaded");
        drop(mmu, &mut env, root).expect("dropped");
        root = next;
    }
    model
}

fn collapse(pages: u64, operate: bool, how: Collapse) -> Model {
    let mut model = tracked(pages, Level::M2, "write-protect", |config| {
        (config.mmu.split, config.mmu.collapse) = (Split::Eager, how);
    });
    if operate {
        let mut mapper = NoMapper;
        let (mmu, mut env) = env(&mut model, &mut mapper);
        mmu.stop(&mut env).expect("stopped");
        assert_eq!(mmu.stats().collapsed, pages / 512);
    }
    model
}

/// L2 pages to write: 16 in each tenth 2 MiB.
fn sparse(pages: u64) -> impl Iterator<Item = u64> {
    (0..pages).step_by(5120).flat_map(|first| (0..16).map(move |page| first + page * 32))
}

/// A huge L2 of which little is written: all of it mapped, its leaves split by the first writes. The split caches hold one
/// table, so that what they fetch in advance is no part of the figure.
fn sparsely(pages: u64, name: &str) -> Model {
    tracked(pages, Level::M2, name, |config| {
        config.mmu.split = Split::Shatter;
        config.mmu.caches.pages = CacheSize { min: 1, capacity: 1 };
        config.mmu.caches.descs = CacheSize { min: 0, capacity: 0 };
    })
}

fn sparse_fault(pages: u64, operate: bool) -> Model {
    let mut model = sparsely(pages, "write-protect");
    write(&mut model, sparse(pages), operate);
    model
}

fn sparse_harvest(pages: u64, operate: bool) -> Model {
    let mut model = sparsely(pages, "dirty-bit");
    let writes = sparse(pages).map(|page| PageAccess { page, write: true });
    model.round(writes, &mut NoHooks).expect("written");
    read_out(&mut model, pages, operate);
    model
}

fn clear_wp(pages: u64, operate: bool) -> Model {
    let mut model = tracked(pages, Level::K4, "write-protect", |_| {});
    write(&mut model, 0..pages, true);
    model.harvest().expect("harvested");
    if operate {
        clear(&mut model, pages);
    }
    model
}

fn resync(pages: u64, operate: bool) -> Model {
    let mut model = mapped(pages, Level::K4, "write-protect", |_| {});
    if operate {
        let mut mapper = NoMapper;
        let (mmu, mut env) = env(&mut model, &mut mapper);
        mmu.invalidate(&mut env, umbra_mmu::Invalidation::All);
        assert!(mmu.stats().synced >= pages);
    }
    model
}

/// Instructions of one run of this program, by callgrind.
fn count(op: &str, mib: u64, operate: bool) -> Result<u64, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .args(["RUN", op, &mib.to_string(), if operate { "1" } else { "0" }])
        .output()
        .map_err(|error| format!("cannot run valgrind: {error}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{op} failed: {text}"));
    }
    let line = text.lines().find_map(|line| line.split("Collected : ").nth(1));
    line.and_then(|number| number.trim().parse().ok()).ok_or_else(|| format!("no count in callgrind's output: {text}"))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [run, name, mib, operate] = &arguments[..]
        && run == "RUN"
    {
        let op = OPS.iter().find(|op| op.name == *name).expect("a known operation");
        std::mem::forget((op.run)(mib.parse::<u64>().expect("a number") * 256, operate == "1"));
        return ExitCode::SUCCESS;
    }
    let (mut sizes, mut room, mut only) = (vec![64u64, 1024], 10.0, None);
    for argument in &arguments {
        let known = match argument.split_once('=') {
            Some(("MIB", value)) => {
                sizes = value.split(',').filter_map(|size| size.parse().ok()).collect();
                !sizes.is_empty()
            }
            Some(("ROOM", value)) => value.parse().map(|value| room = value).is_ok(),
            Some(("OP", value)) => {
                only = Some(value.to_owned());
                OPS.iter().any(|op| op.name == value)
            }
            _ => false,
        };
        if !known {
            eprintln!("bench_mmu: cannot use `{argument}`: give MIB=64,1024, ROOM=per cent or OP=name");
            return ExitCode::from(2);
        }
    }
    match table(&sizes, room, only.as_deref()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("bench_mmu: {error}");
            ExitCode::from(3)
        }
    }
}

fn table(sizes: &[u64], room: f64, only: Option<&str>) -> Result<bool, String> {
    let heads: Vec<String> = sizes.iter().map(|mib| format!("{:>12}", format!("{mib} MiB"))).collect();
    println!("{:<20} {} {:>10} {:>8}  per", "operation", heads.join(" "), "limit", "spread");
    let mut good = true;
    for op in OPS.iter().filter(|op| only.is_none_or(|name| name == op.name)) {
        let mut figures = Vec::new();
        for &mib in sizes {
            if mib > op.up_to_mib {
                continue;
            }
            // Two processes: their counts do not depend on what else runs.
            let (with, without) = std::thread::scope(|scope| {
                let with = scope.spawn(|| count(op.name, mib, true));
                let without = count(op.name, mib, false);
                (with.join().unwrap_or_else(|_| Err("a thread was lost".to_owned())), without)
            });
            let (difference, units) = (with?.saturating_sub(without?), (op.units)(mib * 256));
            // Hundredths, so that whole numbers do: counts stay far below 2^53.
            let hundredths = u32::try_from(difference * 100 / units).map_err(|_| "a count beyond any sense")?;
            figures.push(f64::from(hundredths) / 100.0);
        }
        let (low, high) = figures.iter().fold((f64::MAX, 0.0f64), |(low, high), &at| (low.min(at), high.max(at)));
        let spread = (high / low - 1.0) * 100.0;
        let held = high <= op.limit * (1.0 + room / 100.0) && spread <= 10.0;
        good &= held;
        let mut cells: Vec<String> = figures.iter().map(|figure| format!("{figure:>12.2}")).collect();
        cells.resize(sizes.len(), format!("{:>12}", ""));
        println!(
            "{:<20} {} {:>10} {:>7.1}%  {}{}",
            op.name,
            cells.join(" "),
            if op.limit.is_finite() { op.limit.to_string() } else { "none".to_owned() },
            spread,
            op.unit,
            if held { "" } else { "  <- exceeded" }
        );
    }
    Ok(good)
}
