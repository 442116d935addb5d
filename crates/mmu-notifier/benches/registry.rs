// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a change of the page tables costs when many listen: `cargo bench -p mmu-notifier`.
//!
//! * lookup: a random page that no subscription covers (`miss`), and one that three cover on average (`hits`), among
//!   n. Beside `iset` (a red-black tree that can be updated, like ours) and `coitrees` (static: built once, cannot be
//!   updated);
//! * section: a whole start and end in the registry over n interval notifiers, without an overlap;
//! * dispatch: a start and end that k of 1,000 notifiers hear;
//! * update: one insertion and one removal among 100,000.
//!
//! The contenders of a row take turns, batch by batch, so that whatever else the machine does falls on all of them;
//! medians over the batches are printed, in nanoseconds.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use coitrees::{BasicCOITree, IntervalTree};
use interleave::MaySleep;
use iset::IntervalMap;
use mmu_notifier::*;

const SIZES: [u64; 4] = [1, 1_000, 100_000, 1_000_000];
const PROBES: usize = 1 << 14;
/// Pages of one subscription.
const PAGES: u64 = 16;
/// Batches of one contender.
const BATCHES: usize = 31;
/// Calls in a batch, at most.
const CALLS: u64 = 1 << 14;

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

/// Runs a batch of so many calls.
type Contender<'a> = Box<dyn FnMut(u64) + 'a>;

fn repeat<'a, T>(mut call: impl FnMut() -> T + 'a) -> Contender<'a> {
    Box::new(move |calls| {
        for _ in 0..calls {
            black_box(call());
        }
    })
}

/// The median cost of one call of each, in nanoseconds.
fn medians(mut contenders: Vec<Contender<'_>>, calls: u64) -> Vec<f64> {
    let mut times = vec![Vec::with_capacity(BATCHES); contenders.len()];
    // The first batch warms up.
    for batch in 0..=BATCHES {
        for (contender, times) in contenders.iter_mut().zip(&mut times) {
            let start = Instant::now();
            contender(calls);
            if batch > 0 {
                times.push(start.elapsed().as_secs_f64() * 1e9 / calls as f64);
            }
        }
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[BATCHES / 2]
    };
    times.into_iter().map(median).collect()
}

fn title(what: &str, columns: &[&str]) {
    print!("\n{what:<26}");
    columns.iter().for_each(|column| print!("{column:>12}"));
    println!();
}

fn row(name: &str, n: u64, nanoseconds: &[f64]) {
    print!("{:<26}", format!("{name} {n}"));
    nanoseconds.iter().for_each(|ns| print!("{ns:>12.1}"));
    println!();
}

fn lookup() {
    title("lookup, ns", &["ours", "iset", "coitrees"]);
    for (name, make) in [("miss among", apart as fn(u64) -> _), ("3 hits among", heaped)] {
        for n in SIZES {
            let (ranges, probes) = make(n);
            let probes = &probes;
            let probe = || {
                let mut next = (0..PROBES).cycle();
                move || black_box(probes[next.next().expect("endless")])
            };
            let (index, map, tree) = (ours(&ranges), rb_tree(&ranges), static_tree(&ranges));
            let (mut a, mut b, mut c) = (probe(), probe(), probe());
            let contenders = vec![
                repeat(|| index.overlaps(a()).fold(0u32, |sum, (_, _, &id)| sum ^ id)),
                repeat(|| {
                    let range = b();
                    map.values(range.start()..range.end()).fold(0u32, |sum, &id| sum ^ id)
                }),
                repeat(|| {
                    let page = (c().start() / PAGE_SIZE) as i32;
                    let mut sum = 0u32;
                    tree.query(page, page, |i| sum ^= i.metadata);
                    sum
                }),
            ];
            row(name, n, &medians(contenders, CALLS));
        }
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

/// A start and an end over each range in turn.
fn sections<'a>(
    cx: &'a mut MaySleep<'_>,
    mm: &'a NotifierSubscriptions,
    ranges: &'a [Range],
) -> Contender<'a> {
    let mut next = ranges.iter().cycle();
    repeat(move || {
        let inv = Invalidation::new(black_box(*next.next().expect("endless")), Event::Unmap);
        mm.invalidate_range_start(cx, inv).invalidate_range_end(cx);
    })
}

fn section(cx: &mut MaySleep<'_>) {
    let silent = Arc::new(Silent);
    title("section, ns", &["registry"]);
    for n in SIZES {
        let (ranges, probes) = apart(n);
        let mm = NotifierSubscriptions::new(Rules::default());
        let held: Vec<_> = ranges.iter().map(|&r| mm.insert_interval(cx, r, silent.clone())).collect();
        row("no overlap among", n, &medians(vec![sections(cx, &mm, &probes)], CALLS));
        drop(held);
    }
    title("dispatch, ns", &["registry"]);
    for k in [0, 1, 8, 64] {
        let mm = NotifierSubscriptions::new(Rules::default());
        let there = (0..k).map(|_| pages(10, 1));
        let elsewhere = (k..1_000).map(|i| pages(100 + i, 1));
        let held: Vec<_> =
            there.chain(elsewhere).map(|r| mm.insert_interval(cx, r, silent.clone())).collect();
        row("overlaps", k, &medians(vec![sections(cx, &mm, &[pages(10, 1)])], CALLS / 4));
        drop(held);
    }
}

fn update(cx: &mut MaySleep<'_>) {
    const AMONG: u64 = 100_000;
    let (ranges, probes) = apart(AMONG);
    let silent = Arc::new(Silent);
    let (mut index, mut map) = (ours(&ranges), rb_tree(&ranges));
    let mm = NotifierSubscriptions::new(Rules::default());
    let held: Vec<_> = ranges.iter().map(|&r| mm.insert_interval(cx, r, silent.clone())).collect();
    let [mut a, mut b, mut c] = [(); 3].map(|()| probes.iter().cycle());
    let contenders = vec![
        repeat(|| {
            let key = index.insert(*a.next().expect("endless"), 0);
            index.remove(key)
        }),
        repeat(|| {
            let range = *b.next().expect("endless");
            map.force_insert(range.start()..range.end(), 0);
            map.remove(range.start()..range.end())
        }),
        repeat(|| mm.insert_interval(cx, *c.next().expect("endless"), silent.clone()).map(|i| i.remove(cx))),
    ];
    title("insert and remove, ns", &["ours", "iset", "a notifier"]);
    row("among", AMONG, &medians(contenders, CALLS));
    drop(held);
}

fn main() {
    lookup();
    MaySleep::enter(|cx| {
        section(cx);
        update(cx);
    });
}
