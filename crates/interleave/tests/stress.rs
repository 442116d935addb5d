// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every primitive under real threads that contend. A test that hangs is killed by [`deadline`].

use std::collections::VecDeque;
use std::time::Duration;

use interleave::lockdep::{Policy, reports_about, with_policy};
use interleave::{
    AtomicBool, AtomicU64, AtomicUsize, LockClass, LockMap, MaySleep, Mutex, OnceCell, Ordering, PerThread,
    RefCount, RwLock, Semaphore, SpinLock, WaitQueue, WriteGuard, scope, spawn, time, try_spawn, yield_now,
};

const THREADS: usize = 4;
const ROUNDS: usize = 20_000;

/// Aborts the process if `f` takes ten minutes: a lost wake-up must not hang whoever runs the tests.
fn deadline<R>(f: impl FnOnce(&mut MaySleep<'_>) -> R) -> R {
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::Builder::new().spawn(move || {
        if wait.recv_timeout(Duration::from_secs(600)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            std::process::abort();
        }
    });
    let result = with_policy(Policy::Panic, || MaySleep::enter(f));
    drop(done);
    watchdog.expect("a thread").join().expect("it does not panic");
    result
}

/// Runs `f` in `THREADS` threads at once.
fn threads(cx: &mut MaySleep<'_>, f: impl Fn(usize, &mut MaySleep<'_>) + Sync) {
    let f = &f;
    scope(cx, |s, cx| {
        let all: Vec<_> = (0..THREADS).map(|i| s.spawn(&format!("stress-{i}"), move |cx| f(i, cx))).collect();
        for thread in all {
            thread.join(cx).expect("it does not panic");
        }
    });
}

#[test]
fn mutex_and_spin_lock_exclude() {
    static OUTER: LockClass = LockClass::new("stress-mutex");
    static INNER: LockClass = LockClass::new("stress-spin");
    // Two words that must agree whenever the lock is free.
    let mutex = Mutex::new(&OUTER, (0u64, 0u64));
    let spin = SpinLock::new(&INNER, (0u64, 0u64));
    let tried = AtomicU64::new(0);
    deadline(|cx| {
        threads(cx, |i, cx| {
            for round in 0..ROUNDS {
                if (round + i) % 3 == 0 {
                    if let Some(mut guard) = mutex.try_lock(cx) {
                        assert_eq!(guard.0, guard.1);
                        guard.0 += 1;
                        guard.1 += 1;
                        tried.fetch_add(1, Ordering::Relaxed);
                    }
                    continue;
                }
                let mut outer = mutex.lock(cx);
                assert_eq!(outer.0, outer.1);
                outer.0 += 1;
                let mut inner = spin.lock(cx);
                let (inner, _atomic) = inner.split();
                assert_eq!(inner.0, inner.1);
                inner.0 += 1;
                inner.1 += 1;
                outer.1 += 1;
            }
        });
    });
    let locked = (0..THREADS).map(|i| (0..ROUNDS).filter(|r| (r + i) % 3 != 0).count() as u64).sum::<u64>();
    assert_eq!(spin.into_inner().0, locked);
    assert_eq!(mutex.into_inner().0, locked + tried.into_inner());
    assert!(reports_about(&INNER).is_empty());
}

#[test]
fn rwlock_readers_see_whole_writes_and_downgrade_lets_no_writer_in() {
    static CLASS: LockClass = LockClass::new("stress-rw");
    let lock = RwLock::new(&CLASS, (0usize, 0usize));
    deadline(|cx| {
        threads(cx, |i, cx| {
            for round in 0..ROUNDS {
                if (round + i) % 4 == 0 {
                    let mut guard = lock.write(cx);
                    guard.0 += 1;
                    guard.1 += 1;
                    let mine = guard.0;
                    let guard = WriteGuard::downgrade(guard);
                    assert_eq!(*guard, (mine, mine));
                } else {
                    let guard = lock.read(cx);
                    assert_eq!(guard.0, guard.1);
                }
            }
        });
    });
    assert_eq!(lock.into_inner().0, THREADS * ROUNDS / 4);
}

#[test]
fn a_reader_queues_behind_a_waiting_writer() {
    static CLASS: LockClass = LockClass::new("stress-rw-queue");
    let lock = RwLock::new(&CLASS, ());
    deadline(|cx| {
        scope(cx, |s, cx| {
            let guard = lock.read(cx);
            let writer = s.spawn("writer", |cx| drop(lock.write(cx)));
            // Once the writer waits, reading by try fails although only a reader holds the lock.
            while lock.try_read(cx).is_some() {
                yield_now();
            }
            drop(guard);
            writer.join(cx).expect("it does not panic");
            assert!(lock.try_read(cx).is_some());
        });
    });
}

#[test]
fn a_semaphore_never_gives_more_than_it_has_and_forgets_nobody() {
    static CLASS: LockClass = LockClass::new("stress-sem");
    let semaphore = Semaphore::new(&CLASS, 2);
    let (inside, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    deadline(|cx| {
        threads(cx, |i, cx| {
            for round in 0..ROUNDS / 4 {
                if (round + i) % 5 == 0 {
                    if !semaphore.try_down(cx) {
                        continue;
                    }
                } else {
                    semaphore.down(cx);
                }
                let now = inside.fetch_add(1, Ordering::Relaxed) + 1;
                most.fetch_max(now, Ordering::Relaxed);
                yield_now();
                inside.fetch_sub(1, Ordering::Relaxed);
                semaphore.up();
            }
        });
        assert_eq!(most.load(Ordering::Relaxed), 2);
        assert!(semaphore.try_down(cx) && semaphore.try_down(cx) && !semaphore.try_down(cx));
    });
}

#[test]
fn a_wait_queue_loses_no_wake_up() {
    static QUEUE: LockClass = LockClass::new("stress-ping");
    // Two threads that hand a number to and fro: one wake lost is a hang.
    let (ping, pong) = (WaitQueue::new(&QUEUE), WaitQueue::new(&QUEUE));
    let turn = AtomicUsize::new(0);
    deadline(|cx| {
        scope(cx, |s, cx| {
            s.spawn("pong", |cx| {
                for round in 0..ROUNDS {
                    pong.wait_event(cx, || turn.load(Ordering::Relaxed) == 2 * round + 1);
                    turn.store(2 * round + 2, Ordering::Relaxed);
                    ping.wake_one();
                }
            });
            for round in 0..ROUNDS {
                turn.store(2 * round + 1, Ordering::Relaxed);
                pong.wake_one();
                ping.wait_event(cx, || turn.load(Ordering::Relaxed) == 2 * round + 2);
            }
        });
    });
}

#[test]
fn one_wake_for_each_item_is_enough_for_many_consumers() {
    static QUEUE: LockClass = LockClass::new("stress-items-wait");
    static ITEMS: LockClass = LockClass::new("stress-items");
    let (queue, items) = (WaitQueue::new(&QUEUE), SpinLock::new(&ITEMS, VecDeque::new()));
    let sum = AtomicU64::new(0);
    let each = ROUNDS as u64;
    deadline(|cx| {
        scope(cx, |s, cx| {
            for i in 0..THREADS {
                let (queue, items, sum) = (&queue, &items, &sum);
                s.spawn(&format!("consumer-{i}"), move |cx| {
                    for _ in 0..each {
                        let mut item = None;
                        queue.wait_event_with(cx, |atomic| {
                            item = items.lock(atomic).pop_front();
                            item.is_some()
                        });
                        sum.fetch_add(item.unwrap_or(0), Ordering::Relaxed);
                    }
                });
            }
            for n in 1..=each * THREADS as u64 {
                items.lock(cx).push_back(n);
                queue.wake_one();
            }
        });
    });
    let all = each * THREADS as u64;
    assert_eq!(sum.into_inner(), all * (all + 1) / 2);
}

#[test]
fn waiting_lets_the_lock_go_and_times_out() {
    static QUEUE: LockClass = LockClass::new("stress-cond-wait");
    static STATE: LockClass = LockClass::new("stress-cond");
    let (queue, state) = (WaitQueue::new(&QUEUE), Mutex::new(&STATE, 0));
    deadline(|cx| {
        let short = Duration::from_millis(5);
        let before = time::now();
        assert!(!queue.wait_event_timeout(cx, short, || false));
        let guard = state.lock(cx);
        let (guard, woken) = queue.wait_timeout(cx, guard, short);
        assert!(!woken);
        drop(guard);
        assert!(before.elapsed() >= 2 * short);
        assert!(queue.wait_event_timeout(cx, Duration::MAX, || true));
        scope(cx, |s, cx| {
            s.spawn("setter", |cx| {
                for _ in 0..1000 {
                    *state.lock(cx) += 1;
                    queue.wake_all();
                }
            });
            let mut guard = state.lock(cx);
            while *guard < 1000 {
                guard = queue.wait(cx, guard);
            }
        });
    });
}

#[test]
fn a_value_is_made_once_also_after_a_panic() {
    let (cell, made) = (OnceCell::new(), AtomicUsize::new(0));
    deadline(|cx| {
        threads(cx, |_, cx| {
            let value = cell.get_or_init(cx, |_| {
                yield_now();
                made.fetch_add(1, Ordering::Relaxed) + 1
            });
            assert_eq!(*value, 1);
        });
        let cell = OnceCell::new();
        let failed = scope(cx, |s, cx| {
            let thread = s.spawn("fails", |cx| *cell.get_or_init(cx, |_| -> i32 { panic!("on purpose") }));
            thread.join(cx)
        });
        assert_eq!(failed.expect_err("it panics").message, "on purpose");
        assert_eq!(cell.get(), None);
        assert_eq!(*cell.get_or_init(cx, |_| 2), 2);
    });
    assert_eq!(made.into_inner(), 1);
}

#[test]
fn a_reference_count_reaches_zero_once() {
    deadline(|cx| {
        for _ in 0..200 {
            let (count, last) = (RefCount::new(), AtomicUsize::new(0));
            threads(cx, |_, _| {
                for _ in 0..50 {
                    if count.get_unless_zero() {
                        count.get();
                        last.fetch_add(
                            usize::from(count.put()) + usize::from(count.put()),
                            Ordering::Relaxed,
                        );
                    }
                }
            });
            assert_eq!(last.load(Ordering::Relaxed), 0, "the first reference is still there");
            assert!(count.put() && !count.get_unless_zero());
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| count.get())).is_err());
        }
    });
}

#[test]
fn threads_have_names_storage_of_their_own_and_panics_that_are_errors() {
    static STORAGE: PerThread<std::cell::Cell<usize>> = PerThread::new(|| std::cell::Cell::new(0));
    deadline(|cx| {
        threads(cx, |i, _| {
            assert_eq!(STORAGE.with(|n| n.replace(i + 1)), 0);
            yield_now();
            assert_eq!(STORAGE.with(std::cell::Cell::get), i + 1);
            assert_eq!(std::thread::current().name(), Some(format!("stress-{i}").as_str()));
        });
        assert_eq!(STORAGE.with(std::cell::Cell::get), 0);
        let thread = spawn("failing", |_| -> () { panic!("on {}", "purpose") });
        assert_eq!(thread.name(), "failing");
        let error = thread.join(cx).expect_err("it panics");
        assert_eq!(error.to_string(), "thread `failing` panicked: on purpose");
        assert!(try_spawn("a\0b", |_| ()).is_err());
    });
}

#[test]
fn a_flag_set_before_a_fence_is_seen_by_one_side_at_least() {
    // Store buffering: with the fences, not both loads may miss the other's store.
    let (a, b) = (AtomicBool::new(false), AtomicBool::new(false));
    deadline(|cx| {
        for _ in 0..500 {
            a.store(false, Ordering::Relaxed);
            b.store(false, Ordering::Relaxed);
            let side = |mine: &AtomicBool, other: &AtomicBool| {
                mine.store(true, Ordering::Relaxed);
                interleave::fence(Ordering::SeqCst);
                other.load(Ordering::Relaxed)
            };
            let saw = scope(cx, |s, cx| {
                let one = s.spawn("a", |_| side(&a, &b));
                let other = side(&b, &a);
                one.join(cx).expect("it does not panic") || other
            });
            assert!(saw);
        }
    });
}

#[test]
fn inversions_of_threads_are_found_without_their_meeting() {
    static A: LockClass = LockClass::new("stress-inv-a");
    static B: LockClass = LockClass::new("stress-inv-b");
    let (a, b) = (Mutex::new(&A, ()), LockMap::new(&B));
    MaySleep::enter(|cx| {
        scope(cx, |s, cx| {
            let one = s.spawn("one", |cx| {
                let _a = a.lock(cx);
                let _b = b.acquire(cx);
            });
            one.join(cx).expect("it does not panic");
            let two = s.spawn("two", |cx| {
                let _b = b.acquire(cx);
                let _a = a.lock(cx);
            });
            two.join(cx).expect("it does not panic");
        });
    });
    assert_eq!(reports_about(&A).len(), 1);
}
