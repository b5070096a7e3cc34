//! Exceptions on purpose. Each function faults at its first instruction, so its address is the RIP that must be reported.

/// #UD.
#[unsafe(naked)]
pub extern "C" fn invalid_opcode() {
    core::arch::naked_asm!("ud2")
}

/// Reads `address`: #PF, where nothing is mapped.
///
/// # Safety
/// Reading there has no other effect.
#[unsafe(naked)]
#[must_use]
pub unsafe extern "C" fn read(address: u64) -> u64 {
    core::arch::naked_asm!("mov rax, [rdi]", "ret")
}
