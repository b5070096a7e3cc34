//! Whether another task ran inside a window, which is then no figure.
//!
//! On hardware the thread's own involuntary switches tell. In the lab, where all threads share one CPU and switching between them
//! is part of the work, the CPU time of all other tasks tells: it is read from /proc, exactly, before and after the window.

use crate::ground::Clock;
use std::collections::BTreeMap;
use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Other tasks may take one part in so many of a window: a kernel thread that wakes for a moment takes about 6,000 instructions, which is nothing in
/// a round of 26 million, and much in a GET of 3,000.
const SHARE: u32 = 2000;

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
    /// CPU nanoseconds so far, by process id, and when that was.
    Times(BTreeMap<u32, u64>, Instant),
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
            Self::Tasks => Before::Times(times(), Instant::now()),
        }
    }
}

impl Before {
    /// The window begins now, some time after the look.
    pub fn begin(&mut self) {
        if let Self::Times(_, since) = self {
            *since = Instant::now();
        }
    }

    /// Looks again after the window and compares.
    #[must_use]
    pub fn nobody_else_ran(&self) -> bool {
        match self {
            Self::Nothing => true,
            Self::Preemptions(before) => switches().1 == *before,
            Self::Switches(before) => switches() == *before,
            Self::Times(before, since) => {
                // In the kernel's time, as the tasks' is: the unit of the window may be another. The look itself is not in it.
                let length = since.elapsed();
                let others: Vec<(u64, u32)> = times()
                    .iter()
                    .map(|(&task, now)| (now.saturating_sub(before.get(&task).copied().unwrap_or(0)), task))
                    .filter(|&(time, task)| time > 0 && !works_for_interrupts(task))
                    .collect();
                let clean = Duration::from_nanos(others.iter().map(|(time, _)| time).sum()) <= length / SHARE;
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

    #[test]
    fn a_window_without_others_is_clean_and_one_with_them_is_not() {
        assert!(Witness::None.look().nobody_else_ran());
        let before = Witness::Tasks.look();
        assert!(matches!(&before, Before::Times(times, _) if !times.is_empty()));
        // Another process, alive for the whole window, burns CPU time.
        let mut other = std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(200));
        let clean = before.nobody_else_ran();
        other.kill().unwrap();
        other.wait().unwrap();
        assert!(!clean);
        assert!(intruder().contains(" for "), "{}", intruder());
    }

    #[test]
    fn an_hour_long_window_bears_a_moment_of_others() {
        let Before::Times(times, now) = Witness::Tasks.look() else { panic!() };
        let before = Before::Times(times, now.checked_sub(Duration::from_secs(1 << 20)).unwrap_or(now));
        assert!(before.nobody_else_ran());
    }
}
