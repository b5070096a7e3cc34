//! SMIs into a running guest: a vCPU is kicked out of `KVM_RUN`, gets an SMI, and goes on. What the CPU saved is held against what the vCPU was.

use super::Error;
use super::machine::Machine;
use crate::kvm::clock::Window;
use crate::kvm::urgent::Urgent;
use crate::kvm::vcpu::{Exit, Interrupted};
use kvm_bindings::{kvm_regs, kvm_sregs};
use std::time::Duration;
use umbra_shared::protocol::{Command, Doorbell};
use umbra_shared::smm::{self, saved};

/// What came of the SMIs of one command.
#[derive(Debug, Default)]
pub struct Smis {
    /// Where each of them interrupted the guest, by vCPU.
    pub interrupted: Vec<(usize, u64)>,
    /// What the CPU saved wrongly, in words.
    pub faults: Vec<String>,
}

/// One vCPU under SMIs.
#[derive(Default)]
struct Target {
    /// The guest has done its command.
    done: bool,
    /// SMIs that its handler had counted before the one under way.
    handled: u64,
    /// The one under way.
    interrupted: Option<Box<Interrupted>>,
}

impl Machine {
    /// Gives all vCPUs one command and, until all have done it, sends one of them in turn an SMI every `pace`, `most` of them at most.
    ///
    /// # Errors
    /// [`Error::Broken`] and [`Error::Silent`].
    pub fn command_under_smis(
        &self,
        command: Command,
        pace: Duration,
        most: u64,
        smis: &mut Smis,
    ) -> Result<Window, Error> {
        let mut targets = Vec::new();
        for vcpu in 0..self.vcpus() {
            targets.push(Target { handled: self.smm_ledger(vcpu)?.handled, ..Target::default() });
        }
        let (mut windows, mut sent, mut turn, mut silence) = (Vec::new(), 0, 0, Duration::ZERO);
        self.begin(command, 0)?;
        let _urgent = Urgent::now();
        while let Some(first) = targets.iter().position(|target| !target.done) {
            let Some(stop) = self.stop_within(pace) else {
                silence += pace;
                if silence > self.patience {
                    return Err(self.silent(first, "a command under SMIs", self.patience));
                }
                turn = (turn + 1) % targets.len();
                self.compare(turn, &mut targets[turn], smis)?;
                if sent < most && !targets[turn].done && targets[turn].interrupted.is_none() {
                    sent += u64::from(self.send_smi(turn));
                }
                continue;
            };
            silence = Duration::ZERO;
            let target = &mut targets[stop.vcpu];
            match stop.exit {
                Exit::Interrupted(interrupted) => {
                    smis.interrupted.push((stop.vcpu, interrupted.registers.rip));
                    target.interrupted = Some(interrupted);
                }
                Exit::Doorbell(Doorbell::Ready) => {
                    windows.push(stop.window);
                    self.compare(stop.vcpu, target, smis)?;
                    target.done = true;
                    if target.interrupted.is_some() {
                        smis.faults.push(format!("vCPU {}'s handler did not run for the last SMI", stop.vcpu));
                    }
                }
                exit => return Err(self.broken(stop.vcpu, exit)),
            }
        }
        Ok(Window::around(windows).unwrap_or(Window { begin: 0, end: 0, clean: true }))
    }

    /// Compares what the CPU saved with what the vCPU was, once the handler has run.
    fn compare(&self, vcpu: usize, target: &mut Target, smis: &mut Smis) -> Result<(), Error> {
        if self.smm_ledger(vcpu)?.handled == target.handled {
            return Ok(());
        }
        let Some(interrupted) = target.interrupted.take() else { return Ok(()) };
        target.handled += 1;
        for (name, expected, offset) in state(&interrupted.registers, &interrupted.system) {
            let found = self.smram_word(vcpu, offset)?;
            if found != expected && smis.faults.len() < 8 {
                smis.faults.push(format!("vCPU {vcpu}: SMM saved {found:#x} for {name}, which was {expected:#x}"));
            }
        }
        let logged = self.smram_word(vcpu, smm::LOG + (target.handled - 1) % smm::LOG_ENTRIES * 8)?;
        if logged != interrupted.registers.rip && smis.faults.len() < 8 {
            let rip = interrupted.registers.rip;
            smis.faults.push(format!("vCPU {vcpu}: the handler found RIP {logged:#x}, and it was {rip:#x}"));
        }
        Ok(())
    }
}

/// Registers by name, and where the CPU saves them.
fn state(registers: &kvm_regs, system: &kvm_sregs) -> impl Iterator<Item = (&'static str, u64, u64)> {
    let r = registers;
    // In the order in which they lie below RAX.
    let general = [
        ("RAX", r.rax),
        ("RCX", r.rcx),
        ("RDX", r.rdx),
        ("RBX", r.rbx),
        ("RSP", r.rsp),
        ("RBP", r.rbp),
        ("RSI", r.rsi),
        ("RDI", r.rdi),
        ("R8", r.r8),
        ("R9", r.r9),
        ("R10", r.r10),
        ("R11", r.r11),
        ("R12", r.r12),
        ("R13", r.r13),
        ("R14", r.r14),
        ("R15", r.r15),
    ];
    let general = (0..).zip(general).map(|(index, (name, value))| (name, value, saved::RAX - 8 * index));
    general.chain([
        ("RIP", r.rip, saved::RIP),
        ("RFLAGS", r.rflags, saved::RFLAGS),
        ("CR0", system.cr0, saved::CR0),
        ("CR3", system.cr3, saved::CR3),
        ("CR4", system.cr4, saved::CR4),
        ("EFER", system.efer, saved::EFER),
    ])
}
