//! The clock of a measurement.

use super::witness::Witness;
use crate::ground::Clock;
use std::time::{Duration, Instant};

/// Long against the few microseconds that a thread needs to fall asleep, short against a phase. In the lab, where idle time costs nothing, also
/// long against what the kernel puts off to the end of a grace period: kernels before 6.12 leave that to `ksoftirqd`, in the middle of the next window.
pub(crate) const fn settle(clock: Clock) -> Duration {
    match clock {
        Clock::Instructions => Duration::from_millis(50),
        Clock::Nanoseconds => Duration::from_millis(1),
    }
}

/// Waits for the end of a timer interrupt, so that each window of the instruction clock begins at the same distance from one. How many
/// fall into it follows from its length then, and not from what was done before it: else a tick more or less (2,800 instructions) tells images
/// apart that do the same work.
pub(crate) fn behind_a_tick(clock: Clock) {
    /// Between two looks at the clock: far more than the loop takes, far less than an interrupt does.
    const GAP: u64 = 500;
    /// Some hundred ticks: a kernel whose tick does not come is not waited for.
    const PATIENCE: u64 = 1 << 30;
    if clock != Clock::Instructions {
        return;
    }
    // SAFETY: see `Timer::now`.
    let now = || unsafe { core::arch::x86_64::_rdtsc() };
    let begin = now();
    let mut last = begin;
    while last - begin < PATIENCE {
        let next = now();
        if next - last > GAP {
            return;
        }
        last = next;
    }
}

/// Reads a clock. All values of one process compare.
#[derive(Clone, Copy, Debug)]
pub struct Timer {
    clock: Clock,
    since: Instant,
}

/// A measured stretch of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// When it began, in the timer's unit.
    pub begin: u64,
    /// When it ended.
    pub end: u64,
    /// Whether no other task ran in it, see [`Witness`].
    pub clean: bool,
}

impl Window {
    /// How long it was.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.end.saturating_sub(self.begin)
    }

    /// From the first begin to the last end of several, clean if all are. `None` if there are none.
    #[must_use]
    pub fn around(windows: impl IntoIterator<Item = Self>) -> Option<Self> {
        windows.into_iter().reduce(|a, b| Self {
            begin: a.begin.min(b.begin),
            end: a.end.max(b.end),
            clean: a.clean && b.clean,
        })
    }
}

impl Timer {
    /// A timer of that clock.
    #[must_use]
    pub fn new(clock: Clock) -> Self {
        Self { clock, since: Instant::now() }
    }

    /// The unit's clock.
    #[must_use]
    pub const fn clock(&self) -> Clock {
        self.clock
    }

    /// The current value.
    #[inline]
    #[must_use]
    pub fn now(&self) -> u64 {
        match self.clock {
            // Under QEMU's icount with shift 0, and always in Bochs, a tick of the TSC is an executed instruction, whatever Linux makes of the clock.
            // SAFETY: every x86-64 CPU has RDTSC, and user space may use it unless CR4.TSD is set, which Linux does only on request.
            Clock::Instructions => unsafe { core::arch::x86_64::_rdtsc() },
            Clock::Nanoseconds => u64::try_from(self.since.elapsed().as_nanos()).unwrap_or(u64::MAX),
        }
    }

    /// Runs `work` and says how long it took and whether that is a figure.
    ///
    /// Sleeps before the window begins, so that a thread which gave an order (or ended one) has gone to sleep itself: on one CPU its last
    /// steps would fall into the window. The witness looks outside the window.
    pub fn window<T>(&self, witness: Witness, work: impl FnOnce() -> T) -> (T, Window) {
        std::thread::sleep(settle(self.clock));
        let before = witness.look();
        behind_a_tick(self.clock);
        let begin = self.now();
        let result = work();
        let end = self.now();
        (result, Window { begin, end, clean: before.nobody_else_ran(end.saturating_sub(begin)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_join() {
        let window = |begin, end, clean| Window { begin, end, clean };
        let both = Window::around([window(5, 9, true), window(3, 7, true)]).unwrap();
        assert_eq!((both.length(), both.clean), (6, true));
        assert!(!Window::around([window(5, 9, true), window(3, 7, false)]).unwrap().clean);
        assert_eq!(Window::around([]), None);
    }

    #[test]
    fn both_clocks_advance() {
        for clock in [Clock::Instructions, Clock::Nanoseconds] {
            let work = || (0..10_000_u64).fold(0, |a, b| std::hint::black_box(a + b));
            let (sum, window) = Timer::new(clock).window(Witness::None, work);
            assert!(sum > 0 && window.length() > 0 && window.clean);
        }
    }
}
