//! Frame numbers and page-table levels, as types that cannot be mixed up.

use core::fmt;

/// log2 of the smallest page.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes of the smallest page.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

macro_rules! frame_number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl $name {
            /// The frame that holds the byte at `address`.
            #[must_use]
            pub const fn containing(address: u64) -> Self {
                Self(address >> PAGE_SHIFT)
            }

            /// The address of the frame's first byte. Bits that do not fit 64 are lost, so frames above 2^52 wrap.
            #[must_use]
            pub const fn address(self) -> u64 {
                self.0 << PAGE_SHIFT
            }

            /// The frame `count` frames further on, wrapping at 2^64.
            #[must_use]
            pub const fn plus(self, count: u64) -> Self {
                Self(self.0.wrapping_add(count))
            }

            /// The first frame of the page of `level` that holds this frame.
            #[must_use]
            pub const fn align_down(self, level: Level) -> Self {
                Self(self.0 & !(level.frames() - 1))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

frame_number! {
    /// An L1 guest frame number: an L1 guest physical address over 4 KiB.
    Gfn
}
frame_number! {
    /// An L2 guest frame number. Never the same thing as a [`Gfn`], even where the numbers agree.
    L2Gfn
}

/// A level of a page-table walk, counted as Linux's `PG_LEVEL_*` does: 1 holds 4 KiB leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Level {
    /// 4 KiB leaves (a page table).
    K4 = 1,
    /// 2 MiB leaves (a page directory).
    M2 = 2,
    /// 1 GiB leaves (a page directory pointer table).
    G1 = 3,
    /// 512 GiB an entry (PML4).
    T512 = 4,
    /// 256 TiB an entry (PML5).
    P256 = 5,
}

impl Level {
    /// The level numbered `number`, or `None` outside 1..=5.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::K4),
            2 => Some(Self::M2),
            3 => Some(Self::G1),
            4 => Some(Self::T512),
            5 => Some(Self::P256),
            _ => None,
        }
    }

    /// 1 to 5.
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// log2 of the bytes that one 8-byte entry of this level maps (Intel SDM 3A, 4.5: 9 address bits a level).
    #[must_use]
    pub const fn shift(self) -> u32 {
        PAGE_SHIFT + 9 * (self as u32 - 1)
    }

    /// 4 KiB frames that one 8-byte entry of this level maps.
    #[must_use]
    pub const fn frames(self) -> u64 {
        1 << (9 * (self as u32 - 1))
    }

    /// Bytes that one 8-byte entry of this level maps.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_map_what_the_manual_says() {
        assert_eq!(Level::K4.bytes(), 4 << 10);
        assert_eq!(Level::M2.bytes(), 2 << 20);
        assert_eq!(Level::G1.bytes(), 1 << 30);
        assert_eq!(Level::P256.bytes(), 256 << 40);
        assert_eq!(Level::M2.frames(), 512);
        for number in 0..=7 {
            assert_eq!(Level::from_number(number).map(Level::number), (1..=5).contains(&number).then_some(number));
        }
    }

    #[test]
    fn frames_align_to_their_level() {
        let gfn = Gfn::containing(0x1234_5678);
        assert_eq!(gfn, Gfn(0x12345));
        assert_eq!(gfn.address(), 0x1234_5000);
        assert_eq!(gfn.align_down(Level::M2), Gfn(0x12200));
        assert_eq!(gfn.plus(1).to_string(), "0x12346");
    }
}
