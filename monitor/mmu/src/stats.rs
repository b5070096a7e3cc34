//! What the MMU counts.

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counts of events since the MMU was made.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Stats {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Stats {
            /// What happened since `earlier`.
            #[must_use]
            pub const fn since(self, earlier: Self) -> Self {
                Self { $($name: self.$name.wrapping_sub(earlier.$name),)* }
            }

            /// Names and values, in one order for all tables.
            #[must_use]
            pub fn list(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }
    };
}

counters! {
    /// Calls of `fault`.
    faults,
    /// Faults on what was mapped already.
    spurious,
    /// Writes to closed leaves that nothing but tracking (or its remains) had closed.
    wp_faults,
    /// Faults that went to L1.
    reflected,
    /// Faults beyond memory.
    wants_memory,
    /// Leaves that faults or neighbours installed.
    mapped,
    /// Huge leaves replaced by full tables.
    shattered,
    /// Huge leaves zapped because small ones were needed.
    split_by_zap,
    /// Tables dropped or replaced by a huge leaf.
    collapsed,
    /// Leaves zapped.
    zapped,
    /// Shadow pages made.
    pages_made,
    /// Shadow pages freed.
    pages_freed,
    /// Entries compared with EPT12 at invalidations and links.
    synced,
    /// Pages and roots pushed out by the quota.
    evicted,
    /// Roots zapped.
    roots_zapped,
    /// Roots found again when loaded.
    roots_reused,
    /// Refills of a split cache.
    topups,
    /// Times that the log was drained.
    log_drains,
    /// Entries found in it.
    log_entries,
    /// Copies made of huge leaves.
    twins,
    /// Pages of leaves that were compared with a copy; those that are found to be zero on both sides by other means count as well.
    compared,
    /// Times that 2 MiB of memory were found to be written densely.
    made_dense,
    /// Blocks of 64 opened.
    blocks_opened,
    /// A/D flags set in EPT12, in entries.
    guest_flags,
    /// Extents mapped.
    map_extents,
    /// Pages in them.
    map_pages,
    /// Extents whose rights changed.
    protect_extents,
    /// Pages in them.
    protect_pages,
    /// Extents unmapped.
    unmap_extents,
    /// Flushes.
    flushes,
    /// Invalidations that L1 asked for.
    invalidations,
}

/// Heap bytes, exactly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Shadow pages: tables, headers, hash; the split cache's tables included.
    pub table_bytes: u64,
    /// Reverse maps and lists; the split cache's descriptors included.
    pub rmap_bytes: u64,
    /// What the split caches hold, in objects times their size. A part of the two above.
    pub cache_bytes: u64,
    /// Bitmaps, log and twins.
    pub track_bytes: u64,
    /// Roots, slots and the rest.
    pub other_bytes: u64,
}

impl Memory {
    /// Everything.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.table_bytes + self.rmap_bytes + self.track_bytes + self.other_bytes
    }
}
