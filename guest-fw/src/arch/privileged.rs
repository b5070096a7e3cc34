//! Registers that only ring 0 reaches: model-specific ones, CR0, CR3 and CR4.

/// # Safety
/// At ring 0; the register exists.
pub unsafe fn read_msr(register: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller's.
    unsafe { core::arch::asm!("rdmsr", in("ecx") register, out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// # Safety
/// At ring 0; the register may have that value.
pub unsafe fn write_msr(register: u32, value: u64) {
    // SAFETY: the caller's.
    unsafe {
        core::arch::asm!("wrmsr", in("ecx") register, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack));
    }
}

/// CR0, CR3 and CR4.
///
/// # Safety
/// At ring 0.
pub unsafe fn control_registers() -> [u64; 3] {
    let (cr0, cr3, cr4);
    // SAFETY: the caller's; these are reads.
    unsafe {
        core::arch::asm!("mov {}, cr0", out(reg) cr0, options(nomem, nostack));
        core::arch::asm!("mov {}, cr3", out(reg) cr3, options(nomem, nostack));
        core::arch::asm!("mov {}, cr4", out(reg) cr4, options(nomem, nostack));
    }
    [cr0, cr3, cr4]
}

/// # Safety
/// At ring 0; CR4 may have that value, and nothing in use depends on what changes.
pub unsafe fn write_cr4(value: u64) {
    // SAFETY: the caller's.
    unsafe { core::arch::asm!("mov cr4, {}", in(reg) value, options(nostack)) };
}
