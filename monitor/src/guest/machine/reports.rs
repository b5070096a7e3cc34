//! What the firmware and the monitor leave in memory for each other: mailboxes, histograms, L1's reports, and SMM's ledger.

use super::Machine;
use crate::guest::Error;
use crate::kvm;
use umbra_shared::control::ControlPage;
use umbra_shared::histogram::Histogram;
use umbra_shared::layout::vcpu_area;
use umbra_shared::nested::Report;
use umbra_shared::probe::Answers;
use umbra_shared::protocol::Mailbox;
use umbra_shared::race::{self, Access, Journal, ROOM};
use umbra_shared::{PAGE_SIZE, smm};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

impl Machine {
    /// The mailbox of one vCPU as the guest left it.
    ///
    /// # Errors
    /// [`Error::Memory`] if it is not there.
    pub fn mailbox(&self, vcpu: usize) -> Result<Mailbox, Error> {
        read(self.vm.system(), vcpu_area(vcpu) + vcpu_area::MAILBOX)
    }

    /// One word of a vCPU's mailbox, read while the guest runs.
    ///
    /// # Errors
    /// [`Error::Memory`] if it is not there.
    pub fn rounds_done(&self, vcpu: usize) -> Result<u64, Error> {
        self.load_mailbox(vcpu, std::mem::offset_of!(Mailbox, rounds_done))
    }

    /// Accesses that a vCPU's paced run has made, read while the guest runs.
    ///
    /// # Errors
    /// [`Error::Memory`] if it is not there.
    pub fn accesses_done(&self, vcpu: usize) -> Result<u64, Error> {
        self.load_mailbox(vcpu, std::mem::offset_of!(Mailbox, accesses_done))
    }

    fn load_mailbox(&self, vcpu: usize, field: usize) -> Result<u64, Error> {
        let address = vcpu_area(vcpu) + vcpu_area::MAILBOX + field as u64;
        self.vm
            .system()
            .load(GuestAddress(address), std::sync::atomic::Ordering::Acquire)
            .map_err(|error| Error::Memory(error.to_string()))
    }

    pub(super) fn write_mailbox(&self, vcpu: usize, field: usize, value: u64) -> Result<(), Error> {
        let address = vcpu_area(vcpu) + vcpu_area::MAILBOX + field as u64;
        self.vm
            .system()
            .store(value, GuestAddress(address), std::sync::atomic::Ordering::Release)
            .map_err(|error| Error::Memory(error.to_string()))
    }

    pub(super) fn text(&self, vcpu: usize) -> Result<String, Error> {
        let mailbox = self.mailbox(vcpu)?;
        let length = usize::try_from(mailbox.text_bytes).unwrap_or(usize::MAX).min(mailbox.text.len());
        Ok(String::from_utf8_lossy(&mailbox.text[..length]).into_owned())
    }

    /// The stall histograms of all vCPUs together, in ticks of the guest's TSC.
    ///
    /// # Errors
    /// [`Error::Memory`] if they are not there.
    pub fn stalls(&self) -> Result<Histogram, Error> {
        let mut all = Histogram::default();
        for vcpu in 0..self.threads.len() {
            all.merge(&read(self.vm.system(), vcpu_area(vcpu) + vcpu_area::HISTOGRAM)?);
        }
        Ok(all)
    }

    /// What L1 reports about its L2s: the counts of all vCPUs together.
    ///
    /// # Errors
    /// [`Error::Memory`] if the reports are not there.
    pub fn nested_report(&self) -> Result<Report, Error> {
        (0..self.threads.len()).try_fold(Report::default(), |sum, vcpu| {
            let one: Report = read(self.vm.system(), vcpu_area(vcpu) + vcpu_area::NESTED_REPORT)?;
            Ok(Report {
                entries: sum.entries.saturating_add(one.entries),
                violations: sum.violations.saturating_add(one.violations),
                filled: sum.filled.saturating_add(one.filled),
                // All vCPUs have one table.
                table_pages: sum.table_pages.max(one.table_pages),
                table_root: sum.table_root.max(one.table_root),
                ..one
            })
        })
    }

    /// The control page of one vCPU's L2, as L1 left it.
    ///
    /// # Errors
    /// [`Error::Memory`] if it is not there.
    pub fn control(&self, vcpu: usize) -> Result<ControlPage, Error> {
        read(self.vm.system(), vcpu_area(vcpu) + vcpu_area::CONTROL_BLOCK)
    }

    /// What became of the last probes of one vCPU's L2.
    ///
    /// # Errors
    /// [`Error::Memory`] if they are not there.
    pub fn answers(&self, vcpu: usize) -> Result<Answers, Error> {
        read(self.vm.system(), vcpu_area(vcpu) + vcpu_area::ANSWERS)
    }

    /// What one vCPU's L2 did in the last race, as far as its journal is filled. The firmware says how far: no more than there is room is read.
    ///
    /// # Errors
    /// [`Error::Memory`] if there are no journals.
    pub fn journal(&self, vcpu: usize) -> Result<Vec<Access>, Error> {
        let failed = |error: GuestMemoryError| Error::Memory(error.to_string());
        if self.journals == 0 || !(1..self.threads.len()).contains(&vcpu) {
            return Err(Error::Memory(format!("vCPU {vcpu} keeps no journal")));
        }
        let place = GuestAddress(race::journal(self.journals, vcpu));
        let count: u64 = self.vm.system().read_obj(place).map_err(failed)?;
        let mut accesses = vec![Access::default(); usize::try_from(count).unwrap_or(usize::MAX).min(ROOM)];
        let first = place.unchecked_add(std::mem::offset_of!(Journal, accesses) as u64);
        self.vm.system().read_slice(accesses.as_mut_bytes(), first).map_err(failed)?;
        Ok(accesses)
    }

    /// What SMM's handler keeps for one vCPU.
    ///
    /// # Errors
    /// [`Error::Memory`] if it is not there.
    pub fn smm_ledger(&self, vcpu: usize) -> Result<smm::Ledger, Error> {
        read(self.vm.smram(), smm::smbase(vcpu) + smm::LEDGER)
    }

    /// Puts other code where every vCPU's handler begins.
    ///
    /// # Errors
    /// [`Error::Memory`] if there is no SMRAM.
    pub fn break_smm(&self, code: &[u8]) -> Result<(), Error> {
        (0..self.threads.len()).try_for_each(|vcpu| {
            let at = GuestAddress(smm::smbase(vcpu) + smm::ENTRY);
            self.vm.smram().write_slice(code, at).map_err(|error| Error::Memory(error.to_string()))
        })
    }

    /// Whether everybody but SMM still finds what the monitor left in the place of one vCPU's SMRAM.
    ///
    /// # Errors
    /// [`Error::Memory`] if it is not there.
    pub fn smram_is_closed(&self, vcpu: usize) -> Result<bool, Error> {
        let (first, pages) = (smm::smbase(vcpu), smm::SMRAM_BYTES / PAGE_SIZE);
        (0..pages).try_fold(true, |closed, page| {
            let bytes: [u8; 1 << umbra_shared::PAGE_SHIFT] = read(self.vm.system(), first + page * PAGE_SIZE)?;
            Ok(closed && bytes.iter().all(|&byte| byte == kvm::vm::CLOSED_SMRAM))
        })
    }

    /// Writes that the guest says its last command made, over all vCPUs.
    ///
    /// # Errors
    /// [`Error::Memory`] if the mailboxes are not there.
    pub fn writes(&self) -> Result<u64, Error> {
        (0..self.threads.len()).try_fold(0_u64, |sum, vcpu| Ok(sum.saturating_add(self.mailbox(vcpu)?.writes)))
    }

    /// Eight bytes of one vCPU's SMRAM, `offset` from its SMBASE on.
    ///
    /// # Errors
    /// [`Error::Memory`] if they are not there.
    pub fn smram_word(&self, vcpu: usize, offset: u64) -> Result<u64, Error> {
        read(self.vm.smram(), smm::smbase(vcpu) + offset)
    }
}

fn read<T: FromBytes>(memory: &GuestMemoryMmap, address: u64) -> Result<T, Error> {
    let mut bytes = vec![0; size_of::<T>()];
    memory.read_slice(&mut bytes, GuestAddress(address)).map_err(|error| Error::Memory(error.to_string()))?;
    T::read_from_bytes(&bytes).map_err(|_| Error::Memory("a report has the wrong size".into()))
}
