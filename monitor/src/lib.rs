//! Umbra: a laboratory for KVM's memory management.
//!
//! The layers, each of which knows only those below it: `scenario` (one file a scenario), `track` (dirty trackers) and `guest` (the
//! firmware), `kvm` (everything that talks to /dev/kvm). `report` and `lab` know scenarios only through the
//! [`report::Record`] and the command line.

pub mod cli;
pub mod failure;
pub mod ground;
pub mod guest;
pub mod host;
pub mod hostmm;
pub mod kvm;
pub mod lab;
pub mod nested;
pub mod pages;
pub mod probe;
pub mod progress;
pub mod report;
pub mod scenario;
pub mod track;
pub mod truth;

pub use failure::Failure;
