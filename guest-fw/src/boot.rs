//! The first Rust code of each vCPU, at ring 3: checks the boot page, builds the final page tables, starts the payload.

use crate::arch::{idt, legacy, paging, smm, space, vcpu};
use crate::nested::table;
use crate::{abi, console, selftest, workload};
use core::fmt;
use core::sync::atomic::Ordering::Relaxed;
use umbra_shared::layout::{MAX_SLOTS, MAX_VCPUS, Slot};
use umbra_shared::nested::{Nested, Way};
use umbra_shared::paging::Mode;
use umbra_shared::pattern::Pattern;
use umbra_shared::protocol::{BOOT_MAGIC, BootPage, ENTERED_BY_MONITOR};
use umbra_shared::{Gfn, Level};

/// What is wrong with a boot page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// Not [`BOOT_MAGIC`].
    Magic(u64),
    /// Not 1 to 8 vCPUs.
    Vcpus(u64),
    /// No level, or none that can be a leaf.
    Leaf(u64),
    /// More slots than there is room for, or none.
    Slots(u64),
    /// The slots do not add up to the pages.
    Pages(u64),
    /// The pattern is none, or is for other pages.
    Pattern,
    /// What L2 is makes no sense, or is for other pages.
    Nested,
    /// The plans are too small for that many accesses.
    Plans(u64),
    /// No paging mode.
    Mode(u64),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic(found) => write!(f, "magic {found:#x} instead of {BOOT_MAGIC:#x}"),
            Self::Vcpus(found) => write!(f, "{found} vCPUs, 1 to {MAX_VCPUS} are possible"),
            Self::Leaf(found) => write!(f, "guest pages of level {found}, only 1 and 2 are possible"),
            Self::Slots(found) => write!(f, "{found} slots, 1 to {MAX_SLOTS} are possible"),
            Self::Pages(found) => write!(f, "{found} pages, which is not what the slots add up to"),
            Self::Pattern => write!(f, "the pattern cannot be decoded, or is for another number of pages"),
            Self::Nested => write!(f, "L2's options cannot be decoded, or are for another number of pages"),
            Self::Mode(found) => write!(f, "paging mode {found}, there are 0 to 2"),
            Self::Plans(accesses) => write!(f, "no room to plan {accesses} accesses"),
        }
    }
}

/// A boot page that makes sense.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// As it came.
    pub page: BootPage,
    /// Its pattern.
    pub pattern: Pattern,
    /// Its leaf size.
    pub leaf: Level,
    /// What the pattern's pages are, if not the tracked ones themselves.
    pub nested: Option<Nested>,
    /// The mode in which the tracked pages are touched.
    pub mode: Mode,
}

impl Setup {
    /// Checks `page`.
    ///
    /// # Errors
    /// Says what is wrong first.
    pub fn check(page: BootPage) -> Result<Self, Error> {
        if page.magic != BOOT_MAGIC {
            return Err(Error::Magic(page.magic));
        }
        if !(1..=MAX_VCPUS as u64).contains(&page.vcpus) {
            return Err(Error::Vcpus(page.vcpus));
        }
        let leaf = match page.guest_page_level {
            1 => Level::K4,
            2 => Level::M2,
            other => return Err(Error::Leaf(other)),
        };
        if !(1..=MAX_SLOTS as u64).contains(&page.slot_count) {
            return Err(Error::Slots(page.slot_count));
        }
        let pattern = Pattern::decode(&page.pattern).ok_or(Error::Pattern)?;
        let nested = Nested::decode(&page.nested).ok_or(Error::Nested)?;
        let mode = Mode::from_number(page.guest_paging).ok_or(Error::Mode(page.guest_paging))?;
        let setup = Self { page, pattern, leaf, nested, mode };
        if page.pages == 0 || setup.slots().try_fold(0_u64, |sum, slot| sum.checked_add(slot.pages)) != Some(page.pages)
        {
            return Err(Error::Pages(page.pages));
        }
        if nested.is_some_and(|nested| nested.map.l1_pages() != page.pages) {
            return Err(Error::Nested);
        }
        if pattern.pages != nested.map_or(page.pages, |nested| nested.map.l2_pages()) {
            return Err(Error::Pattern);
        }
        if pattern.accesses() > page.plan_entries {
            return Err(Error::Plans(pattern.accesses()));
        }
        Ok(setup)
    }

    /// The tracked slots, in the order of their pages.
    pub fn slots(&self) -> impl Iterator<Item = Slot> + Clone {
        let slots = self.page.slots;
        let mut first_page = 0_u64;
        (0..self.page.slot_count as usize).map(move |index| {
            let [base, pages] = slots[index];
            let slot = Slot { base: Gfn(base), pages, first_page };
            first_page = first_page.wrapping_add(pages);
            slot
        })
    }

    /// The setup that this machine was given. Panics if it makes no sense.
    #[must_use]
    pub fn given() -> Self {
        match Self::check(vcpu::boot_page()) {
            Ok(setup) => setup,
            Err(error) => panic!("boot page: {error}"),
        }
    }
}

unsafe extern "C" {
    /// The payload, as `hermit-abi` programs are entered: the C convention of `main`, but it does not return.
    fn runtime_entry(argc: i32, argv: *const *const u8, env: *const *const u8) -> !;
}

/// The arguments of every payload: a name, and an empty environment. Each list ends with a null pointer.
#[repr(transparent)]
struct Arguments([*const u8; 2]);

// SAFETY: constants that point to constants.
unsafe impl Sync for Arguments {}

static ARGUMENTS: Arguments = Arguments([c"umbra".as_ptr().cast(), core::ptr::null()]);

/// The tables of a mode before long mode, where one is asked for. Tests cannot link its 32-bit code.
#[cfg_attr(test, allow(clippy::unnecessary_wraps))]
fn create_legacy(setup: &Setup) -> Result<(), paging::Error> {
    if setup.mode == Mode::Long {
        return Ok(());
    }
    legacy::create(setup.page.legacy_tables, setup.page.legacy_table_bytes, setup.slots(), setup.leaf, setup.mode)
}

/// Where the entry code leads each vCPU: ring 3, on its own stack.
pub extern "C" fn start(entered_by: u64, index: u64) -> ! {
    let monitor = entered_by == ENTERED_BY_MONITOR;
    if index == 0 {
        console::set_monitor(monitor);
        if !monitor {
            vcpu::set_boot_page(selftest::boot_page());
            idt::RESUME_AT.store(selftest::AFTER_EXCEPTION as usize as u64, Relaxed);
        }
        let setup = Setup::given();
        abi::time::begin(setup.page.tsc_khz);
        let (tables, bytes) = (setup.page.tables, setup.page.table_bytes);
        let created = match setup.nested {
            Some(Nested { way: Way::Plain, map, .. }) => {
                space::create(tables, bytes, table::as_slots(map, setup.slots(), setup.leaf), setup.leaf)
            }
            _ => space::create(tables, bytes, setup.slots(), setup.leaf),
        };
        if let Err(error) = created.and_then(|()| create_legacy(&setup)) {
            panic!("page tables: {error}");
        }
        if setup.page.smram != 0 {
            (0..setup.page.vcpus as usize).for_each(smm::install);
        }
    }
    let tracked = space::enter();
    if index != 0 {
        // The payload runs on vCPU 0; the others are there for the workload.
        workload::serve(tracked, workload::Conduct::Exact);
    }
    let [_, end] = &ARGUMENTS.0;
    // SAFETY: every image defines it, and the lists end as they must.
    unsafe { runtime_entry(1, ARGUMENTS.0.as_ptr(), end) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_shared::nested::{AliasKind, Flags, Format, Map};
    use umbra_shared::pattern::Kind;

    fn page() -> BootPage {
        let pattern = Pattern { kind: Kind::Sequential, seed: 1, pages: 30, write_percent: 100, accesses_per_page: 2 };
        let mut page = BootPage {
            magic: BOOT_MAGIC,
            vcpus: 2,
            pages: 30,
            guest_page_level: 1,
            plan_entries: 60,
            pattern: pattern.encode(),
            slot_count: 2,
            ..BootPage::default()
        };
        page.slots[0] = [0x10_0000, 10];
        page.slots[1] = [0x20_0000, 20];
        page
    }

    #[test]
    fn a_good_page_is_taken() {
        let slots: Vec<Slot> = Setup::check(page()).unwrap().slots().collect();
        assert_eq!(slots[1], Slot { base: Gfn(0x20_0000), pages: 20, first_page: 10 });
    }

    #[test]
    fn every_fault_is_found() {
        let fault = |change: fn(&mut BootPage)| {
            let mut page = page();
            change(&mut page);
            Setup::check(page).unwrap_err()
        };
        assert_eq!(fault(|page| page.magic = 7), Error::Magic(7));
        assert_eq!(fault(|page| page.vcpus = 0), Error::Vcpus(0));
        assert_eq!(fault(|page| page.vcpus = 9), Error::Vcpus(9));
        assert_eq!(fault(|page| page.guest_page_level = 3), Error::Leaf(3));
        assert_eq!(fault(|page| page.slot_count = 33), Error::Slots(33));
        assert_eq!(fault(|page| page.slot_count = 1), Error::Pages(30));
        assert_eq!(fault(|page| page.slots[0][1] = u64::MAX), Error::Pages(30));
        assert_eq!(fault(|page| page.pattern[0] = 99), Error::Pattern);
        assert_eq!(fault(|page| page.pattern[4] = 31), Error::Pattern);
        assert_eq!(fault(|page| page.plan_entries = 59), Error::Plans(60));
        assert_eq!(fault(|page| page.nested[0] = 9), Error::Nested);
        assert_eq!(fault(|page| page.guest_paging = 3), Error::Mode(3));
    }

    #[test]
    fn an_l2_has_as_many_pages_as_its_pattern() {
        let nested = |pages, aliases| {
            let map = Map::new(pages, Level::K4, aliases, AliasKind::Contiguous, 1).unwrap();
            Nested { way: Way::Svm, map, format: Format::Npt, flags: Flags::Clear, fill_batch: 0, remaps: 0 }.encode()
        };
        let pattern = |pages| {
            Pattern { kind: Kind::Sequential, seed: 1, pages, write_percent: 100, accesses_per_page: 1 }.encode()
        };
        let check =
            |nested, pattern| Setup::check(BootPage { nested, pattern, ..page() }).map(|setup| setup.nested.is_some());
        assert_eq!(check(nested(30, 2), pattern(60)), Ok(true));
        assert_eq!(check(nested(30, 2), pattern(30)), Err(Error::Pattern));
        assert_eq!(check(nested(60, 1), pattern(60)), Err(Error::Nested));
    }
}
