//! Dirty patterns: one definition, executed by the firmware and evaluated by the monitor.
//!
//! A round is a numbered sequence of accesses, `0..accesses()`. [`Pattern::access`] says which page the i-th one touches and
//! whether it writes. The firmware executes exactly that; the monitor's evaluation of the same function is the truth. vCPU
//! `v` of `n` executes the contiguous share [`Pattern::share`] of the sequence, so the union over all vCPUs is the round,
//! whatever their number.
//!
//! What is exact: of `A` accesses, `floor(A * write_percent / 100)` write; with a hot spot, `floor(W * share / 100)` of those
//! `W` writes go to the hot pages. Both are spread evenly (Bresenham's line), and shifted from round to round, so that a
//! round does not repeat the set of the one before.

use core::fmt;
use core::ops::Range;
use core::str::FromStr;

/// The order in which a round touches pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// No access at all: shows what a phase costs by itself.
    Empty,
    /// 0, 1, 2, ...
    Sequential,
    /// 0, s, 2s, ..., 1, s+1, ...: every page once, neighbours far apart in time.
    Stride(u64),
    /// A permutation by seed and round.
    Random,
    /// `pages` percent of the pages get `share` percent of the writes (and of the reads).
    HotSpot {
        /// Percent of all pages that are hot, 1..=99.
        pages: u64,
        /// Percent of accesses that go to them, 0..=100.
        share: u64,
    },
    /// Runs of that many neighbours, the runs in random order.
    Clusters(u64),
    /// As sequential, and that many rounds, one after the other, write the same bytes: most writes leave a page as it was.
    Same(u64),
}

/// The names of the kinds, as the command line spells them.
pub const NAMES: &[&str] =
    &["empty", "sequential", "stride:N", "random", "hotspot:PAGES%/SHARE%", "clusters:N", "same:ROUNDS"];

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => write!(f, "empty"),
            Self::Sequential => write!(f, "sequential"),
            Self::Stride(step) => write!(f, "stride:{step}"),
            Self::Random => write!(f, "random"),
            Self::HotSpot { pages, share } => write!(f, "hotspot:{pages}/{share}"),
            Self::Clusters(length) => write!(f, "clusters:{length}"),
            Self::Same(rounds) => write!(f, "same:{rounds}"),
        }
    }
}

/// A pattern's name that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownKind;

impl FromStr for Kind {
    type Err = UnknownKind;

    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        let (name, argument) = text.split_once(':').map_or((text, None), |(name, rest)| (name, Some(rest)));
        let number = |text: &str| text.trim_end_matches('%').parse::<u64>().map_err(|_| UnknownKind);
        let positive = |text: &str| number(text).and_then(|n| if n == 0 { Err(UnknownKind) } else { Ok(n) });
        match (name, argument) {
            ("empty", None) => Ok(Self::Empty),
            ("sequential", None) => Ok(Self::Sequential),
            ("random", None) => Ok(Self::Random),
            ("stride", Some(step)) => Ok(Self::Stride(positive(step)?)),
            ("clusters", Some(length)) => Ok(Self::Clusters(positive(length)?)),
            ("same", Some(rounds)) => Ok(Self::Same(positive(rounds)?)),
            ("hotspot", Some(both)) => {
                let (pages, share) = both.split_once('/').ok_or(UnknownKind)?;
                let (pages, share) = (number(pages)?, number(share)?);
                if !(1..=99).contains(&pages) || share > 100 {
                    return Err(UnknownKind);
                }
                Ok(Self::HotSpot { pages, share })
            }
            _ => Err(UnknownKind),
        }
    }
}

/// One access of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Index among all tracked pages.
    pub page: u64,
    /// Whether it writes; else it reads.
    pub write: bool,
}

/// A whole pattern. All rounds follow from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// The order.
    pub kind: Kind,
    /// Seed of everything random.
    pub seed: u64,
    /// Tracked pages, at most 2^31.
    pub pages: u64,
    /// Percent of the accesses that write, 0..=100.
    pub write_percent: u64,
    /// Accesses in a round for each page (on average, for a hot spot).
    pub accesses_per_page: u64,
}

/// The accesses of a round are numbered in 32 bits, with one bit to spare for "write" in the plans.
pub const MAX_ACCESSES: u64 = 1 << 31;

/// Whether step `index` of `whole` is one of the `percent` hundredths that Bresenham's line picks: over `0..whole` exactly
/// `floor(whole * percent / 100)` are.
const fn picked(index: u64, percent: u64) -> bool {
    (index + 1) * percent / 100 > index * percent / 100
}

/// How many of `0..index` are picked.
const fn picked_before(index: u64, percent: u64) -> u64 {
    index * percent / 100
}

/// The finaliser of `SplitMix64` (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
pub(crate) const fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A keyed permutation of `0..size` evaluated at `index < size`: a balanced Feistel network over the next even power of
/// two, walked until it falls inside (Black and Rogaway: "Ciphers with arbitrary finite domains", 2002; at most 4 steps on average).
pub(crate) fn permute(index: u64, size: u64, key: u64) -> u64 {
    if size < 2 {
        return index;
    }
    let half_bits = (64 - (size - 1).leading_zeros()).div_ceil(2);
    let mask = (1_u64 << half_bits) - 1;
    let mut value = index;
    loop {
        let (mut left, mut right) = (value >> half_bits, value & mask);
        for round in 0..4_u64 {
            let next = left ^ (mix(key ^ (round << 60) ^ right) & mask);
            left = right;
            right = next;
        }
        value = (left << half_bits) | right;
        if value < size {
            return value;
        }
    }
}

impl Pattern {
    /// Accesses in one round.
    #[must_use]
    pub const fn accesses(&self) -> u64 {
        match self.kind {
            Kind::Empty => 0,
            _ => self.pages * self.accesses_per_page,
        }
    }

    /// Writes in one round: exactly `floor(accesses * write_percent / 100)`.
    #[must_use]
    pub const fn writes(&self) -> u64 {
        picked_before(self.accesses(), self.write_percent)
    }

    /// The accesses that vCPU `vcpu` of `vcpus` executes.
    #[must_use]
    pub const fn share(&self, vcpu: u64, vcpus: u64) -> Range<u64> {
        let all = self.accesses();
        all * vcpu / vcpus..all * (vcpu + 1) / vcpus
    }

    /// Pages that vCPU `vcpu` of `vcpus` populates.
    #[must_use]
    pub const fn populate_share(&self, vcpu: u64, vcpus: u64) -> Range<u64> {
        self.pages * vcpu / vcpus..self.pages * (vcpu + 1) / vcpus
    }

    /// Access `index` (below [`Self::accesses`]) of round `round`.
    #[must_use]
    pub fn access(&self, round: u64, index: u64) -> Access {
        let all = self.accesses();
        let position = (index + round.wrapping_mul(37) % all) % all;
        let write = picked(position, self.write_percent);
        let page = match self.kind {
            Kind::Empty | Kind::Sequential | Kind::Same(_) => index % self.pages,
            Kind::Stride(step) => stride(index % self.pages, self.pages, step),
            Kind::Random => permute(index % self.pages, self.pages, self.key(round, 0)),
            Kind::Clusters(length) => self.cluster(round, index % self.pages, length),
            Kind::HotSpot { pages, share } => self.hot_spot(round, position, write, pages, share),
        };
        Access { page, write }
    }

    /// The round whose [`Pattern::stamp`] the writes of `round` leave: itself, but with [`Kind::Same`], where several rounds share one.
    #[must_use]
    pub const fn written_as(&self, round: u64) -> u64 {
        match self.kind {
            Kind::Same(rounds) => round - round % rounds,
            _ => round,
        }
    }

    /// The word that a write of `round` leaves at the start of `page`: never that of another round or page, never zero. So a write always
    /// changes the page's bytes, and `unchanged` is 0, but where [`Pattern::written_as`] says otherwise.
    #[must_use]
    pub const fn stamp(round: u64, page: u64) -> u64 {
        ((round + 1) << 32) | page
    }

    fn key(&self, round: u64, purpose: u64) -> u64 {
        mix(self.seed ^ mix(round ^ (purpose << 56)))
    }

    fn cluster(&self, round: u64, index: u64, length: u64) -> u64 {
        let clusters = self.pages / length;
        let (cluster, offset) = (index / length, index % length);
        // Pages that fill no whole cluster stay at the end.
        if cluster < clusters { permute(cluster, clusters, self.key(round, 1)) * length + offset } else { index }
    }

    /// Among the writes (and apart from them among the reads) `share` percent are hot. The k-th hot access touches the k-th page of
    /// a permutation of the hot pages, and so on round and round; likewise the cold ones.
    fn hot_spot(&self, round: u64, position: u64, write: bool, percent: u64, share: u64) -> u64 {
        let writes_before = picked_before(position, self.write_percent);
        let nth = if write { writes_before } else { position - writes_before };
        let hot_pages = (self.pages * percent / 100).clamp(1, self.pages);
        let cold_pages = self.pages - hot_pages;
        // The hot region is one run of pages that begins where the seed says, the same in all rounds.
        let start = mix(self.seed) % self.pages;
        let hot_before = picked_before(nth, share);
        let offset = if picked(nth, share) || cold_pages == 0 {
            permute(hot_before % hot_pages, hot_pages, self.key(round, 2))
        } else {
            hot_pages + permute((nth - hot_before) % cold_pages, cold_pages, self.key(round, 3))
        };
        (start + offset) % self.pages
    }

    /// The pattern as words for the boot page.
    #[must_use]
    pub const fn encode(&self) -> [u64; 8] {
        let (kind, a, b) = match self.kind {
            Kind::Empty => (0, 0, 0),
            Kind::Sequential => (1, 0, 0),
            Kind::Stride(step) => (2, step, 0),
            Kind::Random => (3, 0, 0),
            Kind::HotSpot { pages, share } => (4, pages, share),
            Kind::Clusters(length) => (5, length, 0),
            Kind::Same(rounds) => (6, rounds, 0),
        };
        [kind, a, b, self.seed, self.pages, self.write_percent, self.accesses_per_page, 0]
    }

    /// The pattern of such words, or `None` if they are none.
    #[must_use]
    pub const fn decode(words: &[u64; 8]) -> Option<Self> {
        let &[kind, a, b, seed, pages, write_percent, accesses_per_page, _] = words;
        let kind = match kind {
            0 => Kind::Empty,
            1 => Kind::Sequential,
            2 if a > 0 => Kind::Stride(a),
            3 => Kind::Random,
            4 => Kind::HotSpot { pages: a, share: b },
            5 if a > 0 => Kind::Clusters(a),
            6 if a > 0 => Kind::Same(a),
            _ => return None,
        };
        Some(Self { kind, seed, pages, write_percent, accesses_per_page })
    }
}

/// Column-major order over rows of `step` pages: a permutation of `0..pages` also where `step` does not divide it.
const fn stride(index: u64, pages: u64, step: u64) -> u64 {
    let (full, longer) = (pages / step, pages % step);
    // The first `longer` columns have one page more than the others.
    let in_longer = longer * (full + 1);
    let (column, row) = if index < in_longer {
        (index / (full + 1), index % (full + 1))
    } else {
        (longer + (index - in_longer) / full, (index - in_longer) % full)
    };
    row * step + column
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kinds() -> impl Strategy<Value = Kind> {
        prop_oneof![
            Just(Kind::Empty),
            Just(Kind::Sequential),
            (1_u64..600).prop_map(Kind::Stride),
            (1_u64..9).prop_map(Kind::Same),
            Just(Kind::Random),
            (1_u64..100, 0_u64..101).prop_map(|(pages, share)| Kind::HotSpot { pages, share }),
            (1_u64..600).prop_map(Kind::Clusters),
        ]
    }

    fn patterns() -> impl Strategy<Value = Pattern> {
        (kinds(), any::<u64>(), 1_u64..2000, 0_u64..101, 1_u64..4).prop_map(
            |(kind, seed, pages, write_percent, accesses_per_page)| Pattern {
                kind,
                seed,
                pages,
                write_percent,
                accesses_per_page,
            },
        )
    }

    proptest! {
        #[test]
        fn writes_are_exact_and_pages_in_range(pattern in patterns(), round in 0_u64..1000) {
            let mut writes = 0;
            for index in 0..pattern.accesses() {
                let access = pattern.access(round, index);
                prop_assert!(access.page < pattern.pages);
                writes += u64::from(access.write);
            }
            prop_assert_eq!(writes, pattern.accesses() * pattern.write_percent / 100);
            prop_assert_eq!(writes, pattern.writes());
        }

        #[test]
        fn all_but_hot_spots_touch_every_page_equally_often(pattern in patterns(), round in 0_u64..1000) {
            prop_assume!(!matches!(pattern.kind, Kind::Empty | Kind::HotSpot { .. }));
            let mut touched = vec![0; usize::try_from(pattern.pages).unwrap()];
            for index in 0..pattern.accesses() {
                touched[usize::try_from(pattern.access(round, index).page).unwrap()] += 1;
            }
            prop_assert!(touched.iter().all(|&count| count == pattern.accesses_per_page));
        }

        #[test]
        fn hot_pages_get_their_share_of_the_writes(
            pages in 2_u64..2000, percent in 1_u64..100, share in 0_u64..101, write_percent in 0_u64..101, seed: u64, round in 0_u64..100
        ) {
            let kind = Kind::HotSpot { pages: percent, share };
            let pattern = Pattern { kind, seed, pages, write_percent, accesses_per_page: 2 };
            let hot_pages = (pages * percent / 100).clamp(1, pages);
            let start = mix(seed) % pages;
            let hot = (0..pattern.accesses())
                .map(|index| pattern.access(round, index))
                .filter(|access| access.write && (access.page + pages - start) % pages < hot_pages)
                .count() as u64;
            prop_assert_eq!(hot, pattern.writes() * share / 100);
        }

        #[test]
        fn shares_cut_the_round_without_gap_or_overlap(pattern in patterns(), vcpus in 1_u64..9) {
            let (mut next, mut page) = (0, 0);
            for vcpu in 0..vcpus {
                let (share, populate) = (pattern.share(vcpu, vcpus), pattern.populate_share(vcpu, vcpus));
                prop_assert_eq!((share.start, populate.start), (next, page));
                (next, page) = (share.end, populate.end);
            }
            prop_assert_eq!((next, page), (pattern.accesses(), pattern.pages));
        }

        #[test]
        fn a_pattern_survives_the_boot_page_and_the_command_line(pattern in patterns()) {
            prop_assert_eq!(Pattern::decode(&pattern.encode()), Some(pattern));
            prop_assert_eq!(pattern.kind.to_string().parse(), Ok(pattern.kind));
        }

        #[test]
        fn permutations_are_permutations(size in 1_u64..3000, key: u64) {
            let mut seen = vec![false; usize::try_from(size).unwrap()];
            for index in 0..size {
                let image = usize::try_from(permute(index, size, key)).unwrap();
                prop_assert!(!seen[image]);
                seen[image] = true;
            }
        }
    }

    #[test]
    fn rounds_differ() {
        let of = |kind, round| {
            let pattern = Pattern { kind, seed: 1, pages: 1024, write_percent: 25, accesses_per_page: 1 };
            (0..1024).map(|index| pattern.access(round, index)).filter(|a| a.write).map(|a| a.page).collect::<Vec<_>>()
        };
        for kind in [Kind::Sequential, Kind::Random, Kind::Stride(64), Kind::Clusters(16)] {
            assert_ne!(of(kind, 1), of(kind, 2), "{kind}");
        }
    }

    #[test]
    fn rounds_that_write_the_same_share_a_stamp() {
        let pattern = |kind| Pattern { kind, seed: 1, pages: 8, write_percent: 100, accesses_per_page: 1 };
        let stamps = |kind| (0..6).map(|round| pattern(kind).written_as(round)).collect::<Vec<_>>();
        assert_eq!(stamps(Kind::Same(3)), [0, 0, 0, 3, 3, 3]);
        assert_eq!(stamps(Kind::Sequential), [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn bad_names_are_refused() {
        for text in [
            "",
            "zigzag",
            "stride",
            "stride:0",
            "stride:x",
            "hotspot:10",
            "hotspot:0/5",
            "hotspot:5/101",
            "clusters:0",
            "random:1",
        ] {
            assert_eq!(text.parse::<Kind>(), Err(UnknownKind), "{text}");
        }
        assert_eq!("hotspot:10%/90%".parse(), Ok(Kind::HotSpot { pages: 10, share: 90 }));
    }
}
