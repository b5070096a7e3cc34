//! The world of an episode: L1's memory and tables, the MMU under the walker, and the model of both.

use std::collections::{BTreeMap, BTreeSet};

use umbra_shared::{Gfn, L2Gfn, Level};

use super::draw::{DATA, Episode, Rng, Setup, TABLES};
use super::op::{Action, Op};
use crate::access::{Access, Kind, Request};
use crate::config::MmuError;
use crate::defects::Defects;
use crate::dirty::PageSet;
use crate::format::Format;
use crate::memory::{L1Memory, Slot, Slots};
use crate::mmu::Mmu;
use crate::reference::{Context, History, Reference, Verdict};
use crate::role::{ModeBits, RootRole, below};
use crate::roots::RootId;
use crate::spte::Frame;
use crate::sync::Invalidation;
use crate::tables::{Tables, leaf_entry, place, table_entry};
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
        let roots = build(&setup, &mut memory);
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
        let right = Reference::needed(self.contexts[number].1.format, request);
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
            Ended::WantsMemory(gfn) if expected == Verdict::NoMemory(gfn) => Ok(()),
            Ended::WantsMemory(gfn) => Err(format!("{request:?} of L2 {l2} wants {gfn}, expected {expected:x?}")),
            Ended::NoMemory if self.starved => Ok(()),
            Ended::NoMemory => Err(format!("{request:?} of L2 {l2} found no memory")),
            Ended::Stuck => Err(format!("{request:?} of L2 {l2} is stuck, expected {expected:x?}")),
        }
    }

    /// L1 changes one entry on the way to an address, or any entry of any table.
    fn edit(&mut self, a: u32, b: u32, c: u32) {
        let format = self.setup.formats[0];
        let l2 = self.l2(a, b);
        let mut rng = Rng(u64::from(c) << 32 | u64::from(a ^ b));
        let root = Gfn(rng.pick(&self.roots) >> 12);
        let mut table = root;
        let mut level = format.root_level();
        let stop = rng.pick(&[Level::K4, Level::K4, Level::K4, Level::M2, Level::M2, Level::G1, Level::T512]);
        while level > stop {
            if let Some(at) = place(format, level, l2) {
                let entry = Tables::read(&self.walker.memory, table, at);
                let next = (entry & umbra_shared::paging::ADDRESS_MASK) >> 12;
                let in_pool = (self.setup.tables..self.setup.tables + TABLES).contains(&next);
                if !in_pool || entry.trailing_zeros() >= 3 || entry & 0x80 != 0 {
                    break;
                }
                table = Gfn(next);
            }
            level = below(level);
        }
        let Some(at) = place(format, level, l2) else { return };
        let old = Tables::read(&self.walker.memory, table, at);
        let entry = self.new_entry(&mut rng, format, level, l2, old);
        Tables::write(&mut self.walker.memory, table, at, entry);
    }

    fn new_entry(&self, rng: &mut Rng, format: Format, level: Level, l2: L2Gfn, old: u64) -> u64 {
        let (accessed, dirty, rights) = if format.is_ept() { (1 << 8, 1 << 9, 7) } else { (1 << 5, 1 << 6, 6) };
        match rng.below(16) {
            0 => 0,
            1 => rng.draw(),
            2 => old ^ 1 << rng.below(64),
            3 => old & !accessed,
            4 => old & !dirty,
            5 => old & !(accessed | dirty),
            6 => old & !2,
            7 => old | rights | 1,
            8 if format.is_ept() => old & !7 | rng.pick(&[1, 3, 4, 5, 7]),
            8 => old ^ 1 << 63,
            9 if level > Level::K4 => table_entry(format, level, Gfn(self.setup.tables + rng.below(TABLES))),
            _ => {
                let block = rng.below(9) * 512;
                let access = rng.pick(&[Access::ALL, Access::ALL, Access::READ, Access::READ.or(Access::WRITE)]);
                let used = !rng.once_in(3);
                match level {
                    Level::K4 => {
                        let page = if rng.once_in(2) { l2.0 & 511 } else { rng.pick(&PAGES) };
                        leaf_entry(format, level, Gfn(block | page), access, used)
                    }
                    Level::M2 if format.max_leaf() >= level => {
                        let large = if format.has_4_byte_gpte() { block & !1023 } else { block };
                        leaf_entry(format, level, Gfn(large), access, used)
                    }
                    Level::G1 if format.max_leaf() >= level => {
                        leaf_entry(format, level, Gfn(rng.below(2) << 18), access, used)
                    }
                    _ => old,
                }
            }
        }
    }

    fn invalidate(&mut self, a: u32) {
        let now = self.history.now;
        let picked = self.loaded.get(index(a >> 3, self.loaded.len())).map(|loaded| (loaded.id, loaded.context));
        let what = match (a % 8, picked) {
            (0 | 1, _) | (_, None) => Invalidation::All,
            (2 | 3, _) => Invalidation::Table(self.roots[index(a >> 3, self.roots.len())]),
            (4, Some((id, _))) => Invalidation::Root(id),
            (5, Some((id, _))) => Invalidation::Invlpga(id),
            (6, _) => Invalidation::Invvpid,
            (_, _) => Invalidation::L2Cr3,
        };
        for (number, (_, context)) in self.contexts.iter_mut().enumerate() {
            let applies = match what {
                Invalidation::All => true,
                Invalidation::Table(table) => context.table == table,
                Invalidation::Root(_) | Invalidation::Invlpga(_) => picked.is_some_and(|(_, at)| at == number),
                Invalidation::Invvpid | Invalidation::L2Cr3 => false,
            };
            if applies {
                context.since = now;
                context.violated.clear();
            }
        }
        self.mmu.invalidate(&mut self.walker.env(), what);
        let oldest = self.contexts.iter().map(|(_, context)| context.since).min().unwrap_or(now);
        self.history.prune(oldest);
    }

    fn load(&mut self, a: u32, b: u32) -> Result<(), String> {
        if self.loaded.len() >= 4 {
            return Ok(());
        }
        let format = self.setup.formats[index(a >> 2, self.setup.formats.len())];
        let role = RootRole {
            format,
            smm: b.is_multiple_of(5),
            guest_mode: true,
            mode: ModeBits(u8::from(b.is_multiple_of(3))),
        };
        let table = self.roots[index(a, self.roots.len())];
        if b % 31 == 1 {
            let refused = self.mmu.load_root(&mut self.walker.env(), role, table | 8);
            return if refused == Err(MmuError::BadTable(table | 8)) { Ok(()) } else { Err(format!("{refused:?}")) };
        }
        let id = match self.mmu.load_root(&mut self.walker.env(), role, table) {
            Ok(id) => id,
            Err(MmuError::NoMemory) if self.starved => return Ok(()),
            Err(error) => return Err(error.to_string()),
        };
        let now = self.history.now;
        let known = self.contexts.iter().position(|(known, context)| *known == role && context.table == table);
        let context = known.unwrap_or_else(|| {
            let context = Context { format, table, since: now, violated: BTreeMap::new() };
            self.contexts.push((role, context));
            self.contexts.len() - 1
        });
        match self.loaded.iter_mut().find(|loaded| loaded.id == id) {
            Some(loaded) => {
                // Roles that a policy does not tell apart share a root. It must then be of the same table and format.
                let held = &self.contexts[loaded.context].1;
                if (held.format, held.table) != (format, table) {
                    return Err(format!("{id:?} serves two formats or tables"));
                }
                loaded.count += 1;
                // What applies to one applies to all that the root serves.
                let since = held.since.min(self.contexts[context].1.since);
                let held = loaded.context;
                self.contexts[held].1.since = since;
            }
            None => self.loaded.push(Loaded { id, context, count: 1 }),
        }
        Ok(())
    }

    fn drop_root(&mut self, a: u32) -> Result<(), String> {
        if self.loaded.is_empty() {
            return Ok(());
        }
        let at = index(a, self.loaded.len());
        self.mmu.drop_root(&mut self.walker.env(), self.loaded[at].id).map_err(|error| error.to_string())?;
        self.loaded[at].count -= 1;
        if self.loaded[at].count == 0 {
            self.loaded.swap_remove(at);
        }
        Ok(())
    }

    fn start(&mut self) -> Result<(), String> {
        match self.mmu.start(&mut self.walker.env()) {
            Ok(()) if !self.tracking => {}
            Err(MmuError::Tracking) if self.tracking => return Ok(()),
            other => return Err(format!("{other:?}")),
        }
        self.tracking = true;
        self.forget_truth();
        if self.setup.config.strategy.starts_all_set() {
            for slot in self.slots.slots() {
                self.initial.insert_range(slot.first, slot.frames);
            }
        }
        Ok(())
    }

    fn forget_truth(&mut self) {
        let frames = self.setup.config.memory_frames;
        self.truth.clear();
        self.truth_l2.clear();
        self.ever_l2.clear();
        self.before.clear();
        (self.reported, self.initial) = (PageSet::new(frames), PageSet::new(frames));
    }

    fn harvest(&mut self) -> Result<(), String> {
        if !self.tracking {
            let refused = self.mmu.harvest(&mut self.walker.env(), &mut self.harvested);
            return if refused == Err(MmuError::NotTracking) { Ok(()) } else { Err(format!("{refused:?}")) };
        }
        let count = self.mmu.harvest(&mut self.walker.env(), &mut self.harvested).map_err(|error| error.to_string())?;
        if count != self.harvested.len() {
            return Err(format!("{count} pages counted, {} reported", self.harvested.len()));
        }
        let twin = self.setup.config.strategy.name() == "twin";
        for &frame in &self.truth {
            let seen = self.harvested.contains(frame) || twin && self.unchanged(frame);
            if !seen {
                return Err(format!("{frame:?} was written and is not reported"));
            }
        }
        for frame in self.harvested.iter() {
            let explained = self.truth.contains(&frame)
                || self.initial.contains(frame)
                || twin && (self.reported.contains(frame) || self.before.contains_key(&frame));
            if !explained {
                return Err(format!("{frame:?} is reported and was not written"));
            }
        }
        self.harvest_l2()?;
        self.reported.union(&self.harvested);
        self.before.clear();
        Ok(())
    }

    fn unchanged(&self, frame: Frame) -> bool {
        let mut now = [0; 512];
        self.walker.memory.copy_page(frame, &mut now);
        self.before.get(&frame).is_none_or(|before| **before == now)
    }

    fn harvest_l2(&mut self) -> Result<(), String> {
        if !self.setup.config.by_l2 {
            return Ok(());
        }
        let Some(frames) = self.mmu.harvest_l2().map_err(|error| error.to_string())? else { return Ok(()) };
        let frames: BTreeSet<L2Gfn> = frames.into_iter().collect();
        if let Some((l2, frame)) = self.truth_l2.iter().find(|(l2, _)| !frames.contains(l2)) {
            return Err(format!("L2 {l2} ({frame:?}) was written and is not reported by L2 frame"));
        }
        // Other frames can only be there because they share a shadow page, and so their place in a table.
        match frames.iter().find(|l2| !self.ever_l2.contains(&(l2.0 & 511))) {
            Some(l2) => Err(format!("L2 {l2} is reported, shares no table with a written one")),
            None => Ok(()),
        }
    }

    fn clear(&mut self, first: u64, count: u64) -> Result<(), String> {
        let result = self.mmu.clear(&mut self.walker.env(), Frame(first), count);
        if !self.tracking {
            return if result == Err(MmuError::NotTracking) { Ok(()) } else { Err(format!("{result:?}")) };
        }
        result.map_err(|error| error.to_string())?;
        let end = first + count;
        let cleared: Vec<Frame> = self.reported.iter().filter(|frame| (first..end).contains(&frame.0)).collect();
        for frame in cleared {
            self.reported.remove(frame);
            self.initial.remove(frame);
            self.truth.remove(&frame);
            self.truth_l2.retain(|_, written| *written != frame);
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), String> {
        match self.mmu.stop(&mut self.walker.env()) {
            Ok(()) if self.tracking => {}
            Err(MmuError::NotTracking) if !self.tracking => return Ok(()),
            other => return Err(format!("{other:?}")),
        }
        self.tracking = false;
        self.forget_truth();
        Ok(())
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
            if self.tracking && self.setup.config.strategy.name() == "twin" && !self.before.contains_key(&written.frame)
            {
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

/// L1's tables at the start. Returns the root tables' addresses.
fn build(setup: &Setup, memory: &mut PlainMemory) -> Vec<u64> {
    let mut rng = Rng(setup.seed);
    let format = setup.formats[0];
    let mut tables = Tables::new(format, setup.tables, setup.tables + TABLES);
    let regions: Vec<u64> = REGIONS.into_iter().filter(|region| region << 9 < format.frames()).collect();
    let mut small = Vec::new();
    for (number, &region) in regions.iter().enumerate() {
        let l2 = L2Gfn(region << 9);
        let block = rng.below(5) * 512;
        let access = rng.pick(&[Access::ALL, Access::ALL, Access::ALL, Access::READ.or(Access::EXECUTE)]);
        match rng.below(6) {
            0 | 1 if format.max_leaf() >= Level::M2 => {
                let block = if format.has_4_byte_gpte() { block & !1023 } else { block };
                tables.map(memory, l2, Gfn(block), Level::M2, access, !rng.once_in(3));
            }
            2 if format.max_leaf() == Level::G1 && setup.giant && region.is_multiple_of(512) => {
                tables.map(memory, l2, Gfn(0), Level::G1, access, true);
            }
            3 if !small.is_empty() && !format.has_4_byte_gpte() => {
                let other = rng.pick(&small);
                tables.share(memory, l2, Level::K4, other);
            }
            4 if number > 5 => {}
            _ => {
                let straight = rng.once_in(2);
                for run in [0..24, 60..70, 96..132, 316..324, 506..512] {
                    for page in run {
                        let target = if straight { page } else { page * 37 % 512 };
                        let used = !rng.once_in(4);
                        tables.map(memory, l2.plus(page), Gfn(block + target), Level::K4, access, used);
                    }
                }
                small.push(tables.table(memory, l2, Level::K4));
            }
        }
    }
    // A second root that shares the first one's tables, with one entry of its own.
    let second = tables.allocate();
    for offset in (0..4096).step_by(8) {
        let value = memory.read(Frame(tables.root.0), offset);
        memory.write(Frame(second.0), offset, value);
    }
    vec![tables.address(), second.address()]
}

const _: () = assert!(DATA.is_multiple_of(512));
