//! A machine under siege: L1, and what the monitor knows of it without asking it.

use super::forecast::Forecast;
use super::reach::Reach;
use crate::failure::Failure;
use crate::guest::{self, Machine, Plan};
use crate::nested::Host;
use crate::nested::memory::View;
use crate::track::{Kind, Tracker};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use umbra_mmu::{Access, Extent, Format, Frame, Mapper as _, Slots};
use umbra_shared::board::{Board, Words};
use umbra_shared::hostile::{Case, Place};
use umbra_shared::nested::{self, Flags, Nested};
use umbra_shared::paging::ENTRIES;
use umbra_shared::protocol::Command;
use umbra_shared::{Gfn, Level, PAGE_SIZE};

/// Accessed and dirty flags of an entry in any format: they come without anybody's store.
const FLAGS: u64 = 3 << 8 | 3 << 5;

/// L1's memory as a generator of edits reads it.
struct Memory<'a>(&'a View);

impl Words for Memory<'_> {
    fn read(&self, address: u64) -> u64 {
        self.0.0.word(address).map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn write(&mut self, _: u64, _: u64) {}
}

/// The machine.
pub struct Fort {
    pub machine: Machine,
    pub host: Arc<Host>,
    pub place: Place,
    pub tracker: Box<dyn Tracker>,
    reach: Reach,
    nested: Nested,
    view: View,
    slots: Slots,
    /// EPT12's own pages.
    tables: Range<Frame>,
    /// The words that lead to L2's own code, as L1 built them.
    code: Vec<(u64, u64)>,
}

impl Fort {
    /// Boots it, and has L1 build its table.
    pub fn new(plan: &Plan, nested: Nested, kind: Kind) -> Result<Self, Failure> {
        let machine = Machine::new(plan, None, |_| Ok(()))?;
        machine.untimed(0..1, Command::Renew, 0)?;
        let Some(host) = machine.l2().map(Arc::clone) else {
            return Err(Failure::Check("hostile: a machine without an L2".into()));
        };
        let view = View(Arc::clone(host.memory()));
        let slots = Slots::new(&host.memory().slots(), host.memory().frames()).map_err(Failure::Check)?;
        let root = machine.control(0)?.root;
        let (l1, l2) = (nested.map.l1_pages(), nested.map.l2_pages());
        let Some(board) = Board::find(Memory(&view), root, nested.format, l1, l2) else {
            return Err(Failure::Check("hostile: L1's table has no leaf tables".into()));
        };
        let place = Place::of(&board, root, machine.nested_report()?.table_pages);
        let first = slots.find(Gfn::containing(root)).map_or(Frame(0), |found| found.frame);
        let tables = first..first.plus(place.table_pages);
        let code = code(&Memory(&view), root, host.memory().frames());
        let mut tracker = kind.build(&machine, None)?;
        tracker.start(&machine)?;
        Ok(Self { machine, host, place, tracker, reach: Reach::default(), nested, view, slots, tables, code })
    }

    /// Makes L1's table and its control pages what they were at first.
    pub fn renew(&mut self) -> Result<(), guest::Error> {
        self.reach = Reach::default();
        (0..self.machine.vcpus()).try_for_each(|vcpu| self.machine.untimed(vcpu..vcpu + 1, Command::Renew, 0))
    }

    /// L1 is about to make the stores of `case`.
    pub fn store(&mut self, case: &Case) {
        self.reach.store(&self.view, &self.slots, case);
    }

    /// What L1's table says now.
    pub fn forecast(&self) -> Forecast<'_> {
        let format = match self.nested.format {
            nested::Format::Ept => {
                Format::Ept { five_levels: false, accessed_dirty: self.nested.flags != Flags::Unused }
            }
            _ => Format::Npt { five_levels: false, nx: true },
        };
        Forecast::new(&self.view, &self.slots, format, self.place.root)
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

    /// Whether L1's table still leads L2 to its code.
    pub fn has_code(&self) -> bool {
        let memory = Memory(&self.view);
        self.code.iter().all(|&(address, word)| memory.read(address) == word)
    }

    /// Whether L2 may execute something that is not its code.
    pub fn misleads(&self) -> bool {
        !self.has_code() && self.reach.misleads(&self.forecast(), self.first_tracked())
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
        self.view.0.first_word(frame).map_or(0, |word| word.load(Ordering::Acquire) & !FLAGS)
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
        let (frame, word) = tracked.into_iter().find(|(frame, word)| self.word(**frame) != **word & !FLAGS)?;
        Some(format!("L2 wrote {word:#x} to L1's page {}, which has {:#x}", name(frame), self.word(*frame)))
    }

    /// Calls that changed the windows so far.
    pub fn calls(&self) -> Result<u64, Failure> {
        let counts = self.host.shadow()?.places.counts();
        Ok(counts.maps + counts.protects + counts.closes)
    }

    /// Pages of all windows, and bytes that the shadow MMU takes.
    pub fn sizes(&self) -> Result<(u64, u64), Failure> {
        let shadow = self.host.shadow()?;
        let pages: usize = shadow.places.here().windows().iter().map(|window| window.pages.len()).sum();
        Ok((pages as u64, shadow.memory().total()))
    }

    /// The fault stray-page: maps a page that EPT02 does not.
    pub fn stray(&self) -> Result<(), Failure> {
        let mut shadow = self.host.shadow()?;
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
