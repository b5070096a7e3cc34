//! What Umbra's monitor and its firmware agree on.
//!
//! One definition serves both sides: [`pattern`] is executed by the firmware and evaluated by the monitor (that
//! evaluation is the *truth*), [`layout`] is the guest's physical map, [`protocol`] the doorbells and the pages that
//! both read, [`nested`] what L2 is when the firmware is a hypervisor, [`control`] how the monitor runs it for the firmware, [`violation`] a
//! list of accesses that L1's table may not permit, [`edits`] random edits of that table, which [`board`] makes, with the [`probe`]s that L2 makes of them, [`race`] those that race a running L2, [`hostile`] those of a malicious L1. Nothing here knows KVM or the host.
#![cfg_attr(not(test), no_std)]

pub mod board;
pub mod control;
pub mod edits;
pub mod gfn;
pub mod histogram;
pub mod hostile;
pub mod layout;
pub mod nested;
pub mod paging;
pub mod pattern;
pub mod probe;
pub mod protocol;
pub mod race;
pub mod role;
pub mod smm;
pub mod toggle;
pub mod violation;

pub use gfn::{Gfn, L2Gfn, Level, PAGE_SHIFT, PAGE_SIZE};
