//! Changes of a vCPU's mode that the firmware makes at ring 0, there and back: what KVM calls another role may be another root to it.

/// A bit of CPUID: leaf (subleaf 0), register (0 to 3 for EAX, EBX, ECX, EDX), bit.
pub type CpuidBit = (u32, usize, u32);

macro_rules! toggles {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $word:literal, $cpuid:expr;)*) => {
        /// One of them.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u64)]
        pub enum Toggle {
            $($(#[$doc])* $name = $number,)*
        }

        impl Toggle {
            /// All of them, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The toggle of that number, or `None`.
            #[must_use]
            pub const fn from_number(number: u64) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// Its name on the command line.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $word,)*
                }
            }

            /// Whether it leads into system management mode.
            #[must_use]
            pub const fn is_smm(self) -> bool {
                matches!(self, Self::Smm | Self::SmmShared)
            }

            /// Whether it changes one bit of a register, without leaving long mode.
            #[must_use]
            pub const fn is_of_a_bit(self) -> bool {
                use Toggle::{Cr0Wp, Nxe, Pge, Pke, Pse, Smap, Smep};
                matches!(self, Cr0Wp | Pse | Pge | Smep | Smap | Pke | Nxe)
            }

            /// What the vCPU's CPUID must say (Intel SDM 2A, CPUID; AMD APM 3, appendix E); `None` where every CPU with long mode will do.
            #[must_use]
            pub const fn needs(self) -> Option<CpuidBit> {
                match self {
                    $(Self::$name => $cpuid,)*
                }
            }
        }
    };
}

toggles! {
    /// Nothing: what the way there and back costs by itself.
    None = 1, "none", None;
    /// CR0.WP.
    Cr0Wp = 2, "cr0.wp", None;
    /// Long mode's paging off and on.
    Cr0Pg = 3, "cr0.pg", None;
    /// Out of long mode to PAE paging, and back.
    Pae = 4, "cr0.pg:pae", None;
    /// Out of long mode to 32-bit paging, and back.
    Bits32 = 5, "cr0.pg:32bit", None;
    /// CR4.PSE.
    Pse = 6, "cr4.pse", None;
    /// CR4.PGE.
    Pge = 7, "cr4.pge", None;
    /// CR4.SMEP.
    Smep = 8, "cr4.smep", Some((7, 1, 7));
    /// CR4.SMAP.
    Smap = 9, "cr4.smap", Some((7, 1, 20));
    /// CR4.PKE.
    Pke = 10, "cr4.pke", Some((7, 2, 3));
    /// CR4.LA57, with paging off: it cannot change in long mode.
    La57 = 11, "cr4.la57", Some((7, 2, 16));
    /// EFER.NXE.
    Nxe = 12, "efer.nxe", Some((0x8000_0001, 3, 20));
    /// EFER.LME, with paging off: it cannot change in long mode.
    Lme = 13, "efer.lme", None;
    /// Into system management mode and back, where SMM has a view of memory of its own.
    Smm = 14, "smm", None;
    /// The same where SMM sees what everybody sees.
    SmmShared = 15, "smm:shared", None;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_agree() {
        for (number, toggle) in (1..).zip(Toggle::ALL) {
            assert_eq!(Toggle::from_number(number), Some(*toggle));
            assert_eq!(*toggle as u64, number);
            assert_eq!(Toggle::ALL.iter().filter(|other| other.name() == toggle.name()).count(), 1);
        }
        assert_eq!(Toggle::from_number(0), None);
    }
}
