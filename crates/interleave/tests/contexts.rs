// SPDX-License-Identifier: MIT OR Apache-2.0
//! The run-time side of the contexts.

use std::panic::{AssertUnwindSafe, catch_unwind};

use interleave::lockdep::{Policy, with_policy};
use interleave::{
    Context, LockClass, MaySleep, PageContext, Section, Sleep, SpinLock, might_sleep, preempt_disable,
};

static SPIN: LockClass = LockClass::new("contexts-spin");

#[test]
fn the_root_refuses_an_atomic_thread_and_names_the_outermost_place() {
    let lock = SpinLock::new(&SPIN, ());
    MaySleep::enter(|cx| {
        let at = line!() + 1;
        let mut guard = lock.lock(cx);
        let (_, atomic) = guard.split();
        preempt_disable(atomic, |_| {
            let refused = MaySleep::try_enter(|_| ()).expect_err("the thread is atomic");
            assert_eq!((refused.section, refused.site.line()), (Section::Atomic, at));
        });
        let panic = catch_unwind(|| MaySleep::enter(|_| ())).expect_err("the thread is atomic");
        let text = panic.downcast::<String>().expect("with a message");
        assert!(text.contains(&format!("contexts.rs:{at}:")), "{text}");
        drop(guard);
        // Outside again, also after the panic.
        MaySleep::enter(|_| MaySleep::enter(|_| with_policy(Policy::Panic, might_sleep)));
    });
}

#[test]
fn a_section_ends_when_it_is_unwound() {
    let lock = SpinLock::new(&SPIN, ());
    let unwound = catch_unwind(AssertUnwindSafe(|| {
        MaySleep::enter(|cx| {
            let _guard = lock.lock(cx);
            panic!("on purpose");
        })
    }));
    assert!(unwound.is_err());
    MaySleep::enter(|cx| assert!(lock.try_lock(cx).is_some(), "let go"));
}

#[test]
fn a_non_blocking_section_forbids_sleep_and_nests_with_atomic_ones() {
    let lock = SpinLock::new(&SPIN, 1);
    MaySleep::enter(|cx| {
        cx.non_block(|nb| {
            assert_eq!(*lock.lock(nb), 1);
            let refused = MaySleep::try_enter(|_| ()).expect_err("it must not block");
            assert_eq!(refused.section, Section::NonBlock);
            assert!(catch_unwind(|| with_policy(Policy::Panic, might_sleep)).is_err());
        });
        with_policy(Policy::Panic, might_sleep);
    });
}

#[test]
fn run_time_contexts_reborrow_and_spin() {
    fn spin<C: Context>(lock: &SpinLock<i32>, cx: &mut C) {
        *lock.lock(cx) += 1;
    }
    fn callee(lock: &SpinLock<i32>, mut cx: Sleep<'_, '_>) -> bool {
        spin(lock, &mut cx);
        matches!(cx, Sleep::May(_))
    }
    fn page(lock: &SpinLock<i32>, mut cx: PageContext<'_, '_>) -> bool {
        spin(lock, &mut cx);
        matches!(cx, PageContext::May(_))
    }
    let lock = SpinLock::new(&SPIN, 0);
    MaySleep::enter(|cx| {
        let mut sleep = Sleep::May(cx);
        assert!(callee(&lock, sleep.reborrow()) && callee(&lock, sleep));
        cx.non_block(|nb| assert!(!callee(&lock, Sleep::TryOnly(nb))));
        let mut ctx = PageContext::May(cx);
        assert!(page(&lock, ctx.reborrow()) && page(&lock, ctx));
        preempt_disable(cx, |atomic| assert!(!page(&lock, PageContext::Atomic(atomic))));
        assert_eq!(*lock.lock(cx), 6);
    });
}
