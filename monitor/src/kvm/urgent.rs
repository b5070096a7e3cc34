//! A controller that must act while its guest runs on the same CPU, as in the lab: it gets the CPU when it wakes, not when the guest's turn ends.

/// While this lives, the calling thread is scheduled before all ordinary ones (sched(7), `SCHED_FIFO`), if the system lets it.
#[derive(Debug)]
pub struct Urgent(());

fn schedule(policy: libc::c_int, priority: libc::c_int) {
    // SAFETY: zeroes are valid in the plain C struct.
    let mut parameters: libc::sched_param = unsafe { std::mem::zeroed() };
    parameters.sched_priority = priority;
    // SAFETY: 0 is the calling thread, and the kernel only reads the struct. Who may not is scheduled as before, which only makes SMIs rarer.
    unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
}

impl Urgent {
    /// Makes the calling thread urgent.
    #[must_use]
    pub fn now() -> Self {
        schedule(libc::SCHED_FIFO, 1);
        Self(())
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        schedule(libc::SCHED_OTHER, 0);
    }
}
