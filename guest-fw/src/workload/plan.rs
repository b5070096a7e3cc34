//! A plan: the accesses of one round that one vCPU makes, computed before the measured loop.

use core::ops::Range;
use umbra_shared::pattern::Pattern;

/// The bit of an entry that says "write"; the others are the page's index.
pub const WRITE: u32 = 1 << 31;

/// Entries, and room for more. The invariant is: the pages of all entries are below [`Self::pages`].
pub struct Plan<'a> {
    buffer: &'a mut [u32],
    planned: usize,
    pages: u64,
}

impl<'a> Plan<'a> {
    /// An empty plan with room for as many accesses as `buffer` is long.
    #[must_use]
    pub const fn new(buffer: &'a mut [u32]) -> Self {
        Self { buffer, planned: 0, pages: 0 }
    }

    /// Plans the accesses `share` of `round`. Panics if they do not fit, or if the pattern leads to a page that it does not have.
    pub fn fill(&mut self, pattern: &Pattern, round: u64, share: Range<u64>) {
        (self.planned, self.pages) = (0, pattern.pages);
        let (count, room) = (share.end.saturating_sub(share.start), self.buffer.len() as u64);
        assert!(count <= room, "{count} accesses do not fit a plan of {room}");
        for (entry, index) in self.buffer.iter_mut().zip(share) {
            let access = pattern.access(round, index);
            assert!(access.page < pattern.pages.min(u64::from(WRITE)), "the pattern has no page {}", access.page);
            *entry = access.page as u32 | if access.write { WRITE } else { 0 };
        }
        self.planned = count as usize;
    }

    /// The entries, in the order of the accesses.
    #[must_use]
    pub fn entries(&self) -> &[u32] {
        &self.buffer[..self.planned]
    }

    /// The entries as they lie in memory, for code that cannot take a slice.
    pub fn entries_mut(&mut self) -> &mut [u32] {
        &mut self.buffer[..self.planned]
    }

    /// Gives the entries away, to be overwritten: the plan is empty then.
    pub fn consume(&mut self) -> &mut [u32] {
        &mut self.buffer[..core::mem::take(&mut self.planned)]
    }

    /// Pages that the plan may touch: `0..pages`.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Ends the plan before its last write, if it has one: what a firmware executes that is one write short.
    pub fn cut_last_write(&mut self) {
        if let Some(last) = self.entries().iter().rposition(|entry| entry & WRITE != 0) {
            self.planned = last;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_shared::pattern::Kind;

    const PATTERN: Pattern =
        Pattern { kind: Kind::Sequential, seed: 1, pages: 8, write_percent: 50, accesses_per_page: 1 };

    #[test]
    fn entries_are_the_accesses_of_the_share() {
        let mut buffer = [0; 8];
        let mut plan = Plan::new(&mut buffer);
        plan.fill(&PATTERN, 3, 2..7);
        let expected: Vec<u32> = (2..7)
            .map(|index| PATTERN.access(3, index))
            .map(|access| u32::try_from(access.page).unwrap() | if access.write { WRITE } else { 0 })
            .collect();
        assert_eq!(plan.entries(), expected);
        assert_eq!(plan.pages(), 8);
    }

    #[test]
    fn a_cut_plan_lacks_one_write() {
        let mut buffer = [0; 8];
        let mut plan = Plan::new(&mut buffer);
        plan.fill(&PATTERN, 0, 0..8);
        let writes = |plan: &Plan| plan.entries().iter().filter(|&entry| entry & WRITE != 0).count();
        assert_eq!(writes(&plan), 4);
        plan.cut_last_write();
        assert_eq!(writes(&plan), 3);
    }

    #[test]
    fn a_consumed_plan_is_empty() {
        let mut buffer = [0; 8];
        let mut plan = Plan::new(&mut buffer);
        plan.fill(&PATTERN, 0, 0..8);
        assert_eq!((plan.entries_mut().len(), plan.consume().len(), plan.entries().len()), (8, 8, 0));
    }

    #[test]
    #[should_panic(expected = "8 accesses do not fit a plan of 7")]
    fn a_plan_without_room_is_refused() {
        Plan::new(&mut [0; 7]).fill(&PATTERN, 0, 0..8);
    }
}
