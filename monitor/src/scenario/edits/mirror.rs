//! The same edits on a table of the monitor's own, and what Umbra's software walker makes of L2's probes under it.

use crate::failure::Failure;
use crate::pages::PageSet;
use crate::scenario::l1_cpu::format_of;
use umbra_mmu::guest::{GuestCaps, Reflection};
use umbra_mmu::track::strategy;
use umbra_mmu::walker::{Ended, PlainMemory, Walker};
use umbra_mmu::{
    Config, Env, Frame, Invalidation, Kind, L1Memory as _, Mmu, MmuError, Request, RootId, RootRole, Slot,
};
use umbra_shared::board::{Board, MAX_REGIONS, PAGES, Words};
use umbra_shared::edits::Epoch;
use umbra_shared::layout::TRACKED_GPA;
use umbra_shared::nested::{L2_BASE, Nested};
use umbra_shared::paging::{ept, long};
use umbra_shared::probe::Probe;
use umbra_shared::{Gfn, Level, PAGE_SIZE, nested};

/// Where the copy of the table is: root, pointers, directory, then leaf tables.
const ROOT: u64 = 1;
/// Page index of L1's first tracked page.
const FIRST: u64 = 512;
/// Entries of the walker's TLB, as a power of two.
const TLB_BITS: u32 = 8;

/// The copy's memory, while it is played on.
#[derive(Default)]
struct Tables(PlainMemory);

impl Words for Tables {
    fn read(&self, address: u64) -> u64 {
        self.0.read(Frame(address / PAGE_SIZE), address % PAGE_SIZE)
    }

    fn write(&mut self, address: u64, value: u64) {
        self.0.write(Frame(address / PAGE_SIZE), address % PAGE_SIZE, value);
    }
}

/// Makes a copy of the table that L1 has when it has filled it.
pub fn lay(memory: &mut impl Words, nested: &Nested) {
    let (table, leaf) = match nested.format {
        nested::Format::Ept => (ept::RIGHTS, ept::RIGHTS | ept::WRITE_BACK),
        _ => (long::PRESENT | long::WRITE | long::USER, long::PRESENT | long::WRITE | long::USER),
    };
    let at = |frame: u64| frame * PAGE_SIZE;
    let index = |level: Level| (L2_BASE.address() >> level.shift() & 511) * 8;
    memory.write(at(ROOT) + index(Level::T512), at(ROOT + 1) | table);
    memory.write(at(ROOT + 1) + index(Level::G1), at(ROOT + 2) | table);
    let regions = (nested.map.l2_pages() / PAGES).min(MAX_REGIONS as u64);
    for region in 0..regions {
        memory.write(at(ROOT + 2) + region * 8, at(ROOT + 3 + region) | table);
    }
    for page in 0..regions * PAGES {
        let to = TRACKED_GPA + nested.map.l1_page(page) * PAGE_SIZE;
        memory.write(at(ROOT + 3) + page * 8, to | leaf);
    }
}

/// The part of such a copy that is edited.
///
/// # Errors
/// [`Failure::Input`] for what cannot be edited.
pub fn board<W: Words>(words: W, nested: &Nested) -> Result<Board<W>, Failure> {
    let pages = nested.map.l1_pages();
    Board::find(words, ROOT * PAGE_SIZE, nested.format, pages, nested.map.l2_pages()).ok_or_else(|| {
        Failure::Input(format!(
            "--memory {}M: regions of 2M are edited, so it is a multiple of 2M",
            (pages * PAGE_SIZE) >> 20
        ))
    })
}

/// What a probe has to come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// It is made; a read finds this.
    Done(u64),
    /// L1 is told, with this information about the access.
    Told(u64),
}

/// A copy of L1: table and memory.
pub struct Mirror {
    board: Board<Tables>,
    walker: Walker,
    mmu: Mmu,
    root: RootId,
    pages: u64,
    /// L1's pages that L2 wrote since this was last cleared.
    pub written: PageSet,
}

fn broken(error: &MmuError) -> Failure {
    Failure::Check(format!("the walker: {error}"))
}

impl Mirror {
    /// A copy of what L1 has when it has filled its table, with each page's first word as [`Mirror::word`] says.
    ///
    /// # Errors
    /// [`Failure::Input`] for what cannot be edited.
    pub fn new(nested: &Nested, caps: GuestCaps) -> Result<Self, Failure> {
        let pages = nested.map.l1_pages();
        let mut memory = Tables(PlainMemory::new(FIRST + pages, 0));
        let format = format_of(nested);
        lay(&mut memory, nested);
        (0..pages).for_each(|page| memory.0.write(Frame(FIRST + page), 0, Self::word(page)));
        let mut board = board(memory, nested)?;
        let mut walker = Walker::new(std::mem::take(&mut board.words().0), TLB_BITS);
        let slots = [
            Slot { base: Gfn(0), frames: FIRST, first: Frame(0), read_only: false, max_level: Level::G1 },
            Slot {
                base: Gfn::containing(TRACKED_GPA),
                frames: pages,
                first: Frame(FIRST),
                read_only: false,
                max_level: Level::G1,
            },
        ];
        let Some(strategy) = strategy("write-protect") else {
            return Err(Failure::Check("the walker has no strategy write-protect".into()));
        };
        let config = Config { caps, ..Config::new(FIRST + pages, strategy) };
        let mut mmu = Mmu::new(config, &slots).map_err(|error| broken(&error))?;
        let root = mmu
            .load_root(&mut walker.env(), RootRole::new(format), ROOT * PAGE_SIZE)
            .map_err(|error| broken(&error))?;
        Ok(Self { board, walker, mmu, root, pages, written: PageSet::new(pages) })
    }

    /// What L1's page begins with at first: no stamp of a probe's.
    #[must_use]
    pub const fn word(page: u64) -> u64 {
        page + 1
    }

    /// What it begins with now.
    #[must_use]
    pub fn word_now(&self, page: u64) -> u64 {
        self.walker.load(Frame(FIRST + page), 0)
    }

    /// Plays an epoch, and invalidates if that is due.
    pub fn play(&mut self, seed: u64, number: u64) -> Epoch {
        self.board.words().0 = std::mem::take(&mut self.walker.memory);
        let epoch = self.board.play(seed, number);
        self.walker.memory = std::mem::take(&mut self.board.words().0);
        if epoch.due {
            let Walker { memory, tlb, .. } = &mut self.walker;
            self.mmu.invalidate(&mut Env { memory, mapper: tlb }, Invalidation::All);
        }
        epoch
    }

    /// What a probe comes to that writes `stamp`, if it writes.
    ///
    /// # Errors
    /// [`Failure::Check`] if the walker has no answer.
    pub fn probe(&mut self, probe: Probe, stamp: u64) -> Result<Expected, Failure> {
        let l2 = L2_BASE.plus(probe.page);
        let request = Request::of(if probe.write { Kind::Write } else { Kind::Read });
        match self.walker.execute(&mut self.mmu, self.root, l2, request, (0, stamp)) {
            Ended::Done { frame, .. } if probe.write => {
                self.written.insert(frame.0.wrapping_sub(FIRST));
                Ok(Expected::Done(0))
            }
            Ended::Done { frame, .. } => Ok(Expected::Done(self.walker.load(frame, 0))),
            Ended::Reflected(Reflection::EptViolation(bits) | Reflection::NestedPageFault(bits)) => {
                Ok(Expected::Told(bits))
            }
            other => Err(Failure::Check(format!("the walker answers {probe:?} with {other:?}"))),
        }
    }

    /// L1's tracked pages.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }
}
