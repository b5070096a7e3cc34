//! Roots: which top-level shadow pages are loaded, kept, or awaiting synchronisation.

use crate::config::MmuError;
use crate::ptelist::narrow;
use crate::role::RootRole;

/// A root as its users name it. It goes stale when the root is zapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RootId(u32);

impl RootId {
    /// The name of the first root there ever is.
    pub(crate) const FIRST: Self = Self(0);

    /// The place in the table of roots: small, and reused after a zap.
    #[must_use]
    pub const fn index(self) -> u32 {
        self.0 & 0xffff
    }

    const fn new(index: u32, generation: u32) -> Self {
        Self(generation << 16 | index & 0xffff)
    }
}

/// One root.
#[derive(Clone, Copy, Debug)]
pub struct Root {
    /// Its shadow page; 0 for a place that is free.
    pub page: u32,
    /// Its name.
    pub id: RootId,
    /// Times that it is loaded.
    pub count: u32,
    /// As it was loaded (with mode bits masked where the policy does so).
    pub role: RootRole,
    /// The guest's table.
    pub table: u64,
    /// L2 frames that its format can name.
    pub frames: u64,
    /// When it was last loaded or dropped, in loads and drops.
    pub last_used: u64,
    /// An invalidation applied while it was not loaded.
    pub pending_sync: bool,
}

/// The table of roots.
#[derive(Debug, Default)]
pub struct Roots {
    roots: Vec<Root>,
    clock: u64,
}

impl Roots {
    /// The root named `id`.
    ///
    /// # Errors
    /// It is stale.
    #[inline]
    pub fn get(&self, id: RootId) -> Result<&Root, MmuError> {
        match self.roots.get(id.index() as usize) {
            Some(root) if root.id == id && root.page != 0 => Ok(root),
            _ => Err(MmuError::StaleRoot),
        }
    }

    /// The name of the root at `index`; of a place that is free, the name that its next root will have.
    #[inline]
    #[must_use]
    pub fn id(&self, index: u32) -> RootId {
        self.roots.get(index as usize).map(|root| root.id).unwrap_or_default()
    }

    /// The root at `index`, if that place is in use.
    #[must_use]
    #[inline]
    pub fn at(&self, index: u32) -> Option<&Root> {
        self.roots.get(index as usize).filter(|root| root.page != 0)
    }

    /// The root at `index`, to change it.
    pub fn at_mut(&mut self, index: u32) -> Option<&mut Root> {
        self.roots.get_mut(index as usize).filter(|root| root.page != 0)
    }

    /// All roots in use.
    pub fn iter(&self) -> impl Iterator<Item = &Root> {
        self.roots.iter().filter(|root| root.page != 0)
    }

    /// One more than the highest index ever used.
    #[must_use]
    pub fn end(&self) -> u32 {
        narrow(self.roots.len())
    }

    /// Counts one more use of the root at `index`; its name, and whether it awaits synchronisation.
    #[inline]
    pub fn load(&mut self, index: u32) -> Option<(RootId, bool)> {
        self.clock += 1;
        let clock = self.clock;
        let root = self.at_mut(index)?;
        root.count += 1;
        root.last_used = clock;
        Some((root.id, root.pending_sync))
    }

    /// Counts one use less; gives the count that is left.
    pub fn unload(&mut self, index: u32) -> Option<u32> {
        self.clock += 1;
        let clock = self.clock;
        let root = self.at_mut(index)?;
        root.count = root.count.saturating_sub(1);
        root.last_used = clock;
        Some(root.count)
    }

    /// Adds a root with shadow page `page`, not loaded yet. `None` when all 65,536 places are taken.
    pub fn add(&mut self, page: u32, role: RootRole, table: u64) -> Option<RootId> {
        let index = match self.roots.iter().position(|root| root.page == 0) {
            Some(index) => index,
            None if self.roots.len() < 1 << 16 => {
                let id = RootId::new(narrow(self.roots.len()), 0);
                let free = Root { page: 0, id, count: 0, role, table, frames: 0, last_used: 0, pending_sync: false };
                if self.roots.len() == self.roots.capacity() {
                    self.roots.reserve_exact((self.roots.len() / 4).max(4));
                }
                self.roots.push(free);
                self.roots.len() - 1
            }
            None => return None,
        };
        let root = self.roots.get_mut(index)?;
        let frames = role.format.frames();
        *root = Root { page, count: 0, role, table, frames, pending_sync: false, ..*root };
        Some(root.id)
    }

    /// Frees the place at `index`; its name goes stale.
    pub fn remove(&mut self, index: u32) {
        if let Some(root) = self.at_mut(index) {
            root.page = 0;
            root.id = RootId::new(index, (root.id.0 >> 16).wrapping_add(1) & 0xffff);
        }
    }

    /// The root that was used longest ago and is not loaded.
    #[must_use]
    pub fn least_recent(&self) -> Option<u32> {
        self.iter().filter(|root| root.count == 0).min_by_key(|root| root.last_used).map(|root| root.id.index())
    }

    /// Heap bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (self.roots.capacity() * size_of::<Root>()) as u64
    }
}
