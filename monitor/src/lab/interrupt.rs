//! Ctrl-C and SIGTERM: noted here, acted on where the lab waits, so that children are ended and files removed on the way out.

use crate::failure::Failure;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

static SEEN: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From now on SIGINT, SIGTERM and SIGHUP no longer end this process: [`check`] reports them.
///
/// # Errors
/// [`Failure::NotHere`] when the kernel refuses a signal handler.
pub fn watch() -> Result<(), Failure> {
    let seen = Arc::new(AtomicBool::new(false));
    if SEEN.set(Arc::clone(&seen)).is_err() {
        return Ok(());
    }
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&seen))
            .map_err(|error| Failure::NotHere(format!("signal {signal}: no handler can be set: {error}")))?;
    }
    Ok(())
}

/// Whether one of the signals came.
///
/// # Errors
/// [`Failure::Interrupted`] when one did.
pub fn check() -> Result<(), Failure> {
    match SEEN.get() {
        Some(seen) if seen.load(Ordering::Relaxed) => Err(Failure::Interrupted),
        _ => Ok(()),
    }
}
