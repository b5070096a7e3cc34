//! What L2's probes have to come to, told beforehand from L1's table as it lies in memory: by umbra-mmu's naive walk of it, which shares no
//! code with the shadow MMU, nor with KVM's.
//!
//! What the walk finds has its consequence by the way that L2 runs:
//!
//! | the walk finds | under Umbra | under KVM's nested SVM | under KVM's nested VMX |
//! | --- | --- | --- | --- |
//! | a page, and the right to read or write it | it is read or written; without the right to execute: exit `ExecuteRights` | read or written | read or written |
//! | an entry without that right, or that is not present | exit `Violation` | exit 400h, EXITINFO1 (APM 2, 15.25.6) | exit reason 48, qualification (SDM 3C, table 28-7) |
//! | a reserved bit or combination | EPT: exit `Misconfigured`; NPT: exit `Violation` with RSV | exit 400h with P and RSV | exit reason 49, qualification 0 (SDM 3C, 29.3.3.1) |
//! | a page beyond L1's memory | exit `Beyond` | an access to a device: `KVM_EXIT_MMIO` with L1's address, then all bits set, or lost | the same |
//! | a table beyond L1's memory | exit `Beyond` | as an entry that is not present | the same, bits 5:3 the rights of the entries above |
//!
//! An access to a device is emulated, from the second one on without a walk by the processor. If L1's table refuses *that*, VMX's L1 is told what KVM's
//! emulator knows: [`emulated`].
//!
//! What a processor does in the last two is its chipset's choice; these are KVM's (`walk_addr_generic` in `mmu/paging_tmpl.h` ends at a table that no
//! slot holds with what it has so far; a page that none holds is emulated).

use crate::kvm;
use crate::kvm::bus;
use crate::nested::memory::View;
use crate::scenario::l1_cpu::{EPT_MISCONFIGURATION, EPT_VIOLATION, NESTED_PAGE_FAULT, caps_of, format_of, violation};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use umbra_mmu::guest::{GuestCaps, Reflection};
use umbra_mmu::reference::{Context, History, Reference, Verdict};
use umbra_mmu::{Access, Exchange, Format, Frame, Kind, L1Memory, Request, Slots};
use umbra_shared::control::Exit;
use umbra_shared::nested::{L2_BASE, Nested, Way};
use umbra_shared::paging::ept::qualification;
use umbra_shared::probe::{Answer, Probe};
use umbra_shared::{Gfn, L2Gfn};

/// Who runs L2, and what L1's table means there.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    way: Way,
    format: Format,
    caps: GuestCaps,
}

impl Rules {
    /// Those of a table of `nested`.
    pub fn of(nested: &Nested) -> Result<Self, kvm::Error> {
        Ok(Self { way: nested.way, format: format_of(nested), caps: caps_of(nested.way)? })
    }

    /// Accessed and dirty flags of an entry: they come without anybody's store.
    pub const fn flags(&self) -> u64 {
        match self.format {
            Format::Ept { accessed_dirty: false, .. } => 0,
            Format::Ept { .. } => 3 << 8,
            _ => 3 << 5,
        }
    }

    /// Whether it is KVM that shadows the table.
    fn are_kvms(&self) -> bool {
        matches!(self.way, Way::Svm | Way::Vmx)
    }

    /// Code and information of what L1 is told; `write` is bit 1 where the table's format does not say more.
    const fn told(&self, reflection: Reflection, write: u64) -> (u64, u64) {
        match (self.way, reflection) {
            (Way::Svm, Reflection::NestedPageFault(bits)) => (NESTED_PAGE_FAULT, bits),
            (Way::Vmx, Reflection::EptViolation(bits)) => (EPT_VIOLATION, bits),
            (Way::Vmx, _) => (EPT_MISCONFIGURATION, 0),
            (_, Reflection::EptMisconfiguration) => (Exit::Misconfigured as u64, write),
            (_, Reflection::EptViolation(bits) | Reflection::NestedPageFault(bits)) => (Exit::Violation as u64, bits),
        }
    }
}

/// L1's memory as it will be when L2 has written so far. It remembers which pages were walked.
struct Overlay<'a> {
    view: &'a View,
    written: BTreeMap<(Frame, u64), u64>,
    walked: RefCell<BTreeSet<Frame>>,
}

impl Overlay<'_> {
    fn word(&self, frame: Frame, offset: u64) -> u64 {
        self.written.get(&(frame, offset)).copied().unwrap_or_else(|| self.view.read(frame, offset))
    }
}

impl L1Memory for Overlay<'_> {
    fn read(&self, frame: Frame, offset: u64) -> u64 {
        self.walked.borrow_mut().insert(frame);
        self.word(frame, offset)
    }

    fn exchange(&mut self, _: Frame, _: u64, _: u64, _: u64) -> Exchange {
        Exchange::Done
    }

    fn copy_page(&self, _: Frame, _: &mut [u64; 512]) -> bool {
        false
    }
}

/// What L1's table says, and the memory that it is in.
pub struct Forecast<'a> {
    view: &'a View,
    slots: &'a Slots,
    rules: Rules,
    context: Context,
    history: History,
    /// Pages whose first word leads L2 to its code.
    code: &'a BTreeSet<Frame>,
    /// Pages before this one hold what changes by itself: L1's stacks, its reports, tables in use.
    first_tracked: Frame,
}

/// What probes have to come to.
#[derive(Debug, Default)]
pub struct Foretold {
    /// The first answers, as many as can be told.
    pub answers: Vec<Expected>,
    /// The first words of the pages that L2 writes, if all can be told.
    pub written: BTreeMap<Frame, u64>,
}

/// What a probe has to come to.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    /// The answer.
    answer: Answer,
    /// Bits of the value that may be anything.
    any: u64,
    /// To how many bytes the address is told.
    precision: u64,
    /// What the probe does beyond L1's memory.
    pub beyond: Option<bus::Access>,
}

impl Expected {
    /// Whether this is what was foretold.
    pub fn fits(&self, found: &Answer) -> bool {
        let clear = |answer: &Answer| Answer {
            value: answer.value & !self.any,
            address: answer.address / self.precision,
            ..*answer
        };
        clear(&self.answer) == clear(found)
    }
}

/// What L1 is told of an access that its table refuses, where L2 had reached a device by the same page before, and KVM emulates what it does there. The
/// processor's exit was a misconfiguration of KVM's own entry, which has no qualification; so bits 7 and 8 are clear, and bit 0 is set, since KVM's walk
/// for its emulator is one for a user (`translate_nested_gpa`), which an EPT walk takes for a read. SDM 3C, table 28-7 has neither. SVM's EXITINFO1 is as ever, since
/// an access to a device is a nested page fault there, too.
fn emulated(answer: Answer) -> Answer {
    match answer.code {
        EPT_VIOLATION => {
            let linear = qualification::LINEAR_VALID | qualification::LINEAR_FINAL;
            Answer { qualification: answer.qualification & !linear | qualification::READ, ..answer }
        }
        _ => answer,
    }
}

/// Where a probe leads.
enum End {
    Page(Frame),
    Beyond(Gfn),
    Told(Answer),
}

impl<'a> Forecast<'a> {
    /// Of the table at `root`; the first words of the pages `code` lead L2 to its code.
    pub fn new(view: &'a View, slots: &'a Slots, rules: Rules, root: u64, code: &'a BTreeSet<Frame>) -> Self {
        let context = Context { format: rules.format, table: root, since: 0, violated: BTreeMap::new() };
        let first_tracked = view.0.first_tracked();
        Self { view, slots, rules, context, history: History::default(), code, first_tracked }
    }

    /// The memory.
    pub const fn view(&self) -> &View {
        self.view
    }

    /// Whether a page that `fits` was granted at some moment after `since`, as [`Reference::granted_one`] says.
    pub fn granted(
        &self,
        history: &History,
        since: u64,
        gfn: L2Gfn,
        right: Access,
        fits: &mut dyn FnMut(Frame) -> bool,
    ) -> bool {
        let reference = Reference { memory: self.view, slots: self.slots, caps: self.rules.caps, history };
        reference.granted_one(&Context { since, ..self.context.clone() }, gfn, right, fits)
    }

    /// Whether KVM would have to emulate L2's own code, or what it works with, because a page of it is beyond L1's memory: then L2 ends, and its L1
    /// with it, or spins (docs/nesting.md). Umbra tells L1.
    pub fn breaks_code(&self) -> bool {
        let beyond = |number| matches!(self.ask(self.view, L2Gfn(number), Kind::Read), Verdict::NoMemory(_));
        self.rules.are_kvms() && (0..self.first_tracked.0).any(beyond)
    }

    /// Whether `probe` is made.
    pub fn permits(&self, probe: Probe) -> bool {
        matches!(self.end(self.view, probe), End::Page(_))
    }

    /// The answers to `probes`, as far as they can be told: a write into a table makes what follows a question of what was cached. And one that takes
    /// L2's code away is not even answered where KVM emulates it and drops what it had shadowed by the old entry: L2 cannot say that it was made.
    pub fn answers(&self, probes: &[(Probe, u64)]) -> Foretold {
        let written = BTreeMap::new();
        let mut overlay = Overlay { view: self.view, written, walked: RefCell::default() };
        let (mut answers, mut pages) = (Vec::with_capacity(probes.len()), Vec::new());
        let mut devices = BTreeSet::new();
        for &(probe, word) in probes {
            let end = self.end(&overlay, probe);
            let mut expected =
                Expected { answer: Answer::default(), any: 0, precision: violation(self.rules.way).1, beyond: None };
            match end {
                End::Page(frame) => {
                    pages.push((answers.len(), probe, frame));
                    if probe.write {
                        overlay.written.insert((frame, 0), word);
                    } else if frame < self.first_tracked {
                        expected.any = u64::MAX;
                    } else {
                        expected.answer.value = overlay.word(frame, 0);
                    }
                }
                End::Beyond(gfn) => {
                    devices.insert(probe.page);
                    let written = probe.write.then_some(word);
                    expected.beyond = Some(bus::Access { address: gfn.address(), bytes: 8, written });
                    expected.answer.value = if probe.write { 0 } else { u64::MAX };
                }
                End::Told(answer) if devices.contains(&probe.page) => expected.answer = emulated(answer),
                End::Told(answer) => expected.answer = answer,
            }
            answers.push(expected);
        }
        let Overlay { walked, mut written, .. } = overlay;
        let walked = walked.into_inner();
        // A page that is a table as well gets flags by being walked.
        for (index, ..) in pages.iter().filter(|(_, _, frame)| walked.contains(frame)) {
            answers[*index].any |= self.rules.flags();
        }
        let last = pages.iter().filter(|(_, probe, _)| probe.write).find_map(|(index, _, frame)| {
            let code = self.rules.are_kvms() && self.code.contains(frame);
            (code || walked.contains(frame)).then_some(index + usize::from(!code))
        });
        if let Some(told) = last {
            answers.truncate(told);
            written.clear();
        }
        Foretold { answers, written: written.into_iter().map(|((frame, _), word)| (frame, word)).collect() }
    }

    /// Where a probe leads, by the table at the top of this file.
    fn end(&self, memory: &impl L1Memory, probe: Probe) -> End {
        let gfn = L2_BASE.plus(probe.page);
        let kind = if probe.write { Kind::Write } else { Kind::Read };
        let write = u64::from(probe.write) << 1;
        let told = |(code, qualification)| End::Told(Answer { value: 0, code, qualification, address: gfn.address() });
        let kvms = self.rules.are_kvms();
        match self.ask(memory, gfn, kind) {
            Verdict::Permitted(frame) if kvms => End::Page(frame),
            Verdict::Permitted(frame) => match self.ask(memory, gfn, Kind::Execute) {
                Verdict::Permitted(_) => End::Page(frame),
                _ => told((Exit::ExecuteRights as u64, write)),
            },
            Verdict::NoMemory(page) if kvms => End::Beyond(page),
            Verdict::NoTable(_, reflection) if kvms => told(self.rules.told(reflection, write)),
            Verdict::NoMemory(_) | Verdict::NoTable(..) => told((Exit::Beyond as u64, write)),
            Verdict::Reflected(reflection) => told(self.rules.told(reflection, write)),
        }
    }

    fn ask(&self, memory: &impl L1Memory, gfn: L2Gfn, kind: Kind) -> Verdict {
        let reference = Reference { memory, slots: self.slots, caps: self.rules.caps, history: &self.history };
        reference.verdict(&self.context, gfn, Request::of(kind))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_shared::PAGE_SIZE;

    fn rules(way: Way) -> Rules {
        let format = match way {
            Way::Svm => Format::Npt { five_levels: false, nx: true },
            _ => Format::Ept { five_levels: false, accessed_dirty: way == Way::Vmx },
        };
        Rules { way, format, caps: GuestCaps::default() }
    }

    #[test]
    fn each_way_tells_l1_in_its_own_words() {
        let (violation, wrong) = (Reflection::EptViolation(0x1a2), Reflection::EptMisconfiguration);
        let told = |way, reflection| rules(way).told(reflection, 2);
        assert_eq!(told(Way::Svm, Reflection::NestedPageFault(1 << 32 | 7)), (0x400, 1 << 32 | 7));
        assert_eq!((told(Way::Vmx, violation), told(Way::Vmx, wrong)), ((48, 0x1a2), (49, 0)));
        assert_eq!(told(Way::Umbra, violation), (Exit::Violation as u64, 0x1a2));
        assert_eq!(told(Way::Umbra, wrong), (Exit::Misconfigured as u64, 2));
        assert_eq!([Way::Svm, Way::Vmx, Way::Umbra].map(|way| rules(way).flags()), [0x60, 0x300, 0]);
    }

    #[test]
    fn what_kvm_emulates_is_told_in_its_words() {
        let told = |code, qualification| Answer { code, qualification, ..Answer::default() };
        assert_eq!(emulated(told(EPT_VIOLATION, 0x1aa)), told(EPT_VIOLATION, 0x2b));
        let other = told(NESTED_PAGE_FAULT, 1 << 32 | 7);
        assert_eq!(emulated(other), other);
    }

    #[test]
    fn an_answer_fits_but_for_what_nobody_can_tell() {
        let answer = Answer { value: 0x1027, code: 48, qualification: 0x182, address: 0x1_0000_1000 };
        let expected = Expected { answer, any: 0, precision: 1, beyond: None };
        assert!(expected.fits(&answer));
        for other in [
            Answer { value: 0x1047, ..answer },
            Answer { code: 49, ..answer },
            Answer { qualification: 0x183, ..answer },
            Answer { address: answer.address + 8, ..answer },
        ] {
            assert!(!expected.fits(&other), "{other:x?}");
        }
        assert!(Expected { any: 0x60, ..expected }.fits(&Answer { value: 0x1047, ..answer }));
        assert!(Expected { precision: PAGE_SIZE, ..expected }.fits(&Answer { address: answer.address + 8, ..answer }));
        assert!(!Expected { precision: PAGE_SIZE, ..expected }.fits(&Answer { address: answer.address - 8, ..answer }));
    }
}
