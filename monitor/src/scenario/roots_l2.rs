//! `roots` with `--roots`: the changes are made by an L2 on Umbra's shadow MMU, which announces the role that it is in, and where what becomes of an
//! unused root is an option. Each root that is kept has a VM of KVM's for itself.
//!
//! Refaults are tracked pages that the shadow MMU had to map again. KVM's own page faults of the same touch are counted apart.

use super::Setup;
use super::l2;
use super::model;
use super::pass::Pass;
use super::roots::{Faults, Run};
use crate::cli::{NestedArgs, RunArgs};
use crate::failure::Failure;
use crate::guest::{Machine, Plan};
use crate::kvm;
use crate::nested::{FirstReads, Host, Life, Means, Mechanism, Options, RootsLog, source};
use crate::progress::Progress;
use crate::report::record::{Bytes, RootLife};
use std::sync::Arc;
use umbra_mmu::{DEFAULT_TWINS, RootPolicy};
use umbra_shared::Level;
use umbra_shared::nested::{AliasKind, Flags, Format, Map, Nested, Way};
use umbra_shared::pattern::Pattern;
use umbra_shared::protocol::Command;
use umbra_shared::role::Role;

/// The mechanism that needs no KVM.
const WALKER: &str = "walker";

/// Pages that one fault maps, at most.
const EXTENT: u32 = 64;

/// Whether the changes are made on the software walker.
pub fn is_on_walker(args: &RunArgs) -> bool {
    args.shadow.roots.is_some() && args.nested.mechanism == [WALKER]
}

/// Refuses what `roots` cannot make use of.
///
/// # Errors
/// [`Failure::Input`].
pub fn no_stray_options(args: &RunArgs) -> Result<(), Failure> {
    let NestedArgs { mechanism, fault_source, .. } = args.nested.clone();
    let refused = |why: &str| Err(Failure::Input(format!("roots: {why}")));
    if args.nested != (NestedArgs { mechanism, fault_source, ..NestedArgs::default() }) {
        return refused("of L2's options it has --mechanism walker and --fault-source alone (nested has the others)");
    }
    let NestedArgs { mechanism, fault_source, .. } = &args.nested;
    if args.shadow.roots.is_none() && args.nested != NestedArgs::default() {
        return refused("--mechanism and --fault-source are the shadow MMU's, which --roots asks for");
    }
    if !mechanism.is_empty() && *mechanism != [WALKER] {
        return Err(Failure::Input(format!(
            "--mechanism {}: in roots it is walker, or left away for an L2 that runs",
            mechanism.join(",")
        )));
    }
    if is_on_walker(args) && fault_source.is_some() {
        return refused("the walker has no KVM that would fault, so --fault-source means nothing");
    }
    Ok(())
}

/// What becomes of an unused root.
#[derive(Clone, Copy, Debug)]
pub struct Cure {
    /// The policy.
    pub policy: RootPolicy,
    source: Option<source::Kind>,
}

impl Cure {
    /// What `args` ask for; `None` where the changes are made to KVM.
    ///
    /// # Errors
    /// [`Failure::Input`].
    pub fn new(args: &RunArgs) -> Result<Option<Self>, Failure> {
        if args.shadow.roots.is_none() || is_on_walker(args) {
            return Ok(None);
        }
        if args.vcpus != 1 {
            return Err(Failure::Input(format!("--vcpus {}: with --roots it takes one", args.vcpus)));
        }
        let policy = model::roots(args.shadow.roots.as_deref())?;
        if let RootPolicy::Quota(pages @ 0..16) = policy {
            return Err(Failure::Input(format!("--roots quota={pages}: a single walk with its split needs 16 pages")));
        }
        Ok(Some(Self { policy, source: l2::fault_source(&args.nested)? }))
    }

    /// The machine, with an L2 whose pages are those of L1, in order. In the observed pass its roots are logged.
    ///
    /// # Errors
    /// [`Failure::NotHere`] for a host without a source of faults.
    pub fn plan(self, setup: &Setup, pass: Pass, progress: &Progress) -> Result<Plan, Failure> {
        let pages = setup.plan.pattern.pages;
        let map = Map::new(pages, Level::K4, 1, AliasKind::Contiguous, 1)
            .map_err(|error| Failure::Input(format!("--memory: {error}")))?;
        let nested =
            Nested { way: Way::Umbra, map, format: Format::Ept, flags: Flags::Unused, fill_batch: 0, remaps: 0 };
        let source = l2::choose_source(self.source, &source::Kind::ALL, None, "", progress)?;
        // Nothing tracks here.
        let means = Means { strategy: "log", mechanism: Mechanism::KvmBitmap };
        let pieces = !setup.plan.backing.is_huge();
        let log_roots = pass == Pass::Observed && setup.role_log;
        let (roots, twins) = (self.policy, DEFAULT_TWINS);
        let shadow =
            Options { means, source, extent: EXTENT, twins, pieces, first_reads: FirstReads::Exact, roots, log_roots };
        Ok(Plan { nested: Some(nested), shadow: Some(shadow), ..setup.plan.clone() })
    }
}

/// The L2 of a run.
pub struct OnL2 {
    host: Arc<Host>,
    /// Shadow pages in use at once.
    most_pages: u32,
    /// What its structures took at once.
    most: Bytes,
}

impl OnL2 {
    /// The machine's L2, ready to touch its pages.
    ///
    /// # Errors
    /// Those of the guest.
    pub fn begin(machine: &Machine) -> Result<Option<Self>, Failure> {
        let Some(host) = machine.l2() else { return Ok(None) };
        // All of L1's table, so that nothing is L1's to do any more.
        machine.command(Command::Fill, 0)?;
        Ok(Some(Self { host: Arc::clone(host), most_pages: 0, most: Bytes::default() }))
    }

    /// Tracked pages that the shadow MMU has mapped so far.
    ///
    /// # Errors
    /// A thread panicked that had it.
    pub fn mapped(&self) -> Result<u64, Failure> {
        Ok(self.host.shadow()?.places.counts().tracked_pages)
    }

    /// `cause` is being done from here on.
    ///
    /// # Errors
    /// As [`Self::mapped`].
    pub fn log(&self, cause: &str) -> Result<(), Failure> {
        if let Some(log) = &mut self.host.shadow()?.log {
            log.about_to(cause);
        }
        Ok(())
    }

    /// Tracked pages that were mapped by what was torn down since the last call; `None` while nothing is logged.
    ///
    /// # Errors
    /// As [`Self::mapped`].
    pub fn torn_down(&self) -> Result<Option<u64>, Failure> {
        Ok(self.host.shadow()?.log.as_mut().map(RootsLog::torn_down))
    }

    /// L1's memory goes away and comes back, for the shadow MMU too.
    ///
    /// # Errors
    /// The system's.
    pub fn replace_memory(&self) -> Result<(), kvm::Error> {
        self.host.shadow()?.replace_memory()
    }

    /// Looks at what the shadow MMU takes now.
    ///
    /// # Errors
    /// As [`Self::mapped`].
    pub fn look(&mut self) -> Result<(), Failure> {
        let shadow = self.host.shadow()?;
        let now = shadow.memory();
        self.most_pages = self.most_pages.max(shadow.mmu.shadow_pages());
        let most = &mut self.most;
        most.table_bytes = most.table_bytes.max(now.table_bytes);
        most.rmap_bytes = most.rmap_bytes.max(now.rmap_bytes);
        most.cache_bytes = most.cache_bytes.max(now.cache_bytes);
        most.track_bytes = most.track_bytes.max(now.track_bytes);
        Ok(())
    }
}

/// Puts into the row what the shadow MMU came to, and what is wrong with it.
///
/// # Errors
/// As [`OnL2::mapped`].
pub fn finish(run: &mut Run, policy: RootPolicy) -> Result<(), Failure> {
    let Some(l2) = &run.l2 else { return Ok(()) };
    let mut shadow = l2.host.shadow()?;
    let (pages, vms) = (l2.most_pages, shadow.places.all().len());
    let roles = shadow.log.take().map(|log| log.finish(&shadow.places)).unwrap_or_default();
    let audit = shadow.audit();
    drop(shadow);
    let name = format!("{}, {} pass", run.row.name, run.pass.name());
    run.row.memory = Some(l2.most);
    for (counter, value) in [("shadow_pages", u64::from(pages)), ("vms", vms as u64)] {
        run.count(counter, value, "umbra-mmu");
    }
    run.row.roles = roles.into_iter().map(life).collect();
    let faults = &mut run.row.truth.faults;
    if let Err(difference) = audit {
        faults.push(format!("{name}: {difference}"));
    }
    if let RootPolicy::Quota(most) = policy
        && pages > most
    {
        faults.push(format!("{name}: {pages} shadow pages were in use, and the quota is {most}"));
    }
    Ok(())
}

/// As the Record has it. There is no clock in the shadow MMU.
fn life(life: Life) -> RootLife {
    let names: Vec<_> = std::iter::once("shadow MMU").chain(life.role.names()).collect();
    RootLife {
        role: names.join(" "),
        cause: life.cause,
        ended_by: life.ended_by,
        mapped: life.mapped,
        ..RootLife::default()
    }
}

/// The row `12-roles`: every role touches all pages, in turn; then the first one again.
///
/// # Errors
/// Those of the guest.
pub fn twelve_roles(run: &mut Run) -> Result<(), Failure> {
    let (pages, mut most) = (run.setup.plan.pattern.pages, None);
    for round in 0..=run.setup.rounds {
        let (mut toggled, mut touched, mut clean) = (0, 0, true);
        let mut faults = Faults::default();
        for (number, role) in Role::TWELVE.into_iter().enumerate() {
            run.step("role", number as u64 + 1, Role::TWELVE.len() as u64);
            run.about_to("12-roles")?;
            let window = run.machine.command(Command::Role, role.word())?;
            let before = run.faults()?;
            let touch = run.machine.command(Command::Touch, round << 32 | pages)?;
            faults = faults.plus(run.faults()?.since(before));
            toggled += window.length();
            touched += touch.length();
            clean &= window.clean && touch.clean;
            run.look()?;
        }
        run.phase("toggle", round, toggled, clean);
        run.phase("refault", round, touched, clean);
        // In the first round each role touches for the first time.
        if round > 0 {
            most = Some(faults.most(most.unwrap_or_default()));
        }
    }
    run.count_faults(most);
    run.row.truth.pages.written += pages;
    let wrong =
        (0..pages).find(|&page| run.machine.vm().first_word(page) != Some(Pattern::stamp(run.setup.rounds, page)));
    if let Some(page) = wrong {
        let name = run.pass.name();
        run.row
            .truth
            .faults
            .push(format!("12-roles, {name} pass: page {page} does not hold what was written there last"));
    }
    Ok(())
}
