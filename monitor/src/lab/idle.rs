//! Waiting until the machine is idle: kernels run self-tests of their own for seconds after the boot, and a figure taken meanwhile is
//! not one.

use crate::ground::Clock;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The machine must be idle for this long,
const WINDOW: Duration = Duration::from_secs(1);
/// and this share of the time, in thousandths, may be used nevertheless: under the instruction clock, where an instruction takes a nanosecond,
const BUSY: u32 = 1;
/// and on CPUs whose time is the host's, where an emulated timer tick alone takes long.
const BUSY_ON_THE_WALL: u32 = 20;
/// After this much time the wait is given up.
const PATIENCE: Duration = Duration::from_secs(30);

/// The time that tasks have run so far, over all CPUs: the seventh number of a CPU's line in /proc/schedstat, in nanoseconds
/// (kernel: Documentation/scheduler/sched-stats.rst).
fn run_time(schedstat: &str) -> Option<Duration> {
    let mut sum = None;
    for line in schedstat.lines().filter(|line| line.starts_with("cpu")) {
        let nanoseconds: u64 = line.split_whitespace().nth(7)?.parse().ok()?;
        sum = Some(sum.unwrap_or(0) + nanoseconds);
    }
    sum.map(Duration::from_nanos)
}

/// The time that each other task has run so far: the first number of its schedstat, in nanoseconds.
fn run_times() -> BTreeMap<u32, u64> {
    let tasks = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    tasks
        .filter_map(|task| {
            let id = task.file_name().to_str()?.parse().ok().filter(|&id| id != std::process::id())?;
            let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
            Some((id, text.split(' ').next()?.parse().ok()?))
        })
        .collect()
}

/// Who ran longest during one more window.
fn suspects() -> String {
    let before = run_times();
    std::thread::sleep(WINDOW);
    let ran = |(task, time): (u32, u64)| Some((time - before.get(&task)?.min(&time), task));
    let mut ran: Vec<_> = run_times().into_iter().filter_map(ran).filter(|&(time, _)| time > 0).collect();
    ran.sort_unstable_by(|a, b| b.cmp(a));
    let name = |task| std::fs::read_to_string(format!("/proc/{task}/comm")).unwrap_or_default();
    let named = ran.iter().take(3).map(|&(time, task)| format!("{} {} us", name(task).trim(), time / 1000));
    named.collect::<Vec<_>>().join(", ")
}

/// Sleeps until the machine was idle for a second of its time. Under the instruction clock an instruction takes so many of its nanoseconds.
///
/// # Errors
/// A line that says why it cannot be known, or how busy the machine still was after the longest wait.
pub fn wait(clock: Clock, nanoseconds: u32) -> Result<(), String> {
    let now = || {
        let text = std::fs::read_to_string("/proc/schedstat").map_err(|error| format!("/proc/schedstat: {error}"))?;
        run_time(&text).ok_or_else(|| "/proc/schedstat has no CPU".to_owned())
    };
    let share = if clock == Clock::Instructions { BUSY * nanoseconds } else { BUSY_ON_THE_WALL };
    let begun = Instant::now();
    loop {
        let before = now()?;
        std::thread::sleep(WINDOW);
        let busy = now()?.saturating_sub(before);
        if busy <= WINDOW * share / 1000 {
            return Ok(());
        }
        if begun.elapsed() >= PATIENCE {
            let suspects = suspects();
            return Err(format!("still busy for {busy:?} of a second after {PATIENCE:?} ({suspects})"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_task_is_named() {
        let mut other = std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let suspects = suspects();
        other.kill().unwrap();
        other.wait().unwrap();
        assert!(suspects.contains(" us"), "{suspects}");
    }

    #[test]
    fn run_time_is_summed_over_cpus() {
        let text =
            "version 16\ntimestamp 4294901234\ncpu0 0 0 0 0 0 0 1500 700 12\ndomain0 3 0 0\ncpu1 0 0 0 0 0 0 500 1 2\n";
        assert_eq!(run_time(text), Some(Duration::from_micros(2)));
        assert_eq!(run_time("version 16\n"), None);
        assert_eq!(run_time("cpu0 0 0\n"), None);
    }
}
