// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a lock costs beside parking_lot's own, in nanoseconds for one round trip: `cargo bench -p interleave`.
//!
//! The table interleaves the samples of all rows and prints medians, because a busy machine drifts by more than the
//! differences asked for. The same loops follow under criterion (`cargo bench -p interleave -- --criterion`).
#![expect(clippy::disallowed_types, reason = "the things compared with")]

use std::cell::Cell;
use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::Criterion;
use interleave::{AtomicU64, LockClass, MaySleep, Mutex, Ordering, RwLock, SpinLock};
use parking_lot::lock_api::{RawMutex as _, RawRwLock as _};

static FIRST: LockClass = LockClass::new("bench-first");
static SECOND: LockClass = LockClass::new("bench-second");
static THIRD: LockClass = LockClass::new("bench-third");

/// The switch alone, as src/world.rs has it.
trait World {
    fn point(&self);
}

thread_local! {
    static SWITCH: Cell<Option<&'static dyn World>> = const { Cell::new(None) };
}

type Loop<'a> = Box<dyn FnMut(u64) -> Duration + 'a>;

fn timed<'a>(mut body: impl FnMut() + 'a) -> Loop<'a> {
    Box::new(move |rounds| {
        let start = Instant::now();
        for _ in 0..rounds {
            body();
        }
        start.elapsed()
    })
}

/// Makes the value needed.
fn keep(value: u64) {
    black_box(value);
}

fn loops() -> Vec<(&'static str, Loop<'static>)> {
    fn leak<T>(value: T) -> &'static T {
        Box::leak(Box::new(value))
    }
    /// Contexts are lent for a call, and here the call is the loop.
    fn with_cx(mut body: impl FnMut(&mut MaySleep<'_>) + 'static) -> Loop<'static> {
        Box::new(move |rounds| {
            MaySleep::enter(|cx| {
                let start = Instant::now();
                for _ in 0..rounds {
                    body(cx);
                }
                start.elapsed()
            })
        })
    }

    let (raw_a, raw_b, raw_rw) = (
        leak(parking_lot::RawMutex::INIT),
        leak(parking_lot::RawMutex::INIT),
        leak(parking_lot::RawRwLock::INIT),
    );
    let (mutex, second, third) =
        (leak(Mutex::new(&FIRST, 0u64)), leak(Mutex::new(&SECOND, 0u64)), leak(SpinLock::new(&THIRD, 0u64)));
    let (rw, spin) = (leak(RwLock::new(&FIRST, 0u64)), leak(SpinLock::new(&FIRST, 0u64)));
    let (std_atomic, atomic) = (leak(std::sync::atomic::AtomicU64::new(1)), leak(AtomicU64::new(1)));

    let raw_round = move |lock: &'static parking_lot::RawMutex| {
        black_box(lock).lock();
        // SAFETY: locked on the line above, by this thread.
        unsafe { black_box(lock).unlock() };
    };
    vec![
        ("raw parking_lot mutex", timed(move || raw_round(raw_a))),
        (
            "  the same behind a const thread-local",
            timed(move || match SWITCH.get() {
                None => raw_round(raw_a),
                Some(world) => world.point(),
            }),
        ),
        ("Mutex", with_cx(move |cx| drop(black_box(mutex).lock(cx)))),
        ("SpinLock", with_cx(move |cx| drop(black_box(spin).lock(cx)))),
        (
            "raw parking_lot rwlock, read",
            timed(move || {
                black_box(raw_rw).lock_shared();
                // SAFETY: locked on the line above, by this thread.
                unsafe { black_box(raw_rw).unlock_shared() };
            }),
        ),
        ("RwLock, read", with_cx(move |cx| drop(black_box(rw).read(cx)))),
        (
            "raw parking_lot rwlock, write",
            timed(move || {
                black_box(raw_rw).lock_exclusive();
                // SAFETY: locked on the line above, by this thread.
                unsafe { black_box(raw_rw).unlock_exclusive() };
            }),
        ),
        ("RwLock, write", with_cx(move |cx| drop(black_box(rw).write(cx)))),
        (
            "two raw parking_lot mutexes, nested",
            timed(move || {
                black_box(raw_a).lock();
                raw_round(raw_b);
                // SAFETY: locked two lines above, by this thread.
                unsafe { black_box(raw_a).unlock() };
            }),
        ),
        (
            "two Mutexes, nested",
            with_cx(move |cx| {
                let _outer = black_box(mutex).lock(cx);
                drop(black_box(second).lock(cx));
            }),
        ),
        (
            "two Mutexes and a SpinLock, nested",
            with_cx(move |cx| {
                let _outer = black_box(mutex).lock(cx);
                let _inner = black_box(second).lock(cx);
                drop(black_box(third).lock(cx));
            }),
        ),
        ("std atomic, load", timed(move || keep(black_box(std_atomic).load(Ordering::Acquire)))),
        ("AtomicU64, load", timed(move || keep(black_box(atomic).load(Ordering::Acquire)))),
        ("std atomic, fetch_add", timed(move || keep(black_box(std_atomic).fetch_add(1, Ordering::Relaxed)))),
        ("AtomicU64, fetch_add", timed(move || keep(black_box(atomic).fetch_add(1, Ordering::Relaxed)))),
        ("SpinLock::new", timed(move || keep(black_box(SpinLock::new(&FIRST, 0u64)).into_inner()))),
    ]
}

#[expect(clippy::print_stdout, reason = "the table is the output")]
fn table() {
    const SAMPLES: usize = 400;
    const ROUNDS: u64 = 5_000;
    let mut loops = loops();
    let mut samples = vec![Vec::with_capacity(SAMPLES); loops.len()];
    for _ in 0..SAMPLES {
        for ((_, body), samples) in loops.iter_mut().zip(&mut samples) {
            samples.push(body(ROUNDS).as_secs_f64() * 1e9 / ROUNDS as f64);
        }
    }
    println!("{:<40} {:>9} {:>9}", "one round trip, uncontended", "median ns", "best ns");
    for ((name, _), samples) in loops.iter().zip(&mut samples) {
        samples.sort_by(f64::total_cmp);
        println!("{name:<40} {:>9.2} {:>9.2}", samples[SAMPLES / 2], samples[0]);
    }
}

fn main() {
    if !std::env::args().any(|arg| arg == "--criterion") {
        return table();
    }
    let mut criterion = Criterion::default();
    for (name, mut body) in loops() {
        criterion.bench_function(name.trim(), |b| b.iter_custom(&mut body));
    }
}
