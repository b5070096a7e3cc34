//! What each operation costs, in instructions: `bench_mmu [MIB=64,1024] [ROOM=10] [OP=name]`.
//!
//! Callgrind counts two runs of this program, one that prepares and one that prepares and operates; the difference over
//! the number of units is the figure. Limits are issue 4's; ROOM is the per cent that they may be exceeded by.

use std::hint::black_box;
use std::process::{Command, ExitCode};

use umbra_mmu::model::{AliasKind, Model, ModelConfig, NoHooks, PageAccess};
use umbra_mmu::track::strategy;
use umbra_mmu::{Access, Collapse, Config, Format, Frame, Mmu, ModeBits, Outcome, PageSet, Request, RootRole, Split};
use umbra_shared::{L2Gfn, Level, PAGE_SHIFT};

struct Op {
    name: &'static str,
    unit: &'static str,
    limit: f64,
    run: fn(u64, bool) -> u64,
}

const OPS: &[Op] = &[
    Op { name: "fault-4k", unit: "page", limit: 600.0, run: fault },
    Op { name: "wp-fault", unit: "fault", limit: 150.0, run: wp_fault },
    Op { name: "harvest-dirty", unit: "dirty page", limit: 40.0, run: harvest_dirty },
    Op { name: "harvest-clean", unit: "clean page", limit: 4.0, run: harvest_clean },
    Op { name: "shatter", unit: "entry", limit: 15.0, run: shatter },
    Op { name: "eager-split", unit: "entry", limit: 15.0, run: eager_split },
    Op { name: "protect-64-aliases", unit: "L1 page", limit: 2000.0, run: protect_aliases },
    Op { name: "kept-root", unit: "role change", limit: 200.0, run: kept_root },
    Op { name: "collapse-lazy", unit: "entry", limit: 15.0, run: collapse_lazy },
    Op { name: "collapse-in-place", unit: "entry", limit: 15.0, run: collapse_in_place },
    Op { name: "clear-wp", unit: "page (no limit)", limit: f64::INFINITY, run: clear_wp },
    Op { name: "resync", unit: "entry (no limit)", limit: f64::INFINITY, run: resync },
];

fn model(pages: u64, leaf: Level, name: &str, with: impl Fn(&mut ModelConfig)) -> Model {
    let strategy = strategy(name).expect("a strategy of the crate");
    let mut config = ModelConfig::new(pages, Format::EPT, leaf, Config::new(1, strategy));
    with(&mut config);
    Model::new(config).expect("a configuration that makes sense")
}

fn write_fault(mmu: &mut Mmu, model_root: umbra_mmu::RootId, walker: &mut umbra_mmu::walker::Walker, page: u64) {
    let outcome = mmu.fault(&mut walker.env(), model_root, page << PAGE_SHIFT, Request::WRITE);
    assert!(matches!(outcome, Ok(Outcome::Mapped { .. })));
}

fn fault(pages: u64, operate: bool) -> u64 {
    let mut model = model(pages, Level::K4, "write-protect", |_| {});
    let root = model.root().0;
    for page in 0..if operate { pages } else { 0 } {
        write_fault(&mut model.mmu, root, &mut model.walker, page);
    }
    pages
}

fn wp_fault(pages: u64, operate: bool) -> u64 {
    let mut model = model(pages, Level::K4, "write-protect", |_| {});
    model.populate(&mut NoHooks).expect("populated");
    model.enable().expect("enabled");
    let root = model.root().0;
    for page in 0..if operate { pages } else { 0 } {
        write_fault(&mut model.mmu, root, &mut model.walker, page);
    }
    pages
}

fn dirtied(pages: u64, every: u64, name: &str) -> Model {
    let mut model = model(pages, Level::K4, name, |_| {});
    model.populate(&mut NoHooks).expect("populated");
    model.enable().expect("enabled");
    let root = model.root().0;
    for page in (0..pages).filter(|page| page % every == 0) {
        black_box(model.mmu.hardware_walk(root, L2Gfn(page), Access::WRITE)).expect("walked");
    }
    model
}

fn harvest_dirty(pages: u64, operate: bool) -> u64 {
    let mut model = dirtied(pages, 1, "dirty-bit");
    let mut set = PageSet::new(pages);
    if operate {
        assert_eq!(model.mmu.harvest(&mut model.walker.env(), &mut set), Ok(pages));
    }
    pages
}

fn harvest_clean(pages: u64, operate: bool) -> u64 {
    let mut model = dirtied(pages, u64::MAX, "dirty-bit");
    let mut set = PageSet::new(pages);
    if operate {
        assert_eq!(model.mmu.harvest(&mut model.walker.env(), &mut set), Ok(1));
    }
    pages
}

fn shatter(pages: u64, operate: bool) -> u64 {
    let mut model = model(pages, Level::M2, "write-protect", |config| config.mmu.split = Split::Shatter);
    model.populate(&mut NoHooks).expect("populated");
    model.enable().expect("enabled");
    let root = model.root().0;
    for page in (0..if operate { pages } else { 0 }).step_by(512) {
        write_fault(&mut model.mmu, root, &mut model.walker, page);
    }
    pages
}

fn eager_split(pages: u64, operate: bool) -> u64 {
    let mut model = model(pages, Level::M2, "write-protect", |config| config.mmu.split = Split::Eager);
    model.populate(&mut NoHooks).expect("populated");
    if operate {
        let phase = model.enable().expect("enabled");
        assert_eq!(phase.stats.shattered, pages / 512);
    }
    pages
}

fn protect_aliases(pages: u64, operate: bool) -> u64 {
    let mut model = model(pages / 64, Level::K4, "write-protect", |config| {
        config.aliases = 64;
        config.alias_kind = AliasKind::Contiguous;
    });
    model.populate(&mut NoHooks).expect("populated");
    model.enable().expect("enabled");
    let all = (0..model.l2_pages()).map(|page| PageAccess { page, write: true });
    model.round(all, &mut NoHooks).expect("written");
    model.harvest().expect("harvested");
    if operate {
        let phase = model.clear(0).expect("cleared");
        assert_eq!(phase.stats.protect_pages, pages);
    }
    pages / 64
}

fn kept_root(pages: u64, operate: bool) -> u64 {
    let mut model = model(pages, Level::K4, "write-protect", |_| {});
    model.populate(&mut NoHooks).expect("populated");
    let (mut root, table) = model.root();
    let roles = [RootRole::new(Format::EPT), RootRole { mode: ModeBits(1), ..RootRole::new(Format::EPT) }];
    let other = model.mmu.load_root(&mut model.walker.env(), roles[1], table).expect("loaded");
    model.mmu.drop_root(&mut model.walker.env(), other).expect("dropped");
    let changes = 10_000;
    let mut env = model.walker.env();
    for change in 0..if operate { changes } else { 0 } {
        let next = model.mmu.load_root(&mut env, roles[usize::from(change % 2 == 0)], table).expect("loaded");
        model.mmu.drop_root(&mut env, root).expect("dropped");
        root = next;
    }
    changes
}

fn collapse(pages: u64, operate: bool, how: Collapse) -> u64 {
    let mut model = model(pages, Level::M2, "write-protect", |config| {
        config.mmu.split = Split::Eager;
        config.mmu.collapse = how;
    });
    model.populate(&mut NoHooks).expect("populated");
    model.enable().expect("enabled");
    if operate {
        assert_eq!(model.disable().expect("disabled").stats.collapsed, pages / 512);
    }
    // Both runs end the process with what they have: what is dropped at the end must not differ.
    std::mem::forget(model);
    pages
}

fn collapse_lazy(pages: u64, operate: bool) -> u64 {
    collapse(pages, operate, Collapse::Lazy)
}

fn collapse_in_place(pages: u64, operate: bool) -> u64 {
    collapse(pages, operate, Collapse::InPlace)
}

fn clear_wp(pages: u64, operate: bool) -> u64 {
    let mut model = model(pages, Level::K4, "write-protect", |_| {});
    model.populate(&mut NoHooks).expect("populated");
    model.enable().expect("enabled");
    model.retouch(&mut NoHooks).expect("written");
    model.harvest().expect("harvested");
    if operate {
        model.clear(0).expect("cleared");
    }
    pages
}

fn resync(pages: u64, operate: bool) -> u64 {
    let mut model = model(pages, Level::K4, "write-protect", |_| {});
    model.populate(&mut NoHooks).expect("populated");
    if operate {
        model.mmu.invalidate(&mut model.walker.env(), umbra_mmu::Invalidation::All);
    }
    assert!(
        model.mmu.peek(model.root().0, L2Gfn(0)).is_ok_and(|found| found.is_some_and(|(frame, ..)| frame == Frame(0)))
    );
    pages
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
        (op.run)(mib.parse::<u64>().expect("a number") * 256, operate == "1");
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
            let difference = count(op.name, mib, true)?.saturating_sub(count(op.name, mib, false)?);
            let units = units(op, mib);
            // Hundredths, so that whole numbers do: counts stay far below 2^53.
            let hundredths = u32::try_from(difference * 100 / units).map_err(|_| "a count beyond any sense")?;
            figures.push(f64::from(hundredths) / 100.0);
        }
        let (low, high) = figures.iter().fold((f64::MAX, 0.0f64), |(low, high), &at| (low.min(at), high.max(at)));
        let spread = (high / low - 1.0) * 100.0;
        let held = high <= op.limit * (1.0 + room / 100.0) && spread <= 10.0;
        good &= held || op.limit.is_infinite();
        let cells: Vec<String> = figures.iter().map(|figure| format!("{figure:>12.2}")).collect();
        println!(
            "{:<20} {} {:>10} {:>7.1}%  {}{}",
            op.name,
            cells.join(" "),
            op.limit,
            spread,
            op.unit,
            if held { "" } else { "  <- exceeded" }
        );
    }
    Ok(good)
}

/// Units of `op` at `mib`: what its function returns, without running it.
fn units(op: &Op, mib: u64) -> u64 {
    let pages = mib * 256;
    match op.name {
        "protect-64-aliases" => pages / 64,
        "kept-root" => 10_000,
        _ => pages,
    }
}
