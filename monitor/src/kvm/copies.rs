//! Copies of guest memory, and which of its pages differ from them: with AVX2 where the processor has it, else word by word.
//!
//! The guest may write at any moment. What is read then is some value that was there, as with any volatile access; who needs more takes the
//! right to write away first.

use std::arch::x86_64::{
    __m256i, _mm256_loadu_si256, _mm256_or_si256, _mm256_storeu_si256, _mm256_testz_si256, _mm256_xor_si256,
};

/// A page as words.
pub type PageWords = [u64; 512];

/// Vectors in a page.
const VECTORS: usize = size_of::<PageWords>() / size_of::<__m256i>();
/// Vectors that are copied without a look at the loop's end.
const COPIED_AT_ONCE: usize = 32;

/// How pages are copied and compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// 32 bytes at a time.
    Avx2,
    /// A word at a time.
    Words,
}

impl By {
    /// The fastest that this processor has. It is asked once.
    #[must_use]
    pub fn here() -> Self {
        if std::arch::is_x86_feature_detected!("avx2") { Self::Avx2 } else { Self::Words }
    }

    /// Copies the page at `from` to `into`.
    ///
    /// # Safety
    /// `from` must be a multiple of 4096 and a whole page must be mapped there; the processor must have AVX2 if that is asked for.
    pub unsafe fn copy(self, from: *const u64, into: &mut PageWords) {
        match self {
            // SAFETY: as the caller promises.
            Self::Avx2 => unsafe { copy_avx2(from, into) },
            Self::Words => {
                for (index, word) in into.iter_mut().enumerate() {
                    // SAFETY: a word of the page; volatile, since the guest may write it.
                    *word = unsafe { from.add(index).read_volatile() };
                }
            }
        }
    }

    /// Whether the page at `page` differs from `copy`.
    ///
    /// # Safety
    /// As [`By::copy`].
    #[must_use]
    pub unsafe fn differs(self, page: *const u64, copy: &PageWords) -> bool {
        match self {
            // SAFETY: as the caller promises.
            Self::Avx2 => unsafe { differs_avx2(page, copy) },
            Self::Words => copy.iter().enumerate().any(|(index, &word)| {
                // SAFETY: a word of the page; volatile, since the guest may write it.
                unsafe { page.add(index).read_volatile() != word }
            }),
        }
    }
}

/// # Safety
/// As [`By::copy`].
#[target_feature(enable = "avx2")]
#[allow(clippy::cast_ptr_alignment)] // The page is aligned, and the copy is reached by instructions that need no alignment.
unsafe fn copy_avx2(from: *const u64, into: &mut PageWords) {
    let (from, into) = (from.cast::<__m256i>(), into.as_mut_ptr().cast::<__m256i>());
    for first in (0..VECTORS).step_by(COPIED_AT_ONCE) {
        for at in first..first + COPIED_AT_ONCE {
            // SAFETY: vector `at` of a page that the caller has mapped and aligned; volatile, since the guest may write it.
            let vector = unsafe { from.add(at).read_volatile() };
            // SAFETY: vector `at` of the copy, which need not be aligned.
            unsafe { _mm256_storeu_si256(into.add(at), vector) };
        }
    }
}

/// Whether `COUNT` vectors from `page` on differ from those from `copy` on.
///
/// # Safety
/// So many vectors must lie behind both, aligned behind `page`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn any_differs<const COUNT: usize>(page: *const __m256i, copy: *const __m256i) -> bool {
    // SAFETY: as the caller promises; volatile, since the guest may write the page.
    let difference = |at| unsafe { _mm256_xor_si256(page.add(at).read_volatile(), _mm256_loadu_si256(copy.add(at))) };
    let mut all = difference(0);
    for at in 1..COUNT {
        all = _mm256_or_si256(all, difference(at));
    }
    _mm256_testz_si256(all, all) == 0
}

/// # Safety
/// As [`By::copy`].
#[target_feature(enable = "avx2")]
#[allow(clippy::cast_ptr_alignment)] // As above.
unsafe fn differs_avx2(page: *const u64, copy: &PageWords) -> bool {
    let (page, copy) = (page.cast::<__m256i>(), copy.as_ptr().cast::<__m256i>());
    // What differs mostly does so early; what does not is to cost few tests.
    // SAFETY: together these are the vectors of both.
    unsafe {
        any_differs::<4>(page, copy)
            || any_differs::<12>(page.add(4), copy.add(4))
            || any_differs::<16>(page.add(16), copy.add(16))
            || any_differs::<32>(page.add(32), copy.add(32))
            || any_differs::<32>(page.add(64), copy.add(64))
            || any_differs::<32>(page.add(96), copy.add(96))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::Backing;
    use crate::kvm::memory::HostMemory;
    use umbra_shared::PAGE_SIZE;

    #[test]
    fn every_word_is_copied_and_compared() {
        let memory = HostMemory::new(2 * PAGE_SIZE, Backing::Shmem).unwrap();
        let page = memory.word(1, 0).unwrap().as_ptr().cast_const();
        let ways = if By::here() == By::Avx2 { vec![By::Avx2, By::Words] } else { vec![By::Words] };
        for word in 0..512_u64 {
            memory.word(1, word * 8).unwrap().store(word * 0x1_0001 + 7, std::sync::atomic::Ordering::Relaxed);
        }
        for way in ways {
            let mut copy = [0; 512];
            // SAFETY: page 1 of the memory, and a way that this processor has.
            unsafe { way.copy(page, &mut copy) };
            assert!((0..512).eq(copy.iter().map(|word| (word - 7) / 0x1_0001)), "{way:?}");
            // SAFETY: as above.
            let differs = |copy: &PageWords| unsafe { way.differs(page, copy) };
            assert!(!differs(&copy), "{way:?}");
            for word in 0..512 {
                for bit in [0, 63] {
                    copy[word] ^= 1 << bit;
                    assert!(differs(&copy), "{way:?}: bit {bit} of word {word}");
                    copy[word] ^= 1 << bit;
                }
            }
        }
    }
}
