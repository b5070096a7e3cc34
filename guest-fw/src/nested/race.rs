//! L1 edits its table while the L2s of other vCPUs use it ([`umbra_shared::race`]).

use super::{Hypervisor, edits};
use crate::arch::journal::LiveJournal;
use crate::arch::l2::{Answer, Extension, Violation};
use crate::arch::port;
use crate::arch::tracked::Executed;
use crate::arch::vcpu;
use crate::boot::Setup;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Release, SeqCst};
use core::sync::atomic::fence;
use umbra_shared::board::{MAX_REGIONS, PAGES};
use umbra_shared::edits::Concern;
use umbra_shared::layout::MAX_VCPUS;
use umbra_shared::nested::Nested;
use umbra_shared::probe;
use umbra_shared::protocol::Doorbell;
use umbra_shared::race::{CONCERNS, Lapse, Order, ROOM, Turn};

/// Set in the word of a [`Concern`] that is a region.
const REGION: u64 = 1 << 63;

/// Accesses of each L2 before an invalidation that is late.
const LATE: usize = 32;

/// What the vCPUs say to each other. Numbers of epochs, and of races by their first one, grow from the boot on.
struct Course {
    /// The last epoch that was begun.
    begun: AtomicU64,
    /// The last that L1 has done with.
    returned: AtomicU64,
    /// The last race that is over.
    over: AtomicU64,
    /// The last race that each vCPU's L2 has begun, and whose journal is full.
    joined: [AtomicU64; MAX_VCPUS],
    full: [AtomicU64; MAX_VCPUS],
    /// The last epoch whose invalidation each vCPU is to make, and those that each has made.
    wanted: AtomicU64,
    heeded: [AtomicU64; MAX_VCPUS],
    /// What the last edits are about.
    concerns: [AtomicU64; CONCERNS],
}

static COURSE: Course = Course {
    begun: AtomicU64::new(0),
    returned: AtomicU64::new(0),
    over: AtomicU64::new(0),
    joined: [const { AtomicU64::new(0) }; MAX_VCPUS],
    full: [const { AtomicU64::new(0) }; MAX_VCPUS],
    wanted: AtomicU64::new(0),
    heeded: [const { AtomicU64::new(0) }; MAX_VCPUS],
    concerns: [const { AtomicU64::new(0) }; CONCERNS],
};

impl Course {
    fn concern(&self, index: usize) -> Concern {
        let word = self.concerns[index].load(Acquire);
        if word & REGION == 0 { Concern::Page(word) } else { Concern::Region(word & !REGION) }
    }
}

/// Lets others run until all of `words` have come to `number`.
fn wait(words: &[AtomicU64], number: u64) {
    while words.iter().any(|word| word.load(Acquire) < number) {
        port::ring(Doorbell::Wait);
    }
}

/// Waits until an L2 has made `more` accesses, or its journal is full.
fn wait_for_accesses(journal: &LiveJournal, more: usize, order: Order) {
    let end = ROOM.min(journal.count() + more);
    while journal.count() < end {
        if order.burst > 0 {
            port::ring(Doorbell::Wait);
        }
        core::hint::spin_loop();
    }
}

impl<E: Extension> Hypervisor<E> {
    /// The first vCPU edits, the L2s of the others use the table.
    pub fn race(&mut self, setup: &Setup, nested: &Nested, argument: u64) -> Executed {
        let order = Order::of(argument);
        if vcpu::current() == 0 {
            return Executed { writes: self.edit_meanwhile(setup, nested, order), ticks: 0 };
        }
        self.use_meanwhile(LiveJournal::of(&setup.page, vcpu::current()), nested, order);
        Executed::default()
    }

    /// Plays epochs until there are enough, or a journal is full. Says how many.
    fn edit_meanwhile(&mut self, setup: &Setup, nested: &Nested, order: Order) -> u64 {
        let others = 1..setup.page.vcpus as usize;
        wait(&COURSE.joined[others.clone()], order.first);
        let mut played = 0;
        let mut told = 0;
        while played < order.epochs && COURSE.full[others.clone()].iter().all(|race| race.load(Acquire) < order.first) {
            let number = order.first + played;
            COURSE.begun.store(number, SeqCst);
            let epoch = edits::with_board(setup, nested, |board| {
                board.play_telling(nested.map.seed(), number, |concern| {
                    let word = match concern {
                        Concern::Page(page) => page,
                        Concern::Region(region) => REGION | region,
                    };
                    COURSE.concerns[told % CONCERNS].store(word, Release);
                    told += 1;
                })
            });
            let accesses = |more| {
                others.clone().for_each(|vcpu| wait_for_accesses(LiveJournal::of(&setup.page, vcpu), more, order));
            };
            self.say(order, number, epoch.due, &COURSE.heeded[others.clone()], accesses);
            played += 1;
            accesses(order.gap_after(nested.map.seed(), number) as usize);
        }
        COURSE.over.store(order.first, SeqCst);
        played
    }

    /// Epoch `number` is made: says what is `due`, and that it is done. `accesses` waits for so many of each L2.
    fn say(&mut self, order: Order, number: u64, due: bool, heeded: &[AtomicU64], accesses: impl Fn(usize)) {
        let others_run = || {
            if order.burst > 0 {
                port::ring(Doorbell::Wait);
            }
        };
        if order.lapse == Lapse::None {
            // While L2 may still go by the old table, it is to run. After a lapse it is to have no chance of coming into accord before that shows.
            others_run();
        }
        if order.lapse == Lapse::Late {
            COURSE.returned.store(number, SeqCst);
            accesses(LATE);
        }
        if due && order.lapse != Lapse::Lost {
            if E::FORGETS_FOR_ALL {
                self.l2.extension().forget();
            } else {
                COURSE.wanted.store(number, SeqCst);
                wait(heeded, number);
            }
        }
        COURSE.returned.store(number, SeqCst);
        others_run();
    }

    /// Lets L2 use the table until the race is over. This vCPU's L1 is there for what only it can do: what violates the table comes here, and so does
    /// an invalidation that each vCPU has to make for itself.
    fn use_meanwhile(&mut self, journal: &LiveJournal, nested: &Nested, order: Order) {
        let me = vcpu::current();
        journal.clear();
        COURSE.joined[me].store(order.first, SeqCst);
        // Else a journal may be full before L1 has edited anything.
        wait(core::slice::from_ref(&COURSE.begun), order.first);
        loop {
            let wanted = COURSE.wanted.load(Acquire);
            if COURSE.heeded[me].load(Acquire) != wanted {
                self.l2.extension().forget();
                // L2 is not running, and forgets when it does.
                COURSE.heeded[me].store(wanted, SeqCst);
            }
            if COURSE.over.load(Acquire) == order.first {
                return;
            }
            if journal.count() == ROOM {
                COURSE.full[me].store(order.first, SeqCst);
                port::ring(Doorbell::Wait);
                continue;
            }
            self.use_once(journal, nested, order, wanted);
            if order.rests_after(journal.count()) {
                // And while it is outside, after a violation.
                port::ring(Doorbell::Wait);
            }
        }
    }

    /// Lets L2 go on until somebody wants its L1: up to a violation, an invalidation, or the end of the race.
    fn use_once(&mut self, journal: &LiveJournal, nested: &Nested, order: Order, heeded: u64) {
        let (tracked, me) = (self.tracked, vcpu::current());
        let regions = (nested.map.l2_pages() / PAGES).min(MAX_REGIONS as u64);
        let mut work = || {
            while journal.count() < ROOM
                && COURSE.wanted.load(Acquire) == heeded
                && COURSE.over.load(Acquire) != order.first
            {
                let turn = Turn { first: order.first, vcpu: me, index: journal.count() };
                let (probe, spins) = turn.draw(nested.map.seed(), regions, order.spins, |index| COURSE.concern(index));
                (0..spins).for_each(|_| core::hint::spin_loop());
                journal.begin(probe, COURSE.returned.load(Acquire));
                let value = if probe.write {
                    tracked.write_word(probe.page, turn.word(), turn.stamp());
                    turn.stamp()
                } else {
                    tracked.read(probe.page)
                };
                // The access comes before the look at the clock, a write's way through the table included.
                fence(SeqCst);
                let begun = COURSE.begun.load(Acquire);
                journal.end(begun, probe::Answer { value, ..probe::Answer::default() });
                if order.rests_after(journal.count()) {
                    // L1 edits while this L2 is inside: KVM's nested SVM brings its shadow into accord at every entry (`nested_svm_transition_tlb_flush`),
                    // so there L2 sees an old entry only if it stays.
                    port::ring(Doorbell::Wait);
                }
            }
        };
        let mut violation = |Violation { code, qualification, address }: Violation| {
            let begun = COURSE.begun.load(Acquire);
            journal.end(begun, probe::Answer { value: 0, code, qualification, address });
            Answer::GivenUp
        };
        let run = self.l2.run(&mut work, &mut violation);
        self.report.entries.fetch_add(run.entries, core::sync::atomic::Ordering::Relaxed);
    }
}
