//! The log of all roots that KVM makes and tears down: role, time, cause, pages mapped, life time. From the kernel's own events, in the observed
//! pass alone.
//!
//! Three of `kvmmmu`'s events are enough and the same on every kernel whose TDP MMU takes part in them (5.10's does not: there the log is empty): a
//! shadow page is got (a root is one of the highest level), one is zapped, an entry is set. A root of the TDP MMU has no event of its own at its end,
//! so the end is that of the table below it. Mapped pages are leaves of tracked memory that were set since the newest root was made, and are counted
//! for that root.

use crate::host;
use crate::kvm::Error;
use crate::kvm::events::{Event, Events, Wanted};
use crate::report::record::RootLife;
use std::fs;
use umbra_shared::layout::TRACKED_GPA;
use umbra_shared::{Gfn, PAGE_SIZE};

/// This event came with those of the TDP MMU.
const OF_TDP_MMU: &str = "/sys/kernel/tracing/events/kvmmmu/kvm_tdp_mmu_spte_changed";
const GOT: usize = 0;
const ZAPPED: usize = 1;
const SET: usize = 2;
const WANTED: [Wanted; 3] = [
    Wanted { event: "kvmmmu/kvm_mmu_get_page", fields: &["role", "gfn", "created"], filter: None },
    Wanted { event: "kvmmmu/kvm_mmu_prepare_zap_page", fields: &["role", "gfn"], filter: None },
    Wanted { event: "kvmmmu/kvm_mmu_set_spte", fields: &["level", "gfn"], filter: Some("level==1") },
];

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
pub struct RoleLog {
    events: Events,
    begin: Option<u64>,
    /// The highest level seen: a root's.
    top: u32,
    lives: Vec<(RoleWord, RootLife)>,
    /// Tracked pages that the roots mapped which were torn down since this was last asked.
    torn_down: u64,
}

impl RoleLog {
    /// Begins to log. Before the VM has a root: the first ones would be missing.
    ///
    /// # Errors
    /// [`Error::Call`] where the user may not, or the kernel has no such events; [`Error::Capability`] where its TDP MMU does not take part in them.
    pub fn begin() -> Result<Self, Error> {
        if host::parameter("kvm", "tdp_mmu").as_deref() == Some("Y") && !fs::exists(OF_TDP_MMU).unwrap_or(false) {
            return Err(Error::Capability {
                capability: "kvmmmu/kvm_tdp_mmu_spte_changed",
                consequence: "this kernel's TDP MMU tells nothing about its roots".into(),
            });
        }
        Ok(Self { events: Events::record(&WANTED)?, begin: None, top: 0, lives: Vec::new(), torn_down: 0 })
    }

    /// Takes in what happened since the last time; `cause` is what was being done.
    ///
    /// # Errors
    /// [`Error::Call`] if events were lost.
    pub fn during(&mut self, cause: &str) -> Result<(), Error> {
        for event in self.events.take()? {
            self.take(&event, cause);
        }
        Ok(())
    }

    fn take(&mut self, event: &Event, cause: &str) {
        let begin = *self.begin.get_or_insert(event.time);
        let now = event.time.saturating_sub(begin);
        match (event.which, event.fields.as_slice()) {
            (GOT, &[role, _, created]) => {
                let role = RoleWord(u32::try_from(role).unwrap_or(u32::MAX));
                self.top = self.top.max(role.level());
                if role.level() == self.top && created & 1 == 1 {
                    let life = RootLife {
                        role: role.text(),
                        cause: cause.to_owned(),
                        time: now,
                        life: None,
                        ended_by: None,
                        mapped: 0,
                    };
                    self.lives.push((role, life));
                }
            }
            (ZAPPED, &[role, _]) => {
                let role = RoleWord(u32::try_from(role).unwrap_or(u32::MAX));
                if role.level() + 1 < self.top {
                    return;
                }
                let alive =
                    |(kept, life): &&mut (RoleWord, RootLife)| kept.kind() == role.kind() && life.life.is_none();
                if let Some((_, life)) = self.lives.iter_mut().find(alive) {
                    life.life = Some(now.saturating_sub(life.time));
                    life.ended_by = Some(cause.to_owned());
                    self.torn_down += life.mapped;
                }
            }
            (SET, &[1, gfn]) if Gfn(gfn).0 >= TRACKED_GPA / PAGE_SIZE => {
                if let Some((_, life)) = self.lives.last_mut() {
                    life.mapped += 1;
                }
            }
            _ => {}
        }
    }

    /// Tracked pages that were mapped by the roots that were torn down since the last call; `None` where this kernel tells nothing about roots.
    pub fn torn_down(&mut self) -> Option<u64> {
        let pages = std::mem::take(&mut self.torn_down);
        (!self.lives.is_empty()).then_some(pages)
    }

    /// The lives of all roots, in the order in which they were made.
    #[must_use]
    pub fn finish(self) -> Vec<RootLife> {
        self.lives.into_iter().map(|(_, life)| life).collect()
    }
}
