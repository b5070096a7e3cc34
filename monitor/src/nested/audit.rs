//! Whether what the kernel has mapped into the windows is what EPT02 says: read from /proc/self/maps, which nobody here writes.

use super::Shadow;
use super::source::{Closed, begins_with};
use super::window::{Page, Window};
use std::fs;
use std::os::fd::AsFd;
use umbra_mmu::{Access, Frame, RootId};
use umbra_shared::PAGE_SIZE;

/// A line of /proc/self/maps (`proc_pid_maps(5)`).
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    rights: String,
    offset: u64,
    inode: u64,
    name: String,
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let rights = words.next()?.to_owned();
        let offset = hex(words.next()?)?;
        let inode = words.nth(1)?.parse().ok()?;
        let name = words.collect::<Vec<_>>().join(" ");
        Some(Self { start: hex(start)?, end: hex(end)?, rights, offset, inode, name })
    }
}

/// Mappings that lie in `start..end`, or touch it.
fn mappings(start: u64, end: u64) -> Result<Vec<Mapping>, String> {
    let text = fs::read_to_string("/proc/self/maps").map_err(|error| format!("/proc/self/maps: {error}"))?;
    let all = text.lines().map(|line| Mapping::parse(line).ok_or_else(|| format!("/proc/self/maps has {line:?}")));
    all.filter(|mapping| mapping.as_ref().map_or(true, |mapping| mapping.start < end && mapping.end > start)).collect()
}

impl Shadow {
    /// Compares, page by page: a window maps nothing that EPT02 does not grant, nothing but L1's memory is mapped, and the kernel has mapped
    /// what the window says. L2 must be at rest.
    ///
    /// # Errors
    /// The first page that differs, in words.
    pub fn audit(&self) -> Result<(), String> {
        self.places.all().iter().try_for_each(|place| {
            place.windows().iter().try_for_each(|window| {
                self.audit_grants(place.root(), window)?;
                self.audit_mappings(window)
            })
        })
    }

    fn audit_grants(&self, root: Option<RootId>, window: &Window) -> Result<(), String> {
        for (gfn, page) in (0..).map(|page| window.first.plus(page)).zip(&window.pages) {
            let Some(frame) = page.frame() else { continue };
            let granted = root.and_then(|root| self.mmu.peek(root, gfn).ok().flatten());
            let fits = granted.is_some_and(|(granted, _, access)| {
                granted == frame && (access.allows(Access::WRITE) || !page.writable())
            });
            if !fits {
                return Err(format!("L2's frame {gfn} maps {page:?}, and EPT02 has {granted:?} there"));
            }
        }
        Ok(())
    }

    fn audit_mappings(&self, window: &Window) -> Result<(), String> {
        let place = window.place();
        let mut next = 0;
        for mapping in mappings(place.start.0, place.end().0)? {
            if mapping.start < place.start.0 || mapping.end > place.end().0 {
                return Err(format!("a mapping of {:?} reaches out of the window at {}", mapping.name, place.start));
            }
            let first = (mapping.start - place.start.0) / PAGE_SIZE;
            self.audit_closed(window, next..first)?;
            let end = (mapping.end - place.start.0) / PAGE_SIZE;
            // Most of a window is closed: that is told at once.
            if !self.is_closed(window, first..end, &mapping) {
                (first..end).try_for_each(|page| self.audit_page(window, page, &mapping))?;
            }
            next = end;
        }
        self.audit_closed(window, next..place.pages)
    }

    /// Nothing is mapped in `pages`.
    fn audit_closed(&self, window: &Window, mut pages: std::ops::Range<u64>) -> Result<(), String> {
        let holes = self.places.here().source().closed() == Closed::Hole;
        match pages.find(|&page| !holes || page_of(window, page) != Page::CLOSED) {
            None => Ok(()),
            Some(page) => Err(format!(
                "L2's frame {} should be {:?}, and is a hole",
                window.first.plus(page),
                page_of(window, page)
            )),
        }
    }

    /// Whether `pages`, all of a mapping, are closed and mapped as closed pages are.
    fn is_closed(&self, window: &Window, pages: std::ops::Range<u64>, mapping: &Mapping) -> bool {
        let range = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        let pages = window.pages.get(range(pages.start)..range(pages.end)).unwrap_or_default();
        self.places.here().source().closed() == Closed::Empty
            && mapping.name.contains(Closed::NAME)
            && pages.iter().all(|page| *page == Page::CLOSED)
    }

    fn audit_page(&self, window: &Window, number: u64, mapping: &Mapping) -> Result<(), String> {
        let page = page_of(window, number);
        let offset = mapping.offset + (number * PAGE_SIZE + window.place().start.0 - mapping.start);
        let closed = self.places.here().source().closed();
        let right = match page.frame() {
            None => closed != Closed::Hole && mapping.name.contains(Closed::NAME),
            Some(frame) if page.gathered() => {
                // Which page of L1's a page of a udmabuf is, nobody tells.
                let word = self.memory_map().first_word(frame);
                mapping.rights == "rw-s"
                    && mapping.name.starts_with("/dmabuf:")
                    && word.is_some_and(|word| begins_with(window.place().start.plus(number), word))
            }
            Some(frame) => {
                // Where userfaultfd write-protects, all mappings have all rights; a page whose fault is being settled has none.
                let rights = match closed {
                    Closed::Hole | Closed::Poisoned if !page.writable() => "r--s",
                    _ => "rw-s",
                };
                self.is_at(frame, mapping.inode, offset)
                    && (mapping.rights == rights || closed == Closed::Empty && mapping.rights == "---s")
            }
        };
        if right {
            return Ok(());
        }
        Err(format!("L2's frame {} should be {page:?}, and is {mapping:?}", window.first.plus(number)))
    }

    /// Whether `frame` of L1's memory is byte `offset` of the file with that inode.
    fn is_at(&self, frame: Frame, inode: u64, offset: u64) -> bool {
        self.memory_map().in_file(frame).is_some_and(|at| {
            at.offset == offset && rustix::fs::fstat(at.file.as_fd()).is_ok_and(|status| status.st_ino == inode)
        })
    }
}

fn page_of(window: &Window, number: u64) -> Page {
    usize::try_from(number).ok().and_then(|number| window.pages.get(number).copied()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_taken_apart() {
        let line = "100000200000-100000400000 rw-s 00001000 00:01 1043                       /memfd:umbra (deleted)";
        let mapping = Mapping::parse(line).unwrap();
        assert_eq!((mapping.start, mapping.end), (0x1000_0020_0000, 0x1000_0040_0000));
        assert_eq!((mapping.offset, mapping.inode, mapping.rights.as_str()), (0x1000, 1043, "rw-s"));
        assert_eq!(mapping.name, "/memfd:umbra (deleted)");
        assert_eq!(Mapping::parse("7ffd0-7ffd1 ---p 0 00:00 0").unwrap().name, "");
        assert_eq!(Mapping::parse("nonsense"), None);
        assert!(!mappings(0, u64::MAX).unwrap().is_empty());
    }
}
