//! Umbra's shadow MMU: EPT12 in (whatever its format), EPT02 out. No KVM, no I/O, no clock.
//!
//! L1 translates L2's addresses by its own table, EPT12. The monitor builds EPT02 from it, fault by fault: shadow pages
//! in an arena, found by guest frame and role, with parents, reverse maps and counted roots. What changes leaves through
//! a [`Mapper`]. The words are those of Linux's `arch/x86/kvm/mmu`: role, spte, rmap, `parent_ptes`, unsync, zap,
//! collapse, quadrant. docs/mmu.md has the drawing, the invariants, and a strategy added step by step.
//!
//! The invariant: each EPT02 entry grants at most what each entry on its walk through EPT12 granted at some moment since
//! the last invalidation that applied to it, cut by the memory map and by tracking as they are now. Its other half: an
//! access that EPT12 permits now is never reflected to L1, and completes within two faults.
#![forbid(unsafe_code)]
// What a guest writes must not end the monitor: nothing here panics but by overflow, which release builds do not check.
#![cfg_attr(
    not(test),
    warn(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)
)]

mod access;
mod ahead;
mod arena;
mod audit;
mod block;
mod collapse;
mod config;
mod defects;
mod dirty;
mod fault;
mod format;
pub mod guest;
mod hardware;
mod head;
pub mod hostile;
mod link;
mod map;
mod memory;
mod mmu;
pub mod model;
mod outbox;
mod paths;
mod ptelist;
pub mod reference;
mod rmap;
mod role;
mod roots;
mod slots_change;
mod split;
mod spte;
#[expect(clippy::indexing_slicing, reason = "a test's own script and tables")]
pub mod stateful;
mod stats;
mod sync;
pub mod tables;
pub mod track;
pub mod walker;

pub use access::{Access, Kind, Request};
pub use config::{CacheSize, Caches, Collapse, Config, DEFAULT_TWINS, MmuError, NoMemory, RootPolicy, Split};
pub use defects::{Defect, Defects};
pub use dirty::{L2Set, PageSet};
pub use fault::Outcome;
pub use format::Format;
pub use hardware::Hardware;
pub use memory::{Backing, Env, Exchange, Extent, Flush, L1Memory, Mapper, NoMapper, Slot, Slots};
pub use mmu::Mmu;
pub use role::{ModeBits, Role, RootRole};
pub use roots::RootId;
pub use spte::{Frame, Spte, SpteRef};
pub use stats::{Memory, Stats};
pub use sync::Invalidation;
