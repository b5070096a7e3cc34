//! EPT entries: SDM 3C 29.3.2; misconfigurations: 29.3.3.1.

use umbra_shared::paging::{ADDRESS_MASK, ept};
use umbra_shared::{Gfn, Level};

use super::{Decoded, GuestCaps};
use crate::access::Access;

#[inline]
pub(super) fn decode(caps: GuestCaps, accessed_dirty: bool, level: Level, raw: u64) -> Decoded {
    let access = Access::from_bits(raw);
    if access.is_none() {
        return Decoded::NotPresent;
    }
    // 29.3.3.1: writable without readable; execute-only without the capability; reserved bits.
    if !access.allows(Access::READ) && (access.allows(Access::WRITE) || !caps.execute_only) {
        return Decoded::Reserved;
    }
    if raw & caps.reserved_address() != 0 {
        return Decoded::Reserved;
    }
    let accessed = !accessed_dirty || raw & ept::ACCESSED != 0;
    let large = level > Level::K4 && raw & ept::LARGE != 0;
    let too_large = level > Level::G1 || level == Level::G1 && !caps.giant_pages;
    if large && too_large {
        return Decoded::Reserved;
    }
    let leaf = large || level == Level::K4;
    let gfn = Gfn::containing(raw & ADDRESS_MASK);
    if !leaf {
        // Tables 29-1, 29-3, 29-5: bits 6:3 of an entry that references a table are reserved.
        if raw & (0xf << 3) != 0 {
            return Decoded::Reserved;
        }
        return Decoded::Table { gfn, access, accessed };
    }
    // Memory types 2, 3 and 7 are reserved; so are address bits below the page's size.
    let memory_type = raw >> ept::MEMORY_TYPE_SHIFT & 7;
    if matches!(memory_type, 2 | 3 | 7) || gfn != gfn.align_down(level) {
        return Decoded::Reserved;
    }
    let dirty = !accessed_dirty || raw & ept::DIRTY != 0;
    Decoded::Leaf { gfn, access, accessed, dirty }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(level: Level, raw: u64) -> Decoded {
        decode(GuestCaps::default(), true, level, raw)
    }

    #[test]
    fn misconfigurations_are_told_from_absence() {
        assert_eq!(entry(Level::K4, 0xabc_0000_0000 & ADDRESS_MASK), Decoded::NotPresent);
        assert_eq!(entry(Level::K4, 0x1000 | ept::WRITE | ept::WRITE_BACK), Decoded::Reserved);
        assert_eq!(entry(Level::K4, 0x1000 | ept::WRITE | ept::EXECUTE), Decoded::Reserved);
        assert!(matches!(entry(Level::K4, 0x1000 | ept::EXECUTE), Decoded::Leaf { access: Access::EXECUTE, .. }));
        let no_xo = GuestCaps { execute_only: false, ..GuestCaps::default() };
        assert_eq!(decode(no_xo, true, Level::K4, 0x1000 | ept::EXECUTE), Decoded::Reserved);
        assert_eq!(entry(Level::K4, 1 << 46 | ept::READ), Decoded::Reserved, "beyond the address width");
        assert_eq!(entry(Level::M2, 0x1000 | ept::READ | ept::LARGE), Decoded::Reserved, "2M leaf not aligned");
        assert_eq!(entry(Level::T512, 0x1000 | ept::READ | ept::LARGE), Decoded::Reserved);
        assert_eq!(entry(Level::M2, 0x1000 | ept::READ | 1 << 3), Decoded::Reserved, "memory type in a table entry");
        assert_eq!(entry(Level::K4, 0x1000 | ept::READ | 3 << 3), Decoded::Reserved, "memory type 3");
        let giant = 1 << 30 | ept::RIGHTS | ept::LARGE;
        assert!(matches!(entry(Level::G1, giant), Decoded::Leaf { dirty: false, accessed: false, .. }));
        let no_1g = GuestCaps { giant_pages: false, ..GuestCaps::default() };
        assert_eq!(decode(no_1g, true, Level::G1, giant), Decoded::Reserved);
        assert!(matches!(
            decode(GuestCaps::default(), false, Level::K4, 0x1007),
            Decoded::Leaf { dirty: true, accessed: true, .. }
        ));
    }
}
