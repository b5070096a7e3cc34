//! A machine under siege: L1, and what the monitor knows of it without asking it.

use super::forecast::{Forecast, Rules};
use super::reach::Reach;
use crate::failure::Failure;
use crate::guest::{self, Machine, Plan};
use crate::kvm::bus::{self, EmptyBus};
use crate::nested::Host;
use crate::nested::memory::{L1Pages, View};
use crate::track::{Kind, Tracker};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use umbra_mmu::{Access, Extent, Frame, Mapper as _, Slots};
use umbra_shared::board::{Board, Words};
use umbra_shared::hostile::{Case, Place};
use umbra_shared::layout::TRACKED_GPA;
use umbra_shared::nested::{Format, Nested, Report};
use umbra_shared::paging::{ENTRIES, ept, long};
use umbra_shared::probe::Probe;
use umbra_shared::protocol::Command;
use umbra_shared::{Gfn, Level, PAGE_SIZE};

/// How long an L1 that may have broken itself has for its last table, where nobody can take its L2 from it.
const LAST: Duration = Duration::from_millis(300);

/// L1's memory as a generator of edits reads it.
struct Memory<'a>(&'a View);

impl Words for Memory<'_> {
    fn read(&self, address: u64) -> u64 {
        self.0.0.word(address).map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn write(&mut self, _: u64, _: u64) {}
}

/// Who runs L2 where the monitor does, and what tracks its writes.
struct Ours {
    host: Arc<Host>,
    tracker: Box<dyn Tracker>,
}

/// The machine.
pub struct Fort {
    pub machine: Machine,
    pub place: Place,
    /// `None` where KVM shadows L1's table.
    ours: Option<Ours>,
    /// What lies beyond L1's memory for KVM, whose L2s get there.
    bus: Arc<EmptyBus>,
    reach: Reach,
    nested: Nested,
    rules: Rules,
    view: View,
    slots: Slots,
    /// EPT12's own pages.
    tables: Range<Frame>,
    /// The words that lead to L2's own code, as L1 built them.
    code: Vec<(u64, u64)>,
    /// The pages that begin with one of them.
    code_pages: BTreeSet<Frame>,
}

impl Fort {
    /// Boots it, and has L1 build its table.
    pub fn new(plan: &Plan, nested: Nested, kind: Option<Kind>) -> Result<Self, Failure> {
        let bus = Arc::new(EmptyBus::default());
        let plan = Plan { bus: kind.is_none().then(|| Arc::clone(&bus)), ..plan.clone() };
        let machine = Machine::new(&plan, None, |_| Ok(()))?;
        machine.untimed(0..1, Command::Renew, 0)?;
        let host = machine.l2().map(Arc::clone);
        let pages = host.as_ref().map_or_else(|| Arc::new(L1Pages::of(machine.vm())), |host| Arc::clone(host.memory()));
        let slots = Slots::new(&pages.slots(), pages.frames()).map_err(Failure::Check)?;
        let pages_of_l1 = pages.frames();
        let view = View(pages);
        let rules = Rules::of(&nested)?;
        let Report { table_root: root, table_pages, .. } = machine.nested_report()?;
        // The firmware says it, and it may be anybody's.
        let sound = root.is_multiple_of(PAGE_SIZE) && table_pages <= pages_of_l1;
        let Some(first) = slots.find(Gfn::containing(root)).filter(|_| sound).map(|found| found.frame) else {
            return Err(Failure::Check(format!("L1 says that its table has {table_pages} pages from {root:#x} on")));
        };
        let (l1, l2) = (nested.map.l1_pages(), nested.map.l2_pages());
        let Some(board) = Board::find(Memory(&view), root, nested.format, l1, l2) else {
            return Err(Failure::Check("L1's table has no leaf tables".into()));
        };
        let place = Place::of(&board, root, table_pages);
        let tables = first..first.plus(place.table_pages);
        let code = code(&Memory(&view), root, view.0.frames());
        let starts = code.iter().filter(|(address, _)| address.is_multiple_of(PAGE_SIZE));
        let code_pages = starts.filter_map(|(address, _)| Some(slots.find(Gfn::containing(*address))?.frame)).collect();
        let ours = match (kind, host) {
            (Some(kind), Some(host)) => {
                let mut tracker = kind.build(&machine, None)?;
                tracker.start(&machine)?;
                Some(Ours { host, tracker })
            }
            (None, None) => None,
            _ => return Err(Failure::Check("hostile: the machine and its row differ in who runs L2".into())),
        };
        let reach = Reach::default();
        Ok(Self { machine, place, ours, bus, reach, nested, rules, view, slots, tables, code, code_pages })
    }

    /// Whether KVM shadows L1's table, and not Umbra.
    pub const fn is_kvms(&self) -> bool {
        self.ours.is_none()
    }

    /// Makes L1's table and its control pages what they were at first.
    pub fn renew(&mut self) -> Result<(), guest::Error> {
        self.reach = Reach::default();
        (0..self.machine.vcpus()).try_for_each(|vcpu| self.machine.untimed(vcpu..vcpu + 1, Command::Renew, 0))
    }

    /// L1, which may have broken itself, builds another table: what is broken may not show at once.
    pub fn last_table(&mut self) -> Result<(), guest::Error> {
        if self.ours.is_some() {
            return self.renew();
        }
        let renew = |vcpu| self.machine.untimed_within(vcpu, Command::Renew, 0, LAST).map(|_| ());
        (0..self.machine.vcpus()).try_for_each(renew)
    }

    /// L1 is about to make the stores of `case`.
    pub fn store(&mut self, case: &Case) {
        self.reach.store(&self.view, &self.slots, case);
    }

    /// What L1's table says now.
    pub fn forecast(&self) -> Forecast<'_> {
        Forecast::new(&self.view, &self.slots, self.rules, self.place.root, &self.code_pages)
    }

    /// The pages that L2 may come to write by the probes of `case`; `None` if they are too many to tell.
    pub fn reached(&mut self, case: &Case) -> Option<BTreeSet<Frame>> {
        let mut reach = std::mem::take(&mut self.reach);
        let reached = reach.write(&self.forecast(), case.probes());
        self.reach = reach;
        reached
    }

    /// Whether one of `frames` is L1's own: its image, its stacks, what it shares with the monitor, L2's own tables.
    pub fn is_own(&self, frames: &BTreeSet<Frame>) -> bool {
        frames.range(..self.first_tracked()).any(|frame| !self.tables.contains(frame))
    }

    /// Whether L2 may take its own code away by writing `frames`.
    pub fn is_code(&self, frames: &BTreeSet<Frame>) -> bool {
        !frames.is_disjoint(&self.code_pages)
    }

    /// Whether L1's table still leads L2 to its code.
    pub fn has_code(&self) -> bool {
        let (memory, flags) = (Memory(&self.view), self.rules.flags());
        self.code.iter().all(|&(address, word)| (memory.read(address) ^ word) & !flags == 0)
    }

    /// Whether L2 may execute something that is not its code.
    pub fn misleads(&self) -> bool {
        if self.has_code() {
            return false;
        }
        let forecast = self.forecast();
        self.reach.misleads(&forecast, self.first_tracked()) || forecast.breaks_code()
    }

    /// What L2 did beyond L1's memory since this was last asked, where KVM lets it.
    pub fn went_beyond(&self) -> Vec<bus::Access> {
        self.bus.take()
    }

    fn first_tracked(&self) -> Frame {
        self.view.0.first_tracked()
    }

    /// The first words of all tracked pages, without what sets itself.
    pub fn words(&self) -> BTreeMap<Frame, u64> {
        let frames = self.view.0.tracked().flat_map(|(first, _, pages)| (0..pages).map(move |page| first.plus(page)));
        frames.map(|frame| (frame, self.word(frame))).collect()
    }

    fn word(&self, frame: Frame) -> u64 {
        self.view.0.first_word(frame).map_or(0, |word| word.load(Ordering::Acquire) & !self.rules.flags())
    }

    /// What is wrong with what L2 wrote, if something is: a page that was out of its reach, by the words before; a word that is not where it has to be.
    pub fn misplaced(
        &self,
        before: &BTreeMap<Frame, u64>,
        reached: &BTreeSet<Frame>,
        written: &BTreeMap<Frame, u64>,
    ) -> Option<String> {
        let name = |frame: &Frame| frame.0 - self.first_tracked().0;
        let changed = before.iter().filter(|(frame, word)| self.word(**frame) != **word);
        let stray = changed.map(|(frame, _)| frame).find(|frame| !reached.contains(frame));
        if let Some(frame) = stray {
            let (page, word) = (name(frame), self.word(*frame));
            return Some(format!("L1's page {page} was written ({word:#x}), and no walk of the table led L2 there"));
        }
        let tracked = written.range(self.first_tracked()..);
        let (frame, word) =
            tracked.into_iter().find(|(frame, word)| self.word(**frame) != **word & !self.rules.flags())?;
        Some(format!("L2 wrote {word:#x} to L1's page {}, which has {:#x}", name(frame), self.word(*frame)))
    }

    /// What was written since the last time is harvested.
    pub fn harvest(&mut self) -> Result<(), Failure> {
        let Some(Ours { tracker, .. }) = &mut self.ours else { return Ok(()) };
        tracker.harvest(&self.machine)?;
        if tracker.clears() {
            tracker.clear(&self.machine)?;
        }
        Ok(())
    }

    /// What tracking counted.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.ours.as_ref().map_or(Vec::new(), |ours| ours.tracker.counters(&self.machine))
    }

    /// How the windows differ from EPT02, or from what the process has mapped, if they do.
    pub fn audit(&self) -> Result<Option<String>, Failure> {
        let Some(Ours { host, .. }) = &self.ours else { return Ok(None) };
        let audited = host.shadow()?.audit();
        Ok(audited.err())
    }

    /// Calls that changed the windows so far; there are windows where the monitor runs L2.
    pub fn calls(&self) -> Result<u64, Failure> {
        let Some(Ours { host, .. }) = &self.ours else { return Ok(0) };
        let counts = host.shadow()?.places.counts();
        Ok(counts.maps + counts.protects + counts.closes)
    }

    /// Pages of all windows, and bytes that the shadow MMU takes.
    pub fn sizes(&self) -> Result<(u64, u64), Failure> {
        let Some(Ours { host, .. }) = &self.ours else { return Ok((0, 0)) };
        let shadow = host.shadow()?;
        let pages: usize = shadow.places.here().windows().iter().map(|window| window.pages.len()).sum();
        Ok((pages as u64, shadow.memory().total()))
    }

    /// The fault stray-page where KVM has EPT02, which nobody else can change: KVM is made to map a page that L1 has not granted by an entry that
    /// L1 has not stored. Says whether one of `probes` finds it.
    pub fn slip_in(&self, probes: &[(Probe, u64)]) -> bool {
        let rights = match self.nested.format {
            Format::Ept => ept::RIGHTS | ept::WRITE_BACK,
            _ => long::PRESENT | long::WRITE | long::USER,
        };
        probes.iter().any(|&(probe, _)| {
            let Some(entry) = self.view.0.word(self.place.leaf(probe.page)) else { return false };
            if self.forecast().permits(probe) {
                return false;
            }
            let old = entry.swap(TRACKED_GPA | rights, Ordering::AcqRel);
            let found = self.forecast().permits(probe);
            if !found {
                entry.store(old, Ordering::Release);
            }
            found
        })
    }

    /// The fault stray-page: maps a page that EPT02 does not.
    pub fn stray(&self) -> Result<(), Failure> {
        let Some(Ours { host, .. }) = &self.ours else { return Ok(()) };
        let mut shadow = host.shadow()?;
        let Some(root) = shadow.root() else { return Ok(()) };
        let windows = shadow.places.here().windows().iter();
        let mut pages = windows.flat_map(|window| (0..window.pages.len() as u64).map(|page| window.first.plus(page)));
        let free = pages.find(|&gfn| shadow.mmu.peek(root, gfn).is_ok_and(|granted| granted.is_none()));
        if let Some(start) = free {
            let access = Access::READ.or(Access::WRITE).or(Access::EXECUTE);
            shadow.places.here_mut().map(Extent { root, start, frames: 1 }, Frame(0), Level::K4, access);
            if let Some(error) = shadow.places.settle() {
                return Err(Failure::Check(format!("--inject stray-page: {error}")));
            }
        }
        Ok(())
    }

    /// The fault break-l1: what a wild write of the monitor's would do, where L1 waits.
    pub fn break_l1(&self) -> Result<(), Failure> {
        /// UD2, over and over.
        const NONSENSE: u64 = u64::from_le_bytes([0x0f, 0x0b, 0x0f, 0x0b, 0x0f, 0x0b, 0x0f, 0x0b]);
        for (registers, _) in self.machine.registers()? {
            for address in [registers.rip & !7, (registers.rip & !7) + 8] {
                if let Some(word) = self.view.0.word(address) {
                    word.store(NONSENSE, Ordering::Release);
                }
            }
        }
        Ok(())
    }
}

/// The words of L1's table by which L2 finds its code, its stack, and what it shares with L1: the first ones of the first three tables.
fn code(memory: &Memory<'_>, root: u64, frames: u64) -> Vec<(u64, u64)> {
    let pointers = root + PAGE_SIZE;
    let directory = root + 2 * PAGE_SIZE;
    let large = frames.div_ceil(ENTRIES as u64);
    let places = [root, pointers].into_iter().chain((0..large.min(ENTRIES as u64)).map(|index| directory + index * 8));
    places.map(|address| (address, memory.read(address))).collect()
}
