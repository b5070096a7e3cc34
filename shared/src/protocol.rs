//! Doorbells, boot page and mailbox.
//!
//! The firmware talks to the monitor by a 32-bit OUT to [`DOORBELL_PORT`]: one exit, no memory access that KVM would have
//! to emulate. Everything else lies in pages of the system slot: the [`BootPage`] (monitor to firmware, once) and a
//! [`Mailbox`] for each vCPU (command in, report out). A vCPU that rings [`Doorbell::Ready`] finds a command in its
//! mailbox when it is entered again.
//!
//! The monitor treats all of it as untrusted: every number is checked before it is used, every length is cut to the field.

use crate::layout::MAX_SLOTS;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The port of all doorbells.
pub const DOORBELL_PORT: u16 = 0x5b0;
/// `BootPage::magic`: "umbraFW1" in memory order.
pub const BOOT_MAGIC: u64 = u64::from_le_bytes(*b"umbraFW1");
/// What RDI holds when the monitor enters a vCPU (the PVH entry has 0 there).
pub const ENTERED_BY_MONITOR: u64 = BOOT_MAGIC;

/// What an OUT to [`DOORBELL_PORT`] means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Doorbell {
    /// The last command is done (or this is the first time); the next one is expected in the mailbox.
    Ready = 1,
    /// `Mailbox::text` holds `text_bytes` bytes of output.
    Print = 2,
    /// The program ended with `Mailbox::exit_code`.
    Exit = 3,
    /// An exception: `Mailbox::exception` says which.
    Exception = 4,
    /// The firmware panicked: `Mailbox::text` says why.
    Panic = 5,
    /// This vCPU lacks what the firmware was asked for: `Mailbox::text` says what.
    NotHere = 6,
    /// The chipset's SMI command: the monitor sends this vCPU an SMI and enters it again.
    Smi = 7,
    /// L1 wants its L2 to run, as the control page says ([`crate::control`]); the next instruction is executed when L2 was left.
    EnterL2 = 8,
    /// L1 changed entries of its table that were present: translations of it are void.
    Invalidate = 9,
    /// L2 has done its work: it is left, and L1 goes on.
    Yield = 10,
    /// L2 is in another role from here on, which its control page names.
    ChangeRole = 11,
    /// This vCPU waits for another one, which may want to run.
    Wait = 12,
}

impl Doorbell {
    /// The doorbell of that number, or `None`.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::Ready),
            2 => Some(Self::Print),
            3 => Some(Self::Exit),
            4 => Some(Self::Exception),
            5 => Some(Self::Panic),
            6 => Some(Self::NotHere),
            7 => Some(Self::Smi),
            8 => Some(Self::EnterL2),
            9 => Some(Self::Invalidate),
            10 => Some(Self::Yield),
            11 => Some(Self::ChangeRole),
            12 => Some(Self::Wait),
            _ => None,
        }
    }
}

impl Doorbell {
    /// Whether an L2 may ring it for itself, as any guest may: all but those by which L1 speaks about its L2, and the end of a command.
    #[must_use]
    pub const fn is_of_any_guest(self) -> bool {
        matches!(self, Self::Print | Self::Exit | Self::Exception | Self::Panic | Self::NotHere)
    }
}

/// What the firmware is told once. Pattern fields are those of [`crate::pattern::Pattern`], see there.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BootPage {
    /// [`BOOT_MAGIC`].
    pub magic: u64,
    /// vCPUs that take part, 1..=8.
    pub vcpus: u64,
    /// Tracked pages over all slots.
    pub pages: u64,
    /// 1 for 4 KiB leaves in the firmware's own tables, 2 for 2 MiB ([`crate::Level`]).
    pub guest_page_level: u64,
    /// Frequency of the TSC in kHz as KVM says it, 0 if unknown.
    pub tsc_khz: u64,
    /// Physical address of the plans (4 bytes for each access of a round).
    pub plans: u64,
    /// Accesses that the plans have room for.
    pub plan_entries: u64,
    /// Physical address of the page-table pool.
    pub tables: u64,
    /// Bytes of the pool.
    pub table_bytes: u64,
    /// The pattern, encoded.
    pub pattern: [u64; 8],
    /// What the pages of the pattern are, if not the tracked pages themselves ([`crate::nested::Nested`], encoded); else zeroes.
    pub nested: [u64; crate::nested::WORDS],
    /// Physical address of the tables that an L2 needs, L2's own and L1's.
    pub nested_tables: u64,
    /// Bytes of them.
    pub nested_table_bytes: u64,
    /// Not 0: SMRAM is open, and the firmware shall install its handler there ([`crate::smm`]).
    pub smram: u64,
    /// The mode in which tracked pages are touched ([`crate::paging::Mode`]).
    pub guest_paging: u64,
    /// Physical address of that mode's tables, if it is not long mode's.
    pub legacy_tables: u64,
    /// Bytes of them.
    pub legacy_table_bytes: u64,
    /// TSC ticks from one access of [`Command::PacedRun`] to the next, at least.
    pub pace: u64,
    /// Physical address of the journals of [`Command::Race`] ([`crate::race::Journal`]), one for each vCPU but the first; 0 if there are none.
    pub journals: u64,
    /// Slots in use.
    pub slot_count: u64,
    /// First frame and pages of each tracked slot.
    pub slots: [[u64; 2]; MAX_SLOTS],
}

/// What a vCPU is asked to do. When the firmware is a hypervisor, its L2 does it, unless it says "L1 alone".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Command {
    /// Compute this vCPU's share of round `argument` into its part of the plans. Touches no tracked page.
    Plan = 1,
    /// Execute the plan: the bare loop.
    Timed = 2,
    /// Execute the plan, each write timed into the histogram.
    Observed = 3,
    /// Write every page of this vCPU's share once, with the stamp of round `argument`.
    Populate = 4,
    /// Plan and execute rounds from `argument` on, counting finished ones in `rounds_done`, until `stop` is set.
    FreeRun = 5,
    /// Empty the histogram.
    ClearHistogram = 6,
    /// L1 alone: enter L2 `argument` times, where it has nothing to do. [`Mailbox::ticks`] is the last one's.
    Enter = 7,
    /// L1 alone: make all entries of its table for L2's pages that are not there yet.
    Fill = 8,
    /// Change the vCPU's mode there and back: the [`crate::toggle::Toggle`] whose number is the lower half of `argument`. If the upper half is not 0, wait
    /// in between until so many vCPUs have come there since the boot (a bit's toggles alone). [`Mailbox::ticks`] is what that took. An L2 of the monitor's
    /// announces the roles that it passes through instead, and the ticks are those of L1, from the entry to the exit.
    Toggle = 9,
    /// Write the first pages, as many as the lower half of `argument` says, with the stamp of the round in its upper half.
    Touch = 10,
    /// As `FreeRun`, but each access waits until [`BootPage::pace`] ticks after the one before it, and is timed into the histogram.
    /// [`Mailbox::accesses_done`] counts them.
    PacedRun = 11,
    /// L1 alone: provoke case `argument` of [`crate::violation::CASES`], and report what L1 was told ([`crate::nested::Report`]).
    Provoke = 12,
    /// L1 alone: exchange leaves of its table as round `argument` demands, and say so where that is due.
    Edit = 13,
    /// L1 alone: play the edits of epoch `argument` ([`crate::edits`]) on its table. No L2 runs.
    Play = 14,
    /// L1 says what is due after the last [`Command::Play`], and lets its L2 make the probes of that epoch, or of the last [`Command::Attack`].
    Probe = 15,
    /// L1 alone: make its table and control page what they were at first, all of L2's pages mapped.
    Renew = 16,
    /// L1 alone, a malicious one: case `argument` of [`crate::hostile`].
    Attack = 17,
    /// An L2 of the monitor's alone: announce that it is in role `argument` ([`crate::role::Role`]). Ticks as for `Toggle`.
    Role = 18,
    /// Leave long mode, write all tracked pages with the stamp of the round in the upper half of `argument`, change the bit of the
    /// [`crate::toggle::Toggle`] in its lower half there and back, write the pages again, and come back. [`Doorbell::Ready`] is rung after each of the
    /// first three, and what is commanded then is ignored. [`Mailbox::ticks`] is what the change took. One slot, below 4 GiB.
    Unpaged = 19,
    /// Nothing: what was begun goes on.
    GoOn = 20,
    /// The first vCPU's L1 edits its table while the L2s of the others use it, as the [`crate::race::Order`] in `argument` says. [`Mailbox::writes`] of
    /// the first vCPU are the epochs that it played.
    Race = 21,
}

impl Command {
    /// The command of that number, or `None`.
    #[must_use]
    pub const fn from_number(number: u64) -> Option<Self> {
        match number {
            1 => Some(Self::Plan),
            2 => Some(Self::Timed),
            3 => Some(Self::Observed),
            4 => Some(Self::Populate),
            5 => Some(Self::FreeRun),
            6 => Some(Self::ClearHistogram),
            7 => Some(Self::Enter),
            8 => Some(Self::Fill),
            9 => Some(Self::Toggle),
            10 => Some(Self::Touch),
            11 => Some(Self::PacedRun),
            12 => Some(Self::Provoke),
            13 => Some(Self::Edit),
            14 => Some(Self::Play),
            15 => Some(Self::Probe),
            16 => Some(Self::Renew),
            17 => Some(Self::Attack),
            18 => Some(Self::Role),
            19 => Some(Self::Unpaged),
            20 => Some(Self::GoOn),
            21 => Some(Self::Race),
            _ => None,
        }
    }
}

/// An exception that the firmware did not expect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ExceptionReport {
    /// Vector, 0..=255 (Intel SDM 3A, table 6-1).
    pub vector: u64,
    /// The error code, 0 for vectors without one.
    pub error_code: u64,
    /// Where it happened.
    pub rip: u64,
    /// CR2: the address, for a page fault.
    pub cr2: u64,
    /// The stack pointer at that moment.
    pub rsp: u64,
    /// The code segment: its low two bits are the privilege level.
    pub cs: u64,
}

/// Bytes of `Mailbox::text`.
pub const TEXT_BYTES: usize = 2048;

/// One page for each vCPU.
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Mailbox {
    /// [`Command`], written by the monitor.
    pub command: u64,
    /// Its argument.
    pub argument: u64,
    /// Set by the monitor to end [`Command::FreeRun`].
    pub stop: u64,
    /// Accesses that the last plan holds for this vCPU.
    pub accesses: u64,
    /// Writes the last executed command made.
    pub writes: u64,
    /// TSC ticks between the first and the last access of the last executed command.
    pub ticks: u64,
    /// Rounds that [`Command::FreeRun`] has finished, counted from its argument: the number of the next round.
    pub rounds_done: u64,
    /// Accesses that [`Command::PacedRun`] has made since it began.
    pub accesses_done: u64,
    /// With [`Doorbell::Exit`].
    pub exit_code: u64,
    /// With [`Doorbell::Exception`].
    pub exception: ExceptionReport,
    /// Bytes of `text` in use.
    pub text_bytes: u64,
    /// With [`Doorbell::Print`], [`Doorbell::Panic`] and [`Doorbell::NotHere`]: UTF-8, cut where it does not fit.
    pub text: [u8; TEXT_BYTES],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_fit_a_page() {
        assert!(size_of::<BootPage>() <= 4096);
        assert!(size_of::<Mailbox>() <= 4096);
    }

    #[test]
    fn numbers_and_names_agree() {
        for number in 0..32 {
            assert!(Doorbell::from_number(number).is_none_or(|doorbell| doorbell as u32 == number));
            assert!(Command::from_number(number.into()).is_none_or(|command| command as u64 == u64::from(number)));
        }
    }
}
