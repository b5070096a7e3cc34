//! Other programs (apt, dpkg, xz, QEMU): each in a process group of its own, ended with everything it started when Umbra ends,
//! however Umbra ends.

use super::interrupt;
use crate::failure::Failure;
use rustix::process::{Pid, Signal, kill_process_group};
use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

/// How often a running child is looked at. It bounds how late an interrupt is acted on.
pub const TICK: Duration = Duration::from_millis(20);

/// The full path of a program.
#[must_use]
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian keeps some tools out of an ordinary user's PATH.
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(program))
        .find(|file| rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok() && file.is_file())
}

/// A running program. Dropping it kills its whole process group.
pub struct Child {
    process: std::process::Child,
}

impl Child {
    /// A command for `program` that will die with this process: the kernel sends it SIGKILL when Umbra's thread is gone, even if
    /// Umbra was killed itself. setpriv (util-linux) asks for that; doing so here would need code between fork and exec.
    ///
    /// # Errors
    /// [`Failure::NotHere`] when a program is not installed; `package` is the Debian package that has it.
    pub fn command(program: &str, package: &str) -> Result<Command, Failure> {
        let missing = |program: &str, package: &str| {
            Failure::NotHere(format!("{program} is not installed; `apt-get install {package}` brings it"))
        };
        let setpriv = find("setpriv").ok_or_else(|| missing("setpriv", "util-linux"))?;
        let program = find(program).ok_or_else(|| missing(program, package))?;
        let mut command = Command::new(setpriv);
        command
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .process_group(0);
        Ok(command)
    }

    /// Starts it.
    ///
    /// # Errors
    /// [`Failure::NotHere`] when the kernel does not start it.
    pub fn spawn(command: &mut Command) -> Result<Self, Failure> {
        let process = command.spawn().map_err(|error| {
            Failure::NotHere(format!("{} cannot be started: {error}", command.get_program().to_string_lossy()))
        })?;
        Ok(Self { process })
    }

    /// Its exit status if it has ended, else waits one [`TICK`] for news.
    ///
    /// # Errors
    /// [`Failure::Interrupted`] after Ctrl-C or SIGTERM; the child still runs then.
    pub fn tick(&mut self) -> Result<Option<ExitStatus>, Failure> {
        interrupt::check()?;
        let status =
            self.process.try_wait().map_err(|error| Failure::Check(format!("waiting for a child: {error}")))?;
        if status.is_none() {
            std::thread::sleep(TICK);
        }
        Ok(status)
    }

    /// For how long its threads could have run so far while others had the CPUs: the second number of each one's schedstat, in nanoseconds
    /// (kernel: Documentation/scheduler/sched-stats.rst). Zero where the kernel does not tell.
    #[must_use]
    pub fn starved(&self) -> Duration {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.process.id()));
        let waited = threads.into_iter().flatten().flatten().filter_map(|thread| {
            let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
            text.split(' ').nth(1)?.parse::<u64>().ok()
        });
        Duration::from_nanos(waited.sum())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // The group, not only the process: apt has helpers. It may be gone already, which is no error.
        if let Ok(None) = self.process.try_wait() {
            let _ = kill_process_group(Pid::from_child(&self.process), Signal::KILL);
            let _ = self.process.wait();
        }
    }
}

/// What a program that has ended left.
pub struct Ended {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to stdout.
    pub stdout: Vec<u8>,
    /// What it wrote to stderr.
    pub stderr: String,
}

impl Ended {
    /// stdout as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Why it failed, in one line: its last complaint, or its status.
    #[must_use]
    pub fn complaint(&self) -> String {
        let lines = || self.stderr.lines().map(str::trim).filter(|line| !line.is_empty());
        // apt's errors begin with "E: "; what follows them are hints.
        let line = lines().find(|line| line.starts_with("E: ")).or_else(|| lines().next_back());
        line.map_or_else(|| self.status.to_string(), |line| line.trim_start_matches("E: ").to_owned())
    }
}

/// Runs a program to its end, in `directory`.
///
/// # Errors
/// [`Failure::NotHere`] when it cannot be started, [`Failure::Interrupted`] when it was ended by Ctrl-C or SIGTERM.
pub fn run(command: &mut Command, directory: &Path) -> Result<Ended, Failure> {
    let broken = |error: std::io::Error| Failure::NotHere(format!("a temporary file cannot be made: {error}"));
    let mut stdout = tempfile::tempfile().map_err(broken)?;
    let mut stderr = tempfile::tempfile().map_err(broken)?;
    command.current_dir(directory);
    command.stdout(stdout.try_clone().map_err(broken)?).stderr(stderr.try_clone().map_err(broken)?);
    let mut child = Child::spawn(command)?;
    let status = loop {
        if let Some(status) = child.tick()? {
            break status;
        }
    };
    let all = |file: &mut File| {
        let mut bytes = Vec::new();
        file.rewind().and_then(|()| file.read_to_end(&mut bytes)).map_err(broken)?;
        Ok::<_, Failure>(bytes)
    };
    let (stdout, stderr) = (all(&mut stdout)?, all(&mut stderr)?);
    Ok(Ended { status, stdout, stderr: String::from_utf8_lossy(&stderr).into_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_status_come_back() {
        let mut command = Child::command("sh", "dash").unwrap();
        command.args(["-c", "echo out; echo 'W: w' >&2; echo 'E: bad' >&2; echo hint >&2; exit 7"]);
        let ended = run(&mut command, Path::new("/")).unwrap();
        assert_eq!(ended.status.code(), Some(7));
        assert_eq!(ended.text(), "out\n");
        assert_eq!(ended.complaint(), "bad");
    }

    #[test]
    fn a_missing_program_is_named_with_its_package() {
        let failure = Child::command("no-such-program", "no-such-package").map(|_| ()).unwrap_err();
        assert!(matches!(failure, Failure::NotHere(_)));
        assert!(failure.to_string().contains("no-such-program is not installed"), "{failure}");
    }

    #[test]
    fn who_shares_a_cpu_waits_for_it() {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
        let first = allowed.trim().split(['-', ',']).next().unwrap();
        let spin = || {
            let mut command = Child::command("taskset", "util-linux").unwrap();
            Child::spawn(command.args(["-c", first, "sh", "-c", "while :; do :; done"])).unwrap()
        };
        let spinning = [spin(), spin()];
        let both_waited = || spinning.iter().all(|child| child.starved() > 2 * TICK);
        assert!((0..500).any(|_| {
            std::thread::sleep(TICK);
            both_waited()
        }));
    }

    #[test]
    fn dropping_ends_the_whole_group() {
        let mut command = Child::command("sh", "dash").unwrap();
        command.args(["-c", "sleep 1000 & wait"]);
        let child = Child::spawn(&mut command).unwrap();
        let group = Pid::from_child(&child.process);
        std::thread::sleep(Duration::from_millis(200));
        assert!(rustix::process::test_kill_process_group(group).is_ok());
        drop(child);
        // The grandchild is reaped by whoever adopts orphans, a moment later.
        for _ in 0..100 {
            if rustix::process::test_kill_process_group(group).is_err() {
                return;
            }
            std::thread::sleep(TICK);
        }
        panic!("the group lives on");
    }
}
