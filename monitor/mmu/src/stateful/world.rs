//! The world of an episode: L1's memory and tables, the MMU under the walker, and the model of both.

mod guest;
mod tracked;

use std::collections::{BTreeMap, BTreeSet};

use umbra_shared::{Gfn, L2Gfn, Level};

use super::draw::{Episode, Rng, Setup, TABLES};
use super::op::{Action, Op};
use crate::access::{Access, Kind, Request};
use crate::config::MmuError;
use crate::defects::Defects;
use crate::dirty::PageSet;
use crate::memory::{L1Memory, Slot, Slots};
use crate::mmu::Mmu;
use crate::reference::{Context, History, Reference, Verdict};
use crate::role::RootRole;
use crate::roots::RootId;
use crate::spte::Frame;
use crate::walker::{Ended, Mirror, PlainMemory, Walker};

/// 2 MiB regions of L2 that are used: both halves of a 4 MiB page, all four quadrants, neighbours, aliases.
const REGIONS: [u64; 9] = [0, 1, 2, 3, 512, 513, 1025, 1537, 1 << 18];
/// Pages of a region that are used: block borders, both ends, neighbours.
const PAGES: [u64; 16] = [0, 1, 2, 3, 5, 8, 21, 63, 64, 65, 100, 127, 128, 320, 510, 511];
/// Operations between full audits.
const AUDIT: usize = 64;

struct Loaded {
    id: RootId,
    context: usize,
    count: u32,
}

/// See the module.
pub struct World {
    setup: Setup,
    mmu: Mmu,
    walker: Walker,
    slots: Slots,
    layout: usize,
    history: History,
    contexts: Vec<(RootRole, Context)>,
    loaded: Vec<Loaded>,
    roots: Vec<u64>,
    starved: bool,
    tracking: bool,
    truth: BTreeSet<Frame>,
    truth_l2: BTreeMap<L2Gfn, Frame>,
    ever_l2: BTreeSet<u64>,
    reported: PageSet,
    harvested: PageSet,
    initial: PageSet,
    before: BTreeMap<Frame, Box<[u64; 512]>>,
    fresh: u64,
    probe: Rng,
}

fn index(number: u32, of: usize) -> usize {
    number as usize % of.max(1)
}

impl World {
    /// The world of `episode`.
    ///
    /// # Errors
    /// The MMU refused the configuration, which is a defect of the drawing.
    pub fn new(episode: Episode, defects: Defects) -> Result<Self, String> {
        let setup = episode.setup();
        let frames = setup.config.memory_frames;
        let slots = Self::layouts(&setup).swap_remove(0);
        let mut mmu = Mmu::new(setup.config, &slots).map_err(|error| error.to_string())?;
        mmu.set_defects(defects);
        let mut memory = PlainMemory::new(frames, 0);
        let roots = guest::build(&setup, &mut memory);
        memory.keep_journal();
        let mut walker = Walker::new(memory, 9);
        let watched = REGIONS.into_iter().flat_map(|region| PAGES.map(|page| L2Gfn(region << 9 | page)));
        walker.tlb.mirror = Some(Box::new(Mirror::new(watched.collect())));
        Ok(Self {
            slots: Slots::new(&slots, frames)?,
            layout: 0,
            mmu,
            walker,
            history: History::default(),
            contexts: Vec::new(),
            loaded: Vec::new(),
            roots,
            starved: false,
            tracking: false,
            truth: BTreeSet::new(),
            truth_l2: BTreeMap::new(),
            ever_l2: BTreeSet::new(),
            reported: PageSet::new(frames),
            harvested: PageSet::new(frames),
            initial: PageSet::new(frames),
            before: BTreeMap::new(),
            fresh: 1,
            probe: Rng(setup.seed ^ 0x77),
            setup,
        })
    }

    /// L1's memory maps: the first is ordinary; in the others data goes read-only, moves, vanishes, overlaps, ends in
    /// the middle of a huge leaf; and the tables go read-only or vanish.
    fn layouts(setup: &Setup) -> Vec<Vec<Slot>> {
        let slot = |base: u64, frames: u64, first: u64| Slot {
            base: Gfn(base),
            frames,
            first: Frame(first),
            ..Slot::identity(1)
        };
        let data = setup.tables;
        let tables = slot(setup.tables, TABLES, setup.tables);
        let half = 4 * 512;
        vec![
            vec![slot(0, data, 0), tables],
            vec![slot(0, half, 0), Slot { read_only: true, ..slot(half, data - half, half) }, tables],
            vec![slot(0, half + 256, 0), slot(half + 512, data - half - 512, half + 512), tables],
            vec![slot(0, half, half), slot(half, data - half, half), tables],
            vec![slot(0, 700, 0), slot(700, data - 701, 701), tables],
            vec![slot(0, data, 0), Slot { read_only: true, ..tables }],
            vec![Slot { max_level: Level::K4, ..slot(0, data, 0) }, tables],
            vec![slot(0, 512, 0), slot(1536, data - 1536, 1536), slot(setup.tables, 16, setup.tables)],
        ]
    }

    fn l2(&self, a: u32, b: u32) -> L2Gfn {
        let format = self.setup.formats[0];
        let regions: Vec<u64> = REGIONS.into_iter().filter(|region| region << 9 < format.frames()).collect();
        let pages = PAGES[index(b, PAGES.len())];
        if a.is_multiple_of(97) {
            return L2Gfn(format.frames() + pages);
        }
        L2Gfn(regions[index(a, regions.len())] << 9 | pages)
    }

    fn reference(&self) -> Reference<'_> {
        Reference {
            memory: &self.walker.memory,
            slots: &self.slots,
            caps: self.setup.config.caps,
            history: &self.history,
        }
    }

    /// Runs one operation and checks everything that can be checked after it.
    ///
    /// # Errors
    /// What does not hold.
    pub fn step(&mut self, step: usize, op: Op) -> Result<(), String> {
        self.history.now += 1;
        // The addresses probed depend on the operation alone, so that a script that shrinks keeps its probes.
        self.probe = Rng(u64::from(op.a) << 40 ^ u64::from(op.b) << 20 ^ u64::from(op.c));
        self.apply(op).map_err(|what| format!("{:?}: {what}", op.action))?;
        self.read_journal();
        self.check(step).map_err(|what| format!("after {:?}: {what}", op.action))
    }

    /// Lets go of everything and checks that nothing is left.
    ///
    /// # Errors
    /// What does not hold.
    pub fn end(&mut self) -> Result<(), String> {
        self.mmu.audit()?;
        for at in 0..self.loaded.len() {
            for region in REGIONS {
                for page in PAGES {
                    self.check_grants(at, L2Gfn(region << 9 | page))?;
                }
            }
        }
        self.history.now += 1;
        if self.tracking {
            self.harvest()?;
        }
        while let Some(loaded) = self.loaded.pop() {
            for _ in 0..loaded.count {
                self.mmu.drop_root(&mut self.walker.env(), loaded.id).map_err(|error| error.to_string())?;
            }
        }
        self.mmu.audit()
    }

    fn apply(&mut self, op: Op) -> Result<(), String> {
        let Op { action, a, b, c } = op;
        match action {
            Action::Access => {
                let kind = [Kind::Read, Kind::Write, Kind::Write, Kind::Execute][index(c, 4)];
                let request = match c >> 12 & 15 {
                    // The processor reads an entry of L2's own tables, or sets its flags.
                    0 | 1 if kind != Kind::Execute => Request { kind, ..Request::TABLE_WALK },
                    2 => Request { linear: false, ..Request::of(kind) },
                    _ => Request::of(kind),
                };
                self.access(c >> 4, self.l2(a, b), request, c)
            }
            Action::Sweep => {
                let start = self.l2(a, b);
                for page in 0..(600 * u64::from(c.is_multiple_of(7))).max(u64::from(c) % 70) {
                    self.access(c >> 8, start.plus(page), Request::WRITE, c)?;
                    self.read_journal();
                }
                Ok(())
            }
            Action::Prefetch => self.prefetch(c >> 4, self.l2(a, b), u64::from(c & 15)),
            Action::Edit => {
                self.edit(a, b, c);
                Ok(())
            }
            Action::Remap => {
                self.edit(a, b, c);
                self.invalidate(c >> 3 & !7);
                Ok(())
            }
            Action::Invalidate => {
                self.invalidate(a);
                Ok(())
            }
            Action::Load => self.load(a, b),
            Action::Drop => self.drop_root(a),
            Action::ChangeRole => self.change_role(a, b),
            Action::Start => self.start(),
            Action::Harvest => self.harvest(),
            Action::Clear => self.clear(u64::from(a) % self.setup.config.memory_frames, u64::from(b) % 3000),
            Action::ClearAll => self.clear(0, self.setup.config.memory_frames),
            Action::Stop => self.stop(),
            Action::Slots => self.change_slots(a),
            Action::Starve => {
                self.starved = true;
                self.mmu.limit_allocations(a % 6);
                Ok(())
            }
            Action::Feed => {
                self.starved = false;
                self.mmu.limit_allocations(u32::MAX);
                Ok(())
            }
        }
    }

    /// What it maps is checked as all that is granted; it is no access, so it changes no table of L1's.
    fn prefetch(&mut self, which: u32, l2: L2Gfn, stretches: u64) -> Result<(), String> {
        let Some(loaded) = self.loaded.get(index(which, self.loaded.len())) else { return Ok(()) };
        match self.mmu.prefetch(&mut self.walker.env(), loaded.id, l2.address(), stretches) {
            Err(MmuError::NoMemory) if self.starved => {}
            done => done.map_err(|error| error.to_string())?,
        }
        if self.walker.memory.take_journal().is_empty() { Ok(()) } else { Err(format!("it wrote a table at L2 {l2}")) }
    }

    fn access(&mut self, which: u32, l2: L2Gfn, request: Request, c: u32) -> Result<(), String> {
        if self.loaded.is_empty() {
            self.load(which, c)?;
        }
        // Time passes between a load and the access, and between the accesses of a sweep: each may write a table.
        self.history.now += 1;
        let Some(loaded) = self.loaded.get(index(which, self.loaded.len())) else { return Ok(()) };
        let (root, number) = (loaded.id, loaded.context);
        let expected = self.reference().verdict(&self.contexts[number].1, l2, request);
        // Now and then L2 writes what is there already.
        self.fresh += 1;
        let value = if c.is_multiple_of(13) { u64::MAX } else { self.fresh };
        let right = <Reference>::needed(self.contexts[number].1.format, request);
        let ended = if request.table_walk {
            self.walker.access(&mut self.mmu, root, l2, request, right)
        } else {
            self.walker.execute(&mut self.mmu, root, l2, request, (u64::from(c) & 0xff8, value))
        };
        // L2 may have written a table, even one on this walk.
        self.read_journal();
        let context = &self.contexts[number].1;
        match ended {
            Ended::Done { frame, cached, faults } => {
                if faults > 2 {
                    return Err(format!("{request:?} of L2 {l2} took {faults} faults"));
                }
                if !self.reference().granted(context, l2, right, frame) {
                    return Err(format!("{request:?} of L2 {l2} reached {frame:?} (cached: {cached}), never granted"));
                }
                let mirror = self.walker.tlb.mirror.as_ref().and_then(|mirror| mirror.find(root, l2));
                if let (1.., Some(mapped)) = (faults, mirror)
                    && !mapped.is_some_and(|(at, access)| at == frame && access.allows(right))
                {
                    return Err(format!(
                        "{request:?} of L2 {l2} faulted and nothing was posted that allows it: {mapped:?}"
                    ));
                }
                let flags = self.reference().flags_set(context, l2, right == Access::WRITE);
                if flags == Some(false) {
                    return Err(format!("{request:?} of L2 {l2} left A/D flags of EPT12 clear"));
                }
                // What counts as a write is reported, whether it changes anything or not.
                if right == Access::WRITE {
                    self.truth.insert(frame);
                    self.truth_l2.insert(l2, frame);
                    self.ever_l2.insert(l2.0 & 511);
                }
                Ok(())
            }
            Ended::Reflected(reflection) => {
                if expected != Verdict::Reflected(reflection) {
                    return Err(format!(
                        "{request:?} of L2 {l2} was reflected as {reflection:x?}, expected {expected:x?}"
                    ));
                }
                let now = self.history.now;
                self.contexts[number].1.violated.insert(l2, now);
                Ok(())
            }
            Ended::WantsMemory(gfn) if matches!(expected, Verdict::NoMemory(other) | Verdict::NoTable(other, _) if other == gfn) => {
                Ok(())
            }
            Ended::WantsMemory(gfn) => Err(format!("{request:?} of L2 {l2} wants {gfn}, expected {expected:x?}")),
            Ended::NoMemory if self.starved => Ok(()),
            Ended::NoMemory => Err(format!("{request:?} of L2 {l2} found no memory")),
            Ended::Stuck => Err(format!("{request:?} of L2 {l2} is stuck, expected {expected:x?}")),
        }
    }

    fn change_slots(&mut self, a: u32) -> Result<(), String> {
        let layouts = Self::layouts(&self.setup);
        self.layout = if self.layout == 0 { index(a, layouts.len()) } else { 0 };
        let slots = &layouts[self.layout];
        let frames = self.setup.config.memory_frames;
        let bad = [Slot::identity(frames + 1)];
        if self.mmu.memory_changed(&mut self.walker.env(), &bad).is_ok() {
            return Err("a map beyond memory was taken".into());
        }
        self.mmu.memory_changed(&mut self.walker.env(), slots).map_err(|error| error.to_string())?;
        self.slots = Slots::new(slots, frames)?;
        Ok(())
    }

    /// What was stored since the last operation: it makes history, and where the MMU did it a dirty page.
    fn read_journal(&mut self) {
        for written in self.walker.memory.take_journal() {
            // Any page may be a table: entries can lead to data.
            self.history.note((written.frame.0, written.offset), written.old);
            if written.by_mmu && self.tracking {
                self.truth.insert(written.frame);
            }
            if self.tracking && self.setup.config.strategy.compares() && !self.before.contains_key(&written.frame) {
                let mut page = Box::new([0; 512]);
                self.walker.memory.copy_page(written.frame, &mut page);
                page[(written.offset >> 3) as usize] = written.old;
                self.before.insert(written.frame, page);
            }
        }
    }

    fn check(&mut self, step: usize) -> Result<(), String> {
        for loaded in &self.loaded {
            let count = self.mmu.load_count(loaded.id).map_err(|error| error.to_string())?;
            if count != loaded.count {
                return Err(format!("{:?} is loaded {} times and counts {count}", loaded.id, loaded.count));
            }
        }
        for _ in 0..2 {
            let number = self.probe.draw();
            let l2 = self.l2((number >> 8 & 0xffff_ffff) as u32 | 1, (number >> 32) as u32);
            self.check_grants(index((number & 0xff) as u32, self.loaded.len()), l2)?;
        }
        if step % AUDIT == AUDIT - 1 {
            self.mmu.audit()?;
            let memory = self.mmu.memory_in_use();
            if memory.total() > self.mmu.memory_bound() {
                return Err(format!("{memory:?} is above the bound of {}", self.mmu.memory_bound()));
            }
        }
        Ok(())
    }

    /// Nothing is granted at `l2` that must not be, in EPT02 and in the TLB, under loaded root number `at`.
    fn check_grants(&self, at: usize, l2: L2Gfn) -> Result<(), String> {
        let Some(loaded) = self.loaded.get(at) else { return Ok(()) };
        let context = &self.contexts[loaded.context].1;
        let mapped = self.mmu.peek(loaded.id, l2).map_err(|error| error.to_string())?;
        let cached = self.walker.tlb.find(loaded.id, l2);
        let posted = self.walker.tlb.mirror.as_ref().and_then(|mirror| mirror.find(loaded.id, l2)).flatten();
        if let Some((frame, access)) = posted
            && !mapped.is_some_and(|(at, _, allowed)| at == frame && allowed.allows(access))
        {
            return Err(format!("a mapper has {frame:?} {access} at L2 {l2}, EPT02 has {mapped:?}"));
        }
        let found = [
            mapped.map(|(frame, _, access)| (frame, access, "EPT02")),
            cached.map(|(frame, access, _)| (frame, access, "the TLB")),
        ];
        for (frame, access, place) in found.into_iter().flatten() {
            for right in [Access::READ, Access::WRITE, Access::EXECUTE] {
                if access.allows(right) && !self.reference().granted(context, l2, right, frame) {
                    return Err(format!("{place} grants {right} on {frame:?} at L2 {l2}, which EPT12 never did"));
                }
            }
        }
        Ok(())
    }
}
