//! Every way in which a lab machine can die, on a real boot each: one clear line of its own, the right exit code, and nothing left
//! behind. Words choose some of them. This program is the test, the lab's user (`--drive CASE`) and the
//! lab's PID 1 (which dies as the kernel's command line says).

use rustix::process::{Pid, Signal, getpid, kill_process};
use rustix::system::{RebootCommand, reboot};
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use umbra::Failure;
use umbra::cli;
use umbra::ground::Clock;
use umbra::lab::emulator::Emulator;
use umbra::lab::entry::Entry;
use umbra::lab::watch::Limits;
use umbra::lab::{self, Machine, child, shelf};
use umbra::progress::Progress;

/// What is tried, the exit code, and the line that says what it was.
const CASES: &[(&str, i32, &str)] = &[
    ("crash", 1, "the lab's kernel panicked: sysrq triggered crash"),
    (
        "exit",
        1,
        "the lab's kernel panicked: Attempted to kill init! exitcode=0x00000700 (Umbra's PID 1 ended with exit code 7)",
    ),
    ("abort", 1, "(Umbra's PID 1 was killed by signal "),
    ("triple", 1, "the lab machine had a triple fault while its kernel booted"),
    ("reset", 1, "the lab machine reset or switched itself off while its kernel booted"),
    ("garbage", 1, "the lab's results are damaged: byte 0 of COM2 begins no frame"),
    ("silent", 1, "the lab machine is silent while its kernel booted: no byte on its serial ports for 20 s"),
    ("late", 1, "the lab run was ended while its kernel booted: it took longer than its limit of 2 s"),
    (
        "module",
        1,
        "the lab's kernel refused module kvm_amd (No such file or directory (os error 2)): kvm_amd: Unknown symbol",
    ),
    ("input", 2, "no-such-scenario: there is no such scenario"),
    ("qemu-missing", 3, "qemu-system-x86_64 is not installed; `apt-get install qemu-system-x86` brings it"),
    ("qemu-breaks", 1, "QEMU ended early while its kernel booted (exit status: 9): no such accelerator"),
    (
        "bochs-missing",
        3,
        "bochs is not installed; `apt-get install --no-install-recommends bochs bochs-term isolinux syslinux-common xorriso` brings it",
    ),
    ("bochs-breaks", 1, "Bochs ended early while its kernel booted (exit status: 9): no such accelerator"),
];

/// Tried only when named: Bochs takes most of a minute for a boot.
const LONG_CASES: &[(&str, i32, &str)] = &[
    ("vmx-crash", 1, "the lab's kernel panicked: sysrq triggered crash"),
    ("vmx-triple", 1, "the lab machine had a triple fault while its kernel booted"),
    ("vmx-reset", 1, "the lab machine reset or switched itself off while its kernel booted"),
    ("vmx-input", 2, "no-such-scenario: there is no such scenario"),
];

fn main() {
    let death = std::env::var("death").unwrap_or_default();
    if getpid() == Pid::INIT && !matches!(death.as_str(), "" | "none") {
        die(&death);
    }
    if lab::init::inside() {
        lab::init::main();
    }
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--nocapture").collect();
    if let [drive, case] = &words[..]
        && drive == "--drive"
    {
        let failure = self::drive(case).expect_err("the machine dies");
        eprintln!("umbra: {failure}");
        std::process::exit(match failure {
            Failure::Check(_) => 1,
            Failure::Input(_) => 2,
            Failure::NotHere(_) => 3,
            Failure::Interrupted => 130,
        });
    }
    // The kernel is fetched here if need be, where nobody measures the time.
    let shelf = shelf::shelf();
    shelf.kernel(None).expect("a default").ensure(&Progress::stderr()).expect("the default kernel");
    let named = |name: &str| words.iter().any(|word| word == name);
    let cases = CASES.iter().chain(LONG_CASES.iter().filter(|(case, ..)| named(case)));
    let mut tests: Vec<Test> =
        cases.map(|&(case, code, line)| (case.to_owned(), Box::new(move || dies(case, code, line)) as _)).collect();
    for (machine, case) in [("", "silent"), ("vmx-", "vmx-silent")] {
        for (name, signal, code) in
            [("sigint", Signal::INT, Some(130)), ("sigterm", Signal::TERM, Some(130)), ("sigkill", Signal::KILL, None)]
        {
            tests.push((format!("{machine}{name}"), Box::new(move || ends_on(case, signal, code))));
        }
    }
    tests.retain(|(name, _)| words.is_empty() || named(name));
    // Most of a death is the boot before it, on one CPU: two at a time.
    let tests = Mutex::new(tests.into_iter());
    let next = || tests.lock().expect("no test runs while it is held").next();
    let try_all = || {
        while let Some((name, test)) = next() {
            let begun = Instant::now();
            test();
            println!("{name}: {:.1} s", begun.elapsed().as_secs_f32());
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(try_all);
        scope.spawn(try_all);
    });
}

/// A test by its name.
type Test = (String, Box<dyn Fn() + Send>);

/// What PID 1 does instead of its work.
fn die(how: &str) -> ! {
    let mount = |kind: &str, place: &str| {
        rustix::mount::mount(kind, place, kind, rustix::mount::MountFlags::empty(), None).expect("a mount");
    };
    match how {
        "crash" => {
            mount("proc", "/proc");
            fs::write("/proc/sysrq-trigger", "c").expect("sysrq");
        }
        "exit" => std::process::exit(7),
        "abort" => std::process::abort(),
        // With reboot=t the kernel resets by a triple fault, with reboot=k by the keyboard controller.
        "triple" | "reset" => reboot(RebootCommand::Restart).expect("a restart"),
        "garbage" => {
            mount("devtmpfs", "/dev");
            fs::write("/dev/ttyS1", "hello\n").expect("COM2");
        }
        _ => {}
    }
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// The lab's user: boots the machine of a case.
fn drive(case: &str) -> Result<(), Failure> {
    let kernel = shelf::shelf().kernel(None)?.ensure(&Progress::Silent)?;
    let scratch = tempfile::tempdir().expect("a directory");
    let emulator =
        if case.starts_with("vmx-") || case.starts_with("bochs-") { Emulator::Bochs } else { Emulator::Qemu };
    let case = case.trim_start_matches("vmx-");
    let (kernel, append) = match case {
        "module" => (without_kvm(&kernel, scratch.path()), "death=none".to_owned()),
        "input" => (kernel, "death=none".to_owned()),
        "triple" => (kernel, "death=triple reboot=t".to_owned()),
        "reset" => (kernel, "death=reset reboot=k".to_owned()),
        other => (kernel, format!("death={other}")),
    };
    let init = "/proc/self/exe".into();
    let machine =
        Machine { emulator, kernel, clock: Clock::Instructions, cpus: None, params: Vec::new(), init, append };
    let words = ["umbra", "run", "no-such-scenario"].map(str::to_owned);
    let cli::Command::Run(args) = cli::parse(words)?.command else { panic!("a run is a run") };
    // On a busy machine a boot takes several times as long; only the two cases that wait for a limit have a short one.
    let seconds = |waiting: &str, short: u64| Duration::from_secs(if case == waiting { short } else { 300 });
    let limits = Limits { silent: seconds("silent", 20), wall: seconds("late", 2) };
    let mut results = lab::boot_within(&machine, &[args], limits, &Progress::Silent)?;
    results.pop().expect("a result for the job").map(|_| ())
}

/// A copy of a cache entry whose manifest does not list kvm, which kvm-amd needs.
fn without_kvm(kernel: &Entry, place: &Path) -> Entry {
    let source = kernel.vmlinuz().parent().expect("an entry's directory").to_owned();
    for file in fs::read_dir(source).expect("the entry").flatten() {
        fs::copy(file.path(), place.join(file.file_name())).expect("a copy");
    }
    let manifest = place.join("manifest.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&manifest).expect("a manifest")).expect("JSON");
    json["modules"].as_array_mut().expect("modules").retain(|module| module["name"] != "kvm");
    fs::write(&manifest, json.to_string()).expect("a manifest");
    Entry::open(place, json["wanted"].as_str().expect("a pin")).expect("an entry without kvm")
}

/// This program as the lab's user, with a directory of its own for temporary files.
fn user(case: &str, place: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command
        .args(["--drive", case])
        .env("TMPDIR", place)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    if let Some((program, state)) = case.split_once('-').filter(|(program, _)| *program != "vmx") {
        command.env("PATH", path_with_another(program, state, place));
    }
    command
}

/// A PATH with all that the lab needs but the emulator, or one that breaks.
fn path_with_another(emulator: &str, state: &str, place: &Path) -> PathBuf {
    let bin = place.join("bin");
    fs::create_dir(&bin).expect("a directory");
    for program in ["setpriv", "sh", "xorriso"] {
        symlink(child::find(program).expect("a program that `make test` needs"), bin.join(program)).expect("a link");
    }
    if state == "breaks" {
        let fake = bin.join(if emulator == "qemu" { "qemu-system-x86_64" } else { emulator });
        let script = "#!/bin/sh\ncase $1 in --*) echo The Emulator version 0; exit;; esac\necho no such accelerator >&2\nexit 9\n";
        fs::write(&fake, script).expect("a script");
        fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).expect("a mode");
    }
    bin
}

fn dies(case: &str, code: i32, line: &str) {
    let place = tempfile::tempdir().expect("a directory");
    let output = user(case, place.path()).output().expect("this program runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let last = said.lines().last().unwrap_or_default();
    assert_eq!(output.status.code(), Some(code), "{case}: {said}");
    assert!(last.starts_with("umbra: ") && last.contains(line), "{case}: expected {line}\n{said}");
    let _ = fs::remove_dir_all(place.path().join("bin"));
    nothing_left(case, place.path());
}

/// Processes that work in a directory or below it; emulators run in the lab's temporary one.
fn workers(place: &Path) -> Vec<PathBuf> {
    let processes = fs::read_dir("/proc").expect("/proc").flatten().map(|entry| entry.path());
    processes.filter(|process| fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd.starts_with(place))).collect()
}

fn nothing_left(case: &str, place: &Path) {
    assert!(workers(place).is_empty(), "{case}: a process lives on");
    let files: Vec<_> = fs::read_dir(place).expect("the directory").flatten().map(|file| file.path()).collect();
    assert!(files.is_empty(), "{case}: {files:?}");
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(120), "{what}");
        std::thread::sleep(child::TICK);
    }
}

/// The user ends the run by a signal while the machine is booting.
fn ends_on(case: &str, signal: Signal, code: Option<i32>) {
    let place = tempfile::tempdir().expect("a directory");
    let mut user: Child = user(case, place.path()).spawn().expect("this program runs");
    wait_until("the emulator starts", || !workers(place.path()).is_empty());
    std::thread::sleep(Duration::from_secs(1));
    kill_process(Pid::from_child(&user), signal).expect("a signal");
    assert_eq!(user.wait().expect("an end").code(), code, "{signal:?}");
    wait_until("the emulator ends with its user", || workers(place.path()).is_empty());
    // Whoever is killed by SIGKILL cannot tidy up; everyone else does.
    if code.is_some() {
        nothing_left("a signal", place.path());
    }
}
