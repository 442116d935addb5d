// SPDX-License-Identifier: MIT OR Apache-2.0
//! lockdep sees what it must see and nothing else. Each test has classes of its own: the graph is the process's.

use std::panic::{AssertUnwindSafe, catch_unwind};

use interleave::lockdep::{self, Policy, Report, ReportKind, Site, reports_about};
use interleave::{LockClass, LockMap, MaySleep, Mutex, RwLock, SpinLock, WriteGuard, preempt_disable};

/// The line of a place in this file.
fn line(site: Site) -> u32 {
    assert!(site.file().ends_with("tests/lockdep.rs"), "{site}");
    site.line()
}

fn only(class: &LockClass) -> Report {
    let mut reports = reports_about(class);
    assert_eq!(reports.len(), 1, "{reports:?}");
    reports.remove(0)
}

#[test]
fn an_inversion_names_four_places_without_a_deadlock() {
    static A: LockClass = LockClass::new("inv-a");
    static B: LockClass = LockClass::new("inv-b");
    let (a, b) = (Mutex::new(&A, ()), Mutex::new(&B, ()));
    let first = line!() + 2;
    MaySleep::enter(|cx| {
        let _a = a.lock(cx);
        let _b = b.lock(cx);
    });
    assert!(reports_about(&A).is_empty());
    let second = line!() + 2;
    MaySleep::enter(|cx| {
        let _b = b.lock(cx);
        let _a = a.lock(cx);
    });
    let report = only(&A);
    assert_eq!(report.kind, ReportKind::Inversion);
    assert_eq!(report.classes, ["inv-b", "inv-a"]);
    let lines: Vec<u32> = report.sites.iter().map(|s| line(s)).collect();
    assert_eq!(lines, [second, second + 1, first, first + 1]);
    let text = report.to_string();
    assert!(text.starts_with("lock order inversion: `inv-b` -> `inv-a` -> `inv-b`"), "{text}");
    assert!(text.contains("now: `inv-a` taken") && text.contains("earlier: `inv-b` taken"), "{text}");
    // The same contradiction again is not another report.
    MaySleep::enter(|cx| {
        let _b = b.lock(cx);
        let _a = a.lock(cx);
    });
    only(&A);
}

#[test]
fn a_cycle_of_four_classes_is_found_through_all_lock_types() {
    static A: LockClass = LockClass::new("cyc-a");
    static B: LockClass = LockClass::new("cyc-b");
    static C: LockClass = LockClass::new("cyc-c");
    static D: LockClass = LockClass::new("cyc-d");
    let (a, b, c, d) = (LockMap::new(&A), Mutex::new(&B, ()), RwLock::new(&C, ()), Mutex::new(&D, ()));
    MaySleep::enter(|cx| {
        {
            let _a = a.acquire(cx);
            let _b = b.lock(cx);
        }
        {
            let _b = b.lock(cx);
            let _c = c.read(cx);
        }
        {
            let _c = c.write(cx);
            let _d = d.lock(cx);
        }
        assert!(reports_about(&A).is_empty());
        let _d = d.lock(cx);
        let _a = a.acquire(cx);
    });
    let report = only(&A);
    assert_eq!(report.kind, ReportKind::Inversion);
    assert_eq!(report.classes, ["cyc-d", "cyc-a", "cyc-b", "cyc-c"]);
    assert_eq!(report.links.len(), 4);
    assert_eq!(report.sites.len(), 8);
}

#[test]
fn recursion_is_reported_and_nesting_is_not() {
    static R: LockClass = LockClass::new("rec");
    static N: LockClass = LockClass::new("nest");
    let (parent, child) = (Mutex::new(&N, ()), Mutex::new(&N, ()));
    MaySleep::enter(|cx| {
        for _ in 0..2 {
            let _p = parent.lock(cx);
            let _c = child.lock_nested(cx, 1);
        }
    });
    assert!(reports_about(&N).is_empty());
    MaySleep::enter(|cx| {
        let _c = child.lock_nested(cx, 1);
        let _p = parent.lock(cx);
    });
    assert_eq!(only(&N).classes, ["nest/1", "nest"]);

    let (one, two) = (Mutex::new(&R, ()), Mutex::new(&R, ()));
    MaySleep::enter(|cx| {
        let _one = one.lock(cx);
        let _two = two.lock(cx);
    });
    let report = only(&R);
    assert_eq!(report.kind, ReportKind::Recursion);
    assert_eq!(report.sites.len(), 2);
    assert!(report.to_string().contains("another lock of the class"), "{report}");
}

#[test]
fn a_second_read_of_one_thread_is_recursion() {
    static C: LockClass = LockClass::new("read-read");
    let lock = RwLock::new(&C, ());
    MaySleep::enter(|cx| {
        let _one = lock.read(cx);
        let _two = lock.read(cx);
    });
    let report = only(&C);
    assert_eq!(report.kind, ReportKind::Recursion);
    assert!(report.to_string().contains("the same lock again"), "{report}");
}

#[test]
fn the_lock_that_the_thread_holds_is_recursion_under_any_subclass_and_by_any_first_hold() {
    static C: LockClass = LockClass::new("same-nested");
    static T: LockClass = LockClass::new("same-tried");
    let (lock, other, tried) = (Mutex::new(&C, 0), Mutex::new(&C, 0), RwLock::new(&T, 0));
    MaySleep::enter(|cx| {
        let _one = lock.lock(cx);
        let _two = other.lock_nested(cx, 1);
    });
    assert!(reports_about(&C).is_empty());
    // Under Policy::Panic, since it would hang.
    let deadlock = |f: &mut dyn FnMut()| {
        let result = catch_unwind(AssertUnwindSafe(|| lockdep::with_policy(Policy::Panic, f)));
        let text = result.expect_err("it must panic").downcast::<String>().expect("with a message");
        assert!(text.contains("the same lock again"), "{text}");
        text
    };
    let text = deadlock(&mut || {
        MaySleep::enter(|cx| {
            let _one = lock.lock(cx);
            let _two = lock.lock_nested(cx, 1);
        })
    });
    assert!(text.contains("`same-nested/1` taken at"), "{text}");
    assert_eq!(only(&C).kind, ReportKind::Recursion);
    deadlock(&mut || {
        MaySleep::enter(|cx| {
            let _one = tried.try_read(cx).expect("free");
            let _two = tried.write_nested(cx, 1);
        })
    });
    assert!(lockdep::held().is_empty());
}

#[test]
fn a_certain_deadlock_panics_each_time_before_it_happens() {
    static C: LockClass = LockClass::new("self-deadlock");
    let lock = Mutex::new(&C, 0);
    for _ in 0..2 {
        let result = catch_unwind(AssertUnwindSafe(|| {
            lockdep::with_policy(Policy::Panic, || {
                MaySleep::enter(|cx| {
                    let _one = lock.lock(cx);
                    let _two = lock.lock(cx);
                });
            });
        }));
        let text = result.expect_err("it must panic").downcast::<String>().expect("with a message");
        assert!(text.contains("recursion on lock class `self-deadlock`"), "{text}");
        assert!(lockdep::held().is_empty(), "unwinding has let go of all");
    }
}

#[test]
fn no_order_leads_to_a_try_lock_but_one_leads_from_it() {
    static A: LockClass = LockClass::new("try-a");
    static B: LockClass = LockClass::new("try-b");
    let (a, b) = (Mutex::new(&A, ()), Mutex::new(&B, ()));
    MaySleep::enter(|cx| {
        {
            let _a = a.lock(cx);
            let _b = b.try_lock(cx).expect("free");
            // Recursion by a try cannot wait either.
            assert!(a.try_lock(cx).is_none());
        }
        {
            let _b = b.lock(cx);
            let _a = a.try_lock(cx).expect("free");
        }
        assert!(reports_about(&A).is_empty());
        {
            let _b = b.try_lock(cx).expect("free");
            let _a = a.lock(cx);
        }
        assert!(reports_about(&A).is_empty());
        let _a = a.lock(cx);
        let _b = b.lock(cx);
    });
    assert_eq!(only(&A).kind, ReportKind::Inversion);
}

#[test]
fn an_order_below_a_try_lock_is_seen() {
    static A: LockClass = LockClass::new("below-a");
    static B: LockClass = LockClass::new("below-b");
    static T: LockClass = LockClass::new("below-t");
    let (a, b, t) = (Mutex::new(&A, ()), Mutex::new(&B, ()), Mutex::new(&T, ()));
    MaySleep::enter(|cx| {
        {
            let _a = a.lock(cx);
            let _t = t.try_lock(cx).expect("free");
            let _b = b.lock(cx);
        }
        let _b = b.lock(cx);
        let _a = a.lock(cx);
    });
    assert_eq!(only(&A).classes, ["below-b", "below-a"]);
}

#[test]
fn the_held_stack_survives_release_out_of_order_and_overflow() {
    static A: LockClass = LockClass::new("held-a");
    static B: LockClass = LockClass::new("held-b");
    static MANY: LockClass = LockClass::new("held-many");
    let names = || lockdep::held().into_iter().map(|h| h.class).collect::<Vec<_>>();
    let (a, b) = (Mutex::new(&A, ()), RwLock::new(&B, ()));
    MaySleep::enter(|cx| {
        let guard_a = a.lock(cx);
        let guard_b = b.write(cx);
        assert_eq!(names(), ["held-a", "held-b"]);
        drop(guard_a);
        assert_eq!(names(), ["held-b"]);
        let guard_b = WriteGuard::downgrade(guard_b);
        assert_eq!(names(), ["held-b"]);
        drop(guard_b);

        let many: Vec<_> = (0..40).map(|i| Mutex::new(&MANY, i)).collect();
        let unrecorded = lockdep::stats().unrecorded_locks;
        let guards: Vec<_> = many.iter().map(|m| m.try_lock(cx).expect("free")).collect();
        assert_eq!(names().len(), 32);
        assert_eq!(lockdep::stats().unrecorded_locks - unrecorded, 8);
        drop(guards);
        assert!(names().is_empty());
        let _a = a.lock(cx);
        assert_eq!(names(), ["held-a"]);
    });
}

#[test]
fn sleeping_in_atomic_names_both_places_and_what_is_held() {
    static S: LockClass = LockClass::new("sleep-spin");
    let lock = SpinLock::new(&S, ());
    let at = line!() + 2;
    MaySleep::enter(|cx| {
        let mut guard = lock.lock(cx);
        let (_, atomic) = guard.split();
        preempt_disable(atomic, |_| interleave::might_sleep());
    });
    let report = only(&S);
    assert_eq!(report.kind, ReportKind::SleepInAtomic);
    assert_eq!(report.classes, ["sleep-spin"]);
    let lines: Vec<u32> = report.sites.iter().map(|s| line(s)).collect();
    assert_eq!(lines, [at, at + 2]);
}

#[test]
fn a_forged_context_is_caught() {
    static S: LockClass = LockClass::new("forge-spin");
    static M: LockClass = LockClass::new("forge-mutex");
    let (spin, mutex) = (SpinLock::new(&S, ()), Mutex::new(&M, ()));
    MaySleep::enter(|cx| {
        let mut guard = spin.lock(cx);
        let (_, atomic) = guard.split();
        interleave::forge_may_sleep_against_the_rules(atomic, |cx| drop(mutex.lock(cx)));
    });
    assert_eq!(only(&S).kind, ReportKind::SleepInAtomic);
}
