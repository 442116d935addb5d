// SPDX-License-Identifier: MIT OR Apache-2.0
//! Exploration finds what is wrong, shows it, and finds nothing where nothing is.
#![expect(clippy::disallowed_types, reason = "what is seen is written down behind the explorer's back")]

use std::time::Duration;

use interleave::explore::{Config, Failure, FailureKind, Strategy, explore, replay};
use interleave::{
    AtomicBool, AtomicU32, LockClass, MaySleep, Mutex, Ordering, RwLock, Semaphore, SpinLock, WaitQueue,
    scope, spin_hint, time,
};

const SC: Ordering = Ordering::SeqCst;

static A: LockClass = LockClass::new("a_lock");
static B: LockClass = LockClass::new("b_lock");
static MMAP_LOCK: LockClass = LockClass::new("mmap_lock");
static QUEUE: LockClass = LockClass::new("queue");

const ALL: [Strategy; 8] = [
    Strategy::Plain,
    Strategy::Sleep,
    Strategy::Dpor,
    Strategy::ValueCache,
    Strategy::Preemptions(2),
    Strategy::CachedPreemptions(2),
    Strategy::Pct { depth: 3, seed: 1, executions: 20_000 },
    Strategy::Random { seed: 1, executions: 20_000 },
];

/// Each strategy finds `kind`, the schedule replays, and two explorations find the same.
fn finds(
    kind: FailureKind,
    config: impl Fn(Strategy) -> Config,
    scenario: impl Fn(&mut MaySleep<'_>),
) -> Failure {
    let mut found = None;
    for strategy in ALL {
        let config = config(strategy);
        let report = explore(&config, &scenario);
        let failure =
            report.failures.first().unwrap_or_else(|| panic!("{strategy:?} found nothing: {report:?}"));
        assert_eq!(failure.kind, kind, "{strategy:?}: {failure}");
        let again = replay(&config, &failure.replay, &scenario).expect("a replay string can be read");
        assert!(again.missed.is_empty(), "{strategy:?}: {:?} of {failure}", again.missed);
        let again =
            again.failure.unwrap_or_else(|| panic!("{strategy:?}: no failure under {}", failure.replay));
        assert_eq!(again.kind, kind);
        if kind != FailureKind::LockOrder {
            assert_eq!(again.message, failure.message, "{strategy:?}");
        }
        found = Some(failure.clone());
    }
    found.expect("there are strategies")
}

/// Each strategy that can finds that nothing is wrong.
fn silent(scenario: impl Fn(&mut MaySleep<'_>)) {
    for strategy in ALL {
        let report = explore(&Config::new(strategy), &scenario);
        report.assert_ok();
        let endless = matches!(strategy, Strategy::Pct { .. } | Strategy::Random { .. });
        assert_eq!(report.exhausted, !endless, "{strategy:?}");
    }
}

fn two(
    cx: &mut MaySleep<'_>,
    a: impl FnOnce(&mut MaySleep<'_>) + Send,
    b: impl FnOnce(&mut MaySleep<'_>) + Send,
) {
    scope(cx, |s, _| {
        s.spawn("one", a);
        s.spawn("two", b);
    });
}

#[test]
fn a_lost_update_is_found() {
    let failure = finds(FailureKind::Panic, Config::new, |cx| {
        let hits = AtomicU32::new(0);
        let hit = |_: &mut MaySleep<'_>| hits.store(hits.load(SC) + 1, SC);
        two(cx, hit, hit);
        assert_eq!(hits.load(SC), 2);
    });
    assert_eq!(failure.preemptions, 1, "{failure}");
    assert!(failure.message.contains("left: 1"), "{failure}");
    silent(|cx| {
        let hits = Mutex::new(&A, 0);
        let hit = |cx: &mut MaySleep<'_>| *hits.lock(cx) += 1;
        two(cx, hit, hit);
        assert_eq!(hits.into_inner(), 2);
    });
}

#[test]
fn a_deadlock_of_two_locks_names_both_chains() {
    let abba = |cx: &mut MaySleep<'_>| {
        let (a, b) = (Mutex::new(&A, ()), Mutex::new(&B, ()));
        two(
            cx,
            |cx| {
                let _a = a.lock(cx);
                drop(b.lock(cx));
            },
            |cx| {
                let _b = b.lock(cx);
                drop(a.lock(cx));
            },
        );
    };
    let failure = finds(FailureKind::Deadlock, |strategy| Config::new(strategy).lockdep(false), abba);
    for part in
        ["`one` waits: b_lock.lock", "held by `two`", "`two` waits: a_lock.lock", "holds `a_lock` since"]
    {
        assert!(failure.message.contains(part), "{part} in {failure}");
    }
    assert_eq!(failure.preemptions, 1, "{failure}");
    let failure = finds(FailureKind::LockOrder, Config::new, abba);
    assert!(
        failure.message.contains("`a_lock` -> `b_lock`") || failure.message.contains("`b_lock` -> `a_lock`")
    );
}

#[test]
fn a_reader_that_reads_twice_deadlocks_with_a_writer_in_between() {
    let failure = finds(
        FailureKind::Deadlock,
        |strategy| Config::new(strategy).lockdep(false),
        |cx| {
            let lock = RwLock::new(&MMAP_LOCK, 0);
            two(
                cx,
                |cx| {
                    let _first = lock.read(cx);
                    drop(lock.read(cx));
                },
                |cx| *lock.write(cx) += 1,
            );
        },
    );
    assert!(failure.message.contains("waited for first by `two`"), "{failure}");
}

#[test]
fn a_wake_that_comes_too_early_is_lost() {
    finds(FailureKind::Deadlock, Config::new, |cx| {
        let (queue, ready) = (WaitQueue::new(&QUEUE), AtomicBool::new(false));
        two(
            cx,
            |cx| queue.wait_event(cx, || ready.load(SC)),
            |_| {
                queue.wake_all();
                ready.store(true, SC);
            },
        );
    });
    silent(|cx| {
        let (queue, ready) = (WaitQueue::new(&QUEUE), AtomicBool::new(false));
        two(
            cx,
            |cx| queue.wait_event(cx, || ready.load(SC)),
            |_| {
                ready.store(true, SC);
                queue.wake_all();
            },
        );
    });
}

#[test]
fn spinning_semaphores_and_time_are_modelled() {
    silent(|cx| {
        let (flag, semaphore) = (AtomicBool::new(false), Semaphore::new(&QUEUE, 1));
        two(
            cx,
            |cx| {
                while !flag.load(SC) {
                    spin_hint();
                }
                semaphore.down(cx);
                semaphore.up();
            },
            |cx| {
                semaphore.down(cx);
                let before = time::now();
                time::sleep(cx, Duration::from_secs(3600));
                assert_eq!(before.elapsed(), Duration::from_secs(3600));
                flag.store(true, SC);
                semaphore.up();
            },
        );
    });
    let failure = finds(
        FailureKind::Livelock,
        |strategy| Config::new(strategy).max_steps(200),
        |cx| {
            let flag = AtomicBool::new(false);
            two(
                cx,
                |_| {
                    while !flag.load(SC) {
                        spin_hint();
                    }
                },
                |_| {},
            );
        },
    );
    assert!(failure.message.contains("`one`"), "{failure}");
}

#[test]
fn sleeping_in_atomic_context_is_a_failure() {
    let failure = finds(FailureKind::SleepInAtomic, Config::new, |cx| {
        let (spin, mutex) = (SpinLock::new(&A, ()), Mutex::new(&B, ()));
        let mut guard = spin.lock(cx);
        let (_data, atomic) = guard.split();
        interleave::forge_may_sleep_against_the_rules(atomic, |cx| drop(mutex.lock(cx)));
    });
    assert!(failure.message.contains("holds `a_lock`"), "{failure}");
}

#[test]
fn a_scenario_that_is_not_deterministic_is_told_so() {
    let n = std::cell::Cell::new(0);
    let report = explore(&Config::new(Strategy::Plain), |cx| {
        n.set(n.get() + 1);
        let a = AtomicU32::new(0);
        let odd = n.get() % 2 == 1;
        two(
            cx,
            |_| {
                a.store(1, SC);
                if odd {
                    a.store(3, SC);
                }
            },
            |_| a.store(2, SC),
        );
    });
    assert_eq!(report.failures[0].kind, FailureKind::Nondeterminism, "{report:?}");
}

#[test]
fn a_schedule_outlives_unrelated_edits() {
    let check = |edited: bool| {
        move |cx: &mut MaySleep<'_>| {
            let (page, seq, live, other) =
                (Mutex::new(&A, 0), AtomicU32::new(0), AtomicBool::new(true), Mutex::new(&B, 0));
            if edited {
                *other.lock(cx) += 1;
            }
            scope(cx, |s, _| {
                s.spawn("binder", |cx| {
                    if edited {
                        *other.lock(cx) += 1;
                    }
                    let before = seq.load(SC);
                    let mut page = page.lock(cx);
                    if before == 0 {
                        *page = 1;
                        assert!(live.load(SC), "the page is gone");
                    }
                });
                s.spawn("unmapper", |cx| {
                    seq.store(1, SC);
                    if edited {
                        drop(other.lock(cx));
                    }
                    *page.lock(cx) = 0;
                    live.store(false, SC);
                });
                if edited {
                    s.spawn("bystander", |cx| *other.lock(cx) += 1);
                }
            });
        }
    };
    let config = Config::default();
    let failure = explore(&config, check(false)).failures.remove(0);
    for edited in [false, true] {
        let again = replay(&config, &failure.replay, check(edited)).expect("readable");
        assert!(again.missed.is_empty(), "{:?} of {}", again.missed, failure.replay);
        let again = again.failure.unwrap_or_else(|| panic!("edited {edited}: no failure, {failure}"));
        assert!(again.message.contains("the page is gone"), "{again}");
    }
    assert!(!failure.replay.chars().any(|c| c.is_ascii_digit()), "no numbers: {}", failure.replay);
    assert!(replay(&config, "binder@a_lock.lock#0", check(false)).is_none());
    let other = replay(&config, "nobody, binder@a_lock.unheard", check(false)).expect("readable");
    assert_eq!(other.missed, ["nobody"], "binder runs to its end, since it comes to no such operation");
}

#[test]
fn the_events_of_a_failure_say_who_did_what_to_what_holding_what() {
    let report = explore(&Config::default(), |cx| {
        let (lock, spin) = (RwLock::new(&MMAP_LOCK, 0), SpinLock::new(&B, 0));
        two(
            cx,
            |cx| {
                let _read = lock.read(cx);
                *spin.lock(cx) += 1;
                interleave::explore::note(|| "counted".to_owned());
            },
            |cx| {
                *lock.write(cx) += 1;
                assert_eq!(*spin.lock(cx), 0, "too late");
            },
        );
    });
    let schedule = &report.failures[0].schedule;
    let event = |what: &str| schedule.iter().find(|e| e.what == what).unwrap_or_else(|| panic!("{what}"));
    let read = event("mmap_lock.read");
    assert_eq!((read.thread.as_str(), read.class, read.verb), ("one", Some("mmap_lock"), "read"));
    assert!(read.site.file().ends_with("explore.rs"));
    let spin = event("b_lock.lock");
    assert_eq!(
        (spin.class, spin.verb, &spin.holds[..]),
        (Some("b_lock"), "lock", &["mmap_lock", "b_lock"][..])
    );
    let note = event("counted");
    assert!(note.note && note.thread == "one" && note.class.is_none() && note.holds == ["mmap_lock"]);
}

#[test]
fn a_try_lock_sees_both_outcomes() {
    for strategy in
        [Strategy::Plain, Strategy::Sleep, Strategy::Dpor, Strategy::ValueCache, Strategy::Preemptions(2)]
    {
        let seen = std::sync::atomic::AtomicU32::new(0);
        let report = explore(&Config::new(strategy), |cx| {
            let lock = Mutex::new(&A, ());
            two(
                cx,
                |cx| drop(lock.lock(cx)),
                |cx| {
                    let bit = if lock.try_lock(cx).is_some() { 1 } else { 2 };
                    seen.fetch_or(bit, SC);
                },
            );
        });
        report.assert_ok();
        assert_eq!(seen.into_inner(), 3, "{strategy:?}");
    }
}

#[test]
fn what_one_thread_uses_costs_no_executions_until_another_comes_to_it() {
    let late = |cx: &mut MaySleep<'_>| {
        let (own, flag) = ([0; 3].map(AtomicU32::new), AtomicU32::new(0));
        two(
            cx,
            |_| {
                flag.store(1, SC);
                own.iter().for_each(|n| n.store(1, SC));
                flag.store(2, SC);
            },
            // Only between the two stores does it come to what is else the other thread's own.
            |_| assert!(flag.load(SC) != 1 || own[2].load(SC) == 0, "came too late"),
        );
    };
    let quiet = |cx: &mut MaySleep<'_>| {
        let (own, flag) = (AtomicU32::new(0), AtomicU32::new(0));
        two(cx, |_| (0..6).for_each(|n| own.store(n, SC)), |_| flag.store(1, SC));
    };
    let executions = |config: Config| explore(&config, quiet).executions;
    assert_eq!(executions(Config::new(Strategy::Plain).all_points()), 8);
    assert_eq!(executions(Config::new(Strategy::Plain)), 3);
    let failure = finds(FailureKind::Panic, Config::new, late);
    assert!(failure.message.contains("came too late"), "{failure}");
}
