//! A processor in software: it executes L2's accesses against EPT02 in a plain memory, through a TLB.
//!
//! The TLB keeps what it has until it is told to forget it, so a flush that the MMU owes is an access that goes wrong.

mod memory;
mod mirror;
mod tlb;

pub use memory::{PlainMemory, Written};
pub use mirror::Mirror;
pub use tlb::Tlb;

use umbra_shared::{L2Gfn, PAGE_SHIFT};

use crate::access::{Access, Request};
use crate::config::MmuError;
use crate::fault::Outcome;
use crate::guest::Reflection;
use crate::hardware::Hardware;
use crate::memory::{Env, Extent, Flush, L1Memory, Mapper};
use crate::mmu::Mmu;
use crate::roots::RootId;
use crate::spte::Frame;
use umbra_shared::{Gfn, Level};

/// How an access ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It was done, on this page of L1's memory.
    Done {
        /// The page.
        frame: Frame,
        /// By a translation that the TLB had.
        cached: bool,
        /// Faults that it took; exits for a full log do not count.
        faults: u32,
    },
    /// L1 gets an exit.
    Reflected(Reflection),
    /// The monitor is asked for memory.
    WantsMemory(Gfn),
    /// The MMU ran out of memory.
    NoMemory,
    /// Nothing came of it in so many faults.
    Stuck,
}

/// Faults after which an access counts as stuck.
pub const MAX_FAULTS: u32 = 4;

/// The walker: memory, TLB, and counts.
#[derive(Debug)]
pub struct Walker {
    /// L1's memory.
    pub memory: PlainMemory,
    /// Cached translations.
    pub tlb: Tlb,
    /// Exits for a full log.
    pub log_exits: u64,
}

/// The mapper of a processor that walks EPT02 itself: flushes matter, mappings are EPT02's own.
impl Mapper for Tlb {
    fn map(&mut self, extent: Extent, frame: Frame, _: Level, access: Access) {
        if let Some(mirror) = &mut self.mirror {
            mirror.map(extent, frame, access);
        }
    }

    fn protect(&mut self, extent: Extent, access: Access) {
        if let Some(mirror) = &mut self.mirror {
            mirror.protect(extent, access);
        }
    }

    fn protect_all(&mut self, root: RootId, starts: &[L2Gfn], frames: u64, access: Access) {
        if let Some(mirror) = &mut self.mirror {
            for start in starts {
                mirror.protect(Extent { root, start: *start, frames }, access);
            }
        }
    }

    fn unmap(&mut self, extent: Extent) {
        if let Some(mirror) = &mut self.mirror {
            mirror.unmap(extent);
        }
    }

    fn flush(&mut self, flush: Flush) {
        match flush {
            Flush::All => self.forget_all(),
            Flush::Extent(extent) => self.forget(extent),
        }
    }
}

impl Walker {
    /// A walker over `memory` with a TLB of `2^tlb_bits` entries.
    #[must_use]
    pub fn new(memory: PlainMemory, tlb_bits: u32) -> Self {
        Self { memory, tlb: Tlb::new(tlb_bits), log_exits: 0 }
    }

    /// Both sides for an operation of the MMU.
    pub fn env(&mut self) -> Env<'_> {
        Env { memory: &mut self.memory, mapper: &mut self.tlb }
    }

    /// Translates L2's access, faulting as often as it takes. Nothing is read or written yet.
    pub fn access(&mut self, mmu: &mut Mmu, root: RootId, l2: L2Gfn, request: Request, needed: Access) -> Ended {
        let write = needed.allows(Access::WRITE);
        if let Some((frame, access, dirty)) = self.tlb.find(root, l2) {
            // A clean translation cannot serve a write: hardware walks again to set the dirty flag.
            if access.allows(needed) && (dirty || !write) {
                return Ended::Done { frame, cached: true, faults: 0 };
            }
            if !access.allows(needed) {
                // A violation voids what was cached for the address (SDM 3C 29.4.3.1).
                self.tlb.forget(Extent { root, start: l2, frames: 1 });
            }
        }
        let mut faults = 0;
        loop {
            match mmu.hardware_walk(root, l2, needed) {
                Err(_) => return Ended::Stuck,
                Ok(Hardware::LogFull) => {
                    self.log_exits += 1;
                    mmu.drain_log();
                }
                Ok(Hardware::Translated { frame, level, access, dirty }) => {
                    self.tlb.insert(root, l2, level, frame, access, dirty);
                    return Ended::Done { frame, cached: false, faults };
                }
                Ok(Hardware::Violation) => {
                    self.tlb.forget(Extent { root, start: l2, frames: 1 });
                    if faults == MAX_FAULTS {
                        return Ended::Stuck;
                    }
                    faults += 1;
                    let mut env = Env { memory: &mut self.memory, mapper: &mut self.tlb };
                    match mmu.fault(&mut env, root, l2.0 << PAGE_SHIFT, request) {
                        Ok(Outcome::Mapped { .. } | Outcome::Retry) => {}
                        Ok(Outcome::Reflected(reflection)) => return Ended::Reflected(reflection),
                        Ok(Outcome::WantsMemory { gfn, .. }) => return Ended::WantsMemory(gfn),
                        Err(MmuError::NoMemory) => return Ended::NoMemory,
                        Err(_) => return Ended::Stuck,
                    }
                }
            }
        }
    }

    /// Executes an access of L2 itself: translates it, and for a write stores `value` at `offset` of the page.
    pub fn execute(
        &mut self,
        mmu: &mut Mmu,
        root: RootId,
        l2: L2Gfn,
        request: Request,
        (offset, value): (u64, u64),
    ) -> Ended {
        let ended = self.access(mmu, root, l2, request, request.kind.needs());
        if let Ended::Done { frame, .. } = ended
            && request.is_write()
        {
            self.memory.store(frame, offset, value);
        }
        ended
    }

    /// The 8 bytes at `offset` of a page, as L1 sees them.
    #[must_use]
    pub fn load(&self, frame: Frame, offset: u64) -> u64 {
        self.memory.read(frame, offset)
    }
}
