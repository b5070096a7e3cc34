//! Text in a buffer of fixed size.

use core::fmt;

/// Collects formatted text and cuts it, between two characters, where the buffer ends.
pub struct Text<const BYTES: usize> {
    buffer: [u8; BYTES],
    used: usize,
    full: bool,
}

impl<const BYTES: usize> Text<BYTES> {
    /// Empty.
    #[must_use]
    pub const fn new() -> Self {
        Self { buffer: [0; BYTES], used: 0, full: false }
    }

    /// What was written, as far as it fits: UTF-8.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.buffer[..self.used]
    }
}

impl<const BYTES: usize> Default for Text<BYTES> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const BYTES: usize> fmt::Write for Text<BYTES> {
    /// Never fails; what comes after the cut is dropped.
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if self.full {
            return Ok(());
        }
        let mut length = text.len().min(BYTES - self.used);
        while !text.is_char_boundary(length) {
            length -= 1;
        }
        self.full = length < text.len();
        self.buffer[self.used..self.used + length].copy_from_slice(&text.as_bytes()[..length]);
        self.used += length;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::fmt::Write;

    #[test]
    fn text_is_cut_between_characters() {
        let mut text = Text::<8>::new();
        write!(text, "ab{}", 12).unwrap();
        assert_eq!(text.as_bytes(), b"ab12");
        write!(text, "xyzä").unwrap();
        assert_eq!(text.as_bytes(), b"ab12xyz");
        // Nothing comes after a cut, even where it would fit.
        write!(text, "q").unwrap();
        assert_eq!(text.as_bytes(), b"ab12xyz");
    }
}
