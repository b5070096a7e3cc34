//! Roles of an L2 that announces them ([`crate::control`]): what KVM would look at to choose a root.

use crate::toggle::Toggle;

/// The paging mode of an L2, and whether it is in system management mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Role(u64);

impl Role {
    /// The role that an L2 begins in.
    pub const HOME: Self = Self(0);
    /// CR0.WP.
    pub const WP: Self = Self(1 << 0);
    /// CR0.PG is clear.
    pub const UNPAGED: Self = Self(1 << 1);
    /// CR4.PSE.
    pub const PSE: Self = Self(1 << 2);
    /// CR4.PGE.
    pub const PGE: Self = Self(1 << 3);
    /// CR4.SMEP.
    pub const SMEP: Self = Self(1 << 4);
    /// CR4.SMAP.
    pub const SMAP: Self = Self(1 << 5);
    /// CR4.PKE.
    pub const PKE: Self = Self(1 << 6);
    /// EFER.NXE.
    pub const NXE: Self = Self(1 << 7);
    /// System management mode: another address space.
    pub const SMM: Self = Self(1 << 8);

    /// Twelve roles, as the seed has it: "just thrashing between two roles, or 12 different roles?"
    pub const TWELVE: [Self; 12] = [
        Self::HOME,
        Self::WP,
        Self::WP.and(Self::NXE),
        Self::WP.and(Self::NXE).and(Self::PGE),
        Self::WP.and(Self::NXE).and(Self::PGE).and(Self::SMEP),
        Self::WP.and(Self::NXE).and(Self::PGE).and(Self::SMEP).and(Self::SMAP),
        Self::WP.and(Self::NXE).and(Self::PGE).and(Self::SMEP).and(Self::SMAP).and(Self::PKE),
        Self::UNPAGED,
        Self::UNPAGED.and(Self::PSE),
        Self::PSE,
        Self::SMM,
        Self::WP.and(Self::SMM),
    ];

    const NAMES: [&'static str; 9] = ["wp", "!pg", "pse", "pge", "smep", "smap", "pke", "nxe", "smm"];

    /// The role of that word, or `None` if it has bits that no role has.
    #[must_use]
    pub const fn from_word(word: u64) -> Option<Self> {
        if word >> Self::NAMES.len() == 0 { Some(Self(word)) } else { None }
    }

    /// As a word.
    #[must_use]
    pub const fn word(self) -> u64 {
        self.0
    }

    /// Both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The bits of the paging mode.
    #[must_use]
    pub const fn mode(self) -> u8 {
        self.0.to_le_bytes()[0]
    }

    /// Whether it is in SMM.
    #[must_use]
    pub const fn is_smm(self) -> bool {
        self.0 & Self::SMM.0 != 0
    }

    /// The names of its bits.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        (0_u32..).zip(Self::NAMES).filter(move |(bit, _)| self.0 >> bit & 1 == 1).map(|(_, name)| name)
    }
}

impl Toggle {
    /// The roles that it passes through before it is back at [`Role::HOME`].
    #[must_use]
    pub const fn visits(self) -> &'static [Role] {
        match self {
            Self::None => &[],
            Self::Cr0Wp => &[Role::WP],
            // LA57 and LME change while paging is off, when they are in no role.
            Self::Cr0Pg | Self::La57 | Self::Lme => &[Role::UNPAGED],
            Self::Pae => const { &[Role::UNPAGED, Role::PGE.and(Role::PKE), Role::UNPAGED] },
            Self::Bits32 => const { &[Role::UNPAGED, Role::PSE.and(Role::PKE), Role::UNPAGED] },
            Self::Pse => &[Role::PSE],
            Self::Pge => &[Role::PGE],
            Self::Smep => &[Role::SMEP],
            Self::Smap => &[Role::SMAP],
            Self::Pke => &[Role::PKE],
            Self::Nxe => &[Role::NXE],
            Self::Smm | Self::SmmShared => &[Role::SMM],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_roles_agree() {
        for (index, role) in Role::TWELVE.into_iter().enumerate() {
            assert_eq!(Role::from_word(role.word()), Some(role));
            assert!(!Role::TWELVE[..index].contains(&role), "{role:?} is there twice");
        }
        assert_eq!(Role::from_word(1 << 9), None);
        let role = Role::WP.and(Role::SMM);
        assert_eq!((role.mode(), role.is_smm()), (1, true));
        assert!(role.names().eq(["wp", "smm"]) && Role::HOME.names().next().is_none());
    }

    #[test]
    fn a_toggle_leaves_home_if_it_changes_anything() {
        for toggle in Toggle::ALL {
            assert_eq!(toggle.visits().is_empty(), *toggle == Toggle::None);
            assert!(!toggle.visits().contains(&Role::HOME), "{toggle:?}");
        }
    }
}
