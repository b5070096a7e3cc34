//! Shadow pages: an arena of tables and headers, and the hash that finds them by (gfn, role).

use umbra_shared::{Gfn, L2Gfn};

use crate::config::{CacheSize, NoMemory};
use crate::head::Head;
use crate::ptelist::{Allowance, narrow};
use crate::role::Role;
use crate::spte::{Spte, SpteRef};

/// 512 entries.
pub type Table = [Spte; 512];

static EMPTY: Table = [Spte::NONE; 512];

/// What is known about a shadow page besides its entries: 56 bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Header {
    /// The guest table that it shadows; for a direct page the first frame of the guest leaf that it splits.
    pub gfn: Gfn,
    /// The rest of its identity.
    pub role: Role,
    /// Entries that link to it.
    pub parents: Head,
    /// First L2 frame under its first path. The only path unless `shared`.
    pub l2_base: u64,
    next: u32,
    /// Index in the root table, and whether other paths lead here too.
    path: u32,
    /// When it was last synchronised, in sync operations.
    pub stamp: u32,
    /// When a walk of everything below a page last saw it, in such walks.
    pub visit: u32,
    /// Present entries.
    pub present: u16,
    /// Blocks of 64 entries that are open without traps (strategy `combined`).
    pub touched: u8,
    flags: u8,
}

const IN_USE: u8 = 1;
const ROOT: u8 = 2;

/// In `path`, beside an index below 2^16.
const SHARED: u32 = 1 << 31;

impl Header {
    /// Whether the page is in use.
    #[must_use]
    pub const fn in_use(&self) -> bool {
        self.flags & IN_USE != 0
    }

    /// Whether there is, or was, more than one path from roots to it.
    #[must_use]
    pub const fn shared(&self) -> bool {
        self.path & SHARED != 0
    }

    /// Whether it is a root.
    #[must_use]
    pub const fn is_root(&self) -> bool {
        self.flags & ROOT != 0
    }

    /// Marks it as reachable by several paths, for good.
    pub fn set_shared(&mut self) {
        self.path |= SHARED;
    }

    /// Marks it as the root at `index` of the root table.
    pub fn set_root(&mut self, index: u32) {
        self.flags |= ROOT;
        self.path = index;
    }

    /// Index in the root table: of itself for a root page, else of the root of its first path.
    #[inline]
    #[must_use]
    pub const fn root(&self) -> u32 {
        self.path & !SHARED
    }

    /// Gives it its first path, by the root at `root`.
    pub fn set_path(&mut self, root: u32, l2_base: u64) {
        (self.path, self.l2_base) = (root, l2_base);
    }
}

/// A header and the entries, 64 bytes without them. No table: the page is free.
#[derive(Debug, Default)]
struct Page {
    header: Header,
    table: Option<Box<Table>>,
}

/// The arena. Page 0 is never used: reading it gives an empty page, writing it does nothing.
#[derive(Debug)]
pub struct Arena {
    pages: Vec<Page>,
    buckets: Vec<u32>,
    seed: u64,
    free: u32,
    in_use: u32,
    cache: Vec<Box<Table>>,
    nothing: Header,
    /// Allocation limit for tests.
    pub allowance: Allowance,
}

/// The present entries of one page in order, for loops that change them: see [`Arena::present`].
#[derive(Clone, Copy, Debug)]
pub struct Present {
    at: SpteRef,
    end: u32,
    left: u16,
}

impl Present {
    /// The next one. Ends early when all that were present at the beginning have been seen.
    #[inline]
    pub fn next(&mut self, arena: &Arena) -> Option<(SpteRef, Spte)> {
        while self.left > 0 && self.at.0 < self.end {
            let (at, spte) = (self.at, arena.spte(self.at));
            self.at = SpteRef(at.0 + 1);
            if spte.present() {
                self.left -= 1;
                return Some((at, spte));
            }
        }
        None
    }
}

fn new_table() -> Result<Box<Table>, NoMemory> {
    let mut entries = Vec::new();
    entries.try_reserve_exact(512).map_err(|_| NoMemory)?;
    // In blocks: a fill of a whole page is a string instruction, of which every iteration counts as an instruction on
    // the lab's clock and under callgrind.
    for _ in 0..4 {
        entries.extend_from_slice(std::hint::black_box(&EMPTY).get(..128).unwrap_or_default());
    }
    entries.into_boxed_slice().try_into().map_err(|_| NoMemory)
}

impl Arena {
    /// An empty arena. `seed` makes the hash unpredictable for a guest that chooses its frames.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            pages: Vec::new(),
            buckets: Vec::new(),
            seed,
            free: 0,
            in_use: 0,
            cache: Vec::new(),
            nothing: Header::default(),
            allowance: Allowance(u32::MAX),
        }
    }

    /// Pages in use.
    #[must_use]
    pub const fn in_use(&self) -> u32 {
        self.in_use
    }

    /// One more than the highest page index ever used.
    #[must_use]
    pub fn end(&self) -> u32 {
        narrow(self.pages.len())
    }

    /// Heap bytes, cached tables included.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let tables = (u64::from(self.in_use) + self.cache.len() as u64) * size_of::<Table>() as u64;
        tables
            + (self.pages.capacity() * size_of::<Page>()
                + self.buckets.capacity() * 4
                + self.cache.capacity() * size_of::<Box<Table>>()) as u64
    }

    /// Tables in the split cache, and their bytes.
    #[must_use]
    pub fn cached(&self) -> (u32, u64) {
        (narrow(self.cache.len()), (self.cache.len() * size_of::<Table>()) as u64)
    }

    /// The header of `page`.
    #[inline]
    #[must_use]
    pub fn header(&self, page: u32) -> &Header {
        self.pages.get(page as usize).map_or(&self.nothing, |page| &page.header)
    }

    /// The header of `page`, to change it.
    #[inline]
    pub fn header_mut(&mut self, page: u32) -> &mut Header {
        self.pages.get_mut(page as usize).map_or(&mut self.nothing, |page| &mut page.header)
    }

    /// The entries of `page`.
    #[inline]
    #[must_use]
    pub fn table(&self, page: u32) -> &Table {
        match self.pages.get(page as usize) {
            Some(Page { table: Some(table), .. }) => table,
            _ => &EMPTY,
        }
    }

    /// One entry, to change it without changing whether it is present, and its page's header.
    #[inline]
    pub fn entry_mut(&mut self, at: SpteRef) -> Option<(&mut Spte, &Header)> {
        let Page { header, table } = self.pages.get_mut(at.page() as usize)?;
        Some((table.as_deref_mut()?.get_mut(at.index())?, header))
    }

    /// The entries and header of `page`.
    pub fn page_mut(&mut self, page: u32) -> Option<(&mut Table, &mut Header)> {
        let Page { header, table } = self.pages.get_mut(page as usize)?;
        Some((table.as_deref_mut()?, header))
    }

    /// One entry.
    #[inline]
    #[must_use]
    pub fn spte(&self, at: SpteRef) -> Spte {
        self.table(at.page()).get(at.index()).copied().unwrap_or_default()
    }

    /// The present entries of `page`, in order. Any of them may change on the way; what has gone is passed over.
    #[inline]
    #[must_use]
    pub fn present(&self, page: u32) -> Present {
        let at = SpteRef::new(page, 0);
        Present { at, end: at.0 + 512, left: self.header(page).present }
    }

    /// Replaces one entry; presence is counted.
    #[inline]
    pub fn set(&mut self, at: SpteRef, new: Spte) {
        if let Some((table, header)) = self.page_mut(at.page())
            && let Some(entry) = table.get_mut(at.index())
        {
            let old = std::mem::replace(entry, new);
            if old.present() != new.present() {
                header.present = if new.present() { header.present + 1 } else { header.present.saturating_sub(1) };
            }
        }
    }

    /// Closes the small leaves at `entries`, from the first on, while each equals the open leaf `like` and is reached by
    /// one path, from the root at `root`. Their L2 frames go to `frames`. How many they are.
    #[inline(never)]
    pub fn close_alike(&mut self, entries: &[u32], (like, root): (Spte, u32), frames: &mut [L2Gfn]) -> usize {
        for (done, (&entry, l2)) in entries.iter().zip(frames.iter_mut()).enumerate() {
            let at = SpteRef(entry);
            let Some(Page { header, table: Some(table) }) = self.pages.get_mut(at.page() as usize) else { return done };
            let Some(spte) = table.get_mut(at.index()) else { return done };
            if *spte != like || header.path != root {
                return done;
            }
            *spte = like.closed();
            *l2 = L2Gfn(header.l2_base + at.index() as u64);
        }
        entries.len().min(frames.len())
    }

    #[inline]
    fn bucket(&self, gfn: Gfn, role: Role) -> usize {
        let mixed = (gfn.0 ^ self.seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ role.word();
        let mixed = (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed >> 32) as usize & (self.buckets.len().max(1) - 1)
    }

    /// The page that shadows (gfn, role).
    #[must_use]
    #[inline]
    pub fn find(&self, gfn: Gfn, role: Role) -> Option<u32> {
        let mut page = self.buckets.get(self.bucket(gfn, role)).copied().unwrap_or(0);
        while page != 0 {
            let header = self.header(page);
            if header.gfn == gfn && header.role == role {
                return Some(page);
            }
            page = header.next;
        }
        None
    }

    fn rehash(&mut self) -> Result<(), NoMemory> {
        let size = (self.buckets.len() * 2).max(64);
        let mut buckets: Vec<u32> = Vec::new();
        buckets.try_reserve_exact(size).map_err(|_| NoMemory)?;
        buckets.resize(size, 0);
        self.buckets = buckets;
        for page in 1..self.end() {
            if self.header(page).in_use() {
                self.insert(page);
            }
        }
        Ok(())
    }

    fn insert(&mut self, page: u32) {
        let (gfn, role) = (self.header(page).gfn, self.header(page).role);
        let bucket = self.bucket(gfn, role);
        if let Some(first) = self.buckets.get_mut(bucket) {
            let next = std::mem::replace(first, page);
            self.header_mut(page).next = next;
        }
    }

    fn remove(&mut self, page: u32) {
        let (gfn, role, next) = (self.header(page).gfn, self.header(page).role, self.header(page).next);
        let bucket = self.bucket(gfn, role);
        let Some(first) = self.buckets.get_mut(bucket) else { return };
        if *first == page {
            *first = next;
            return;
        }
        let mut at = *first;
        while at != 0 {
            let after = self.header(at).next;
            if after == page {
                self.header_mut(at).next = next;
                return;
            }
            at = after;
        }
    }

    /// A new, empty page for (gfn, role), which must not exist. `for_split` allows tables of the split cache.
    ///
    /// # Errors
    /// No memory; nothing changed.
    pub fn alloc(&mut self, gfn: Gfn, role: Role, for_split: bool) -> Result<u32, NoMemory> {
        if self.in_use as usize >= self.buckets.len() {
            self.rehash()?;
        }
        if self.free == 0 {
            let have = self.pages.len();
            let more = if have == 0 { 64 } else { (have / 8).max(16) };
            if have + more > SpteRef::MAX_PAGES as usize {
                return Err(NoMemory);
            }
            self.pages.try_reserve_exact(more).map_err(|_| NoMemory)?;
            self.pages.resize_with(have + more, Page::default);
            for page in (narrow(have).max(1)..self.end()).rev() {
                self.header_mut(page).next = self.free;
                self.free = page;
            }
        }
        let cached = if for_split { self.cache.pop() } else { None };
        let table = if let Some(table) = cached {
            table
        } else {
            self.allowance.take()?;
            new_table()?
        };
        let page = self.free;
        self.free = self.header(page).next;
        if let Some(place) = self.pages.get_mut(page as usize) {
            let header = Header { gfn, role, flags: IN_USE, ..Header::default() };
            *place = Page { header, table: Some(table) };
        }
        self.insert(page);
        self.in_use += 1;
        Ok(page)
    }

    /// Frees `page`, whose entries must all be gone. It leaves the hash too.
    pub fn release(&mut self, page: u32) {
        if !self.header(page).in_use() {
            return;
        }
        debug_assert!(self.header(page).present == 0 && self.header(page).parents.is_empty());
        self.remove(page);
        if let Some(place) = self.pages.get_mut(page as usize) {
            *place = Page { header: Header { next: self.free, ..Header::default() }, table: None };
        }
        self.free = page;
        self.in_use -= 1;
    }

    /// Fills the split cache to its capacity if it holds less than its minimum. Returns whether it did.
    pub fn top_up(&mut self, size: CacheSize) -> Result<bool, NoMemory> {
        if self.cache.len() >= size.min as usize {
            return Ok(false);
        }
        let target = size.capacity as usize;
        if self.cache.capacity() < target {
            self.cache.try_reserve_exact(target - self.cache.len()).map_err(|_| NoMemory)?;
        }
        while self.cache.len() < target {
            self.allowance.take()?;
            self.cache.push(new_table()?);
        }
        Ok(true)
    }

    /// Frees the split cache.
    pub fn drop_cache(&mut self) {
        self.cache = Vec::new();
    }
}
