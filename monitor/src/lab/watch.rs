//! Following a running lab machine to its end: messages, limits of time, and what a death was.

use super::child::Child;
use super::console;
use super::emulator::{Emulator, End, file};
use super::wire::{self, Message, Receiver, Told};
use crate::failure::Failure;
use crate::progress::Progress;
use crate::report::Record;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

/// After the last message, a panic or damage the machine has this long to end by itself.
const GRACE: Duration = Duration::from_secs(10);

/// Limits of the time that a machine has: the wall's, less what its emulator waited for a CPU.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Without a byte on either serial port.
    pub silent: Duration,
    /// The whole run.
    pub wall: Duration,
}

/// How a machine can fail.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel's last words.
    #[error("the lab's kernel panicked: {0}")]
    Panic(String),
    /// The emulator saw it.
    #[error("the lab machine had a triple fault {doing}: its kernel died without a word")]
    TripleFault {
        /// At what.
        doing: String,
    },
    /// Neither a panic nor a triple fault, and yet it is over.
    #[error("the lab machine reset or switched itself off {doing}, before Umbra's PID 1 was done")]
    Reset {
        /// At what.
        doing: String,
    },
    /// The emulator itself broke, or was killed.
    #[error("{emulator} ended early {doing} ({status}): {why}")]
    Ended {
        /// Its name.
        emulator: &'static str,
        /// At what.
        doing: String,
        /// Its exit status.
        status: ExitStatus,
        /// Its last complaint.
        why: String,
    },
    /// Nothing comes any more.
    #[error("the lab machine is silent {doing}: no byte on its serial ports for {} s", limit.as_secs())]
    Silent {
        /// At what.
        doing: String,
        /// The limit.
        limit: Duration,
    },
    /// It takes too long.
    #[error("the lab run was ended {doing}: it took longer than its limit of {} s", limit.as_secs())]
    TimeOut {
        /// At what.
        doing: String,
        /// The limit.
        limit: Duration,
    },
    /// Damage on COM2.
    #[error("the lab's results are damaged: {0}")]
    Wire(#[from] wire::Error),
    /// PID 1 itself failed.
    #[error("{}", .0.text())]
    Init(Told),
    /// All was said and a result is missing.
    #[error("the lab's PID 1 ended without the result of job {0}")]
    Missing(usize),
    /// The machine's files cannot be read.
    #[error("the lab's temporary files: {0}")]
    Files(#[from] std::io::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Init(told) => told.into(),
            _ => Self::Check(error.to_string()),
        }
    }
}

/// What a machine left.
pub struct Outcome {
    /// Parameters that were asked for, as its kernel had them.
    pub params: BTreeMap<String, String>,
    /// A result for each job that had one.
    pub results: Vec<Option<Result<Record, Told>>>,
    /// Whether a job broke, so that the console may say more.
    pub broke: bool,
    /// How the machine failed, if it did.
    pub error: Option<Error>,
    /// The console's last lines.
    pub tail: Vec<String>,
}

/// A stretch of the time that a machine has.
struct Spell {
    begun: Instant,
    starved: Duration,
}

impl Spell {
    fn begin(child: &Child) -> Self {
        Self { begun: Instant::now(), starved: child.starved() }
    }

    /// Whether it is longer than `limit`.
    fn exceeds(&self, limit: Duration, child: &Child) -> bool {
        let starved = || child.starved().saturating_sub(self.starved);
        self.begun.elapsed() > limit && self.begun.elapsed().saturating_sub(starved()) > limit
    }
}

/// A file that grows.
struct Tail(File);

impl Tail {
    fn more(&mut self) -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.0.read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

struct Watch<'a> {
    emulator: Emulator,
    console: Tail,
    said: Vec<u8>,
    messages: Tail,
    receiver: Receiver,
    outcome: Outcome,
    ended: bool,
    /// Since when the machine has nothing more to do: it said all, or its kernel panicked.
    last_words: Option<Instant>,
    doing: String,
    /// What the boot was last seen at.
    booting: Option<&'static str>,
    progress: &'a Progress,
}

/// Starts the machine in `directory` and follows it to its end.
///
/// # Errors
/// [`Failure::Interrupted`] after Ctrl-C or SIGTERM, or the emulator cannot be started. How the machine itself fails is in the [`Outcome`].
pub fn run(
    emulator: Emulator,
    command: &mut Command,
    directory: &Path,
    jobs: usize,
    limits: Limits,
    progress: &Progress,
) -> Result<Outcome, Failure> {
    let create = |name: &str| File::create(directory.join(name)).map_err(|error| Failure::from(Error::from(error)));
    let output = create(file::OUTPUT)?;
    let clone = output.try_clone().map_err(Error::from)?;
    let open = |name: &str| {
        create(name)?;
        Ok::<_, Failure>(Tail(File::open(directory.join(name)).map_err(Error::from)?))
    };
    let mut watch = Watch {
        emulator,
        console: open(file::CONSOLE)?,
        said: Vec::new(),
        messages: open(file::MESSAGES)?,
        receiver: Receiver::default(),
        outcome: Outcome {
            params: BTreeMap::new(),
            results: (0..jobs).map(|_| None).collect(),
            broke: false,
            error: None,
            tail: Vec::new(),
        },
        ended: false,
        last_words: None,
        doing: "while its kernel booted".to_owned(),
        booting: None,
        progress,
    };
    progress.step("lab: booting");
    let child = Child::spawn(command.current_dir(directory).stdout(output).stderr(clone))?;
    let error = watch.follow(child, directory, limits)?;
    let missing = watch.outcome.results.iter().position(Option::is_none).map(Error::Missing);
    watch.outcome.error = error.or(missing);
    watch.outcome.tail = console::tail(&String::from_utf8_lossy(&watch.said));
    Ok(watch.outcome)
}

impl Watch<'_> {
    fn follow(&mut self, mut child: Child, directory: &Path, limits: Limits) -> Result<Option<Error>, Failure> {
        let begun = Spell::begin(&child);
        let mut heard = Spell::begin(&child);
        let status = loop {
            let status = child.tick()?;
            match self.listen() {
                Ok(true) if self.emulator.began_anew(&self.console_text()) => break ExitStatus::default(),
                Ok(true) => heard = Spell::begin(&child),
                Ok(false) => {}
                Err(error) => return Ok(Some(error)),
            }
            if let Some(status) = status {
                break status;
            }
            if let Some(since) = self.last_words {
                if since.elapsed() > GRACE {
                    break ExitStatus::default();
                }
            } else if heard.exceeds(limits.silent, &child) {
                return Ok(Some(Error::Silent { doing: self.doing.clone(), limit: limits.silent }));
            } else if begun.exceeds(limits.wall, &child) {
                return Ok(Some(Error::TimeOut { doing: self.doing.clone(), limit: limits.wall }));
            }
        };
        drop(child);
        // What was written between the last look and the end.
        if let Err(error) = self.listen() {
            return Ok(Some(error));
        }
        Ok(self.verdict(directory, status))
    }

    fn console_text(&self) -> String {
        String::from_utf8_lossy(&self.said).into_owned()
    }

    /// Takes what is new on both ports; whether there was anything.
    fn listen(&mut self) -> Result<bool, Error> {
        let (said, bytes) = (self.console.more()?, self.messages.more()?);
        self.said.extend_from_slice(&said);
        self.receiver.push(&bytes);
        while let Some(message) = self.receiver.receive()? {
            self.take(message)?;
        }
        let news = !said.is_empty() || !bytes.is_empty();
        if !said.is_empty() && self.receiver.is_empty() {
            self.follow_boot();
        }
        if news && self.last_words.is_none() && (self.ended || console::panic(&self.console_text()).is_some()) {
            self.last_words = Some(Instant::now());
        }
        Ok(news)
    }

    /// Before the first message the console tells how far the boot is.
    fn follow_boot(&mut self) {
        let booting = self.emulator.booting(&self.console_text());
        if let Some(what) = booting
            && booting != self.booting
        {
            self.progress.step(&format!("lab: {what}"));
        }
        self.booting = booting;
    }

    fn take(&mut self, message: Message) -> Result<(), Error> {
        match message {
            Message::Ready(params) => self.outcome.params = params,
            Message::Step(what) => {
                self.progress.step(&format!("lab: {what}"));
                self.doing = format!("at \"{what}\"");
            }
            Message::Done { job, record } => self.result(job, Ok(*record)),
            Message::Failed { job: Some(job), failure, broke } => {
                self.outcome.broke |= broke;
                self.result(job, Err(failure));
            }
            Message::Failed { job: None, failure, .. } => {
                return Err(Error::Init(failure));
            }
            Message::End => self.ended = true,
        }
        Ok(())
    }

    /// The first result of a job counts: what a job says after it is about its own death.
    fn result(&mut self, job: usize, result: Result<Record, Told>) {
        if let Some(slot @ None) = self.outcome.results.get_mut(job) {
            *slot = Some(result);
        }
    }

    /// What the end of the machine was.
    fn verdict(&self, directory: &Path, status: ExitStatus) -> Option<Error> {
        if self.ended {
            return self.receiver.finish().err().map(Error::Wire);
        }
        if let Some(reason) = console::panic(&self.console_text()) {
            return Some(Error::Panic(reason));
        }
        let (doing, emulator) = (self.doing.clone(), self.emulator);
        Some(match emulator.end(status, directory) {
            End::TripleFault => Error::TripleFault { doing },
            End::SwitchedOff => Error::Reset { doing },
            End::Broke(why) => Error::Ended { emulator: emulator.name(), doing, status, why },
        })
    }
}
