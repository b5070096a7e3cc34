//! A strategy of the shadow MMU that L2 runs on: it tracks L1's pages, whichever of L2's was written.

use super::Tracker;
use crate::guest::Machine;
use crate::kvm::Error;
use crate::nested::Host;
use crate::pages::PageSet;
use std::sync::Arc;

/// The tracker.
pub struct Shadowed {
    l2: Arc<Host>,
    clears: bool,
    fault: Option<String>,
}

impl Shadowed {
    /// Of the machine's L2.
    pub fn new(machine: &Machine) -> Result<Self, Error> {
        let l2 = machine.l2().ok_or_else(|| Error::Capability {
            capability: "an L2 on the shadow MMU",
            consequence: "the machine has none".into(),
        })?;
        let clears = l2.shadow()?.clears();
        Ok(Self { l2: Arc::clone(l2), clears, fault: None })
    }
}

impl Tracker for Shadowed {
    fn start(&mut self, _machine: &Machine) -> Result<(), Error> {
        self.l2.shadow()?.start()
    }

    fn harvest(&mut self, _machine: &Machine) -> Result<(), Error> {
        self.l2.shadow()?.harvest()
    }

    fn clear(&mut self, _machine: &Machine) -> Result<(), Error> {
        self.l2.shadow()?.clear()
    }

    fn clears(&self) -> bool {
        self.clears
    }

    fn stop(&mut self, _machine: &Machine) -> Result<(), Error> {
        self.l2.shadow()?.stop()
    }

    fn report(&mut self, _machine: &Machine, into: &mut PageSet) {
        match self.l2.shadow() {
            Ok(shadow) => shadow.report(into),
            Err(error) => self.fault = Some(error.to_string()),
        }
    }

    fn fault(&self) -> Option<String> {
        self.fault.clone()
    }

    fn counters(&self, _machine: &Machine) -> Vec<(&'static str, u64)> {
        self.l2.shadow().map_or_else(|_| Vec::new(), |shadow| shadow.counters())
    }
}
