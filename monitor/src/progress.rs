//! Progress on stderr, for what takes longer than two seconds: a spinner on a terminal, plain lines elsewhere.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Nothing is shown before this much time has passed.
const PATIENCE: Duration = Duration::from_secs(2);

/// What takes the steps of a run whose progress is shown elsewhere.
pub type Sink = Box<dyn FnMut(&str) + Send>;

/// Where progress goes.
pub enum Progress {
    /// A spinner with the current step.
    Bar(ProgressBar),
    /// A line for each step that lasts beyond [`PATIENCE`] or begins after it.
    Lines(Arc<Mutex<Lines>>),
    /// To whatever the lab's PID 1 reports to.
    Sink(Mutex<Sink>),
    /// Nowhere.
    Silent,
}

/// Steps as lines.
#[derive(Default)]
pub struct Lines {
    patience_is_over: bool,
    /// The steps that began before it was, and go on.
    pending: Vec<String>,
}

impl Lines {
    fn step(&mut self, what: &str, beside: bool) {
        if self.patience_is_over {
            eprintln!("umbra: {what}");
            return;
        }
        if !beside {
            self.pending.clear();
        }
        self.pending.push(what.to_owned());
    }

    fn lose_patience(&mut self) {
        self.patience_is_over = true;
        for what in self.pending.drain(..) {
            eprintln!("umbra: {what}");
        }
    }
}

impl Progress {
    /// Progress on stderr.
    #[must_use]
    pub fn stderr() -> Self {
        if !std::io::stderr().is_terminal() {
            let lines = Arc::new(Mutex::new(Lines::default()));
            let weak = Arc::downgrade(&lines);
            after_patience(move || {
                if let Some(lines) = weak.upgrade()
                    && let Ok(mut lines) = lines.lock()
                {
                    lines.lose_patience();
                }
            });
            return Self::Lines(lines);
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed} {msg}") {
            bar.set_style(style);
        }
        let weak = bar.downgrade();
        after_patience(move || {
            if let Some(bar) = weak.upgrade()
                && !bar.is_finished()
            {
                bar.set_draw_target(ProgressDrawTarget::stderr());
                bar.enable_steady_tick(Duration::from_millis(200));
            }
        });
        Self::Bar(bar)
    }

    /// Says what is being done now.
    pub fn step(&self, what: &str) {
        self.say(what, false);
    }

    /// Says what is being done now, beside what was said last.
    pub fn beside(&self, what: &str) {
        self.say(what, true);
    }

    fn say(&self, what: &str, beside: bool) {
        match self {
            Self::Bar(bar) => bar.set_message(what.to_owned()),
            Self::Lines(lines) => {
                if let Ok(mut lines) = lines.lock() {
                    lines.step(what, beside);
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

/// The step that is being done when patience ends may be the last one for long, so a thread shows it.
fn after_patience(show: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        std::thread::sleep(PATIENCE);
        show();
    });
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_steps_that_came_early_those_are_shown_that_go_on() {
        let mut lines = Lines::default();
        lines.step("kernel 6.1", false);
        lines.step("boot 1", false);
        lines.step("boot 2", true);
        assert_eq!(lines.pending, ["boot 1", "boot 2"]);
        lines.lose_patience();
        lines.step("boot 3", true);
        assert!(lines.pending.is_empty(), "it was shown");
    }
}
