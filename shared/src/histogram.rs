//! A log-linear histogram that the firmware fills and the monitor reads.
//!
//! Values below 64 have a bucket each; above, every power of two is cut into 64 buckets, so a value read back is at most
//! 1/64 (1.6%) below the one recorded. Count, total and maximum are exact. The scheme is that of `HdrHistogram`; it is
//! written here because both sides must share its memory and one of them has no allocator.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

const SUB_BITS: u32 = 6;
const SUB: usize = 1 << SUB_BITS;
/// Buckets: 64 exact ones and 64 for each of the 58 higher powers of two.
pub const BUCKETS: usize = SUB * (64 - SUB_BITS as usize + 1);

/// The histogram as it lies in memory; all zeroes is an empty one.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Histogram {
    /// Values recorded.
    pub count: u64,
    /// Sum of all values, wrapping at 2^64.
    pub total: u64,
    /// The largest value.
    pub max: u64,
    buckets: [u64; BUCKETS],
}

impl Default for Histogram {
    #[allow(clippy::large_stack_arrays)] // 30 KiB, once.
    fn default() -> Self {
        Self { count: 0, total: 0, max: 0, buckets: [0; BUCKETS] }
    }
}

/// The bucket of `value`.
#[inline]
#[must_use]
#[allow(clippy::cast_possible_truncation)] // The shifted value is below 128.
pub const fn bucket(value: u64) -> usize {
    if value < SUB as u64 {
        return value as usize;
    }
    let exponent = value.ilog2();
    let within = (value >> (exponent - SUB_BITS)) as usize & (SUB - 1);
    (exponent - SUB_BITS + 1) as usize * SUB + within
}

/// The smallest value of bucket `index` (below [`BUCKETS`]).
#[must_use]
pub const fn lowest_of(index: usize) -> u64 {
    if index < SUB {
        return index as u64;
    }
    ((SUB + index % SUB) as u64) << (index / SUB - 1)
}

impl Histogram {
    /// Records one value. Counters wrap at 2^64.
    #[inline]
    pub fn record(&mut self, value: u64) {
        self.count = self.count.wrapping_add(1);
        self.total = self.total.wrapping_add(value);
        if value > self.max {
            self.max = value;
        }
        // The index is below BUCKETS for every u64, see the tests; `get_mut` keeps a panic out of the measured path.
        if let Some(bucket) = self.buckets.get_mut(bucket(value)) {
            *bucket = bucket.wrapping_add(1);
        }
    }

    /// Adds what `other` holds. Its numbers may come from a guest, so nothing here overflows.
    pub fn merge(&mut self, other: &Self) {
        self.count = self.count.saturating_add(other.count);
        self.total = self.total.saturating_add(other.total);
        self.max = self.max.max(other.max);
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine = mine.saturating_add(*theirs);
        }
    }

    /// The smallest value such that at least `per_mille` thousandths of all values are in its bucket or below (0 if empty), cut to the
    /// largest value recorded.
    #[must_use]
    pub fn quantile(&self, per_mille: u64) -> u64 {
        let wanted = (u128::from(self.count) * u128::from(per_mille)).div_ceil(1000).max(1);
        let mut seen = 0_u128;
        for (index, &count) in self.buckets.iter().enumerate() {
            seen += u128::from(count);
            if seen >= wanted {
                return lowest_of(index).min(self.max);
            }
        }
        self.max
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_value_is_at_most_a_64th_above_its_bucket(value: u64) {
            let index = bucket(value);
            prop_assert!(index < BUCKETS);
            let lowest = lowest_of(index);
            prop_assert!(lowest <= value && value - lowest <= lowest / 64);
            if index + 1 < BUCKETS {
                prop_assert!(value < lowest_of(index + 1));
            }
        }

        #[test]
        fn quantiles_are_those_of_the_sorted_values(mut values in prop::collection::vec(0_u64..1 << 40, 1..200)) {
            let mut histogram = Histogram::default();
            for &value in &values {
                histogram.record(value);
            }
            values.sort_unstable();
            for per_mille in [1, 500, 990, 999, 1000] {
                let exact = values[(values.len() * per_mille).div_ceil(1000) - 1];
                prop_assert_eq!(bucket(histogram.quantile(per_mille as u64)), bucket(exact));
            }
            prop_assert_eq!(histogram.max, *values.last().unwrap());
            prop_assert_eq!(histogram.total, values.iter().sum::<u64>());
        }
    }

    #[test]
    fn merging_is_recording_both() {
        let (mut a, mut b, mut both) = (Histogram::default(), Histogram::default(), Histogram::default());
        for value in 0..1000 {
            let half = if value % 3 == 0 { &mut a } else { &mut b };
            half.record(value * 7);
            both.record(value * 7);
        }
        a.merge(&b);
        assert_eq!(a.as_bytes(), both.as_bytes());
        assert_eq!(Histogram::default().quantile(500), 0);
    }
}
