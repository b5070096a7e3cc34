//! Where output and endings go: to the monitor, or without one to COM1 and QEMU's exit device.

use crate::arch::mailbox::LiveMailbox;
use crate::arch::{port, vcpu};
use crate::text::Text;
use core::fmt::{Arguments, Write as _};
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};
use umbra_shared::protocol::{Doorbell, TEXT_BYTES};

static MONITOR: AtomicBool = AtomicBool::new(false);

/// Exit code under QEMU of a firmware that panicked, before QEMU makes `2n + 1` of it.
const PANICKED: u8 = 101;

/// Says whether a monitor entered the firmware.
pub fn set_monitor(present: bool) {
    MONITOR.store(present, Relaxed);
}

/// Whether there is a monitor to talk to.
#[must_use]
pub fn has_monitor() -> bool {
    MONITOR.load(Relaxed)
}

/// Prints `bytes`, in as many pieces as the mailbox needs.
pub fn print(bytes: &[u8]) {
    if !has_monitor() {
        return port::serial(bytes);
    }
    let mailbox = LiveMailbox::of(vcpu::current());
    for piece in bytes.chunks(TEXT_BYTES) {
        mailbox.put_text(piece);
        port::ring(Doorbell::Print);
    }
}

/// Ends the program. Under QEMU only the low 7 bits of `code` reach the host; any other code than 0 still ends as a failure.
#[allow(clippy::cast_sign_loss)] // The monitor gets all 64 bits of the code, sign-extended.
pub fn exit(code: i32) -> ! {
    if !has_monitor() {
        let low = (code & 0x7f) as u8;
        port::end_qemu(if low == 0 && code != 0 { 1 } else { low });
    }
    LiveMailbox::of(vcpu::current()).exit_code.store(i64::from(code) as u64, Relaxed);
    loop {
        port::ring(Doorbell::Exit);
    }
}

/// Ends the program because this vCPU lacks what it was asked for.
pub fn not_here(what: Arguments) -> ! {
    let mut text = Text::<TEXT_BYTES>::new();
    // Text never fails.
    let _ = write!(text, "{what}");
    tell(&text, Doorbell::NotHere)
}

/// Says `text` last of all, with that doorbell.
fn tell(text: &Text<TEXT_BYTES>, doorbell: Doorbell) -> ! {
    if !has_monitor() {
        port::serial(text.as_bytes());
        port::serial(b"\n");
        port::end_qemu(PANICKED);
    }
    LiveMailbox::of(vcpu::current()).put_text(text.as_bytes());
    loop {
        port::ring(doorbell);
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    let mut text = Text::<TEXT_BYTES>::new();
    // Text never fails.
    let _ = write!(text, "{info}");
    tell(&text, Doorbell::Panic)
}
