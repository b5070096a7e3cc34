//! Umbra as PID 1 of the lab machine: prepares it, runs each job as a process of its own, and switches the machine off. A job is this
//! same binary again, so that a crash is a result and the next job finds the machine as the first one did.

use super::console::about_module;
use super::idle;
use super::module::Param;
use super::plan::{self, Plan};
use super::quiet;
use super::wire::{self, Message, Told};
use crate::failure::Failure;
use crate::ground::{Clock, Ground};
use crate::host;
use crate::kvm::exits::{Exits, Hits};
use crate::kvm::vm::Resident;
use crate::progress::Progress;
use crate::scenario;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, mount};
use rustix::process::{Pid, PidfdFlags, getpid, pidfd_open};
use rustix::system::{RebootCommand, finit_module, reboot};
use rustix::termios::{OptionalActions, tcdrain, tcgetattr, tcsetattr};
use std::ffi::CString;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::Duration;

/// COM2.
const PORT: &str = "/dev/ttyS1";
const BAUD: u32 = 115_200;
/// Names the job to a job's process.
const JOB: &str = "UMBRA_LAB_JOB";
const SHMEM_HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// What fault sources and observed passes ask for, held over all jobs.
const TRACED: &[Hits] = &[("page_faults", "kvm_page_fault", None)];

/// Whether this process is PID 1 of a lab machine, or one of its jobs.
#[must_use]
pub fn inside() -> bool {
    (getpid() == Pid::INIT || std::env::var_os(JOB).is_some()) && Path::new("/").join(plan::FILE).exists()
}

/// What such a process does.
pub fn main() -> ! {
    if let Some(job) = std::env::var(JOB).ok().and_then(|job| job.parse().ok()) {
        run_job(job);
        std::process::exit(0);
    }
    // Without a port there is nobody to tell but the console; the kernel then panics over the end of PID 1, which names it.
    let port = mount_all().and_then(|()| Port::open());
    match port {
        Ok(mut port) => {
            tell_panics(None);
            let said = match prepare_and_run(&mut port) {
                Ok(()) => port.send(&Message::End),
                Err(failure) => port.send(&Message::Failed { job: None, failure: Told::from(&failure), broke: true }),
            };
            if let Err(error) = said {
                eprintln!("umbra: COM2: {error}");
            }
            power_off()
        }
        Err(failure) => {
            eprintln!("umbra: {failure}");
            std::process::exit(1)
        }
    }
}

fn power_off() -> ! {
    // The console's last bytes must be out before the machine is.
    let _ = tcdrain(std::io::stderr());
    let error = reboot(RebootCommand::PowerOff);
    eprintln!("umbra: the machine does not switch off: {error:?}");
    std::process::exit(1)
}

fn check(what: impl std::fmt::Display) -> impl FnOnce(std::io::Error) -> Failure {
    move |error| Failure::Check(format!("inside the lab: {what}: {error}"))
}

fn mount_all() -> Result<(), Failure> {
    for (kind, place) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/tmp"),
        ("tracefs", "/sys/kernel/tracing"),
        ("debugfs", "/sys/kernel/debug"),
    ] {
        match mount(kind, place, kind, MountFlags::empty(), None) {
            // A kernel of the user's own may do without tracing.
            Err(_) if matches!(kind, "tracefs" | "debugfs") => {}
            other => other.map_err(|error| check(place)(error.into()))?,
        }
    }
    Ok(())
}

/// COM2, raw.
struct Port(File);

impl Port {
    fn open() -> Result<Self, Failure> {
        let open = || -> rustix::io::Result<File> {
            let file = rustix::fs::open(PORT, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
            let mut termios = tcgetattr(&file)?;
            termios.make_raw();
            termios.set_speed(BAUD)?;
            tcsetattr(&file, OptionalActions::Now, &termios)?;
            Ok(file.into())
        };
        open().map(Self).map_err(|error| check(PORT)(error.into()))
    }

    /// Sends a message and waits until it has left the machine, so that no interrupt of the port falls into what is measured next.
    fn send(&mut self, message: &Message) -> std::io::Result<()> {
        wire::send(&mut self.0, message)?;
        self.0.flush()?;
        Ok(tcdrain(&self.0)?)
    }
}

/// From now on a panic is told by COM2, then ends this process.
fn tell_panics(job: Option<usize>) {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print(info);
        let what = info.payload();
        let text = what.downcast_ref::<&str>().copied().or_else(|| what.downcast_ref::<String>().map(String::as_str));
        let at = info.location().map_or_else(String::new, |at| format!(" at {}:{}", at.file(), at.line()));
        let text = text.unwrap_or("no message").replace('\n', " ");
        let failure = Failure::Check(format!("Umbra panicked inside the lab{at}: {text}"));
        if let Ok(mut port) = Port::open() {
            let _ = port.send(&Message::Failed { job, failure: Told::from(&failure), broke: true });
        }
        match job {
            // It has told how it ended.
            Some(_) => std::process::exit(0),
            None => power_off(),
        }
    }));
}

fn read_plan() -> Result<Plan, Failure> {
    let path = Path::new("/").join(plan::FILE);
    let text = std::fs::read(&path).map_err(check("the plan"))?;
    serde_json::from_slice(&text).map_err(|error| check("the plan")(error.into()))
}

fn prepare_and_run(port: &mut Port) -> Result<(), Failure> {
    let plan = read_plan()?;
    let step = |port: &mut Port, text: &str| port.send(&Message::Step(text.to_owned())).map_err(check(PORT));
    step(port, "loading modules")?;
    for module in &plan.modules {
        load(module, &plan.params)?;
    }
    let params = plan.params.iter().map(in_effect).collect();
    port.send(&Message::Ready(params)).map_err(check(PORT))?;
    quiet::ask()?;
    // Memfds get huge pages where they are asked for; most distributions leave that off.
    std::fs::write(SHMEM_HUGE_PAGES, "advise").map_err(check(SHMEM_HUGE_PAGES))?;
    // So that between two rows or jobs no last VM goes and no first one comes; and, where CPUs run at a time, no event of a thread's, for which the
    // scheduler is patched as well (`perf_sched_events`). A job says what a machine without KVM lacks.
    let event = || Exits::count(&[getpid()], TRACED).ok();
    let resident = (Resident::new().ok(), (plan.clock == Clock::Nanoseconds).then(event));
    step(port, "waiting until the machine is idle")?;
    if let Err(why) = idle::wait(plan.clock, plan.nanoseconds_per_instruction) {
        step(port, &format!("the machine is not idle: {why}"))?;
    }
    for (number, job) in plan.jobs.iter().enumerate() {
        reserve(job.huge_pages)?;
        if let Err(failure) = supervise(number, job.limit) {
            let message = Message::Failed { job: Some(number), failure: Told::from(&failure), broke: true };
            port.send(&message).map_err(check(PORT))?;
        }
    }
    drop(resident);
    Ok(())
}

/// Loads a module with those of the parameters that are its own.
fn load(module: &str, params: &[Param]) -> Result<(), Failure> {
    let path = format!("/umbra/modules/{module}.ko");
    let file = File::open(&path)
        .map_err(|error| Failure::Check(format!("the lab's image has no module {module}: {error}")))?;
    let own = params.iter().filter(|param| param.module == module);
    let options: Vec<String> = own.map(|param| format!("{}={}", param.name, param.value)).collect();
    let line = CString::new(options.join(" ")).map_err(|error| check(module)(error.into()))?;
    finit_module(&file, &line, 0).map_err(|error| {
        let log = kernel_log();
        let why = about_module(&log, module).unwrap_or("the kernel's log does not say why");
        let with = if options.is_empty() { String::new() } else { format!(" with {}", options.join(" ")) };
        let line = format!("the lab's kernel refused module {module}{with} ({error}): {why}");
        // A value that the module does not take is the user's.
        let users = error == rustix::io::Errno::INVAL && !options.is_empty();
        if users { Failure::Input(line) } else { Failure::Check(line) }
    })
}

/// A parameter as the kernel has it now; one that sysfs does not show is as it was given.
fn in_effect(param: &Param) -> (String, String) {
    let path = format!("/sys/module/{}/parameters/{}", param.module, param.name);
    let value = std::fs::read_to_string(path).map_or_else(|_| param.value.clone(), |text| text.trim().to_owned());
    (format!("{}.{}", param.module, param.name), value)
}

/// The kernel's log. A read of /dev/kmsg gives one record, "priority,sequence,time,flags;text".
fn kernel_log() -> Vec<String> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(mut kmsg) = rustix::fs::open("/dev/kmsg", flags, Mode::empty()).map(File::from) else { return Vec::new() };
    let mut lines = Vec::new();
    let mut record = [0; 8192];
    while let Ok(length @ 1..) = kmsg.read(&mut record) {
        let text = String::from_utf8_lossy(&record[..length]);
        lines.extend(text.lines().next().and_then(|line| line.split_once(';')).map(|(_, text)| text.to_owned()));
    }
    lines
}

fn reserve(pages: u64) -> Result<(), Failure> {
    // Most jobs need none, and the kernel starts with none (one of the user's own may have no hugetlb at all).
    if pages == 0 && !Path::new(HUGE_PAGES).exists() {
        return Ok(());
    }
    let reserved = || std::fs::read_to_string(HUGE_PAGES).map(|text| text.trim().parse().unwrap_or(0));
    if reserved().map_err(check(HUGE_PAGES))? == pages {
        return Ok(());
    }
    std::fs::write(HUGE_PAGES, pages.to_string()).map_err(check(HUGE_PAGES))
    // Fewer than were asked for: the job itself says that its memory cannot be had.
}

/// Runs a job as a process and waits for its end. The job sends its own result; an error is how it ended without one.
fn supervise(number: usize, limit: Duration) -> Result<(), Failure> {
    let broken = check(format!("job {number}"));
    let wait = || -> std::io::Result<Option<ExitStatus>> {
        let mut child = Command::new("/proc/self/exe").env(JOB, number.to_string()).spawn()?;
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        // One timer, far away: while the job runs, PID 1 does nothing at all.
        let limit = Timespec::try_from(limit).map_err(std::io::Error::other)?;
        if poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit))? == 0 {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        child.wait().map(Some)
    };
    let Some(status) = wait().map_err(broken)? else {
        let limit = limit.as_secs();
        return Err(Failure::Check(format!("the run took longer than its limit of {limit} s of the lab's time")));
    };
    match (status.code(), status.signal()) {
        (Some(0), _) => Ok(()),
        // Nothing else in the machine sends SIGKILL.
        (_, Some(9)) => {
            let gib = host::memory_bytes().unwrap_or_default().saturating_add(1 << 29) >> 30;
            Err(Failure::Check(format!("the run was killed inside the lab: its {gib} GiB of memory were used up")))
        }
        _ => Err(Failure::Check(format!("the run crashed inside the lab: {status}"))),
    }
}

/// A job's process: the scenario, its progress and its result.
fn run_job(number: usize) {
    tell_panics(Some(number));
    let run = || {
        let plan = read_plan()?;
        let job = plan.jobs.get(number).ok_or_else(|| Failure::Check(format!("the lab's plan has no job {number}")))?;
        let mut steps = Port::open()?;
        let progress = Progress::Sink(std::sync::Mutex::new(Box::new(move |what| {
            // Progress that is lost is no reason to lose the result.
            let _ = steps.send(&Message::Step(what.to_owned()));
        })));
        scenario::run(&job.args()?, Ground::Lab(plan.clock), &progress)
    };
    let message = match run() {
        Ok(record) => Message::Done { job: number, record: Box::new(record) },
        Err(failure) => Message::Failed { job: Some(number), failure: Told::from(&failure), broke: false },
    };
    if let Err(error) = Port::open().and_then(|mut port| port.send(&message).map_err(check(PORT))) {
        eprintln!("umbra: {error}");
        std::process::exit(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameter_without_a_file_is_as_given() {
        let param: Param = "umbra_no_such_module.x=7".parse().unwrap();
        assert_eq!(in_effect(&param), ("umbra_no_such_module.x".to_owned(), "7".to_owned()));
    }

    #[test]
    fn this_process_is_outside() {
        assert!(!inside());
    }
}
