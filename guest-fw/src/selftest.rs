//! The self-test, under plain QEMU, for which the images have a PVH entry:
//! `qemu-system-x86_64 -m 128M -kernel umbra-firmware -nographic -device isa-debug-exit,iobase=0xf4,iosize=4`.
//!
//! Every kind of pattern runs over three slots in low memory, by leaves of 4 KiB and 2 MiB, timed and observed. What a round left is
//! read at the slots' own addresses, that is, not through the mapping that the loops used, and compared page by page with the pattern.
//! Then two exceptions have to come back as reports. Prints a line for each check that fails and a summary; QEMU ends with exit code 1
//! if all passed and 3 if not (`isa-debug-exit` makes `2n + 1` of `n`).

use crate::arch::mailbox::LiveMailbox;
use crate::arch::tracked::Tracked;
use crate::arch::{provoke, space, vcpu};
use crate::boot::Setup;
use crate::text::Text;
use crate::workload::{Conduct, Worker};
use core::cmp::Ordering;
use core::fmt::{Arguments, Write};
use core::hint::black_box;
use core::sync::atomic::{AtomicU32, Ordering::Relaxed};
use hermit_abi::STDOUT_FILENO;
use umbra_shared::pattern::{Kind, Pattern};
use umbra_shared::protocol::{BOOT_MAGIC, BootPage, Command, ExceptionReport};
use umbra_shared::{Gfn, Level, PAGE_SIZE, layout};

/// First frame and pages of the slots: at 32, 40 and 48 MiB.
const SLOTS: [[u64; 2]; 3] = [[0x2000, 512], [0x2800, 512], [0x3000, 1024]];
const PAGES: u64 = SLOTS[0][1] + SLOTS[1][1] + SLOTS[2][1];
const PAGES_ON_STACK: usize = PAGES as usize;
const MAX_ACCESSES_PER_PAGE: u64 = 2;
const TABLES: u64 = layout::PLANS + (1 << 20);
const TABLE_BYTES: u64 = layout::table_bytes(PAGES, Level::K4);
/// Reading a page that is not there, from ring 3 (Intel SDM 3A, figure 4-12).
const NOT_PRESENT_USER_READ: u64 = 4;
const UNMAPPED: u64 = layout::TRACKED_BASE + PAGES * PAGE_SIZE;

const KINDS: [Kind; 7] = [
    Kind::Empty,
    Kind::Sequential,
    Kind::Stride(64),
    Kind::Same(2),
    Kind::Random,
    Kind::HotSpot { pages: 10, share: 90 },
    Kind::Clusters(16),
];

static PASSED: AtomicU32 = AtomicU32::new(0);
static FAILED: AtomicU32 = AtomicU32::new(0);
/// The exception that is expected: none, or one of the two.
static STAGE: AtomicU32 = AtomicU32::new(0);
const AT_INVALID_OPCODE: u32 = 1;
const AT_PAGE_FAULT: u32 = 2;

const fn pattern(kind: Kind, write_percent: u64, accesses_per_page: u64) -> Pattern {
    Pattern { kind, seed: 1, pages: PAGES, write_percent, accesses_per_page }
}

/// What a monitor would have written.
#[must_use]
pub fn boot_page() -> BootPage {
    let mut page = BootPage {
        magic: BOOT_MAGIC,
        vcpus: 1,
        pages: PAGES,
        guest_page_level: Level::K4.number().into(),
        tsc_khz: 0,
        plans: layout::PLANS,
        plan_entries: PAGES * MAX_ACCESSES_PER_PAGE,
        tables: TABLES,
        table_bytes: TABLE_BYTES,
        pattern: pattern(Kind::Sequential, 100, MAX_ACCESSES_PER_PAGE).encode(),
        slot_count: SLOTS.len() as u64,
        ..BootPage::default()
    };
    page.slots[..SLOTS.len()].copy_from_slice(&SLOTS);
    page
}

fn line(arguments: Arguments) {
    let mut text = Text::<256>::new();
    // Text never fails.
    let _ = writeln!(text, "selftest: {arguments}");
    let bytes = text.as_bytes();
    // SAFETY: a slice is valid for its length.
    unsafe { hermit_abi::write(STDOUT_FILENO, bytes.as_ptr(), bytes.len()) };
}

fn check(passed: bool, what: Arguments) {
    if passed {
        PASSED.fetch_add(1, Relaxed);
    } else {
        FAILED.fetch_add(1, Relaxed);
        line(format_args!("FAILED: {what}"));
    }
}

/// Runs all checks. Ends QEMU.
pub fn run(tracked: Tracked, conduct: Conduct) -> ! {
    line(format_args!("{PAGES} pages in {} slots", SLOTS.len()));
    let setup = Setup::given();
    let mut worker = Worker::new(&setup, tracked, conduct);
    check_memory_functions();
    check_patterns(&setup, &mut worker, Level::K4);

    // The other tables, beside those in use.
    match space::create(TABLES + TABLE_BYTES, TABLE_BYTES, setup.slots(), Level::M2) {
        Ok(()) => {
            worker.tracked = space::enter();
            check_patterns(&setup, &mut worker, Level::M2);
        }
        Err(error) => check(false, format_args!("tables of 2 MiB leaves: {error}")),
    }

    STAGE.store(AT_INVALID_OPCODE, Relaxed);
    provoke::invalid_opcode();
    check(false, format_args!("an invalid opcode raises nothing"));
    finish()
}

/// The memory functions of `arch/lang.rs`, through what the compiler makes of slices whose length it does not know.
fn check_memory_functions() {
    let length = black_box(40_usize);
    let mut bytes = [0_u8; 64];
    for (index, byte) in (0..).zip(&mut bytes) {
        *byte = index;
    }
    let counts = |bytes: &[u8], from: u8| (from..).zip(bytes).all(|(expected, &byte)| byte == expected);

    bytes.copy_within(..length, 8);
    check(counts(&bytes[8..48], 0) && counts(&bytes[48..], 48), format_args!("memmove up: {bytes:?}"));
    bytes.copy_within(8..8 + length, 3);
    check(counts(&bytes[3..43], 0) && counts(&bytes[48..], 48), format_args!("memmove down: {bytes:?}"));
    let mut copy = [0xff_u8; 64];
    copy[..length].copy_from_slice(&bytes[3..3 + length]);
    check(counts(&copy[..40], 0) && copy[40] == 0xff, format_args!("memcpy: {copy:?}"));
    check(copy[..length] == bytes[3..3 + length], format_args!("bcmp of equal bytes"));
    check(copy[..0] == bytes[..length - 40], format_args!("bcmp of no bytes"));
    copy[39] = 0x80;
    let order = (bytes[3..3 + length].cmp(&copy[..length]), copy[..length].cmp(&bytes[3..3 + length]));
    check(order == (Ordering::Less, Ordering::Greater), format_args!("memcmp: {order:?}"));
    copy[1..length].fill(black_box(7));
    check(copy[1..40] == [7; 39] && copy[0] == 0 && copy[40] == 0xff, format_args!("memset: {copy:?}"));
}

fn check_patterns(setup: &Setup, worker: &mut Worker, leaf: Level) {
    for kind in KINDS {
        for (write_percent, accesses_per_page) in [(100, 1), (25, MAX_ACCESSES_PER_PAGE)] {
            worker.pattern = pattern(kind, write_percent, accesses_per_page);
            check_pattern(setup, worker, leaf);
        }
    }
}

/// Populates, then one timed and one observed round.
fn check_pattern(setup: &Setup, worker: &mut Worker, leaf: Level) {
    let pattern = worker.pattern;
    let mut expected = [0; PAGES_ON_STACK];
    let name = |round| Name { pattern, leaf, round };

    let populated = worker.execute(Command::Populate, 0);
    for (page, word) in (0..).zip(&mut expected) {
        *word = Pattern::stamp(0, page);
    }
    check(populated.writes == PAGES, format_args!("{}: populate wrote {} pages", name(0), populated.writes));
    check_pages(setup, &expected, &name(0));

    worker.execute(Command::ClearHistogram, 0);
    for (round, command) in [(1, Command::Timed), (2, Command::Observed)] {
        worker.execute(Command::Plan, round);
        let executed = worker.execute(command, 0);
        let writes = (0..pattern.accesses()).map(|index| pattern.access(round, index)).filter(|access| access.write);
        for access in writes {
            expected[access.page as usize] = Pattern::stamp(pattern.written_as(round), access.page);
        }
        check(
            executed.writes == pattern.writes(),
            format_args!("{}: {} writes instead of {}", name(round), executed.writes, pattern.writes()),
        );
        check_pages(setup, &expected, &name(round));
    }
    let recorded = worker.histogram().count;
    check(recorded == pattern.writes(), format_args!("{}: the histogram holds {recorded} writes", name(2)));
}

/// Compares the first word of every page, read at its own address, with `expected`.
fn check_pages(setup: &Setup, expected: &[u64; PAGES_ON_STACK], name: &Name) {
    let frames = setup.slots().flat_map(|slot| (0..slot.pages).map(move |page| slot.base.plus(page)));
    let differs = |&(_, (frame, &word)): &(u64, (Gfn, &u64))| space::first_word(frame) != word;
    match (0_u64..).zip(frames.zip(expected)).find(differs) {
        None => check(true, format_args!("")),
        Some((page, (frame, word))) => {
            let found = space::first_word(frame);
            check(false, format_args!("{name}: page {page} (frame {frame}) holds {found:#x} instead of {word:#x}"));
        }
    }
}

/// What is being checked.
struct Name {
    pattern: Pattern,
    leaf: Level,
    round: u64,
}

impl core::fmt::Display for Name {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Self { pattern, leaf, round } = self;
        write!(
            f,
            "{}, {}% writes, leaves of level {}, round {round}",
            pattern.kind,
            pattern.write_percent,
            leaf.number()
        )
    }
}

/// Where exceptions go on under QEMU.
pub const AFTER_EXCEPTION: extern "C" fn() -> ! = after_exception;

/// Goes on with the next check, on a fresh stack. An exception that nobody expected ends the test.
extern "C" fn after_exception() -> ! {
    let report = LiveMailbox::of(vcpu::current()).exception();
    let ExceptionReport { vector, error_code, rip, cr2, cs, .. } = report;
    let at = |address: usize| rip == address as u64 && cs & 3 == 3;
    match STAGE.load(Relaxed) {
        AT_INVALID_OPCODE => {
            let as_it_was = vector == 6 && at(provoke::invalid_opcode as *const () as usize);
            check(as_it_was, format_args!("an invalid opcode came back as {report:x?}"));
            STAGE.store(AT_PAGE_FAULT, Relaxed);
            // SAFETY: nothing is mapped there.
            let _ = unsafe { provoke::read(UNMAPPED) };
            check(false, format_args!("{UNMAPPED:#x} can be read"));
        }
        AT_PAGE_FAULT => {
            let as_it_was = (vector, error_code, cr2) == (14, NOT_PRESENT_USER_READ, UNMAPPED);
            let as_it_was = as_it_was && at(provoke::read as *const () as usize);
            check(as_it_was, format_args!("a page fault came back as {report:x?}"));
        }
        _ => check(false, format_args!("an exception that nobody expected: {report:x?}")),
    }
    finish()
}

fn finish() -> ! {
    let (passed, failed) = (PASSED.load(Relaxed), FAILED.load(Relaxed));
    line(format_args!("{passed} passed, {failed} failed"));
    // SAFETY: takes a number.
    unsafe { hermit_abi::exit(i32::from(failed != 0)) }
}
