//! 4-byte entries: SDM 3A 4.3, APM 5.2.1, with 4 MiB pages under CR4.PSE and PSE-36 addresses.

use umbra_shared::paging::{legacy, long};
use umbra_shared::{Gfn, Level};

use super::{Decoded, GuestCaps};

pub(super) fn decode(caps: GuestCaps, pse: bool, level: Level, raw: u64) -> Decoded {
    // Callers cut entries to 32 bits; what is above cannot be part of one.
    let raw = raw & 0xffff_ffff;
    let low = (raw & 0xffff_ffff) as u32;
    if raw & long::PRESENT == 0 {
        return Decoded::NotPresent;
    }
    let access = super::long::rights(raw, false);
    let accessed = raw & long::ACCESSED != 0;
    let gfn = Gfn::containing(u64::from(low & legacy::ADDRESS_MASK));
    if level == Level::M2 {
        if !pse || raw & long::LARGE == 0 {
            return Decoded::Table { gfn, access, accessed };
        }
        // PSE-36: bits 20:13 are address bits 39:32; those beyond the address width are reserved, as is bit 21.
        let high = u64::from(low >> legacy::LARGE_HIGH_SHIFT & 0xff) << 32;
        if low & legacy::LARGE_RESERVED != 0 || high & caps.reserved_address() != 0 {
            return Decoded::Reserved;
        }
        let gfn = Gfn::containing(high | u64::from(low & legacy::LARGE_ADDRESS_MASK));
        return Decoded::Leaf { gfn, access, accessed, dirty: raw & long::DIRTY != 0 };
    }
    Decoded::Leaf { gfn, access, accessed, dirty: raw & long::DIRTY != 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::Access;

    #[test]
    fn four_mebibyte_pages_need_pse() {
        let caps = GuestCaps::default();
        let large = 0x0040_0000 | 3 << 13 | long::PRESENT | long::USER | long::LARGE;
        let leaf = decode(caps, true, Level::M2, large);
        let gfn = Gfn(0x3_0040_0000 >> 12);
        let access = Access::READ.or(Access::EXECUTE);
        assert_eq!(leaf, Decoded::Leaf { gfn, access, accessed: false, dirty: false });
        assert!(matches!(decode(caps, false, Level::M2, large), Decoded::Table { .. }), "bit 7 is ignored without PSE");
        assert_eq!(decode(caps, true, Level::M2, large | 1 << 21), Decoded::Reserved);
        let narrow = GuestCaps { address_bits: 32, ..caps };
        assert_eq!(decode(narrow, true, Level::M2, large), Decoded::Reserved, "PSE-36 bits beyond the width");
    }
}
