//! Hits of KVM's tracepoints, counted. KVM's statistics do not tell exits apart, and older kernels have none; a perf event for each filter and
//! vCPU thread counts the hits that the filter lets through, and nothing is recorded.

use super::{Error, ioctls};
use rustix::process::Pid;
use std::collections::BTreeMap;
use std::fs;
use std::fs::File;
use std::io::{self, Read as _};

/// Something to count: the counter's name, KVM's event, and a filter on the event's fields if not every hit counts
/// (Documentation/trace/events.rst, 5).
pub type Hits<'a> = (&'static str, &'static str, Option<&'a str>);

/// Intel's basic exit reasons (SDM 3, appendix C) that dirty logging is about.
pub const PML: &[Hits] = &[
    ("vm_exits", "kvm_exit", None),
    ("ept_violation", "kvm_exit", Some("exit_reason==48")),
    ("pml_full", "kvm_exit", Some("exit_reason==62")),
];

/// Where the tracepoints' numbers are.
const EVENTS: &str = "/sys/kernel/tracing/events/kvm";

/// Running counters.
#[derive(Debug)]
pub struct Exits(Vec<(&'static str, File)>);

impl Exits {
    /// Begins to count the hits of these threads.
    ///
    /// # Errors
    /// [`Error::Call`] where tracefs is not mounted, or perf events are not for this user.
    pub fn count(threads: &[Pid], what: &[Hits]) -> Result<Self, Error> {
        let failed = |source| Error::Call { what: "counting hits of a tracepoint of KVM", source };
        let mut counters = Vec::new();
        for &(name, event, filter) in what {
            let number = fs::read_to_string(format!("{EVENTS}/{event}/id")).map_err(failed)?;
            let number = number.trim().parse().map_err(|error| failed(io::Error::other(error)))?;
            for &thread in threads {
                counters.push((name, ioctls::tracepoint_counter(number, thread, filter).map_err(failed)?));
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
