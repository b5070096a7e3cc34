//! Umbra's firmware: a bare-metal guest that dirties memory in a pattern known to the page.
//!
//! [`arch`] takes a vCPU from its entry (by the monitor, or by PVH under plain QEMU) to ring 3 and holds all tables; [`boot`]
//! builds the final page tables and starts the payload, a program written to `hermit-abi` whose functions [`abi`] defines.
//! [`workload`] is the payload that executes the monitor's commands, [`selftest`] what it does when there is no monitor; [`nested`] lets an
//! L2 execute them.
//!
//! Without an L2, ring 0 is a few instructions in all: on a KVM without hardware virtualization (PVM) they are emulated, and at ring 3
//! with IOPL 3 everything that the payload does is fast on every KVM.
#![cfg_attr(not(test), no_std)]
#![cfg_attr(test, allow(dead_code, unused_imports))] // On the host only the logic is in use.
#![allow(clippy::cast_possible_truncation)] // There is one target, and its usize has 64 bits.
#![allow(clippy::missing_panics_doc)] // Said in the text, where more than a broken invariant can be the cause.

pub mod abi;
pub mod arch;
pub mod boot;
pub mod console;
pub mod heap;
pub mod nested;
pub mod selftest;
pub mod text;
pub mod workload;
