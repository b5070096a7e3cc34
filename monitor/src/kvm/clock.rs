//! The clock of a measurement, and whether a window of it was clean.

use crate::ground::Clock;
use std::time::Instant;

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
    /// Whether no other task ran in it on the thread's CPU.
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

/// Involuntary context switches of the calling thread so far (getrusage(2), `ru_nivcsw`): 0 on failure, which cannot happen with valid
/// arguments.
fn preemptions() -> i64 {
    // SAFETY: an all-zero rusage is a valid value of the plain C struct.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is a valid place for the result.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    usage.ru_nivcsw
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
            // Under QEMU's icount with shift 0 a tick of the TSC is an executed instruction, whatever Linux makes of the clock.
            // SAFETY: every x86-64 CPU has RDTSC, and user space may use it unless CR4.TSD is set, which Linux does only on request.
            Clock::Instructions => unsafe { core::arch::x86_64::_rdtsc() },
            Clock::Nanoseconds => u64::try_from(self.since.elapsed().as_nanos()).unwrap_or(u64::MAX),
        }
    }

    /// Runs `work` inside a window. What tells clean from unclean is read outside it.
    pub fn window<T>(&self, work: impl FnOnce() -> T) -> (T, Window) {
        let before = preemptions();
        let begin = self.now();
        let result = work();
        let end = self.now();
        (result, Window { begin, end, clean: preemptions() == before })
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
            let (sum, window) =
                Timer::new(clock).window(|| (0..10_000_u64).fold(0, |a, b| std::hint::black_box(a + b)));
            assert!(sum > 0 && window.length() > 0);
        }
    }
}
