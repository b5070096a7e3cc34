//! Whether another task ran inside a window, which is then no figure.
//!
//! On hardware the thread's own involuntary switches tell. In the lab, where all threads share one CPU and switching between them
//! is part of the work, the CPU time of all other tasks tells: it is read from /proc, exactly, before and after the window.

use super::clock::Timer;
use crate::ground::Clock;
use std::collections::BTreeMap;
use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// The time of other tasks may be one part in so many of a window. A kernel thread that wakes for a moment costs three times what it runs itself, with
/// its timer's interrupt and two switches (the flush of memory cgroups' statistics, every two seconds: 5,000 and 15,000 instructions), so that a
/// window called clean has at most 0.025% of others' work in it, less than the noise floor.
const SHARE: u128 = 12_000;

/// How to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Witness {
    /// Somebody else watches this window.
    None,
    /// Involuntary switches of the calling thread (getrusage(2), `ru_nivcsw`).
    Preemptions,
    /// Any switch of the calling thread, voluntary ones included: if there was none, it had the CPU for itself.
    Switches,
    /// CPU time of all tasks outside this process (`/proc/PID/schedstat`), in the lab's one-CPU machine.
    Tasks,
}

/// What a witness saw before the window.
#[derive(Debug)]
pub enum Before {
    /// Nothing.
    Nothing,
    /// Involuntary switches so far.
    Preemptions(i64),
    /// Voluntary and involuntary switches so far.
    Switches((i64, i64)),
    /// CPU nanoseconds so far, by process id, and when that was, by the kernel's clock and by the instruction clock.
    Times(BTreeMap<u32, u64>, Instant, u64),
}

impl Witness {
    /// The witness of a window that the controller times on its own thread.
    #[must_use]
    pub const fn of_controller(clock: Clock) -> Self {
        match clock {
            Clock::Instructions => Self::Tasks,
            Clock::Nanoseconds => Self::Preemptions,
        }
    }

    /// The witness of a vCPU thread. In the lab it is a strict one, which several vCPUs on one CPU never satisfy; then the controller's counts,
    /// whose look at /proc takes too long to be made on a vCPU's thread: it would fall into another's window.
    #[must_use]
    pub const fn of_vcpu(clock: Clock) -> Self {
        match clock {
            Clock::Instructions => Self::Switches,
            Clock::Nanoseconds => Self::Preemptions,
        }
    }

    /// The witness of the controller while vCPU threads time themselves.
    #[must_use]
    pub const fn beside_vcpus(clock: Clock) -> Self {
        match clock {
            Clock::Instructions => Self::Tasks,
            Clock::Nanoseconds => Self::None,
        }
    }

    /// Looks before the window.
    #[must_use]
    pub fn look(self) -> Before {
        match self {
            Self::None => Before::Nothing,
            Self::Preemptions => Before::Preemptions(switches().1),
            Self::Switches => Before::Switches(switches()),
            Self::Tasks => Before::Times(times(), Instant::now(), Timer::new(Clock::Instructions).now()),
        }
    }
}

impl Before {
    /// Looks again after the window, which was so long, and compares. More time than the window's may lie between the looks.
    #[must_use]
    pub fn nobody_else_ran(&self, length: u64) -> bool {
        match self {
            Self::Nothing => true,
            Self::Preemptions(before) => switches().1 == *before,
            Self::Switches(before) => switches() == *before,
            Self::Times(before, since, tick) => {
                // The tasks' time is the kernel's, in which an instruction may take many nanoseconds.
                let (time, ticks) = (since.elapsed(), Timer::new(Clock::Instructions).now().saturating_sub(*tick));
                let others: Vec<(u64, u32)> = times()
                    .iter()
                    .map(|(&task, now)| (now.saturating_sub(before.get(&task).copied().unwrap_or(0)), task))
                    .filter(|&(time, task)| time > 0 && !works_for_interrupts(task))
                    .collect();
                let others_time: u64 = others.iter().map(|(time, _)| time).sum();
                let clean = u128::from(others_time) * u128::from(ticks) * SHARE <= time.as_nanos() * u128::from(length);
                if let (false, Some(&(time, task))) = (clean, others.iter().max()) {
                    *last_intruder() = format!("{} for {} us", name(task), time / 1000);
                }
                clean
            }
        }
    }
}

/// Who ran longest in the last window that was not clean, and how long.
#[must_use]
pub fn intruder() -> String {
    last_intruder().clone()
}

fn last_intruder() -> MutexGuard<'static, String> {
    static LAST: Mutex<String> = Mutex::new(String::new());
    LAST.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Voluntary and involuntary context switches of the calling thread so far.
fn switches() -> (i64, i64) {
    // SAFETY: an all-zero rusage is a valid value of the plain C struct.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is a valid place for the result; with valid arguments the call cannot fail.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    (usage.ru_nvcsw, usage.ru_nivcsw)
}

/// CPU time of all processes but this one: the first number of `schedstat` (Documentation/scheduler/sched-stats.rst).
fn times() -> BTreeMap<u32, u64> {
    let own = std::process::id();
    let Ok(entries) = fs::read_dir("/proc") else { return BTreeMap::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&task| task != own)
        .filter_map(|task| {
            let text = fs::read_to_string(format!("/proc/{task}/schedstat")).ok()?;
            Some((task, text.split(' ').next()?.parse().ok()?))
        })
        .collect()
}

fn name(task: u32) -> String {
    let name = fs::read_to_string(format!("/proc/{task}/comm")).unwrap_or_default();
    name.trim_end().to_owned()
}

/// Whether a task does what interrupts have put off. Ending grace periods: a change of a memory slot waits for one (`synchronize_srcu`), so that
/// this is the ioctl's own work. And softirqs: kernels before 6.12 leave some to `ksoftirqd` that later ones do on the back of whoever was
/// interrupted, where they are in the figure too.
fn works_for_interrupts(task: u32) -> bool {
    let name = name(task);
    let worker = name.starts_with("kworker/") && name.contains("rcu");
    name.starts_with("rcu_") || name.starts_with("ksoftirqd/") || worker
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_window_without_others_is_clean_and_one_with_them_is_not() {
        assert!(Witness::None.look().nobody_else_ran(1));
        let clock = Timer::new(Clock::Instructions);
        let (before, begin) = (Witness::Tasks.look(), clock.now());
        assert!(matches!(&before, Before::Times(times, ..) if !times.is_empty()));
        // Another process, alive for the whole window, burns CPU time.
        let mut other = std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(200));
        let length = clock.now() - begin;
        let clean = before.nobody_else_ran(length);
        // What others took between the looks is held against the window alone, which may be the smaller part of that time.
        let larger = before.nobody_else_ran(length.saturating_mul(1 << 22));
        other.kill().unwrap();
        other.wait().unwrap();
        assert!(!clean && larger);
        assert!(intruder().contains(" for "), "{}", intruder());
    }
}
