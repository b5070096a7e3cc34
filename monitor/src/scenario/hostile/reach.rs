//! What L2 may have come to, whatever was cached: every page to which some walk of L1's table leads, each entry as it is or as it was at some moment
//! since L1 last said that something changed (DESIGN.md, the invariant). More must never be mapped, so what L2 breaks out of this reach is the
//! fault of whoever shadows the table, the monitor or KVM; and an L1 that breaks although its own memory was out of reach was broken by it.

use super::forecast::Forecast;
use crate::nested::memory::View;
use std::collections::{BTreeMap, BTreeSet};
use umbra_mmu::reference::History;
use umbra_mmu::{Access, Frame, L1Memory as _, Slots};
use umbra_shared::hostile::{Case, Store};
use umbra_shared::nested::L2_BASE;
use umbra_shared::probe::Probe;
use umbra_shared::{Gfn, L2Gfn, PAGE_SIZE};

/// Earlier words of the table, as long as they count.
#[derive(Default)]
pub struct Reach {
    history: History,
    /// When L1 last said that something changed.
    since: u64,
}

impl Reach {
    /// L1 is about to make the stores of `case`, and to say so or not.
    pub fn store(&mut self, view: &View, slots: &Slots, case: &Case) {
        let mut stored = BTreeMap::new();
        self.history.now += 1;
        for &Store { address, value } in case.stores() {
            if let Some(found) = slots.find(Gfn::containing(address)) {
                let place = (found.frame.0, address % PAGE_SIZE);
                let old = stored.insert(place, value).unwrap_or_else(|| view.read(found.frame, place.1));
                self.history.note(place, old);
            }
        }
        if case.invalidations > 0 {
            self.since = self.history.now;
            self.history.prune(self.since);
        }
        self.history.now += 1;
    }

    /// The pages that L2 may come to write by `probes`, in this order: what it writes may be an entry. `None` if they are too many to tell.
    pub fn write(&mut self, forecast: &Forecast<'_>, probes: &[(Probe, u64)]) -> Option<BTreeSet<Frame>> {
        let mut all = BTreeSet::new();
        for (probe, word) in probes.iter().filter(|(probe, _)| probe.write) {
            let mut found = BTreeSet::new();
            let mut each = |frame| {
                found.insert(frame);
                false
            };
            if forecast.granted(&self.history, self.since, L2_BASE.plus(probe.page), Access::WRITE, &mut each) {
                return None;
            }
            for &frame in &found {
                self.history.note((frame.0, 0), forecast.view().read(frame, 0));
                self.history.note((frame.0, 0), *word);
            }
            all.append(&mut found);
        }
        Some(all)
    }

    /// Whether L2 may find something else than L1 has at the same address, in the part of its memory that has its code, its stack and its tables.
    pub fn misleads(&self, forecast: &Forecast<'_>, first_tracked: Frame) -> bool {
        (0..first_tracked.0).any(|number| {
            let mut other = |frame| frame != Frame(number);
            forecast.granted(&self.history, self.since, L2Gfn(number), Access::READ, &mut other)
        })
    }
}
