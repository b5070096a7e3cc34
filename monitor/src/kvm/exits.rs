//! VM exits counted by their reason. KVM's statistics do not tell them apart, its tracepoint `kvm_exit` does: a perf event for each
//! reason and vCPU thread counts the hits that its filter lets through, and nothing is recorded.

use super::{Error, ioctls};
use rustix::process::Pid;
use std::collections::BTreeMap;
use std::fs;
use std::fs::File;
use std::io::{self, Read as _};

/// Intel's basic exit reasons (SDM 3, appendix C) that dirty logging is about, by the name of their counter.
pub const PML: &[(&str, Option<u32>)] = &[("vm_exits", None), ("ept_violation", Some(48)), ("pml_full", Some(62))];

/// Where the tracepoint's number is.
const TRACEPOINT: &str = "/sys/kernel/tracing/events/kvm/kvm_exit/id";

/// Running counters.
#[derive(Debug)]
pub struct Exits(Vec<(&'static str, File)>);

impl Exits {
    /// Begins to count the exits of these threads, all of them under a name without a reason.
    ///
    /// # Errors
    /// [`Error::Call`] where tracefs is not mounted, or perf events are not for this user.
    pub fn count(threads: &[Pid], reasons: &[(&'static str, Option<u32>)]) -> Result<Self, Error> {
        let failed = |source| Error::Call { what: "counting exits by the tracepoint kvm_exit", source };
        let number = fs::read_to_string(TRACEPOINT).map_err(failed)?;
        let number = number.trim().parse().map_err(|error| failed(io::Error::other(error)))?;
        let mut counters = Vec::new();
        for &thread in threads {
            for &(name, reason) in reasons {
                let filter = reason.map(|reason| format!("exit_reason=={reason}"));
                counters.push((name, ioctls::tracepoint_counter(number, thread, filter.as_deref()).map_err(failed)?));
            }
        }
        Ok(Self(counters))
    }

    /// All counts so far, those of all threads added up.
    ///
    /// # Errors
    /// The system's.
    pub fn read(&self) -> Result<BTreeMap<String, u64>, Error> {
        let mut sums = BTreeMap::new();
        for (name, mut file) in self.0.iter().map(|(name, file)| (name, file)) {
            let mut value = [0; 8];
            file.read_exact(&mut value).map_err(|source| Error::Call { what: "reading a perf event", source })?;
            *sums.entry((*name).to_owned()).or_default() += u64::from_ne_bytes(value);
        }
        Ok(sums)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_is_gone_is_an_error_and_not_a_zero() {
        let gone = Pid::from_raw(i32::MAX).unwrap();
        assert!(matches!(Exits::count(&[gone], PML), Err(Error::Call { .. })));
        assert!(Exits::count(&[], PML).map_or(true, |exits| exits.read().unwrap().is_empty()));
    }
}
