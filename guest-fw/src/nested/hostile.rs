//! The firmware as a malicious L1 ([`umbra_shared::hostile`]).

use super::{Hypervisor, SHARED, edits, probes, table_place};
use crate::arch::l2::Extension;
use crate::arch::lock::Lock;
use crate::arch::table_words::TableWords;
use crate::arch::tracked::Executed;
use crate::arch::vcpu;
use crate::boot::Setup;
use umbra_shared::board::Words as _;
use umbra_shared::hostile::{CASES, Case, Place, Store};
use umbra_shared::nested::Nested;

static PLACE: Lock<Option<Place>> = Lock::new(None);

impl<E: Extension> Hypervisor<E> {
    /// Makes L1's table and this vCPU's control page what they were at first, all of L2's pages mapped.
    pub fn renew(&mut self, setup: &Setup, nested: &Nested) -> Executed {
        if vcpu::current() == 0 {
            let cleared = SHARED.with(|shared| shared.as_mut().map_or(Ok(()), |shared| shared.table.clear()));
            if let Err(error) = cleared {
                panic!("L1's nested page table: {error}");
            }
            self.fill();
            let (root, pages) = table_place();
            PLACE.with(|place| *place = Some(Place::of(&edits::find(setup, nested), root, pages)));
        }
        self.l2.extension().renew();
        self.l2.restart();
        self.l2.extension().forget();
        Executed::default()
    }

    /// Makes case `number`, counted over all episodes.
    pub fn attack(&mut self, setup: &Setup, nested: &Nested, number: u64) -> Executed {
        let Some(place) = PLACE.with(|place| *place) else { panic!("L1's table was never renewed") };
        let case = Case::draw(nested.map.seed() + number / CASES, number % CASES, &place);
        let mut words = TableWords::of(&setup.page);
        for &Store { address, value } in case.stores() {
            words.write(address, value);
        }
        (0..case.invalidations).for_each(|_| self.l2.extension().forget());
        if let Some(control) = &case.control {
            self.l2.extension().attack(control);
            self.l2.restart();
        }
        // Where a vCPU forgets for itself alone, the one whose L2 probes has to be told.
        probes::set(case.probes().iter().copied(), !E::FORGETS_FOR_ALL && case.invalidations > 0);
        Executed::default()
    }
}
