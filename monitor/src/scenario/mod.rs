//! Scenarios. (Until they come: one that reads what KVM here is.)

use crate::cli::RunArgs;
use crate::failure::Failure;
use crate::ground::{Clock, Ground};
use crate::progress::Progress;
use crate::report::{Host, Phase, Record, Row, Rows, record::SCHEMA};

/// Runs a scenario.
///
/// # Errors
/// No KVM, or an unknown scenario.
///
/// # Panics
/// When asked to.
pub fn run(args: &RunArgs, ground: Ground, progress: &Progress) -> Result<Record, Failure> {
    match args.scenario.as_str() {
        "first-light" => {}
        "panic" => panic!("asked to"),
        "exit" => std::process::exit(3),
        "segv" => rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::SEGV)
            .map_err(|error| Failure::Check(error.to_string()))?,
        "sleep" => std::thread::sleep(std::time::Duration::from_secs(100_000)),
        "spin" => loop {
            std::hint::spin_loop();
        },
        other => return Err(Failure::Input(format!("scenario {other}: there is first-light"))),
    }
    progress.step("opening /dev/kvm");
    let kvm = kvm_ioctls::Kvm::new().map_err(|error| Failure::NotHere(format!("/dev/kvm: {error}")))?;
    let mut phases = Vec::new();
    for round in 0..args.rounds {
        let begun = std::time::Instant::now();
        let vm = kvm.create_vm().map_err(|error| Failure::Check(format!("a VM: {error}")))?;
        let vcpu = vm.create_vcpu(0).map_err(|error| Failure::Check(format!("a vCPU: {error}")))?;
        drop((vcpu, vm));
        let value = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let unit = ground.clock().unit().to_owned();
        phases.push(Phase { phase: "create".into(), round, pass: "timed".into(), value, unit, clean: true });
    }
    let uname = rustix::system::uname();
    let row = Row { name: format!("api-{}", kvm.get_api_version()), phases, ..Row::default() };
    Ok(Record {
        schema: SCHEMA,
        scenario: args.scenario.clone(),
        host: Host {
            ground: ground.name().into(),
            kernel: uname.release().to_string_lossy().into_owned(),
            clock: ground.clock().unit().into(),
            deterministic: ground.clock() == Clock::Instructions,
            umbra: env!("CARGO_PKG_VERSION").into(),
            ..Host::default()
        },
        config: args.config(),
        rows: vec![Rows::Measured(Box::new(row))],
    })
}
