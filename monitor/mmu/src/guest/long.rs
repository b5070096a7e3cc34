//! 8-byte entries: long mode (APM 5.3, SDM 3A 4.5) and PAE (APM 5.2.3, SDM 3A 4.4), as nested tables (APM 15.25).

use umbra_shared::paging::{ADDRESS_MASK, long};
use umbra_shared::{Gfn, Level};

use super::{Decoded, GuestCaps};
use crate::access::Access;

/// Rights of a present entry. Nested accesses are user accesses, so a supervisor entry grants nothing (APM 15.25.5).
pub(super) const fn rights(raw: u64, nx: bool) -> Access {
    if raw & long::USER == 0 {
        return Access::NONE;
    }
    let write = if raw & long::WRITE != 0 { Access::WRITE } else { Access::NONE };
    let execute = if nx && raw & long::NO_EXECUTE != 0 { Access::NONE } else { Access::EXECUTE };
    Access::READ.or(write).or(execute)
}

#[inline]
pub(super) fn decode(caps: GuestCaps, nx: bool, level: Level, raw: u64) -> Decoded {
    if raw & long::PRESENT == 0 {
        return Decoded::NotPresent;
    }
    let large = level > Level::K4 && raw & long::LARGE != 0;
    let too_large = level > Level::G1 || level == Level::G1 && !caps.giant_pages;
    if raw & caps.reserved_address() != 0 || !nx && raw & long::NO_EXECUTE != 0 || large && too_large {
        return Decoded::Reserved;
    }
    finish(nx, level, large, raw)
}

/// PAE below the pointer table: as long mode, but bits 62:52 are reserved (APM figures 5-11 to 5-13).
pub(super) fn decode_pae(caps: GuestCaps, nx: bool, level: Level, raw: u64) -> Decoded {
    if raw & long::PRESENT != 0 && raw & (0x7ff << 52) != 0 {
        return Decoded::Reserved;
    }
    decode(caps, nx, level, raw)
}

/// A PAE pointer-table entry has no rights and no flags (APM figure 5-10). Nested walks read it from memory each time.
pub(super) fn decode_pae_pointer(caps: GuestCaps, _nx: bool, raw: u64) -> Decoded {
    if raw & long::PRESENT == 0 {
        return Decoded::NotPresent;
    }
    if raw & (long::PAE_PDPTE_RESERVED | caps.reserved_address() | 0xfff << 52) != 0 {
        return Decoded::Reserved;
    }
    Decoded::Table { gfn: Gfn::containing(raw & ADDRESS_MASK), access: Access::ALL, accessed: true }
}

fn finish(nx: bool, level: Level, large: bool, raw: u64) -> Decoded {
    let access = rights(raw, nx);
    let accessed = raw & long::ACCESSED != 0;
    let gfn = Gfn::containing(raw & ADDRESS_MASK);
    if level > Level::K4 && !large {
        return Decoded::Table { gfn, access, accessed };
    }
    // Bit 12 of a large leaf is the PAT bit, the address bits between it and the page's size are reserved.
    let address = Gfn(gfn.0 & !u64::from(large));
    if address != address.align_down(level) {
        return Decoded::Reserved;
    }
    Decoded::Leaf { gfn: address, access, accessed, dirty: raw & long::DIRTY != 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USER_RW: u64 = long::PRESENT | long::WRITE | long::USER;

    #[test]
    fn reserved_bits_depend_on_format_and_nxe() {
        let caps = GuestCaps::default();
        let nx_leaf = 0x1000 | USER_RW | long::NO_EXECUTE;
        assert!(matches!(
            decode(caps, true, Level::K4, nx_leaf),
            Decoded::Leaf { access, .. } if access == Access::READ.or(Access::WRITE)
        ));
        assert_eq!(decode(caps, false, Level::K4, nx_leaf), Decoded::Reserved, "bit 63 without NXE");
        assert_eq!(decode(caps, true, Level::T512, 0x1000 | USER_RW | long::LARGE), Decoded::Reserved);
        let pat = 1 << 21 | 1 << 12 | USER_RW | long::LARGE;
        assert!(matches!(decode(caps, true, Level::M2, pat), Decoded::Leaf { gfn: Gfn(512), .. }));
        assert_eq!(decode(caps, true, Level::M2, pat | 1 << 13), Decoded::Reserved);
        assert_eq!(decode_pae(caps, true, Level::K4, 0x1000 | USER_RW | 1 << 52), Decoded::Reserved);
        assert!(matches!(decode(caps, true, Level::K4, 0x1000 | USER_RW | 1 << 52), Decoded::Leaf { .. }));
        assert_eq!(decode_pae_pointer(caps, true, 0x1000 | USER_RW), Decoded::Reserved, "PDPTEs have no R/W, U/S");
        assert!(matches!(decode_pae_pointer(caps, true, 0x1001), Decoded::Table { gfn: Gfn(1), .. }));
        let supervisor = 0x1000 | long::PRESENT | long::WRITE;
        assert!(matches!(decode(caps, true, Level::K4, supervisor), Decoded::Leaf { access: Access::NONE, .. }));
    }
}
