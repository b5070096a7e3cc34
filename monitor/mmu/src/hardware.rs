//! What a processor does with EPT02: walk it, set its dirty flags, log. For the software walker.

use umbra_shared::{L2Gfn, Level};

use crate::access::Access;
use crate::config::MmuError;
use crate::mmu::Mmu;
use crate::roots::RootId;
use crate::spte::Frame;

/// What the walk of EPT02 gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hardware {
    /// A translation, as a TLB would keep it.
    Translated {
        /// The page of memory behind the L2 frame.
        frame: Frame,
        /// The size of the leaf.
        level: Level,
        /// Its rights.
        access: Access,
        /// Its dirty flag is set: writes through this translation set it no more.
        dirty: bool,
    },
    /// EPT02 does not allow the access: `fault` is next.
    Violation,
    /// The log is full: drain it, and try again.
    LogFull,
}

impl Mmu {
    /// Walks EPT02 for an access that needs `needed`. A write sets the leaf's dirty flag, and logs `l2` where it does.
    ///
    /// # Errors
    /// The root is stale.
    pub fn hardware_walk(&mut self, root: RootId, l2: L2Gfn, needed: Access) -> Result<Hardware, MmuError> {
        let root_entry = self.roots.get(root)?;
        if l2.0 >= root_entry.frames {
            return Ok(Hardware::Violation);
        }
        let page = root_entry.page;
        let found = self.lookup_hinted(root, page, l2);
        let spte = found.spte;
        if !spte.is_leaf(found.level) || !spte.access().allows(needed) {
            return Ok(Hardware::Violation);
        }
        let write = needed.allows(Access::WRITE);
        if write && !spte.dirty() {
            if !self.log_write(root, l2) {
                return Ok(Hardware::LogFull);
            }
            self.arena.set(found.at, spte.with_dirty());
        }
        Ok(Hardware::Translated {
            frame: spte.frame().plus(l2.0 & (found.level.frames() - 1)),
            level: found.level,
            access: spte.access(),
            dirty: spte.dirty() || write,
        })
    }

    /// What EPT02 grants at `l2` now, without side effects: frame, leaf size, rights.
    ///
    /// # Errors
    /// The root is stale.
    pub fn peek(&self, root: RootId, l2: L2Gfn) -> Result<Option<(Frame, Level, Access)>, MmuError> {
        let root = self.roots.get(root)?;
        if l2.0 >= root.frames {
            return Ok(None);
        }
        let found = self.lookup(root.page, l2);
        if !found.spte.is_leaf(found.level) {
            return Ok(None);
        }
        let frame = found.spte.frame().plus(l2.0 & (found.level.frames() - 1));
        Ok(Some((frame, found.level, found.spte.access())))
    }
}
