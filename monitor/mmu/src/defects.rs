//! Seeded defects: run-time switches of a test build, and constants (`false`) in any other.
//!
//! To add one: a line in the list below, `self.defect(Defect::Name)` at the place that goes wrong, and the test
//! `stateful::tests::every_defect_is_caught` demands that the generic test finds it. See docs/mmu.md.

macro_rules! defects {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// One seeded defect.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Defect {
            $($(#[$doc])* $name,)*
        }

        impl Defect {
            /// Every defect with the name that the command line knows.
            pub const ALL: &[(Self, &'static str)] = &[$((Self::$name, $text),)*];
        }
    };
}

defects! {
    /// Leaves that lose rights or mappings are not flushed.
    ForgottenFlush = "forgotten-flush",
    /// The last small leaf of a shattered one is not in the reverse map.
    RmapLostAtSplit = "rmap-lost-at-split",
    /// Page tables of 4-byte entries all get quadrant 0.
    WrongQuadrantTable = "wrong-quadrant-table",
    /// Page directories of 4-byte entries all get quadrant 0.
    WrongQuadrantDirectory = "wrong-quadrant-directory",
    /// The scan clears dirty flags without marking pages.
    DirtyClearedBeforeHarvest = "dirty-cleared-before-harvest",
    /// Small leaves of a shattered one are open for writes.
    WriteKeptByShatter = "write-kept-by-shatter",
    /// A huge leaf may reach beyond its slot's end.
    CollapseAcrossSlot = "collapse-across-slot",
    /// A clear protects only the first alias.
    AliasNotProtected = "alias-not-protected",
    /// A root is found by its table alone, whatever the flags of its format.
    StaleRole = "stale-role",
    /// A root is found whatever L2's role is: mode, and SMM.
    RoleNotTold = "role-not-told",
    /// A root that nobody uses goes, whatever the policy.
    KeptRootZapped = "kept-root-zapped",
    /// Dropping a root forgets to count down.
    CountLeak = "count-leak",
    /// Entries beyond the log's 512 are lost.
    LogOverflowDropped = "log-overflow-dropped",
    /// Opening a block of 64 opens one entry more.
    BlockOffByOne = "block-off-by-one",
    /// Split leaves get every right.
    AccessWidenedAtSplit = "access-widened-at-split",
    /// Some faults report success and map nothing.
    FaultMapsNothing = "fault-maps-nothing",
    /// Synchronising compares frames, but not rights.
    SyncIgnoresAccess = "sync-ignores-access",
    /// Unlinking a child leaves its parent reference.
    ParentLost = "parent-lost",
    /// A page found in the hash is linked without synchronising it.
    LinkedUnsynced = "linked-unsynced",
    /// A zap loses the dirty flag.
    DirtyLostAtZap = "dirty-lost-at-zap",
    /// Neighbours are mapped although their accessed flag is clear.
    PrefetchIgnoresAccessed = "prefetch-ignores-accessed",
    /// A slot that turns read-only leaves its leaves alone.
    ReadOnlyStaysWritable = "read-only-stays-writable",
    /// A clear passes huge leaves by.
    HugeNotProtected = "huge-not-protected",
    /// A leaf is writable before the guest's dirty flag is set.
    DirtyFlagIgnored = "dirty-flag-ignored",
    /// What L1 was told is not permitted stays mapped.
    ReflectionKeepsLeaf = "reflection-keeps-leaf",
    /// An invalidation of a root that is not loaded is forgotten.
    UnloadedNotSynced = "unloaded-not-synced",
    /// A zapped root is not flushed.
    RootZapUnflushed = "root-zap-unflushed",
    /// The harvest of `twin` leaves its leaves open.
    TwinLeftOpen = "twin-left-open",
    /// A walk of L2's own tables is reflected as the access that it is for.
    WalkTakenForAccess = "walk-taken-for-access",
    /// A hint survives the link that it leads over.
    HintOutlivesLink = "hint-outlives-link",
}

/// Which defects are switched on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Defects(u64);

impl Defects {
    /// Exactly one.
    #[must_use]
    pub const fn only(defect: Defect) -> Self {
        Self(1 << defect as u32)
    }

    /// Whether `defect` is on. Without the feature `defects` (and outside unit tests) this is `false`.
    #[inline]
    #[must_use]
    pub const fn has(self, defect: Defect) -> bool {
        cfg!(any(test, feature = "defects")) && self.0 & 1 << defect as u32 != 0
    }
}
