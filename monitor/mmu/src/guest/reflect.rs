//! What L1 is told: EPT violations and misconfigurations, nested page faults.

use umbra_shared::paging::ept::qualification;
use umbra_shared::paging::npf;

use crate::access::{Access, Kind, Request};
use crate::format::Format;

/// What L1 is told about an access that EPT12 does not permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reflection {
    /// Basic exit reason 48 with this exit qualification (SDM 3C table 28-7).
    EptViolation(u64),
    /// Basic exit reason 49, which has no qualification.
    EptMisconfiguration,
    /// `VMEXIT_NPF` (400h) with this EXITINFO1 (APM 15.25.6).
    NestedPageFault(u64),
}

/// A walk under way, as far as an exit depends on it.
pub struct Reflect {
    /// The format of EPT12.
    pub format: Format,
    /// The access.
    pub request: Request,
    /// What the entries so far leave; nothing when one is not present.
    pub rights: Access,
}

impl Reflect {
    fn violation(&self) -> Reflection {
        let Request { kind, table_walk, linear } = self.request;
        let access = match kind {
            // Table 28-7, footnote: with A/D flags such an access sets both bits.
            _ if table_walk && self.format.has_accessed_dirty() => qualification::READ | qualification::WRITE,
            Kind::Read => qualification::READ,
            Kind::Write => qualification::WRITE,
            Kind::Execute => qualification::FETCH,
        };
        let valid = if linear { qualification::LINEAR_VALID } else { 0 };
        let last = if linear && !table_walk { qualification::LINEAR_FINAL } else { 0 };
        Reflection::EptViolation(access | self.rights.bits() << qualification::RIGHTS_SHIFT | valid | last)
    }

    fn fault(&self, cause: u64) -> Reflection {
        let Request { kind, table_walk, .. } = self.request;
        let nx = matches!(self.format, Format::Npt { nx: true, .. } | Format::Pae { nx: true });
        let access = match kind {
            _ if table_walk => npf::WRITE,
            Kind::Write => npf::WRITE,
            Kind::Execute if nx => npf::FETCH,
            Kind::Read | Kind::Execute => 0,
        };
        let stage = if table_walk { npf::TABLE_WALK } else { npf::FINAL };
        Reflection::NestedPageFault(npf::USER | cause | access | stage)
    }

    /// An entry is not present.
    #[must_use]
    pub fn not_present(&self) -> Reflection {
        if self.format.is_ept() { self.violation() } else { self.fault(0) }
    }

    /// Rights do not suffice.
    #[must_use]
    pub fn denied(&self) -> Reflection {
        if self.format.is_ept() { self.violation() } else { self.fault(npf::PRESENT) }
    }

    /// An entry has reserved bits set, or is no entry at all.
    #[must_use]
    pub fn reserved(&self) -> Reflection {
        if self.format.is_ept() { Reflection::EptMisconfiguration } else { self.fault(npf::PRESENT | npf::RESERVED) }
    }
}
