// SPDX-License-Identifier: MIT OR Apache-2.0
//! An execution that fails is unwound, wherever its threads are and whatever their destructors do: the process goes
//! on, and so does the exploration, on the same OS thread.
//!
//! Random programs hold every kind of guard at every kind of scheduling point, in nested scopes, with values whose
//! destructors use the facade again, and fail by panics, violations and deadlocks. `UNWIND_FUZZ=n` sets how many.
#![expect(clippy::disallowed_types, reason = "what is counted is not the program's")]

use std::sync::atomic::{AtomicU64 as Count, Ordering::Relaxed};
use std::time::Duration;

use interleave::explore::{self, Config, FailureKind, Ghost, Strategy, explore, replay};
use interleave::{
    AtomicU32, LockClass, LockMap, MaySleep, Mutex, OnceCell, Ordering, PerThread, RwLock, Semaphore,
    SpinLock, WaitQueue, WriteGuard, preempt_disable, scope, spawn, time, yield_now,
};

const SC: Ordering = Ordering::SeqCst;

static OUTER: LockClass = LockClass::new("outer");
static INNER: LockClass = LockClass::new("inner");
static LAST: LockClass = LockClass::new("last");
static QUEUE: LockClass = LockClass::new("queue");
static MAP: LockMap = LockMap::new(&QUEUE);
static STORAGE: PerThread<std::cell::Cell<u32>> = PerThread::new(|| std::cell::Cell::new(0));

static DROPPED: Count = Count::new(0);
static DROPPED_BY_PANIC: Count = Count::new(0);

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

struct Shared {
    mutex: Mutex<u32>,
    spin: SpinLock<u32>,
    rw: RwLock<u32>,
    semaphore: Semaphore,
    queue: WaitQueue,
    once: OnceCell<u32>,
    atomic: AtomicU32,
    ghost: Ghost<u32>,
    /// Taken by destructors only, under any other.
    last: Mutex<u32>,
}

impl Shared {
    fn new() -> Shared {
        Shared {
            mutex: Mutex::new(&OUTER, 0),
            spin: SpinLock::new(&INNER, 0),
            rw: RwLock::new(&OUTER, 0),
            semaphore: Semaphore::new(&QUEUE, 1),
            queue: WaitQueue::new(&QUEUE),
            once: OnceCell::new(),
            atomic: AtomicU32::new(0),
            ghost: Ghost::new(0),
            last: Mutex::new(&LAST, 0),
        }
    }
}

/// Uses the facade when dropped, also while it unwinds.
struct Noisy<'s>(&'s Shared, u64);

impl Drop for Noisy<'_> {
    fn drop(&mut self) {
        let s = self.0;
        DROPPED.fetch_add(1, Relaxed);
        DROPPED_BY_PANIC.fetch_add(u64::from(std::thread::panicking()), Relaxed);
        match self.1 % 12 {
            0 => s.atomic.store(1, SC),
            1 => s.queue.wake_all(),
            2 => s.semaphore.up(),
            3 => yield_now(),
            4 => s.ghost.update(|g| *g += 1),
            5 => STORAGE.with(|n| n.set(n.get() + 1)),
            6 => explore::note(|| "dropped".to_owned()),
            7 => explore::violation(|| "dropped".to_owned()),
            8 => {
                let _ = s.once.get();
            }
            9 => {
                let _new = (Mutex::new(&INNER, 0), AtomicU32::new(0).load(SC), WaitQueue::new(&QUEUE));
            }
            _ => {
                let _ = MaySleep::try_enter(|cx| *s.last.lock(cx) += 1);
            }
        }
    }
}

/// Some operations, with guards held over the rest.
fn run(s: &Shared, rng: &mut Rng, depth: u64, cx: &mut MaySleep<'_>) {
    let _noisy = (rng.below(3) == 0).then(|| Noisy(s, rng.below(12)));
    if depth == 0 {
        return;
    }
    match rng.below(22) {
        0 => {
            let mut guard = s.mutex.lock(cx);
            *guard += 1;
            run(s, rng, depth - 1, cx);
        }
        1 => {
            let _guard = s.rw.read(cx);
            run(s, rng, depth - 1, cx);
        }
        2 => {
            let guard = s.rw.write(cx);
            run(s, rng, depth - 1, cx);
            let _read = WriteGuard::downgrade(guard);
            run(s, rng, depth - 1, cx);
        }
        3 => {
            let mut guard = s.spin.lock(cx);
            let (data, atomic) = guard.split();
            *data += 1;
            let _noisy = Noisy(s, rng.below(12));
            preempt_disable(atomic, |_| s.atomic.fetch_add(1, SC));
        }
        4 => {
            if let Some(_guard) = s.mutex.try_lock(cx) {
                run(s, rng, depth - 1, cx);
            }
        }
        5 => {
            let _read = s.rw.try_read(cx);
            run(s, rng, depth - 1, cx);
        }
        6 => {
            let _write = s.rw.try_write(cx);
            run(s, rng, depth - 1, cx);
        }
        7 => {
            s.semaphore.down(cx);
            let _noisy = Noisy(s, 2);
            run(s, rng, depth - 1, cx);
        }
        8 => s.queue.wait_event(cx, || s.atomic.load(SC) > 0),
        9 => {
            let guard = s.mutex.lock(cx);
            drop(s.queue.wait(cx, guard));
        }
        10 => {
            let guard = s.mutex.lock(cx);
            let (_guard, _) = s.queue.wait_timeout(cx, guard, Duration::from_millis(1));
            run(s, rng, depth - 1, cx);
        }
        11 => {
            let made = s.once.get_or_init(cx, |cx| {
                run(s, rng, depth - 1, cx);
                7
            });
            assert_eq!(*made, 7);
        }
        12 => {
            let seeds = [rng.below(u64::MAX), rng.below(u64::MAX)];
            let _noisy = Noisy(s, rng.below(12));
            scope(cx, |scope, cx| {
                for seed in seeds {
                    scope.spawn("inner", move |cx| run(s, &mut Rng(seed), depth - 1, cx));
                }
                run(s, rng, depth - 1, cx);
            });
        }
        13 => {
            let seed = rng.below(u64::MAX);
            scope(cx, |scope, cx| {
                let handle = scope.spawn("joined", move |cx| run(s, &mut Rng(seed), depth - 1, cx));
                let _told = handle.join(cx);
            });
        }
        14 => {
            let _map = MAP.acquire(cx);
            run(s, rng, depth - 1, cx);
        }
        15 => time::sleep(cx, Duration::from_millis(rng.below(3))),
        16 => {
            let n = s.atomic.fetch_add(1, SC);
            assert!(n < 2, "too many");
        }
        17 => explore::violation(|| "now".to_owned()),
        18 => panic!("a panic of the program's own"),
        19 => cx.non_block(|_| drop(Noisy(s, rng.below(12)))),
        20 => drop(spawn("free", |cx| time::sleep(cx, Duration::from_millis(1)))),
        _ => {
            s.ghost.update(|g| *g += 1);
            run(s, rng, depth - 1, cx);
        }
    }
    if rng.below(2) == 0 {
        run(s, rng, depth - 1, cx);
    }
}

fn scenario(seed: u64, cx: &mut MaySleep<'_>) {
    let shared = &Shared::new();
    scope(cx, |s, _| {
        for n in 0..3 {
            s.spawn(&format!("t{n}"), move |cx| run(shared, &mut Rng(seed * 3 + n), 3, cx));
        }
    });
}

#[test]
fn whatever_fails_wherever_the_others_are_the_process_goes_on() {
    let programs = std::env::var("UNWIND_FUZZ").ok().and_then(|n| n.parse().ok());
    let programs = programs.unwrap_or(if cfg!(debug_assertions) { 300 } else { 3_000 });
    let first = std::env::var("UNWIND_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    let mut kinds = std::collections::BTreeMap::new();
    for seed in first..first + programs {
        let strategies =
            [Strategy::Random { seed, executions: 20 }, Strategy::Preemptions(1), Strategy::Dpor];
        for strategy in strategies {
            let config = Config::new(strategy)
                .failures(if seed % 2 == 0 { 1 } else { 4 })
                .lockdep(seed % 2 == 0)
                .max_executions(20)
                .max_steps(2_000)
                .minimise(20);
            let report = explore(&config, |cx| scenario(seed, cx));
            for failure in &report.failures {
                *kinds.entry(format!("{}", failure.kind)).or_insert(0) += 1;
                assert_ne!(failure.kind, FailureKind::Nondeterminism, "seed {seed}, {strategy:?}: {failure}");
                if failure.kind == FailureKind::LockOrder {
                    // It may take two executions to contradict each other.
                    continue;
                }
                let again = replay(&config, &failure.replay, |cx| scenario(seed, cx)).expect("readable");
                let kind = again.failure.as_ref().map(|failure| failure.kind);
                assert_eq!(kind, Some(failure.kind), "seed {seed}, {strategy:?}: {failure}\n{again:?}");
            }
        }
        assert!(!std::thread::panicking(), "seed {seed}: a panic was left behind");
    }
    let all = ["panic", "violation", "deadlock"].iter().all(|kind| kinds.contains_key(*kind));
    assert!(all && DROPPED_BY_PANIC.load(Relaxed) > 0, "{kinds:?}");
    // What ran before leaves nothing behind: a program without a fault has none.
    explore(&Config::default(), |cx| {
        let n = Mutex::new(&OUTER, 0);
        scope(cx, |s, _| {
            s.spawn("a", |cx| *n.lock(cx) += 1);
            s.spawn("b", |cx| *n.lock(cx) += 1);
        });
        assert_eq!(n.into_inner(), 2);
    })
    .assert_ok();
    assert!(interleave::lockdep::held().is_empty());
}
