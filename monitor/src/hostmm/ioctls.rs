//! The calls of userfaultfd, pagemap and udmabuf: Linux, include/uapi/linux/userfaultfd.h, fs.h and udmabuf.h.

use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

const UFFDIO: u32 = 0xaa;
/// 'u'.
const UDMABUF: u32 = 0x75;

/// `struct uffdio_api`.
#[repr(C)]
pub struct Api {
    pub version: u64,
    pub features: u64,
    pub ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
pub struct Range {
    pub start: u64,
    pub len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
pub struct Register {
    pub range: Range,
    pub mode: u64,
    pub ioctls: u64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
pub struct WriteProtect {
    pub range: Range,
    pub mode: u64,
}

/// `struct uffdio_poison`.
#[repr(C)]
pub struct Poison {
    pub range: Range,
    pub mode: u64,
    pub updated: i64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
pub struct ScanArgument {
    pub size: u64,
    pub flags: u64,
    pub start: u64,
    pub end: u64,
    pub walk_end: u64,
    pub vec: u64,
    pub vec_len: u64,
    pub max_pages: u64,
    pub category_inverted: u64,
    pub category_mask: u64,
    pub category_anyof_mask: u64,
    pub return_mask: u64,
}

/// `struct udmabuf_create_list`, up to its list.
#[repr(C)]
pub struct UdmabufHead {
    pub flags: u32,
    pub count: u32,
}

/// `struct udmabuf_create_item`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct UdmabufItem {
    pub file: u32,
    pub padding: u32,
    pub offset: u64,
    pub bytes: u64,
}

ioctl_iow_nr!(UDMABUF_CREATE_LIST, UDMABUF, 0x43, UdmabufHead);
ioctl_iowr_nr!(UFFDIO_API, UFFDIO, 0x3f, Api);
ioctl_iowr_nr!(UFFDIO_REGISTER, UFFDIO, 0x00, Register);
ioctl_ior_nr!(UFFDIO_UNREGISTER, UFFDIO, 0x01, Range);
ioctl_ior_nr!(UFFDIO_WAKE, UFFDIO, 0x02, Range);
ioctl_iowr_nr!(UFFDIO_WRITEPROTECT, UFFDIO, 0x06, WriteProtect);
ioctl_iowr_nr!(UFFDIO_POISON, UFFDIO, 0x08, Poison);
ioctl_io_nr!(USERFAULTFD_IOC_NEW, UFFDIO, 0x00);
ioctl_iowr_nr!(PAGEMAP_SCAN, b'f' as u32, 16, ScanArgument);

#[cfg(test)]
mod tests {
    use super::*;

    /// As the C compiler computes them from the headers.
    #[test]
    fn numbers_are_the_kernels() {
        let numbers = [UFFDIO_API(), UFFDIO_REGISTER(), UFFDIO_UNREGISTER(), UFFDIO_WAKE(), UFFDIO_WRITEPROTECT()];
        assert_eq!(numbers, [0xc018_aa3f, 0xc020_aa00, 0x8010_aa01, 0x8010_aa02, 0xc018_aa06]);
        assert_eq!((USERFAULTFD_IOC_NEW(), UFFDIO_POISON(), PAGEMAP_SCAN()), (0xaa00, 0xc020_aa08, 0xc060_6610));
    }
}
