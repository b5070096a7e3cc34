//! The tracked memory touched in a paging mode before long mode (PAE, 32-bit paging, none): one loop in 32-bit code.
//!
//! A mode change is a dozen exits to KVM, which the monitor's window has and [`Executed::ticks`] has not. A write is two stores, both to the page
//! that its first one has brought in.

use super::paging::Error;
use super::paging_legacy::{self, Page};
use super::ring0;
use super::tracked::Executed;
use super::unpaged::{self, Paged};
use crate::workload::plan::Plan;
use core::mem::offset_of;
use core::ops::Range;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use umbra_shared::histogram::Histogram;
use umbra_shared::layout::{self, LEGACY_BASE, Slot};
use umbra_shared::paging::Mode;
use umbra_shared::pattern::Pattern;
use umbra_shared::protocol::{DOORBELL_PORT, Doorbell};
use umbra_shared::toggle::Toggle;
use umbra_shared::{Level, PAGE_SIZE};

/// CR3 of the mode, 0 before [`create`].
static ROOT: AtomicU32 = AtomicU32::new(0);
/// Tracked pages that it maps.
static PAGES: AtomicU64 = AtomicU64::new(0);

const TIMED: u32 = 0;
const OBSERVED: u32 = 1;
const POPULATE: u32 = 2;
/// In place of ticks, where an access read.
const NOT_TIMED: u32 = u32::MAX;

/// What the 32-bit code is asked to do, and what it leaves.
#[derive(Default)]
#[repr(C)]
struct Request {
    /// Of no use to [`touch_unpaged`].
    paged: Paged,
    what: u32,
    /// Address of the plan's entries; for POPULATE the first page.
    entries: u32,
    count: u32,
    base: u32,
    /// The upper half of the stamps.
    stamp: u32,
    writes: u32,
    before: u32,
    begin: [u32; 2],
    end: [u32; 2],
    /// For [`touch_unpaged`]: the routine between its two touches, and the ticks that it took.
    change: u32,
    changed: u32,
}

/// The tracked memory in such a mode.
#[derive(Clone, Copy)]
pub struct Legacy {
    mode: Mode,
    root: u32,
    pages: u64,
}

/// Builds the tables in the `bytes` of the system slot from `tables` on. Only vCPU 0 calls this, while it is alone. Panics if that range is none
/// of the system slot's.
///
/// # Errors
/// Says what does not fit.
pub fn create(
    tables: u64,
    bytes: u64,
    slots: impl Iterator<Item = Slot> + Clone,
    leaf: Level,
    mode: Mode,
) -> Result<(), Error> {
    let end = tables.checked_add(bytes);
    assert!(
        tables >= layout::PLANS
            && tables.is_multiple_of(PAGE_SIZE)
            && end.is_some_and(|end| end <= layout::SYSTEM_LIMIT),
        "a table pool of {bytes:#x} bytes at {tables:#x} leaves the system slot"
    );
    // SAFETY: the range is mapped at its own address and holds nothing else: the monitor's layout gives it to these tables, and no CPU walks them
    // yet. Any bytes are a valid Page.
    let pool = unsafe {
        core::slice::from_raw_parts_mut(
            core::ptr::with_exposed_provenance_mut::<Page>(tables as usize),
            (bytes / PAGE_SIZE) as usize,
        )
    };
    PAGES.store(slots.clone().map(|slot| slot.pages).sum(), Ordering::Relaxed);
    ROOT.store(paging_legacy::build(pool, tables, slots, leaf, mode)?, Ordering::Release);
    Ok(())
}

impl Legacy {
    /// The tracked memory in `mode`; `None` for long mode. Panics if vCPU 0 has not built the tables.
    #[must_use]
    pub fn enter(mode: Mode) -> Option<Self> {
        if mode == Mode::Long {
            return None;
        }
        let root = ROOT.load(Ordering::Acquire);
        assert!(root != 0, "vCPU 0 has not built the tables of {}", mode.name());
        Some(Self { mode, root, pages: PAGES.load(Ordering::Relaxed) })
    }

    /// As [`Tracked::timed`](super::tracked::Tracked::timed).
    #[must_use]
    pub fn timed(self, plan: &mut Plan, round: u64) -> Executed {
        self.execute(TIMED, plan, round).1
    }

    /// As [`Tracked::observed`](super::tracked::Tracked::observed). The plan is empty then: what each access took stands in place of its entry for a moment.
    #[must_use]
    pub fn observed(self, plan: &mut Plan, round: u64, histogram: &mut Histogram) -> Executed {
        let (ticks, executed) = self.execute(OBSERVED, plan, round);
        for ticks in ticks.iter().filter(|ticks| **ticks != NOT_TIMED) {
            histogram.record(u64::from(*ticks));
        }
        executed
    }

    /// As [`Tracked::populate`](super::tracked::Tracked::populate).
    #[must_use]
    pub fn populate(self, pages: Range<u64>, round: u64) -> Executed {
        assert!(pages.end <= self.pages, "page {} is not mapped", pages.end);
        self.run(POPULATE, pages.start as u32, pages.end.saturating_sub(pages.start) as u32, round)
    }

    fn execute<'p>(self, what: u32, plan: &'p mut Plan, round: u64) -> (&'p mut [u32], Executed) {
        assert!(plan.pages() <= self.pages, "the plan is for {} pages, {} are mapped", plan.pages(), self.pages);
        let entries = if what == OBSERVED { plan.consume() } else { plan.entries_mut() };
        let executed = self.run(what, entries.as_mut_ptr().expose_provenance() as u32, entries.len() as u32, round);
        (entries, executed)
    }

    fn run(self, what: u32, entries: u32, count: u32, round: u64) -> Executed {
        let mut request = Request {
            paged: Paged::new(self.mode, self.root, access),
            what,
            entries,
            count,
            base: LEGACY_BASE as u32,
            stamp: (Pattern::stamp(round, 0) >> 32) as u32,
            ..Request::default()
        };
        let argument = (&raw mut request).expose_provenance() as u64;
        ring0::call(&mut || {
            // SAFETY: at ring 0 with interrupts off, on a stack below 4 GiB. The mode's tables map this code, its stack and the request at their own
            // addresses, and as many tracked pages as the entries can name; nothing else of this program is there.
            unsafe { Paged::call(argument) };
        });
        // SAFETY: a valid Request, which the 32-bit code has written behind the compiler's back.
        let request = unsafe { (&raw const request).read_volatile() };
        let ticks = |[low, high]: [u32; 2]| u64::from(low) | u64::from(high) << 32;
        Executed { writes: request.writes.into(), ticks: ticks(request.end).wrapping_sub(ticks(request.begin)) }
    }
}

/// With paging off: writes the `pages` pages from `base` with the stamp of `round`, changes the toggle's bit there and back, and writes them again. Rings
/// [`Doorbell::Ready`] after each of the three. Returns the ticks of the change.
#[must_use]
pub fn touch_unpaged(toggle: Toggle, base: u64, pages: u64, round: u64) -> u64 {
    let end = base.saturating_add(pages.saturating_mul(PAGE_SIZE));
    assert!((LEGACY_BASE..=layout::LEGACY_LIMIT).contains(&base) && end <= layout::LEGACY_LIMIT, "pages above 3 GiB");
    let mut request = Request {
        what: POPULATE,
        count: pages as u32,
        base: base as u32,
        stamp: (Pattern::stamp(round, 0) >> 32) as u32,
        change: unpaged::change(toggle),
        ..Request::default()
    };
    let argument = (&raw mut request).expose_provenance() as u64;
    ring0::call(&mut || {
        // SAFETY: at ring 0 with interrupts off, on a stack below 4 GiB. Without paging the code, its stack and the request are where they are, and so
        // are the pages, which are nobody else's.
        unsafe { unpaged::call(stay_and_touch as *const () as u64, argument) };
    });
    // SAFETY: a valid Request, which the 32-bit code has written behind the compiler's back.
    u64::from(unsafe { (&raw const request).read_volatile() }.changed)
}

/// The 32-bit code of [`touch_unpaged`], which never leaves unpaged mode. ESI is the request's address; it keeps EBX, EBP and EDI.
#[unsafe(naked)]
unsafe extern "C" fn stay_and_touch() {
    core::arch::naked_asm!(
        ".code32",
        "push ebx",
        "push ebp",
        "push edi",
        "call {access}",
        "call {ring}",
        "rdtsc",
        "mov ebx, eax",
        "call dword ptr [esi + {change}]",
        "rdtsc",
        "sub eax, ebx",
        "mov [esi + {changed}], eax",
        "call {ring}",
        "call {access}",
        "call {ring}",
        "pop edi",
        "pop ebp",
        "pop ebx",
        "ret",
        ".code64",
        access = sym access,
        ring = sym ring,
        change = const offset_of!(Request, change),
        changed = const offset_of!(Request, changed),
    )
}

/// Rings [`Doorbell::Ready`]. EAX and EDX are free.
#[unsafe(naked)]
unsafe extern "C" fn ring() {
    core::arch::naked_asm!(
        ".code32",
        "mov edx, {port}",
        "mov eax, {ready}",
        "out dx, eax",
        "ret",
        ".code64",
        port = const DOORBELL_PORT,
        ready = const Doorbell::Ready as u32,
    )
}

/// Touches the pages that the request at ESI names, which it keeps.
#[unsafe(naked)]
unsafe extern "C" fn access() {
    core::arch::naked_asm!(
        ".code32",
        "mov edi, [esi + {entries}]",
        "mov ecx, [esi + {count}]",
        "mov ebp, [esi + {base}]",
        "mov ebx, [esi + {stamp}]",
        "rdtsc",
        "mov [esi + {begin}], eax",
        "mov [esi + {begin} + 4], edx",
        "test ecx, ecx",
        "jz 9f",
        "cmp dword ptr [esi + {what}], {observed}",
        "je 6f",
        "ja 8f",
        // TIMED: an entry's lower bits are the page, its highest says that it writes.
        "4:",
        "mov eax, [edi]",
        "mov edx, eax",
        "shl edx, 12",
        "add edx, ebp",
        "test eax, eax",
        "jns 5f",
        "and eax, 0x7fffffff",
        "mov [edx], eax",
        "mov [edx + 4], ebx",
        "inc dword ptr [esi + {writes}]",
        "add edi, 4",
        "dec ecx",
        "jnz 4b",
        "jmp 9f",
        "5:",
        "mov eax, [edx]",
        "add edi, 4",
        "dec ecx",
        "jnz 4b",
        "jmp 9f",
        // OBSERVED: what the write took replaces the entry.
        "6:",
        "cmp dword ptr [edi], 0",
        "jns 7f",
        "rdtsc",
        "mov [esi + {before}], eax",
        "mov eax, [edi]",
        "mov edx, eax",
        "shl edx, 12",
        "and eax, 0x7fffffff",
        "mov [edx + ebp], eax",
        "mov [edx + ebp + 4], ebx",
        "rdtsc",
        "sub eax, [esi + {before}]",
        "mov [edi], eax",
        "inc dword ptr [esi + {writes}]",
        "add edi, 4",
        "dec ecx",
        "jnz 6b",
        "jmp 9f",
        "7:",
        "mov edx, [edi]",
        "shl edx, 12",
        "mov eax, [edx + ebp]",
        "mov dword ptr [edi], {not_timed}",
        "add edi, 4",
        "dec ecx",
        "jnz 6b",
        "jmp 9f",
        // POPULATE: EDI is a page.
        "8:",
        "mov [esi + {writes}], ecx",
        "33:",
        "mov edx, edi",
        "shl edx, 12",
        "mov [edx + ebp], edi",
        "mov [edx + ebp + 4], ebx",
        "inc edi",
        "dec ecx",
        "jnz 33b",
        "9:",
        "rdtsc",
        "mov [esi + {end}], eax",
        "mov [esi + {end} + 4], edx",
        "ret",
        ".code64",
        observed = const OBSERVED,
        not_timed = const NOT_TIMED,
        what = const offset_of!(Request, what),
        entries = const offset_of!(Request, entries),
        count = const offset_of!(Request, count),
        base = const offset_of!(Request, base),
        stamp = const offset_of!(Request, stamp),
        writes = const offset_of!(Request, writes),
        before = const offset_of!(Request, before),
        begin = const offset_of!(Request, begin),
        end = const offset_of!(Request, end),
    )
}
