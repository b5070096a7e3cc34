//! What L2's probes have to come to, told beforehand from L1's table as it lies in memory: by umbra-mmu's naive walk of it, which shares no
//! code with the shadow MMU.

use crate::nested::memory::View;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use umbra_mmu::guest::{GuestCaps, Reflection};
use umbra_mmu::reference::{Context, History, Reference, Verdict};
use umbra_mmu::{Access, Exchange, Format, Frame, Kind, L1Memory, Request, Slots};
use umbra_shared::control::Exit;
use umbra_shared::nested::L2_BASE;
use umbra_shared::probe::{Answer, Probe};
use umbra_shared::{L2Gfn, PAGE_SIZE};

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
    context: Context,
    history: History,
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
    /// What is read may be anything.
    any_value: bool,
}

impl Expected {
    /// Whether this is what was foretold. Umbra's fault sources know the page of an access, not always the byte.
    pub fn fits(&self, found: &Answer) -> bool {
        let value = if self.any_value { 0 } else { found.value };
        self.answer == Answer { value, address: found.address & !(PAGE_SIZE - 1), ..*found }
    }
}

impl<'a> Forecast<'a> {
    /// Of the table at `root`.
    pub fn new(view: &'a View, slots: &'a Slots, format: Format, root: u64) -> Self {
        let context = Context { format, table: root, since: 0, violated: BTreeMap::new() };
        Self { view, slots, context, history: History::default(), first_tracked: view.0.first_tracked() }
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
        let reference = Reference { memory: self.view, slots: self.slots, caps: GuestCaps::default(), history };
        reference.granted_one(&Context { since, ..self.context.clone() }, gfn, right, fits)
    }

    /// The answers to `probes`, as far as they can be told: a write into a table makes what follows a question of what was cached.
    pub fn answers(&self, probes: &[(Probe, u64)]) -> Foretold {
        let written = BTreeMap::new();
        let mut overlay = Overlay { view: self.view, written, walked: RefCell::default() };
        let (mut answers, mut writes) = (Vec::with_capacity(probes.len()), Vec::new());
        for &(probe, word) in probes {
            let verdict = self.verdict(&overlay, probe);
            if let (Ok(frame), true) = (verdict, probe.write) {
                writes.push((answers.len(), frame));
                overlay.written.insert((frame, 0), word);
            }
            answers.push(match verdict {
                Ok(frame) => {
                    let any_value = frame < self.first_tracked && !probe.write;
                    let value = if probe.write || any_value { 0 } else { overlay.word(frame, 0) };
                    Expected { answer: Answer { value, ..Answer::default() }, any_value }
                }
                Err(answer) => Expected { answer, any_value: false },
            });
        }
        let Overlay { walked, mut written, .. } = overlay;
        let walked = walked.into_inner();
        if let Some((index, _)) = writes.iter().find(|(_, frame)| walked.contains(frame)) {
            answers.truncate(index + 1);
            written.clear();
        }
        Foretold { answers, written: written.into_iter().map(|((frame, _), word)| (frame, word)).collect() }
    }

    /// The page that a probe reaches, or what L1 is told.
    fn verdict(&self, memory: &Overlay<'_>, probe: Probe) -> Result<Frame, Answer> {
        let gfn = L2_BASE.plus(probe.page);
        let kind = if probe.write { Kind::Write } else { Kind::Read };
        let bit = u64::from(probe.write) << 1;
        let told = |exit: Exit, qualification| {
            Err(Answer { value: 0, code: exit as u64, qualification, address: gfn.address() })
        };
        match self.ask(memory, gfn, kind) {
            Verdict::Permitted(frame) => match self.ask(memory, gfn, Kind::Execute) {
                Verdict::Permitted(_) => Ok(frame),
                _ => told(Exit::ExecuteRights, bit),
            },
            Verdict::NoMemory(_) => told(Exit::Beyond, bit),
            Verdict::Reflected(Reflection::EptMisconfiguration) => told(Exit::Misconfigured, bit),
            Verdict::Reflected(Reflection::EptViolation(bits) | Reflection::NestedPageFault(bits)) => {
                told(Exit::Violation, bits)
            }
        }
    }

    fn ask(&self, memory: &Overlay<'_>, gfn: L2Gfn, kind: Kind) -> Verdict {
        let reference = Reference { memory, slots: self.slots, caps: GuestCaps::default(), history: &self.history };
        reference.verdict(&self.context, gfn, Request::of(kind))
    }
}
