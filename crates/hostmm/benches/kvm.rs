// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the kvm source costs: `cargo bench -p hostmm --bench kvm`; `-- check` for the synchronous check alone.
//!
//! The call alone is timed, on memory that is present, many calls between two looks at the clock. Ratios matter, not
//! times, because machines are noisy: in each round every variant runs once, right after one another, and is compared
//! with the unwatched one of the same round. What other programs do to a run only ever adds to it, so a run counts as
//! its fastest tenth. Printed are the medians over the rounds.

use hostmm::kvm::{Buckets, KvmSource, Options, Prefer, Subscription};
use mmu_notifier::Range;
use std::hint::black_box;
use std::time::{Duration, Instant};

const ROUNDS: usize = 9;
const BATCH: Duration = Duration::from_millis(20);

/// What listens while a batch runs.
enum Listener {
    Nobody,
    Vm { _vm: Option<kvm_ioctls::VmFd> },
    Source { _subs: Vec<Subscription>, _source: Box<KvmSource> },
}

type Variant = (&'static str, fn(Range) -> Option<Listener>);

fn source(range: Range, options: &Options, subscribers: usize) -> Option<Listener> {
    let source = KvmSource::open(options).ok()?;
    let subscribe = |_| source.subscribe(range, |_| ()).ok();
    let subs = (0..subscribers).map(subscribe).collect::<Option<Vec<_>>>()?;
    Some(Listener::Source { _subs: subs, _source: Box::new(source) })
}

fn options(prefer: Prefer, buckets: bool, ring: bool) -> Options {
    let buckets = buckets.then(Buckets::default);
    Options { prefer, buckets, ring: ring.then_some(1 << 20), ..Options::default() }
}

const VARIANTS: &[Variant] = &[
    ("unwatched", |_| Some(Listener::Nobody)),
    ("VM, no program", |_| Some(Listener::Vm { _vm: Some(kvm_ioctls::Kvm::new().ok()?.create_vm().ok()?) })),
    ("counters", |r| source(r, &options(Prefer::Bpf, false, false), 0)),
    ("counters, window elsewhere", |r| {
        let far = Range::new(r.start() ^ (1 << 40), 4096).ok()?;
        source(r, &Options { window: Some(far), ..options(Prefer::Bpf, false, false) }, 0)
    }),
    ("+ buckets", |r| source(r, &options(Prefer::Bpf, true, false), 0)),
    ("+ ring, monitor, 0 subscribers", |r| source(r, &options(Prefer::Bpf, true, true), 0)),
    ("+ ring, monitor, 1 subscriber", |r| source(r, &options(Prefer::Bpf, true, true), 1)),
    ("+ ring, monitor, 64 subscribers", |r| source(r, &options(Prefer::Bpf, true, true), 64)),
    ("perf rings", |r| source(r, &options(Prefer::PerfRing, false, false), 0)),
    ("perf rings, monitor, 1 subscriber", |r| source(r, &options(Prefer::PerfRing, false, true), 1)),
];

const PAGE: usize = 4096;

/// Pieces of `len` bytes with a page between them that keeps the mappings apart.
struct Memory {
    base: *mut u8,
    len: usize,
    pieces: usize,
}

impl Memory {
    fn new(len: usize, pieces: usize) -> Memory {
        let memory = Memory { base: map(None, (len + PAGE) * pieces, libc::PROT_NONE), len, pieces };
        (0..pieces).for_each(|n| memory.map_again(n));
        memory
    }

    fn piece(&self, n: usize) -> *mut u8 {
        self.base.wrapping_add(n * (self.len + PAGE))
    }

    fn range(&self) -> Range {
        Range::new(self.base as u64, ((self.len + PAGE) * self.pieces) as u64).expect("mapped")
    }

    fn map_again(&self, n: usize) {
        map(Some(self.piece(n)), self.len, libc::PROT_READ | libc::PROT_WRITE);
    }

    fn touch(&self, n: usize) {
        for at in (0..self.len).step_by(PAGE) {
            // SAFETY: inside the piece.
            unsafe { self.piece(n).add(at).write_volatile(1) };
        }
    }

    fn dontneed(&self, n: usize) {
        // SAFETY: our mapping, which holds nothing that matters.
        unsafe { libc::madvise(self.piece(n).cast(), self.len, libc::MADV_DONTNEED) };
    }

    fn unmap(&self, n: usize) {
        // SAFETY: our mapping, to which nothing refers; nobody but `map_again` maps here.
        unsafe { libc::munmap(self.piece(n).cast(), self.len) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: our mappings.
        unsafe { libc::munmap(self.base.cast(), (self.len + PAGE) * self.pieces) };
    }
}

fn map(at: Option<*mut u8>, len: usize, prot: i32) -> *mut u8 {
    let fixed = if at.is_some() { libc::MAP_FIXED } else { 0 };
    let at = at.unwrap_or(std::ptr::null_mut()).cast();
    // SAFETY: a fresh mapping, or one over a piece of our own.
    let p = unsafe { libc::mmap(at, len, prot, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed, -1, 0) };
    assert_ne!(p, libc::MAP_FAILED);
    p.cast()
}

/// What is timed, on one piece of memory that is mapped and present; and what makes it so again, untimed.
#[derive(Clone, Copy)]
struct Op {
    name: &'static str,
    run: fn(&Memory, usize),
    again: fn(&Memory, usize),
}

const OPS: [Op; 2] = [
    Op { name: "munmap", run: Memory::unmap, again: Memory::map_again },
    Op { name: "MADV_DONTNEED", run: Memory::dontneed, again: |_, _| () },
];

/// Seconds per call: the first decile of rounds over all pieces.
fn batch(memory: &Memory, op: Op) -> f64 {
    let round = || {
        (0..memory.pieces).for_each(|n| {
            (op.again)(memory, n);
            memory.touch(n);
        });
        let start = Instant::now();
        (0..memory.pieces).for_each(|n| (op.run)(memory, n));
        start.elapsed().as_secs_f64() / memory.pieces as f64
    };
    // Opening and closing a VM leaves the kernel work to do in the background.
    let warm = Instant::now();
    while warm.elapsed() < Duration::from_millis(3) {
        round();
    }
    let (start, mut rounds) = (Instant::now(), Vec::new());
    while start.elapsed() < BATCH || rounds.len() < 3 {
        rounds.push(round());
    }
    rounds.sort_by(f64::total_cmp);
    // Ready for whoever comes next.
    (0..memory.pieces).for_each(|n| (op.again)(memory, n));
    rounds[rounds.len() / 10]
}

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

fn time(seconds: f64) -> String {
    if seconds < 1e-3 { format!("{:.2} us", seconds * 1e6) } else { format!("{:.2} ms", seconds * 1e3) }
}

/// The median time and the median ratio to the unwatched one, for each variant.
fn watched(len: usize, pieces: usize, op: Op) -> Vec<Option<(f64, f64)>> {
    let memory = Memory::new(len, pieces);
    let mut times: Vec<Vec<f64>> = vec![Vec::new(); VARIANTS.len()];
    for _ in 0..ROUNDS {
        for ((_, listen), times) in VARIANTS.iter().zip(&mut times) {
            if let Some(listener) = listen(memory.range()) {
                times.push(batch(&memory, op));
                drop(listener);
            }
        }
    }
    let of = |mine: &Vec<f64>| {
        let ratios = mine.iter().zip(&times[0]).map(|(a, b)| a / b).collect();
        (mine.len() == ROUNDS).then(|| (median(mine.clone()), median(ratios)))
    };
    times.iter().map(of).collect()
}

fn table(op: Op) {
    const SIZES: [(&str, usize, usize); 3] =
        [("4 KiB", PAGE, 64), ("2 MiB", 2 << 20, 2), ("64 MiB", 64 << 20, 1)];
    let columns = SIZES.map(|(_, len, pieces)| watched(len, pieces, op));
    print!("\n{:<36}", op.name);
    SIZES.iter().for_each(|(size, ..)| print!("{size:>12}{:>7}", ""));
    println!();
    for (n, (variant, _)) in VARIANTS.iter().enumerate() {
        print!("  {variant:<34}");
        for column in &columns {
            match column[n] {
                Some((seconds, ratio)) => print!("{:>12}{:>7}", time(seconds), format!("{ratio:.2}x")),
                None => print!("{:>19}", "not here"),
            }
        }
        println!();
    }
}

fn per_call(name: &str, mut f: impl FnMut() -> bool) {
    // Batches far shorter than a time slice, so that most of them are not interrupted.
    const N: u32 = 200_000;
    let once = |f: &mut dyn FnMut()| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64() * 1e9 / f64::from(N)
    };
    let ns = (0..201).map(|_| {
        once(&mut || {
            for _ in 0..N {
                black_box(f());
            }
        })
    });
    println!("  {name:<34}{:>9.2} ns", median(ns.collect()));
}

fn check() {
    println!("the check, nothing happening");
    let memory = Memory::new(1 << 20, 1);
    let range = memory.range();
    let word = Box::new(0u64);
    // SAFETY: a volatile read of a live box: the floor of any check.
    per_call("one load of an ordinary word", || unsafe { (&raw const *word).read_volatile() } == 1);
    for (name, prefer) in
        [("changed_since, BPF", Prefer::Bpf), ("changed_since, perf rings", Prefer::PerfRing)]
    {
        let Ok(source) = KvmSource::open(&options(prefer, true, false)) else { continue };
        let watch = source.watch(range).unwrap();
        let mut seq = watch.snapshot().unwrap();
        seq = black_box(seq);
        per_call(name, || watch.changed_since(seq));
        // Something elsewhere happened, and the global counter stays moved.
        let other = Memory::new(1 << 21, 1);
        other.touch(0);
        seq = watch.snapshot().unwrap();
        drop(other);
        if !watch.changed_since(seq) {
            per_call("  the same after a change elsewhere", || watch.changed_since(black_box(seq)));
        }
        per_call("  snapshot", || watch.snapshot().is_ok());
    }
}

fn main() {
    check();
    if std::env::args().any(|arg| arg == "check") {
        return;
    }
    OPS.into_iter().for_each(table);
}
