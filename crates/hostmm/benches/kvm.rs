// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the kvm source costs: `cargo bench -p hostmm --bench kvm`; `-- check` for the synchronous check alone.
//!
//! Ratios, not times, because machines are noisy: in each round every variant runs once, right after one another, and is
//! compared with the unwatched one of the same round. What other programs do to a run only ever adds to it, so a run
//! counts as its fastest tenth. Printed are the medians over the rounds.

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
    Source { _subs: Vec<Subscription>, _source: KvmSource },
}

type Variant = (&'static str, fn(Range) -> Option<Listener>);

fn source(range: Range, options: &Options, subscribers: usize) -> Option<Listener> {
    let source = KvmSource::open(options).ok()?;
    let subscribe = |_| source.subscribe(range, |_| ()).ok();
    let subs = (0..subscribers).map(subscribe).collect::<Option<Vec<_>>>()?;
    Some(Listener::Source { _subs: subs, _source: source })
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

struct Memory(*mut u8, usize);

impl Memory {
    fn new(len: usize) -> Memory {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh mapping.
        let p = unsafe { libc::mmap(std::ptr::null_mut(), len, 3, flags, -1, 0) };
        assert_ne!(p, libc::MAP_FAILED);
        Memory(p.cast(), len)
    }

    fn touch(&self) {
        for at in (0..self.1).step_by(4096) {
            // SAFETY: inside the mapping.
            unsafe { self.0.add(at).write_volatile(1) };
        }
    }

    fn dontneed(&self) {
        // SAFETY: our mapping, which holds nothing that matters.
        unsafe { libc::madvise(self.0.cast(), self.1, libc::MADV_DONTNEED) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: our mapping.
        unsafe { libc::munmap(self.0.cast(), self.1) };
    }
}

/// Seconds per call of `op`: the first decile of slices of a few calls.
fn batch(mut op: impl FnMut()) -> f64 {
    // Opening and closing a VM leaves the kernel work to do in the background.
    let warm = Instant::now();
    while warm.elapsed() < Duration::from_millis(3) {
        op();
    }
    let (start, mut slices, mut calls) = (Instant::now(), Vec::new(), 1u32);
    while start.elapsed() < BATCH || slices.len() < 2 {
        let slice = Instant::now();
        for _ in 0..calls {
            op();
        }
        slices.push(slice.elapsed().as_secs_f64() / f64::from(calls));
        // Slices of some 50 us: long beside the clock, short beside a time slice.
        if slices.len() == 1 {
            calls = (50e-6 / slices[0]).clamp(1.0, 64.0) as u32;
        }
    }
    slices.sort_by(f64::total_cmp);
    slices[slices.len() / 10]
}

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

fn time(seconds: f64) -> String {
    if seconds < 1e-3 { format!("{:.2} us", seconds * 1e6) } else { format!("{:.2} ms", seconds * 1e3) }
}

fn watched(name: &str, len: usize, op: impl Fn(&Memory)) {
    let memory = Memory::new(len);
    let range = Range::new(memory.0 as u64, len as u64).unwrap();
    let mut times: Vec<Vec<f64>> = vec![Vec::new(); VARIANTS.len()];
    for _ in 0..ROUNDS {
        for ((_, listen), times) in VARIANTS.iter().zip(&mut times) {
            if let Some(listener) = listen(range) {
                times.push(batch(|| op(&memory)));
                drop(listener);
            }
        }
    }
    println!("\n{name}, {} KiB", len / 1024);
    for ((variant, _), mine) in VARIANTS.iter().zip(&times) {
        if mine.len() < ROUNDS {
            println!("  {variant:<36} not available here");
            continue;
        }
        let ratios = mine.iter().zip(&times[0]).map(|(a, b)| a / b).collect();
        println!("  {variant:<36} {:>10}  {:.2}x", time(median(mine.clone())), median(ratios));
    }
}

fn per_call(name: &str, mut f: impl FnMut() -> bool) {
    const N: u32 = 20_000_000;
    let once = |f: &mut dyn FnMut()| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64() * 1e9 / f64::from(N)
    };
    let ns = (0..9).map(|_| {
        once(&mut || {
            for _ in 0..N {
                black_box(f());
            }
        })
    });
    println!("  {name:<36} {:.2} ns", ns.fold(f64::MAX, f64::min));
}

fn check() {
    println!("the check, nothing happening");
    let memory = Memory::new(1 << 20);
    let range = Range::new(memory.0 as u64, 1 << 20).unwrap();
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
        let other = Memory::new(1 << 21);
        other.touch();
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
    for len in [4096, 2 << 20, 64 << 20] {
        watched("touch + MADV_DONTNEED", len, |m| {
            m.touch();
            m.dontneed();
        });
        watched("mmap + touch + munmap", len, |m| {
            let fresh = Memory::new(m.1);
            fresh.touch();
        });
    }
}
