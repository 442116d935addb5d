// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a change of the page tables costs when many listen: `cargo bench -p mmu-notifier`.
//!
//! * `miss`: a random page that no subscription covers; `hits`: one that three cover on average. Beside `iset`
//!   (a red-black tree that can be updated, like ours) and `coitrees` (static: built once, cannot be updated).
//! * `section`: a whole start and end in the registry over n interval notifiers, without an overlap.
//! * `dispatch`: a start and end that k of 1,000 notifiers hear.
//! * `update`: one insertion and one removal among 100,000.
#![expect(missing_docs, reason = "criterion_group! makes a public function")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use coitrees::{BasicCOITree, IntervalTree};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use interleave::MaySleep;
use iset::IntervalMap;
use mmu_notifier::*;

const SIZES: [u64; 4] = [1, 1_000, 100_000, 1_000_000];
const PROBES: usize = 1 << 14;
/// Pages of one subscription.
const PAGES: u64 = 16;

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

fn pages(at: u64, n: u64) -> Range {
    Range::new(at * PAGE_SIZE, n * PAGE_SIZE).expect("inside user space")
}

/// `n` subscriptions with gaps as large as themselves, in random order, and pages in the gaps.
fn apart(n: u64) -> (Vec<Range>, Vec<Range>) {
    let mut random = Random(42);
    let mut ranges: Vec<_> = (0..n).map(|i| pages(2 * i * PAGES, PAGES)).collect();
    for i in (1..ranges.len()).rev() {
        ranges.swap(i, random.below(i as u64 + 1) as usize);
    }
    let probes = (0..PROBES).map(|_| (random.below(n) * 2 + 1) * PAGES + random.below(PAGES));
    let probes = probes.map(|at| pages(at, 1)).collect();
    (ranges, probes)
}

/// `n` subscriptions thrown onto a third of the pages that they have.
fn heaped(n: u64) -> (Vec<Range>, Vec<Range>) {
    let mut random = Random(42);
    let space = (n * PAGES / 3).max(PAGES);
    let ranges = (0..n).map(|_| pages(random.below(space), PAGES)).collect();
    let probes = (0..PROBES).map(|_| pages(random.below(space), 1)).collect();
    (ranges, probes)
}

fn ours(ranges: &[Range]) -> IntervalIndex<u32> {
    let mut index = IntervalIndex::new();
    for (i, &range) in ranges.iter().enumerate() {
        index.insert(range, i as u32);
    }
    index
}

fn rb_tree(ranges: &[Range]) -> IntervalMap<u64, u32> {
    let mut map = IntervalMap::new();
    for (i, range) in ranges.iter().enumerate() {
        map.force_insert(range.start()..range.end(), i as u32);
    }
    map
}

fn static_tree(ranges: &[Range]) -> BasicCOITree<u32, u32> {
    let page = |addr: u64| (addr / PAGE_SIZE) as i32;
    let nodes: Vec<_> = (0u32..)
        .zip(ranges)
        .map(|(i, r)| coitrees::Interval::new(page(r.start()), page(r.end()) - 1, i))
        .collect();
    BasicCOITree::new(&nodes)
}

fn lookup(c: &mut Criterion) {
    for (name, make) in [("miss", apart as fn(u64) -> _), ("hits", heaped)] {
        let mut group = c.benchmark_group(name);
        for n in SIZES {
            let (ranges, probes) = make(n);
            let mut next = (0..PROBES).cycle();
            let mut probe = move || probes[next.next().expect("endless")];

            let index = ours(&ranges);
            group.bench_function(BenchmarkId::new("ours", n), |b| {
                b.iter(|| index.overlaps(black_box(probe())).fold(0u32, |sum, (_, _, &id)| sum ^ id));
            });
            drop(index);
            let map = rb_tree(&ranges);
            group.bench_function(BenchmarkId::new("iset", n), |b| {
                b.iter(|| {
                    let range = black_box(probe());
                    map.values(range.start()..range.end()).fold(0u32, |sum, &id| sum ^ id)
                });
            });
            drop(map);
            let tree = static_tree(&ranges);
            group.bench_function(BenchmarkId::new("coitrees", n), |b| {
                b.iter(|| {
                    let page = (black_box(probe()).start() / PAGE_SIZE) as i32;
                    let mut sum = 0u32;
                    tree.query(page, page, |i| sum ^= i.metadata);
                    sum
                });
            });
        }
        group.finish();
    }
}

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

fn section(c: &mut Criterion) {
    MaySleep::enter(|cx| {
        let silent = Arc::new(Silent);
        let mut group = c.benchmark_group("section");
        for n in SIZES {
            let (ranges, probes) = apart(n);
            let mm = NotifierSubscriptions::new(Rules::default());
            let held: Vec<_> = ranges.iter().map(|&r| mm.insert_interval(cx, r, silent.clone())).collect();
            let mut next = probes.iter().cycle();
            group.bench_function(BenchmarkId::new("miss", n), |b| {
                b.iter(|| {
                    let inv = Invalidation::new(*next.next().expect("endless"), Event::Unmap);
                    mm.invalidate_range_start(cx, inv).invalidate_range_end(cx);
                });
            });
            drop(held);
        }
        group.finish();

        let mut group = c.benchmark_group("dispatch");
        for k in [0, 1, 8, 64] {
            let mm = NotifierSubscriptions::new(Rules::default());
            let there = (0..k).map(|_| pages(10, 1));
            let elsewhere = (k..1_000).map(|i| pages(100 + i, 1));
            let held: Vec<_> =
                there.chain(elsewhere).map(|r| mm.insert_interval(cx, r, silent.clone())).collect();
            group.bench_function(BenchmarkId::new("overlaps", k), |b| {
                b.iter(|| {
                    let inv = Invalidation::new(black_box(pages(10, 1)), Event::Unmap);
                    mm.invalidate_range_start(cx, inv).invalidate_range_end(cx);
                });
            });
            drop(held);
        }
        group.finish();
    });
}

fn update(c: &mut Criterion) {
    let (ranges, probes) = apart(100_000);
    let mut group = c.benchmark_group("update");
    let mut next = probes.iter().cycle();
    let mut index = ours(&ranges);
    group.bench_function("ours", |b| {
        b.iter(|| {
            let key = index.insert(*next.next().expect("endless"), 0);
            index.remove(key)
        });
    });
    let mut map = rb_tree(&ranges);
    group.bench_function("iset", |b| {
        b.iter(|| {
            let range = *next.next().expect("endless");
            map.force_insert(range.start()..range.end(), 0);
            map.remove(range.start()..range.end())
        });
    });
    MaySleep::enter(|cx| {
        let silent = Arc::new(Silent);
        let mm = NotifierSubscriptions::new(Rules::default());
        let held: Vec<_> = ranges.iter().map(|&r| mm.insert_interval(cx, r, silent.clone())).collect();
        group.bench_function("notifier", |b| {
            b.iter(|| {
                let range = *next.next().expect("endless");
                mm.insert_interval(cx, range, silent.clone()).map(|i| i.remove(cx))
            });
        });
        drop(held);
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20);
    targets = lookup, section, update
}
criterion_main!(benches);
