// SPDX-License-Identifier: MIT OR Apache-2.0
//! The program, run here, and the words that watches look at, against ranges that are compared.

use super::*;
use crate::kvm::shared::{Counters, Shared};
use crate::sys::bpf::run::run;
use crate::sys::map::Mapping;
use crate::sys::wipe::WipePage;
use proptest::prelude::*;
use std::os::fd::AsFd;

/// A source of which the program is run by hand.
struct Source {
    code: Vec<Insn>,
    shared: Shared,
    words: Vec<u64>,
}

impl Source {
    fn new(buckets: Buckets, window: Option<Range>) -> Source {
        let layout = Layout { buckets: Some(buckets), age: false }.check().unwrap();
        let map = Mapping::anonymous(layout.map_len() as usize).unwrap();
        // Never asked what it is.
        let fd = std::fs::File::open("/dev/null").unwrap();
        let canary = Range::new(1 << 46, 4096).unwrap();
        let spec = Spec {
            kind: Kind::Unmap,
            start: 8,
            end: 16,
            layout,
            window,
            canary,
            counters: fd.as_fd(),
            ring: None,
        };
        let code = assemble(&spec).unwrap();
        let words = vec![0; layout.map_len() as usize / 8];
        let shared = Shared::new(WipePage::new().unwrap(), Counters::Bpf { map, layout });
        Source { code, shared, words }
    }

    fn change(&mut self, start: u64, end: u64) {
        assert_eq!(run(&self.code, &[0, start, end], &mut self.words), 1);
        let Counters::Bpf { map, .. } = &*self.shared.counters else { unreachable!() };
        // SAFETY: as many words as the mapping has, which nobody else reads or writes.
        unsafe { map.ptr().cast::<u64>().as_ptr().copy_from(self.words.as_ptr(), self.words.len()) };
    }

    /// What a watch adds up, and what is counted by key is the same.
    fn count(&self, range: Range) -> u64 {
        let local = self.shared.local(Kind::Unmap, range);
        assert!(!local.is_empty(), "{range:?} is looked at");
        let sum = local.iter().map(|word| word.load()).sum();
        if let Some(key) = self.shared.key(range) {
            assert_eq!(self.shared.near(Kind::Unmap).unwrap().count(key), sum, "{range:?}");
        }
        sum
    }

    fn moves(&mut self, watched: Range, change: Range) -> bool {
        let before = self.count(watched);
        self.change(change.start(), change.end());
        self.count(watched) != before
    }
}

fn buckets() -> impl Strategy<Value = Buckets> {
    (6_u32..=13, 12_u32..=16, 0_u32..=9).prop_map(|(count, granule_shift, wide)| Buckets {
        count: 1 << count,
        granule_shift,
        wide: 1 << wide,
    })
}

/// Lengths in granules: short, of some wide granules, and beyond everything.
fn lengths() -> impl Strategy<Value = u64> {
    prop_oneof![1_u64..100, 1_u64..3000, 1_u64..1 << 20]
}

/// Of what is watched: a few, or as many as are added up.
fn watched() -> impl Strategy<Value = u64> {
    prop_oneof![1_u64..8, 1_u64..1 << 13]
}

fn pages(start: u64, count: u64) -> Range {
    Range::new(start * 4096, count * 4096).unwrap()
}

proptest! {
    #[test]
    fn no_change_is_missed(
        b in buckets(), start in 0_u64..1 << 20, granules in lengths(), cut in 0_u64..1 << 8,
        at in 0_u64..1 << 30, watched in watched()
    ) {
        let watched = watched.min(u64::from(b.count) - 1);
        let pages_a_granule = 1 << (b.granule_shift - 12);
        let change = pages(start + watched, (granules * pages_a_granule).saturating_sub(cut).max(1));
        // Somewhere that overlaps it.
        let reach = change.len() / 4096 + watched - 1;
        let watched = pages(start + 1 + at % reach, watched);
        prop_assert!(watched.overlaps(change));
        prop_assert!(Source::new(b, None).moves(watched, change), "{watched:?} in {change:?}");
    }

    #[test]
    fn what_shares_no_granule_is_told_of_nothing(
        b in buckets(), base in 0_u64..1 << 12, start in 0_u64..1 << 10, granules in lengths(),
        other in 0_u64..1 << 16, watched in watched()
    ) {
        // As far as no two granules share a bucket, and no two wide ones, nor all of them move.
        let window = u64::from(b.count.min(Buckets::WIDE_MOST * b.wide));
        let granule = |n: u64, count: u64| {
            Range::new((base * window + n) << b.granule_shift, count << b.granule_shift).unwrap()
        };
        let (watched, start, other) = (watched.min(window / 2), start % window, other % window);
        let (change, watched) = (
            granule(start, granules.min(window - start)),
            granule(other.min(window - watched), watched),
        );
        let told = Source::new(b, None).moves(watched, change);
        prop_assert_eq!(told, watched.overlaps(change), "{:?} beside {:?}", watched, change);
    }
}

#[test]
fn a_wide_change_ends_where_it_ends() {
    let b = Buckets { count: 8192, granule_shift: 16, wide: 64 };
    let granule = |n: u64, count: u64| Range::new(n << 16, count << 16).unwrap();
    for (start, count) in [(64, 65), (64, 128), (1, 65), (63, 66), (100, 1000), (130, 6400), (128, 64 * 256)]
    {
        let change = granule(start, count);
        let mut source = Source::new(b, None);
        for inside in [start, start + count / 2, start + count - 1] {
            assert!(source.moves(granule(inside, 1), change), "granule {inside} of {change:?}");
        }
        for outside in [start - 1, start + count] {
            assert!(!source.moves(granule(outside, 1), change), "granule {outside} beside {change:?}");
        }
    }
    let mut source = Source::new(b, None);
    assert!(source.moves(granule(1 << 20, 1), granule(1, 64 * 256 + 1)), "too wide to be told apart");
}

#[test]
fn a_range_that_ends_before_it_starts_is_everything() {
    let mut source = Source::new(Buckets::default(), None);
    let anywhere = [0, 1 << 16, 77 << 30, 1 << 45].map(|start| Range::new(start, 1 << 17).unwrap());
    let before = anywhere.map(|range| source.count(range));
    source.change(5 << 20, 4 << 20);
    assert!(anywhere.iter().zip(before).all(|(range, before)| source.count(*range) != before));
}

#[test]
fn what_is_outside_the_window_is_not_counted() {
    let window = Range::new(1 << 30, 1 << 20).unwrap();
    let mut source = Source::new(Buckets::default(), Some(window));
    let whole = |shift: u64| Range::new((1 << 30) - (8 << 20) + shift, 8 << 20).unwrap();
    let watched = Range::new((1 << 30) - 4096, 4096).unwrap();
    assert!(!source.moves(watched, whole(0)));
    assert!(source.moves(watched, whole(4096)));
}
