//! Umbra's interface for L2: L1 fills a [`ControlPage`] and rings [`Doorbell::EnterL2`](crate::protocol::Doorbell::EnterL2).
//!
//! The monitor runs L2 on a VM of its own until something happens that is L1's business, writes that into the page, and lets L1 go on behind
//! its OUT. Everything that L1 writes is untrusted: [`ControlPage::check`] makes an [`Entry`] of it, or says what is wrong.

use crate::PAGE_SIZE;
use crate::gfn::L2Gfn;
use crate::nested::Format;
use crate::role::Role;
use core::fmt;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Windows that L2's physical memory can have.
pub const MAX_WINDOWS: usize = 8;
/// Frames that all windows together can have: 64 GiB.
pub const MAX_FRAMES: u64 = 1 << 24;
/// Physical addresses of L2 end here, as those of any 46-bit processor.
pub const FRAME_LIMIT: u64 = 1 << 34;
/// Bytes of L2's own page tables that the monitor maps before L2 runs, at most.
pub const MAX_TABLE_BYTES: u64 = 64 << 20;

/// What L1 says about its L2, and the monitor about L2's exit. One page for each vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ControlPage {
    /// L1 physical address of EPT12's root.
    pub root: u64,
    /// [`Format`] of EPT12.
    pub format: u64,
    /// 1 if A and D of EPT12 are in use (EPTP bit 6), where the format leaves that open; else 0.
    pub accessed_dirty: u64,
    /// L2's physical memory: first frame and frames of each window, in order; 0 frames for none. What lies outside is a violation.
    pub windows: [[u64; 2]; MAX_WINDOWS],
    /// Where L2's own page tables lie: L2 physical address and bytes. They are mapped before L2 runs.
    pub tables: [u64; 2],
    /// Not 0: L2 begins, with the state that follows. 0: it goes on where it was left.
    pub start: u64,
    /// L2's state when it begins: 64-bit mode at ring 3.
    pub state: State,
    /// Not 0: L1 is told when L2 ends ([`Exit::Ended`]), as SVM's SHUTDOWN intercept has it. 0: the monitor stops the machine and says why.
    pub intercept: u64,
    /// What L2 is to do; the monitor does not look at it.
    pub work: u64,
    /// The [`Role`] that L2 is in. L1 says where it begins; L2 changes it and rings [`Doorbell::ChangeRole`](crate::protocol::Doorbell::ChangeRole).
    pub role: u64,
    /// Why L2 was left: [`Exit`]. Written by the monitor, as all that follows.
    pub exit: u64,
    /// With [`Exit::Violation`]: the L2 physical address.
    pub address: u64,
    /// With [`Exit::Violation`] what a processor says of the access: the exit qualification (EPT) or EXITINFO1 (other formats). With other exits,
    /// and outside of all windows, bit 1 alone: set if the access was a write.
    pub qualification: u64,
}

const _: () = assert!(size_of::<ControlPage>() as u64 <= PAGE_SIZE);

/// L2's registers when it begins. Addresses are linear ones but CR3; what is not here is as the monitor sets it for L1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct State {
    /// L2 physical address of its PML4.
    pub cr3: u64,
    /// The first instruction.
    pub rip: u64,
    /// The stack.
    pub rsp: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// Selectors of code, data and task.
    pub selectors: [u64; 3],
    /// Base and limit of the GDT.
    pub gdt: [u64; 2],
    /// Base and limit of the IDT.
    pub idt: [u64; 2],
    /// Base and limit of the TSS.
    pub task: [u64; 2],
}

/// Why L2 was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Exit {
    /// It rang [`Doorbell::Yield`](crate::protocol::Doorbell::Yield).
    Yield = 1,
    /// EPT12 does not permit what it did.
    Violation = 2,
    /// EPT12 leads out of L1's memory, or a table of it does.
    Beyond = 3,
    /// EPT12 has an entry that is none (a misconfiguration).
    Misconfigured = 4,
    /// A leaf permits no execution, or nothing else, which the monitor cannot enforce: KVM does not look at execute rights of a mapping.
    ExecuteRights = 5,
    /// The control page makes no sense; L2 did not run.
    Refused = 6,
    /// L2 cannot go on: an exception that it did not expect, a triple fault, a halt, or an instruction that KVM cannot emulate. With
    /// [`ControlPage::intercept`] alone.
    Ended = 7,
}

impl Exit {
    /// The exit of that number, or `None`.
    #[must_use]
    pub const fn from_number(number: u64) -> Option<Self> {
        match number {
            1 => Some(Self::Yield),
            2 => Some(Self::Violation),
            3 => Some(Self::Beyond),
            4 => Some(Self::Misconfigured),
            5 => Some(Self::ExecuteRights),
            6 => Some(Self::Refused),
            7 => Some(Self::Ended),
            _ => None,
        }
    }
}

/// A stretch of L2's physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Its first frame.
    pub first: L2Gfn,
    /// How many, at least one.
    pub frames: u64,
}

/// A control page that makes sense. The invariant is: windows are in order, do not overlap, and end below [`FRAME_LIMIT`]; tables lie in one of
/// them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// EPT12's root.
    pub root: u64,
    /// Its format.
    pub format: Format,
    /// Whether A and D are in use.
    pub accessed_dirty: bool,
    windows: [Window; MAX_WINDOWS],
    count: usize,
    /// L2's own page tables: first frame and frames.
    pub tables: Window,
    /// L2's role.
    pub role: Role,
    /// L2's state, if it begins.
    pub start: Option<State>,
}

impl Entry {
    /// The windows.
    #[must_use]
    pub fn windows(&self) -> &[Window] {
        &self.windows[..self.count]
    }
}

/// What is wrong with a control page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No [`Format`].
    Format(u64),
    /// No such value of `accessed_dirty`.
    AccessedDirty(u64),
    /// There is no window.
    NoWindow,
    /// This window overlaps the one before it, ends beyond [`FRAME_LIMIT`], or is one too large.
    Window(usize),
    /// The tables lie in no window, or are too large.
    Tables(u64),
    /// No [`Role`].
    Role(u64),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Format(number) => write!(f, "EPT12 of format {number}; there are 1 to 4"),
            Self::AccessedDirty(value) => write!(f, "accessed_dirty is {value}; it is 0 or 1"),
            Self::NoWindow => write!(f, "L2 has no window, so no memory"),
            Self::Window(index) => write!(
                f,
                "window {index} overlaps the one before it, ends beyond frame {FRAME_LIMIT:#x}, or brings L2 over {MAX_FRAMES:#x} frames"
            ),
            Self::Role(word) => write!(f, "L2 is in role {word:#x}; a role has 9 bits"),
            Self::Tables(address) => {
                write!(f, "L2's page tables at {address:#x} lie in no window, or have over {MAX_TABLE_BYTES:#x} bytes")
            }
        }
    }
}

impl ControlPage {
    /// Checks what L1 wrote.
    ///
    /// # Errors
    /// Says what is wrong first.
    pub fn check(&self) -> Result<Entry, Refusal> {
        let format = Format::from_number(self.format).ok_or(Refusal::Format(self.format))?;
        if self.accessed_dirty > 1 {
            return Err(Refusal::AccessedDirty(self.accessed_dirty));
        }
        let mut entry = Entry {
            role: Role::from_word(self.role).ok_or(Refusal::Role(self.role))?,
            root: self.root,
            format,
            accessed_dirty: self.accessed_dirty == 1,
            windows: [Window { first: L2Gfn(0), frames: 0 }; MAX_WINDOWS],
            count: 0,
            tables: Window { first: L2Gfn::containing(self.tables[0]), frames: self.tables[1].div_ceil(PAGE_SIZE) },
            start: (self.start != 0).then_some(self.state),
        };
        let (mut free, mut total) = (0, 0);
        for (index, &[first, frames]) in self.windows.iter().enumerate() {
            if frames == 0 {
                break;
            }
            let end = first.checked_add(frames).filter(|&end| first >= free && end <= FRAME_LIMIT);
            let Some(end) = end else { return Err(Refusal::Window(index)) };
            total += frames;
            if total > MAX_FRAMES {
                return Err(Refusal::Window(index));
            }
            entry.windows[index] = Window { first: L2Gfn(first), frames };
            (entry.count, free) = (index + 1, end);
        }
        if entry.count == 0 {
            return Err(Refusal::NoWindow);
        }
        let tables = entry.tables;
        let inside = |window: &Window| {
            let offset = tables.first.0.wrapping_sub(window.first.0);
            offset < window.frames && tables.frames <= window.frames - offset
        };
        if tables.frames > MAX_TABLE_BYTES / PAGE_SIZE
            || !self.tables[0].is_multiple_of(PAGE_SIZE)
            || !entry.windows().iter().any(inside)
        {
            return Err(Refusal::Tables(self.tables[0]));
        }
        Ok(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page() -> ControlPage {
        let mut page = ControlPage {
            format: 1,
            accessed_dirty: 1,
            tables: [0x20_0000, 0x3000],
            start: 1,
            ..ControlPage::default()
        };
        page.windows[0] = [0, 0x400];
        page.windows[1] = [0x10_0000, 0x1000];
        page
    }

    #[test]
    fn a_good_page_is_taken() {
        let entry = page().check().unwrap();
        assert_eq!((entry.format, entry.accessed_dirty, entry.windows().len()), (Format::Ept, true, 2));
        assert_eq!(entry.tables, Window { first: L2Gfn(0x200), frames: 3 });
        assert!(entry.start.is_some());
    }

    #[test]
    fn every_fault_is_found() {
        let fault = |change: fn(&mut ControlPage)| {
            let mut page = page();
            change(&mut page);
            page.check().unwrap_err()
        };
        assert_eq!(fault(|page| page.format = 5), Refusal::Format(5));
        assert_eq!(fault(|page| page.accessed_dirty = 2), Refusal::AccessedDirty(2));
        assert_eq!(fault(|page| page.role = 1 << 9), Refusal::Role(1 << 9));
        assert_eq!(fault(|page| page.windows[0] = [0, 0]), Refusal::NoWindow);
        assert_eq!(fault(|page| page.windows[1][0] = 0x3ff), Refusal::Window(1));
        assert_eq!(fault(|page| page.windows[1][1] = MAX_FRAMES), Refusal::Window(1));
        assert_eq!(fault(|page| page.windows[1][1] = u64::MAX), Refusal::Window(1));
        assert_eq!(fault(|page| page.windows[1] = [FRAME_LIMIT - 1, 2]), Refusal::Window(1));
        assert_eq!(fault(|page| page.tables[0] = 0x20_0001), Refusal::Tables(0x20_0001));
        assert_eq!(fault(|page| page.tables = [0x3f_f000, 0x2000]), Refusal::Tables(0x3f_f000));
        assert_eq!(fault(|page| page.tables[1] = u64::MAX), Refusal::Tables(0x20_0000));
    }

    proptest! {
        #[test]
        fn any_page_is_answered(words in prop::collection::vec(prop_oneof![0_u64..4, any::<u64>()], 24)) {
            let mut page = page();
            page.as_mut_bytes()[..24 * 8].copy_from_slice(words.as_bytes());
            if let Ok(entry) = page.check() {
                let mut end = 0;
                for window in entry.windows() {
                    prop_assert!(window.first.0 >= end && window.frames > 0);
                    end = window.first.0 + window.frames;
                }
                prop_assert!(end <= FRAME_LIMIT);
            }
        }
    }

    #[test]
    fn numbers_and_names_agree() {
        for number in 0..10 {
            assert!(Exit::from_number(number).is_none_or(|exit| exit as u64 == number));
        }
    }
}
