// SPDX-License-Identifier: MIT OR Apache-2.0
//! A change that nobody listens to costs no allocation.

use std::sync::Arc;

use interleave::MaySleep;
use mmu_notifier::*;

struct Silent;

impl Invalidate for Silent {
    fn invalidate(
        &self,
        _: Sleep<'_, '_>,
        _: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock> {
        Ok(seq.set())
    }
}

impl MmuNotifier for Silent {
    fn ops(&self) -> Ops {
        Ops::START | Ops::END
    }
}

fn page(at: u64) -> Range {
    Range::new(at * PAGE_SIZE, PAGE_SIZE).unwrap()
}

#[test]
fn lookup_never_allocates() {
    let mut index = IntervalIndex::new();
    for i in 0..10_000u64 {
        index.insert(page(2 * i), i);
    }
    let mut hits = 0;
    let info = allocation_counter::measure(|| {
        hits += index.overlaps(page(4_001)).count();
        hits += index.overlaps(Range::new(4_000 * PAGE_SIZE, 20 * PAGE_SIZE).unwrap()).count();
    });
    assert_eq!((info.count_total, hits), (0, 10));
}

#[test]
fn a_section_allocates_nothing_whether_or_not_it_has_an_overlap() {
    MaySleep::enter(|cx| {
        let mm = NotifierSubscriptions::new(Rules::default());
        let silent = Arc::new(Silent);
        let _listed = mm.register(cx, silent.clone()).unwrap();
        let _notifiers: Vec<_> =
            (0..100).map(|i| mm.insert_interval(cx, page(2 * i), silent.clone()).unwrap()).collect();
        for at in [1, 2] {
            let section = |cx: &mut MaySleep<'_>| {
                mm.invalidate_range_start(cx, Invalidation::new(page(at), Event::Unmap))
                    .invalidate_range_end(cx);
            };
            // A thread's first section makes room to remember that it is inside one.
            section(cx);
            let info = allocation_counter::measure(|| section(cx));
            assert_eq!(info.count_total, 0, "page {at}");
        }
    });
}
