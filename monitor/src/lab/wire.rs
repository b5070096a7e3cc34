//! What leaves the lab machine by its second serial port: messages in frames that a damaged or lost byte cannot slip through.
//!
//! ```text
//! | "UMB1" | length of the body, u32 LE | first 8 bytes of the body's SHA-256 | body: a Message as JSON |
//! ```

use crate::failure::Failure;
use crate::report::Record;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::io::Write;

const MAGIC: &[u8; 4] = b"UMB1";
const HEADER: usize = 16;
/// Far above any Record; a length beyond it is damage.
const LONGEST: usize = 64 << 20;

/// What the lab's PID 1 and its jobs say.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub enum Message {
    /// The modules are loaded; parameters that were asked for, as the kernel has them now.
    Ready(BTreeMap<String, String>),
    /// What is being done now.
    Step(String),
    /// A job's result.
    Done {
        /// The job, from 0.
        job: usize,
        /// Its Record.
        record: Box<Record>,
    },
    /// A job's failure; without a job PID 1's own.
    Failed {
        /// The job, from 0.
        job: Option<usize>,
        /// What happened.
        failure: Told,
        /// Whether the job broke (a panic, a signal, a limit) rather than ended in an orderly way.
        broke: bool,
    },
    /// All jobs have ended; the machine powers off.
    End,
}

/// A [`Failure`] on its way out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    kind: Kind,
    text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Kind {
    Check,
    Input,
    NotHere,
    Interrupted,
}

impl Told {
    /// The line that it says.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }
}

impl From<&Failure> for Told {
    fn from(failure: &Failure) -> Self {
        let kind = match failure {
            Failure::Check(_) => Kind::Check,
            Failure::Input(_) => Kind::Input,
            Failure::NotHere(_) => Kind::NotHere,
            Failure::Interrupted => Kind::Interrupted,
        };
        Self { kind, text: failure.to_string() }
    }
}

impl From<Told> for Failure {
    fn from(told: Told) -> Self {
        match told.kind {
            Kind::Check => Self::Check(told.text),
            Kind::Input => Self::Input(told.text),
            Kind::NotHere => Self::NotHere(told.text),
            Kind::Interrupted => Self::Interrupted,
        }
    }
}

/// Damage on the line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No frame begins here.
    #[error("byte {0} of COM2 begins no frame: something else wrote to the port, or bytes were lost")]
    Magic(usize),
    /// A length that cannot be.
    #[error("the frame at byte {at} of COM2 claims {length} bytes")]
    Length {
        /// Where.
        at: usize,
        /// The length.
        length: usize,
    },
    /// The checksum does not fit.
    #[error("the frame at byte {0} of COM2 was damaged: its checksum does not fit")]
    Checksum(usize),
    /// The body is no message, although its checksum fits: another version of Umbra wrote it.
    #[error("the frame at byte {at} of COM2 is no message of this version: {why}")]
    Message {
        /// Where.
        at: usize,
        /// What the parser says.
        why: String,
    },
    /// The stream ends inside a frame.
    #[error("COM2 ends inside the frame at byte {0}")]
    Truncated(usize),
}

/// Writes a message as one frame.
///
/// # Errors
/// The port's error; a message that cannot be written as JSON.
pub fn send(port: &mut impl Write, message: &Message) -> std::io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len()).map_err(std::io::Error::other)?;
    let mut frame = Vec::with_capacity(HEADER + body.len());
    frame.extend_from_slice(MAGIC);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(&Sha256::digest(&body)[..8]);
    frame.extend_from_slice(&body);
    port.write_all(&frame)
}

/// Takes bytes as they come and gives messages.
#[derive(Default)]
pub struct Receiver {
    bytes: Vec<u8>,
    taken: usize,
}

impl Receiver {
    /// Adds bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Whether nothing has come yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The next whole message, if there is one.
    ///
    /// # Errors
    /// The damage, with its place in the stream.
    pub fn receive(&mut self) -> Result<Option<Message>, Error> {
        let at = self.taken;
        let rest = &self.bytes[at..];
        let start = &rest[..rest.len().min(MAGIC.len())];
        if !MAGIC.starts_with(start) {
            return Err(Error::Magic(at));
        }
        let Some((header, rest)) = rest.split_at_checked(HEADER) else { return Ok(None) };
        let length = header[4..8].iter().rev().fold(0_usize, |sum, &byte| sum << 8 | usize::from(byte));
        if length > LONGEST {
            return Err(Error::Length { at, length });
        }
        let Some(body) = rest.get(..length) else { return Ok(None) };
        if Sha256::digest(body)[..8] != header[8..] {
            return Err(Error::Checksum(at));
        }
        let message = serde_json::from_slice(body).map_err(|why| Error::Message { at, why: why.to_string() })?;
        self.taken = at + HEADER + length;
        Ok(Some(message))
    }

    /// Checks that nothing is left over.
    ///
    /// # Errors
    /// [`Error::Truncated`] when half a frame is.
    pub fn finish(&self) -> Result<(), Error> {
        if self.taken == self.bytes.len() { Ok(()) } else { Err(Error::Truncated(self.taken)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> Vec<u8> {
        let mut bytes = Vec::new();
        send(&mut bytes, &Message::Step("one".into())).unwrap();
        let failure = Told::from(&Failure::NotHere("no ring".into()));
        send(&mut bytes, &Message::Failed { job: Some(1), failure, broke: false }).unwrap();
        bytes
    }

    #[test]
    fn messages_arrive_byte_by_byte() {
        let mut receiver = Receiver::default();
        let mut messages = Vec::new();
        for byte in stream() {
            receiver.push(&[byte]);
            messages.extend(receiver.receive().unwrap());
        }
        receiver.finish().unwrap();
        assert_eq!(messages[0], Message::Step("one".into()));
        let Message::Failed { job: Some(1), failure, broke: false } = messages.remove(1) else { panic!() };
        assert!(matches!(Failure::from(failure), Failure::NotHere(text) if text == "no ring"));
    }

    #[test]
    fn every_damaged_byte_is_noticed() {
        let good = stream();
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 0x20;
            let mut receiver = Receiver::default();
            receiver.push(&bytes);
            let clean = loop {
                match receiver.receive() {
                    Ok(Some(_)) => {}
                    Ok(None) => break receiver.finish().is_ok(),
                    Err(_) => break false,
                }
            };
            assert!(!clean, "byte {at}");
        }
    }

    #[test]
    fn damage_is_named() {
        let good = stream();
        let error = |bytes: &[u8]| {
            let mut receiver = Receiver::default();
            receiver.push(bytes);
            loop {
                match receiver.receive() {
                    Ok(Some(_)) => {}
                    Ok(None) => break receiver.finish().unwrap_err(),
                    Err(error) => break error,
                }
            }
        };
        assert!(matches!(error(&good[..good.len() - 1]), Error::Truncated(at) if at > 0));
        assert_eq!(error(b"hello"), Error::Magic(0));
        let mut long = good.clone();
        long[7] = 0xff;
        assert!(matches!(error(&long), Error::Length { at: 0, .. }));
        let mut damaged = good.clone();
        damaged[HEADER] ^= 1;
        assert_eq!(error(&damaged), Error::Checksum(0));
        let body = b"{\"Hello\":1}";
        let mut foreign = MAGIC.to_vec();
        foreign.extend_from_slice(&u32::try_from(body.len()).unwrap().to_le_bytes());
        foreign.extend_from_slice(&Sha256::digest(body)[..8]);
        foreign.extend_from_slice(body);
        assert!(matches!(error(&foreign), Error::Message { at: 0, .. }));
    }
}
