//! Ports, at ring 3 with IOPL 3: doorbells, the serial port, QEMU's exit device.

use umbra_shared::protocol::{DOORBELL_PORT, Doorbell};

/// RFLAGS of ring 3: IOPL 3, interrupts enabled (a host without exits for them would otherwise be shut out), and bit 1, which is
/// always set (Intel SDM 1, 3.4.3).
pub const USER_FLAGS: u32 = 3 << 12 | 1 << 9 | 1 << 1;

/// COM1's transmit register, and the register whose bit 5 says that it is free (16550 data sheet, LSR).
const COM1: u16 = 0x3f8;
const COM1_STATUS: u16 = COM1 + 5;
const TRANSMIT_FREE: u8 = 1 << 5;

/// QEMU's `isa-debug-exit`: writing `n` ends QEMU with exit code `2n + 1`.
const QEMU_EXIT: u16 = 0xf4;

/// Rings a doorbell. All stores before it are in memory when the monitor sees it, and what the monitor wrote meanwhile is seen after it.
pub fn ring(doorbell: Doorbell) {
    // SAFETY: the port belongs to the monitor; the asm block is a compiler barrier, as it does not say `nomem`.
    unsafe { core::arch::asm!("out dx, eax", in("dx") DOORBELL_PORT, in("eax") doorbell as u32, options(nostack)) };
}

/// The ports that ring 3 uses, first and last of each range, in order: a 32-bit OUT needs the bits of four ports.
pub const USER_PORTS: [(u16, u16); 3] =
    [(QEMU_EXIT, QEMU_EXIT), (COM1, COM1_STATUS), (DOORBELL_PORT, DOORBELL_PORT + 3)];

fn out_byte(port: u16, value: u8) {
    // SAFETY: only the ports above are ever passed, and none of them touches memory.
    unsafe { core::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

fn in_byte(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as above.
    unsafe { core::arch::asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}

/// Writes to COM1, waiting for each byte to be taken.
pub fn serial(bytes: &[u8]) {
    for &byte in bytes {
        while in_byte(COM1_STATUS) & TRANSMIT_FREE == 0 {}
        out_byte(COM1, byte);
    }
}

/// Ends QEMU. Without the exit device this waits for ever: whoever starts an emulator sets it a time limit.
pub fn end_qemu(code: u8) -> ! {
    loop {
        out_byte(QEMU_EXIT, code);
    }
}
