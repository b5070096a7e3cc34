//! What becomes of the roots of an L2: each one's role, what was done when it was made and ended, and the tracked pages that it mapped.

use super::places::Places;
use umbra_mmu::{RootId, RootRole};
use umbra_shared::role::Role;

/// One root.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Life {
    /// Its role.
    pub role: Role,
    /// What was being done when it was made.
    pub cause: String,
    /// What was being done when it went; `None` while it is there.
    pub ended_by: Option<String>,
    /// Tracked pages that it maps, or mapped at its end.
    pub mapped: u64,
}

/// A log of roots. There are no times: nothing in the shadow MMU has a clock.
#[derive(Debug)]
pub struct RootsLog {
    /// What is being done.
    cause: String,
    lives: Vec<(RootId, Life)>,
    /// Tracked pages that were mapped by what went since this was last asked.
    torn_down: u64,
}

impl Default for RootsLog {
    fn default() -> Self {
        Self { cause: "boot".to_owned(), lives: Vec::new(), torn_down: 0 }
    }
}

impl RootsLog {
    /// `cause` is being done from here on.
    pub fn about_to(&mut self, cause: &str) {
        cause.clone_into(&mut self.cause);
    }

    /// `root` is loaded, and others may go. Notes what each maps now.
    pub(super) fn loads(&mut self, root: RootId, role: RootRole, places: &Places) {
        self.look(places);
        if !self.lives.iter().any(|(other, life)| *other == root && life.ended_by.is_none()) {
            let word = u64::from(role.mode.0) | if role.smm { Role::SMM.word() } else { 0 };
            let role = Role::from_word(word).unwrap_or_default();
            let life = Life { role, cause: self.cause.clone(), ..Life::default() };
            self.lives.push((root, life));
        }
    }

    /// What is not alive any more has ended.
    pub(super) fn ends(&mut self, alive: impl Fn(RootId) -> bool) {
        for (root, life) in &mut self.lives {
            if life.ended_by.is_none() && !alive(*root) {
                life.ended_by = Some(self.cause.clone());
                self.torn_down += life.mapped;
            }
        }
    }

    /// All mappings go, and the roots stay.
    pub(super) fn empties(&mut self, places: &Places) {
        self.look(places);
        for (_, life) in self.lives.iter_mut().filter(|(_, life)| life.ended_by.is_none()) {
            self.torn_down += std::mem::take(&mut life.mapped);
        }
    }

    fn look(&mut self, places: &Places) {
        for place in places.all() {
            let living = |(root, life): &&mut (RootId, Life)| place.root() == Some(*root) && life.ended_by.is_none();
            if let Some((_, life)) = self.lives.iter_mut().find(living) {
                life.mapped = place.tracked_now();
            }
        }
    }

    /// Tracked pages that were mapped by what went since the last call.
    pub fn torn_down(&mut self) -> u64 {
        std::mem::take(&mut self.torn_down)
    }

    /// The lives of all roots, in the order in which they were made, and what those that are left map.
    #[must_use]
    pub fn finish(mut self, places: &Places) -> Vec<Life> {
        self.look(places);
        self.lives.into_iter().map(|(_, life)| life).collect()
    }
}
