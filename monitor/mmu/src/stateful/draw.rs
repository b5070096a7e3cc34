//! What is drawn from a seed: configurations, tables, scripts.

use umbra_shared::Level;

use super::op::{Action, Op};
use crate::config::{CacheSize, Caches, Collapse, Config, RootPolicy, Split};
use crate::format::Format;
use crate::guest::GuestCaps;
use crate::track::STRATEGIES;

/// A small generator (splitmix64): the same numbers everywhere.
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    /// The next 64 bits.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.draw() % limit.max(1)
    }

    /// One of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::try_from(self.below(choices.len() as u64)).unwrap_or(0)]
    }

    /// True once in `times`.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

/// A configuration and its script, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Episode {
    /// The seed of the search.
    pub seed: u64,
    /// Which episode of it.
    pub number: u64,
}

/// Pages of data, from frame 0.
pub const DATA: u64 = 8 * 512;

/// What an episode runs on.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The MMU's configuration.
    pub config: Config,
    /// The formats that roots are loaded with; the first is the main one, all over tables of one shape.
    pub formats: Vec<Format>,
    /// L1's memory is over 1 GiB, and leaves may be.
    pub giant: bool,
    /// The first of the frames for tables.
    pub tables: u64,
    /// A seed for tables.
    pub seed: u64,
}

/// Frames for tables.
pub const TABLES: u64 = 64;

impl Episode {
    /// Episode `number` of the search from `seed`.
    #[must_use]
    pub const fn new(seed: u64, number: u64) -> Self {
        Self { seed, number }
    }

    fn rng(self, stream: u64) -> Rng {
        let mut rng = Rng(self.seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ self.number << 20 ^ stream);
        rng.draw();
        rng
    }

    /// The configuration.
    #[must_use]
    pub fn setup(self) -> Setup {
        let mut rng = self.rng(1);
        let main = rng.pick(&[
            Format::EPT,
            Format::EPT,
            Format::Ept { five_levels: true, accessed_dirty: true },
            Format::Ept { five_levels: false, accessed_dirty: false },
            Format::Npt { five_levels: false, nx: true },
            Format::Npt { five_levels: true, nx: false },
            Format::Pae { nx: true },
            Format::Bits32 { pse: true },
            Format::Bits32 { pse: false },
        ]);
        let other = match main {
            Format::Ept { five_levels, accessed_dirty } => Format::Ept { five_levels, accessed_dirty: !accessed_dirty },
            Format::Npt { five_levels, nx } => Format::Npt { five_levels, nx: !nx },
            Format::Pae { nx } => Format::Pae { nx: !nx },
            Format::Bits32 { pse } => Format::Bits32 { pse: !pse },
        };
        let giant = rng.once_in(10) && main.max_leaf() == Level::G1;
        let tables = if giant { 1 << 18 } else { DATA };
        loop {
            let mut config = Config::new(tables + 512, rng.pick(&STRATEGIES));
            config.by_l2 = rng.once_in(4);
            config.split = rng.pick(&[Split::Lazy, Split::Shatter, Split::Eager, Split::EagerClear]);
            config.collapse = rng.pick(&[Collapse::None, Collapse::Lazy, Collapse::InPlace]);
            config.roots = rng.pick(&[
                RootPolicy::Drop,
                RootPolicy::AddressSpace,
                RootPolicy::Keep,
                RootPolicy::Keep,
                RootPolicy::Quota(28),
                RootPolicy::Quota(64),
            ]);
            config.caches = Caches {
                pages: rng.pick(&[CacheSize { min: 0, capacity: 0 }, CacheSize { min: 1, capacity: 4 }]),
                descs: rng.pick(&[CacheSize { min: 0, capacity: 0 }, CacheSize { min: 8, capacity: 20 }]),
                desc_bytes: rng.pick(&[16, 32, 128]),
                inline_two: !rng.once_in(3),
            };
            config.extent = rng.pick(&[1, 1, 4, 16, 64]);
            config.max_level = rng.pick(&[Level::G1, Level::G1, Level::M2, Level::K4]);
            config.longest_list = rng.pick(&[16384, 16384, 3]);
            config.max_l2_regions = rng.pick(&[4096, 4096, 2]);
            config.max_twins = rng.pick(&[64, 2]);
            config.break_even = rng.pick(&[180, 8, 1]);
            config.caps = GuestCaps {
                address_bits: rng.pick(&[46, 36]),
                execute_only: !rng.once_in(3),
                giant_pages: !rng.once_in(4),
            };
            config.seed = rng.draw();
            if config.check().is_ok() {
                let formats = if rng.once_in(3) { vec![main, other] } else { vec![main] };
                return Setup { config, formats, giant, tables, seed: rng.draw() };
            }
        }
    }

    /// A script of `length` operations. Each episode has its own taste.
    #[must_use]
    pub fn script(self, length: usize) -> Vec<Op> {
        let mut rng = self.rng(2);
        let mut weights: Vec<(Action, u64)> = vec![
            (Action::Access, 600),
            (Action::Sweep, 10),
            (Action::Edit, 30),
            (Action::Remap, 30),
            (Action::Invalidate, 15),
            (Action::Load, 15),
            (Action::Drop, 12),
            (Action::ChangeRole, 40),
            (Action::Start, 12),
            (Action::Harvest, 30),
            (Action::Clear, 15),
            (Action::ClearAll, 15),
            (Action::Stop, 4),
            (Action::Slots, 4),
            (Action::Starve, 2),
            (Action::Feed, 6),
            (Action::Prefetch, 20),
        ];
        for (_, weight) in &mut weights {
            *weight = *weight * rng.pick(&[0, 1, 2, 2, 2, 4]) / 2;
        }
        weights[0].1 = weights[0].1.max(100);
        let total: u64 = weights.iter().map(|(_, weight)| weight).sum();
        let draw = |rng: &mut Rng| {
            let mut left = rng.below(total);
            for &(action, weight) in &weights {
                if left < weight {
                    return action;
                }
                left -= weight;
            }
            Action::Access
        };
        let number = |rng: &mut Rng| (rng.draw() >> 40) as u32;
        (0..length)
            .map(|_| Op { action: draw(&mut rng), a: number(&mut rng), b: number(&mut rng), c: number(&mut rng) })
            .collect()
    }
}
