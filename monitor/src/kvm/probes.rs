//! Kernel functions as events (Documentation/trace/kprobetrace.rst): for kernels that have no tracepoint where one is needed.
//!
//! They belong to this process by their group's name, and go when this goes.

use super::Error;
use std::fs::OpenOptions;
use std::io::{self, Write as _};

/// Where they are defined.
const DEFINITIONS: &str = "/sys/kernel/tracing/kprobe_events";

/// A function's entry or return as an event.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    /// The event's name.
    pub name: &'static str,
    /// At the return, rather than at the entry.
    pub at_return: bool,
    /// The function.
    pub function: &'static str,
    /// What to fetch, as `level=$arg6:s32 role=+52($retval):u32`.
    pub fetch: &'static str,
}

/// Probes in being.
pub struct Probes {
    group: String,
    names: Vec<&'static str>,
}

impl Probes {
    /// Defines them.
    ///
    /// # Errors
    /// [`Error::Call`] where the user may not, the kernel has no kprobe events, or no such function.
    pub fn define(probes: &[Probe]) -> Result<Self, Error> {
        let mut defined = Self { group: format!("umbra{}", std::process::id()), names: Vec::new() };
        for probe in probes {
            let kind = if probe.at_return { 'r' } else { 'p' };
            let line = format!("{kind}:{}/{} {} {}\n", defined.group, probe.name, probe.function, probe.fetch);
            write(&line).map_err(|source| Error::Call { what: "defining a kprobe event in KVM", source })?;
            defined.names.push(probe.name);
        }
        Ok(defined)
    }

    /// The event's folder below `events`.
    #[must_use]
    pub fn event(&self, probe: &Probe) -> String {
        format!("{}/{}", self.group, probe.name)
    }
}

impl Drop for Probes {
    fn drop(&mut self) {
        for name in &self.names {
            // One that something else still uses stays, which is harmless.
            let _ = write(&format!("-:{}/{name}\n", self.group));
        }
    }
}

fn write(line: &str) -> io::Result<()> {
    // Without O_APPEND all definitions there are would go.
    OpenOptions::new().append(true).open(DEFINITIONS)?.write_all(line.as_bytes())
}
