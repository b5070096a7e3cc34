//! System management mode: where SMRAM lies, and what the firmware's handler leaves there.
//!
//! Each vCPU has 64 KiB of its own, so that several can be in SMM at a time; SMBASE of vCPU 0 is what a reset leaves (AMD APM 2, 10.2.3; Intel SDM 3C,
//! 32.4). In the guest's ordinary view the same addresses are ordinary memory of the system slot.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// SMBASE of vCPU 0.
pub const SMRAM: u64 = 0x3_0000;
/// From one vCPU's SMBASE to the next one's.
pub const SMRAM_BYTES: u64 = 0x1_0000;
/// Where an SMI leads, from SMBASE on (APM 2, 10.2.2).
pub const ENTRY: u64 = 0x8000;
/// [`Ledger`], from SMBASE on.
pub const LEDGER: u64 = 0x9000;
/// The interrupted RIPs of the last [`LOG_ENTRIES`] SMIs, 8 bytes each, from SMBASE on: a ring.
pub const LOG: u64 = 0xa000;
/// Entries of the ring: two pages.
pub const LOG_ENTRIES: u64 = 1024;
/// The state that the CPU saved, from SMBASE on, in AMD's 64-bit layout, which KVM uses for every guest with long mode.
pub const SAVE_STATE: u64 = 0xfe00;

/// SMBASE of vCPU `index`.
#[must_use]
pub const fn smbase(index: usize) -> u64 {
    SMRAM + index as u64 * SMRAM_BYTES
}

/// Whether SMM has a view of memory of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// SMRAM is memory that only SMM sees.
    Own,
    /// SMM sees what everybody sees.
    Shared,
}

/// What the handler keeps in its first page of data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Ledger {
    /// SMIs that it has handled.
    pub handled: u64,
    /// Where it reports that number in memory that everybody sees.
    pub report: u64,
}

/// Offsets of what the CPU saved, from SMBASE on (APM 2, table 10-1).
pub mod saved {
    /// EFER.
    pub const EFER: u64 = 0xfed0;
    /// CR4, CR3 and CR0.
    pub const CR4: u64 = 0xff48;
    /// CR3.
    pub const CR3: u64 = 0xff50;
    /// CR0.
    pub const CR0: u64 = 0xff58;
    /// RFLAGS.
    pub const RFLAGS: u64 = 0xff70;
    /// RIP.
    pub const RIP: u64 = 0xff78;
    /// RAX; RCX, RDX, RBX, RSP, RBP, RSI, RDI and R8 to R15 lie before it, 8 bytes each.
    pub const RAX: u64 = 0xfff8;
}

const _: () = {
    assert!(LEDGER + size_of::<Ledger>() as u64 <= LOG);
    assert!(LOG + 8 * LOG_ENTRIES <= SAVE_STATE);
    assert!(smbase(crate::layout::MAX_VCPUS) <= crate::layout::IMAGE_START);
};
