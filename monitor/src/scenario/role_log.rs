//! The log of all roots that KVM makes and tears down: role, time, cause, pages mapped, life time. From the kernel's own events, in the observed
//! pass alone.
//!
//! Three of `kvmmmu`'s events are enough and the same on every kernel whose TDP MMU takes part in them: a shadow page is got (a root is one of the
//! highest level), one is zapped, an entry is set. A root of the TDP MMU has no event of its own at its end, so the end is that of the table below
//! it. Mapped pages are leaves of tracked memory that were set since the newest root was made, and are counted for that root.
//!
//! 5.10's TDP MMU tells nothing of its roots: neither that one is made nor that it goes. There its own functions are events: a root is asked for, a
//! table is made, an entry changes, a root is freed. A teardown's pages are then counted as they are zapped.

use crate::host;
use crate::kvm::Error;
use crate::kvm::events::{Event, Events, Wanted};
use crate::kvm::probes::{Probe, Probes};
use crate::report::record::RootLife;
use std::fs;
use umbra_shared::Gfn;

/// This event came with those of the TDP MMU.
const OF_TDP_MMU: &str = "/sys/kernel/tracing/events/kvmmmu/kvm_tdp_mmu_spte_changed";
const OF_ALL: [Wanted; 3] = [
    Wanted { event: "kvmmmu/kvm_mmu_get_page", fields: &["role", "gfn", "created"], filter: None },
    Wanted { event: "kvmmmu/kvm_mmu_prepare_zap_page", fields: &["role", "gfn"], filter: None },
    Wanted { event: "kvmmmu/kvm_mmu_set_spte", fields: &["level", "gfn"], filter: Some("level==1") },
];

/// The functions of 5.10's TDP MMU (Linux, `arch/x86/kvm/mmu/tdp_mmu.c`). A `struct kvm_mmu_page` has its role at 52 (`mmu_internal.h`), which
/// [`RoleWord::checked`] makes sure of.
const PROBES: [(Probe, &[&str], Option<&str>); 6] = [
    (
        Probe { name: "ask", at_return: false, function: "kvm_tdp_mmu_get_vcpu_root_hpa", fetch: "" },
        &["common_pid"],
        None,
    ),
    (
        Probe { name: "got", at_return: true, function: "kvm_tdp_mmu_get_vcpu_root_hpa", fetch: "" },
        &["common_pid"],
        None,
    ),
    (
        Probe { name: "made", at_return: true, function: "alloc_tdp_mmu_page", fetch: "role=+52($retval):u32" },
        &["role", "common_pid"],
        None,
    ),
    (
        Probe { name: "free", at_return: false, function: "kvm_tdp_mmu_free_root", fetch: "role=+52($arg2):u32" },
        &["role"],
        None,
    ),
    (Probe { name: "freed", at_return: true, function: "kvm_tdp_mmu_free_root", fetch: "" }, &[], None),
    (
        Probe {
            name: "entry",
            at_return: false,
            function: "__handle_changed_spte",
            fetch: "gfn=$arg3:u64 old=$arg4:u64 new=$arg5:u64 level=$arg6:u32",
        },
        &["gfn", "old", "new"],
        Some("level==1 && (old!=0 || new!=0)"),
    ),
];

/// What an event says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Happened {
    /// There is a new table.
    Made(RoleWord),
    /// A thread begins to ask for a root.
    Asks(u64),
    /// It has got one.
    Got(u64),
    /// It has made a table: a root, if it asks for one. (A table's role does not tell: 5.10 gives it the level of the one above.)
    MadeBy(RoleWord, u64),
    /// A table that was got had been there.
    Found(RoleWord),
    /// A table goes. A root that has no end of its own goes with the table below it.
    Ended(RoleWord),
    /// A root begins to go.
    Ending(RoleWord),
    /// That is done.
    Freed,
    /// A small leaf is there that was not, or was another.
    Mapped(Gfn),
    /// A small leaf is gone.
    Unmapped(Gfn),
    /// Nothing that counts.
    Nothing,
}

/// What an event of [`OF_ALL`], then of [`PROBES`], says.
fn said(event: &Event) -> Happened {
    let role = |word: u64| RoleWord(u32::try_from(word).unwrap_or(u32::MAX));
    match (event.which, event.fields.as_slice()) {
        (0, &[word, _, created]) if created & 1 == 1 => Happened::Made(role(word)),
        (0, &[word, ..]) => Happened::Found(role(word)),
        (1, &[word, _]) => Happened::Ended(role(word)),
        (2, &[_, gfn]) => Happened::Mapped(Gfn(gfn)),
        (3, &[thread]) => Happened::Asks(thread),
        (4, &[thread]) => Happened::Got(thread),
        (5, &[word, thread]) => Happened::MadeBy(role(word), thread),
        (6, &[word]) => Happened::Ending(role(word)),
        (7, _) => Happened::Freed,
        (8, &[gfn, 0, new]) if new != 0 => Happened::Mapped(Gfn(gfn)),
        (8, &[gfn, old, 0]) if old != 0 => Happened::Unmapped(Gfn(gfn)),
        _ => Happened::Nothing,
    }
}

/// A role as the kernel has it, `union kvm_mmu_page_role` (Linux, `arch/x86/include/asm/kvm_host.h`). These bits are where they are since 5.10.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RoleWord(u32);

impl RoleWord {
    const fn level(self) -> u32 {
        self.0 & 15
    }

    /// Without what differs between a root and the tables below it, or becomes true of a root that goes: level and `invalid`.
    const fn kind(self) -> u32 {
        self.0 & !(15 | 1 << 11)
    }

    /// The role, if it can be one: a level that there is, and an address space that there is.
    const fn checked(self) -> Result<Self, u32> {
        if matches!(self.level(), 1..=5) && self.0 >> 24 < 2 { Ok(self) } else { Err(self.0) }
    }

    /// In words, as the kernel's own events have them.
    fn text(self) -> String {
        let bit = |bit: u32, name: &str| if self.0 >> bit & 1 == 1 { format!(" {name}") } else { String::new() };
        let smm = if self.0 >> 24 == 0 { "" } else { " smm" };
        let named = [(7, "direct"), (12, "nx"), (13, "wp"), (14, "smep&!wp"), (15, "smap&!wp"), (17, "guest-mode")];
        let named: String = named.iter().map(|&(at, name)| bit(at, name)).collect();
        format!("level {}{named}{smm}", self.level())
    }
}

/// A log under way.
///
/// Field order matters: a probe that is still recorded cannot go.
pub struct RoleLog {
    events: Events,
    probes: Option<Probes>,
    lives: Lives,
}

impl RoleLog {
    /// Begins to log, with the frames from `tracked` on as those that count. Before the VM has a root: the first ones would be missing.
    ///
    /// # Errors
    /// [`Error::Call`] where the user may not, or the kernel has neither the events nor the functions.
    pub fn begin(tracked: Gfn) -> Result<Self, Error> {
        let silent =
            host::parameter("kvm", "tdp_mmu").as_deref() == Some("Y") && !fs::exists(OF_TDP_MMU).unwrap_or(false);
        let probes = silent.then(|| Probes::define(&PROBES.map(|(probe, ..)| probe))).transpose()?;
        let names: Vec<_> = probes.iter().flat_map(|it| PROBES.map(|(probe, ..)| it.event(&probe))).collect();
        let of_probes = names.iter().zip(PROBES).map(|(event, (_, fields, filter))| Wanted { event, fields, filter });
        let wanted: Vec<_> = OF_ALL.into_iter().chain(of_probes).collect();
        Ok(Self { events: Events::record(&wanted)?, probes, lives: Lives { tracked, ..Lives::default() } })
    }

    /// Takes in what happened since the last time; `cause` is what was being done.
    ///
    /// # Errors
    /// [`Error::Call`] if events were lost; [`Error::Capability`] if a role is none.
    pub fn during(&mut self, cause: &str) -> Result<(), Error> {
        for event in self.events.take()? {
            if self.probes.is_some() && is_told_by_probes(&event) {
                continue;
            }
            self.lives.take(event.time, said(&event), cause).map_err(|word| Error::Capability {
                capability: "struct kvm_mmu_page as 5.10 has it",
                consequence: format!("a table's role reads {word:#x} on this kernel, so its roots cannot be logged"),
            })?;
        }
        Ok(())
    }

    /// Tracked pages that were mapped by what was torn down since the last call; `None` where this kernel tells nothing about roots.
    pub fn torn_down(&mut self) -> Option<u64> {
        let pages = std::mem::take(&mut self.lives.torn_down);
        (!self.lives.all.is_empty()).then_some(pages)
    }

    /// The lives of all roots, in the order in which they were made.
    #[must_use]
    pub fn finish(self) -> Vec<RootLife> {
        self.lives.all.into_iter().map(|(_, life)| life).collect()
    }
}

/// Whether the probes tell that too: 5.10's TDP MMU, whose tables are all direct, takes part in some events.
fn is_told_by_probes(event: &Event) -> bool {
    let is_direct = |word: u64| word >> 7 & 1 == 1;
    match event.which {
        0 | 1 => event.fields.first().is_some_and(|&role| is_direct(role)),
        which => which == 2,
    }
}

/// What became of all roots so far.
#[derive(Default)]
struct Lives {
    /// Leaves from here on count.
    tracked: Gfn,
    begin: Option<u64>,
    /// The highest level seen: a root's.
    top: u32,
    all: Vec<(RoleWord, RootLife)>,
    /// Threads that are asking for a root.
    asking: Vec<u64>,
    /// The root that is being freed, and pages of it that were zapped.
    freeing: Option<(usize, u64)>,
    /// Tracked pages that were mapped by what was torn down since this was last asked.
    torn_down: u64,
}

impl Lives {
    /// Takes in one event. An error is a role that cannot be.
    fn take(&mut self, time: u64, what: Happened, cause: &str) -> Result<(), u32> {
        let begin = *self.begin.get_or_insert(time);
        let now = time.saturating_sub(begin);
        match what {
            Happened::Found(role) => self.top = self.top.max(role.checked()?.level()),
            Happened::Made(role) => {
                self.top = self.top.max(role.checked()?.level());
                if role.level() == self.top {
                    self.begin_life(role, now, cause);
                }
            }
            Happened::Asks(thread) => self.asking.push(thread),
            Happened::Got(thread) => self.asking.retain(|&other| other != thread),
            Happened::MadeBy(role, thread) => {
                if self.asking.contains(&thread) {
                    self.begin_life(role.checked()?, now, cause);
                }
            }
            Happened::Ended(role) => {
                if role.checked()?.level() + 1 >= self.top
                    && let Some(index) = self.end(role, now, cause)
                {
                    self.torn_down += self.all[index].1.mapped;
                }
            }
            Happened::Ending(role) => self.freeing = self.end(role.checked()?, now, cause).map(|index| (index, 0)),
            Happened::Freed => {
                if let Some((index, zapped)) = self.freeing.take() {
                    self.all[index].1.mapped = zapped;
                }
            }
            Happened::Mapped(gfn) if gfn >= self.tracked => {
                if let Some((_, life)) = self.all.last_mut() {
                    life.mapped += 1;
                }
            }
            Happened::Unmapped(gfn) if gfn >= self.tracked => {
                self.torn_down += 1;
                match (&mut self.freeing, self.all.last_mut()) {
                    (Some((_, zapped)), _) => *zapped += 1,
                    (None, Some((_, life))) => life.mapped = life.mapped.saturating_sub(1),
                    _ => {}
                }
            }
            Happened::Mapped(_) | Happened::Unmapped(_) | Happened::Nothing => {}
        }
        Ok(())
    }

    fn begin_life(&mut self, role: RoleWord, now: u64, cause: &str) {
        let (text, cause) = (role.text(), cause.to_owned());
        self.all.push((role, RootLife { role: text, cause, time: now, life: None, ended_by: None, mapped: 0 }));
    }

    /// The oldest living root of that kind ends.
    fn end(&mut self, role: RoleWord, now: u64, cause: &str) -> Option<usize> {
        let alive = |(kept, life): &(RoleWord, RootLife)| kept.kind() == role.kind() && life.life.is_none();
        let index = self.all.iter().position(alive)?;
        let life = &mut self.all[index].1;
        life.life = Some(now.saturating_sub(life.time));
        life.ended_by = Some(cause.to_owned());
        Some(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Level 5, direct, all rights.
    const ROOT: RoleWord = RoleWord(5 | 1 << 7 | 7 << 8);
    const TABLE: RoleWord = RoleWord(4 | 1 << 7 | 7 << 8);
    const PAGE: Gfn = Gfn(0x1000);

    fn lives(events: &[Happened]) -> Lives {
        let mut lives = Lives { tracked: PAGE, ..Lives::default() };
        for (time, &what) in (100..).zip(events) {
            lives.take(time, what, "x").unwrap();
        }
        lives
    }

    #[test]
    fn a_root_without_an_end_of_its_own_ends_with_the_table_below_it() {
        use Happened::{Ended, Made, Mapped};
        let kept = lives(&[Made(ROOT), Made(TABLE), Mapped(PAGE), Mapped(Gfn(0))]);
        assert_eq!((kept.torn_down, kept.all[0].1.life, kept.all[0].1.mapped), (0, None, 1));
        let gone = lives(&[Made(ROOT), Made(TABLE), Mapped(PAGE), Ended(TABLE)]);
        assert_eq!((gone.torn_down, gone.all[0].1.life, gone.all[0].1.mapped), (1, Some(3), 1));
    }

    #[test]
    fn a_freed_root_mapped_what_was_zapped_in_it_and_not_what_was_zapped_before() {
        use Happened::{Asks, Ending, Freed, Got, Made, MadeBy, Mapped, Unmapped};
        let second = PAGE.plus(1);
        let freed =
            lives(&[Made(ROOT), Mapped(PAGE), Mapped(second), Unmapped(PAGE), Ending(ROOT), Unmapped(second), Freed]);
        assert_eq!((freed.torn_down, freed.all[0].1.mapped), (2, 1));
        assert_eq!(freed.all[0].1.ended_by.as_deref(), Some("x"));
        // A table below a root is none, whatever level it says that it has; a thread that only finds its root makes none.
        let asked = lives(&[
            Asks(7),
            MadeBy(ROOT, 8),
            MadeBy(ROOT, 7),
            Got(7),
            MadeBy(ROOT, 7),
            Asks(7),
            Got(7),
            MadeBy(ROOT, 7),
        ]);
        assert_eq!(asked.all.len(), 1);
        // An end of another kind's, and one that was not seen to begin.
        let other = lives(&[Made(ROOT), Mapped(PAGE), Ending(RoleWord(ROOT.0 | 1 << 24)), Freed, Freed]);
        assert_eq!((other.torn_down, other.all[0].1.life), (0, None));
    }

    #[test]
    fn what_probes_tell_is_not_taken_twice() {
        let twice =
            |which, role: RoleWord| is_told_by_probes(&Event { time: 0, which, fields: vec![role.0.into(), 0] });
        assert!(twice(0, ROOT) && twice(1, ROOT) && twice(2, RoleWord(1)));
        // A nested guest's tables are shadowed ones.
        assert!(!twice(0, RoleWord(5)) && !twice(1, RoleWord(5)) && !twice(5, ROOT) && !twice(8, ROOT));
    }

    #[test]
    fn what_is_no_role_is_refused() {
        assert_eq!(Lives::default().take(0, Happened::Made(RoleWord(0)), ""), Err(0));
        assert_eq!(Lives::default().take(0, Happened::Ending(RoleWord(0xffff_8880)), ""), Err(0xffff_8880));
    }

    #[test]
    fn events_say_what_changed() {
        let event = |which, fields: &[u64]| said(&Event { time: 0, which, fields: fields.to_vec() });
        assert_eq!(event(0, &[5, 0, 1]), Happened::Made(RoleWord(5)));
        assert_eq!(event(0, &[5, 0, 0]), Happened::Found(RoleWord(5)));
        assert_eq!(event(8, &[9, 0, 7]), Happened::Mapped(Gfn(9)));
        assert_eq!(event(8, &[9, 7, 0]), Happened::Unmapped(Gfn(9)));
        // Rights that change, and an empty entry that is zapped with its table.
        assert_eq!((event(8, &[9, 7, 5]), event(8, &[9, 0, 0])), (Happened::Nothing, Happened::Nothing));
    }
}
