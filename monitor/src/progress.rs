//! Progress on stderr, for what takes longer than two seconds: a spinner on a terminal, plain lines elsewhere.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal as _;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Nothing is shown before this much time has passed.
const PATIENCE: Duration = Duration::from_secs(2);

/// What takes the steps of a run whose progress is shown elsewhere.
pub type Sink = Box<dyn FnMut(&str) + Send>;

/// Where progress goes.
pub enum Progress {
    /// A spinner with the current step.
    Bar(ProgressBar, Instant),
    /// A line at most every [`PATIENCE`]: when the last one was written.
    Lines(Mutex<Instant>),
    /// To whatever the lab's PID 1 reports to.
    Sink(Mutex<Sink>),
    /// Nowhere.
    Silent,
}

impl Progress {
    /// Progress on stderr.
    #[must_use]
    pub fn stderr() -> Self {
        if !std::io::stderr().is_terminal() {
            return Self::Lines(Mutex::new(Instant::now()));
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed} {msg}") {
            bar.set_style(style);
        }
        Self::Bar(bar, Instant::now())
    }

    /// Says what is being done now.
    pub fn step(&self, what: &str) {
        match self {
            Self::Bar(bar, since) => {
                bar.set_message(what.to_owned());
                if since.elapsed() >= PATIENCE && bar.is_hidden() {
                    bar.set_draw_target(ProgressDrawTarget::stderr());
                    bar.enable_steady_tick(Duration::from_millis(200));
                }
            }
            Self::Lines(last) => {
                if let Ok(mut last) = last.lock()
                    && last.elapsed() >= PATIENCE
                {
                    eprintln!("umbra: {what}");
                    *last = Instant::now();
                }
            }
            Self::Sink(sink) => {
                if let Ok(mut sink) = sink.lock() {
                    sink(what);
                }
            }
            Self::Silent => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Self::Bar(bar, _) = self {
            bar.finish_and_clear();
        }
    }
}
