// SPDX-License-Identifier: MIT OR Apache-2.0
//! The wait list under weak memory: src/wait_list.rs itself, over loom's atomics instead of std's.
//!
//! It is the only code of the crate whose correctness rests on fences of its own. Locks are parking_lot's, once-cells
//! std's, and reference counts the standard pattern.

use std::collections::VecDeque;

use loom::sync::atomic::AtomicBool;
use loom::thread;
use sync::{Arc, AtomicUsize, Mutex, Ordering};

#[path = "../src/wait_list.rs"]
mod wait_list;

/// Loom's twins of what src/sync.rs has.
mod sync {
    use std::time::Instant;

    pub(crate) use loom::sync::Arc;
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
    pub(crate) use loom::thread::{Thread, current};

    pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(data: T) -> Self {
            Mutex(loom::sync::Mutex::new(data))
        }

        pub(crate) fn lock(&self) -> loom::sync::MutexGuard<'_, T> {
            self.0.lock().expect("loom ends a run that panics")
        }
    }

    pub(crate) fn park(_: Option<Instant>) {
        loom::thread::park();
    }

    pub(crate) fn past(_: Option<Instant>) -> bool {
        false
    }
}

use wait_list::WaitList;

fn list() -> Arc<WaitList> {
    Arc::new(WaitList::new(Mutex::new(VecDeque::new()), AtomicUsize::new(0)))
}

/// The loop of `WaitQueue::wait_event`.
fn wait_event(list: &WaitList, mut cond: impl FnMut() -> bool) {
    loop {
        let waiter = list.register();
        if cond() {
            if list.cancel(&waiter) {
                list.wake(1);
            }
            return;
        }
        let _woken = waiter.sleep(None);
    }
}

#[test]
fn a_relaxed_flag_and_a_wake_are_never_missed() {
    loom::model(|| {
        let (list, flag) = (list(), Arc::new(AtomicBool::new(false)));
        let waker = {
            let (list, flag) = (Arc::clone(&list), Arc::clone(&flag));
            thread::spawn(move || {
                flag.store(true, Ordering::Relaxed);
                list.wake(1);
            })
        };
        // Loom reports a deadlock if the wake is lost.
        wait_event(&list, || flag.load(Ordering::Relaxed));
        waker.join().expect("it does not panic");
    });
}

#[test]
fn a_wake_that_is_not_needed_is_passed_on() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let (list, items) = (list(), Arc::new(Mutex::new(0)));
        let take = |list: &Arc<WaitList>, items: &Arc<Mutex<u32>>| {
            let (list, items) = (Arc::clone(list), Arc::clone(items));
            move || {
                wait_event(&list, || {
                    let mut items = items.lock();
                    let there = *items > 0;
                    *items -= u32::from(there);
                    there
                });
            }
        };
        let consumers = [thread::spawn(take(&list, &items)), thread::spawn(take(&list, &items))];
        for _ in 0..2 {
            *items.lock() += 1;
            list.wake(1);
        }
        for consumer in consumers {
            consumer.join().expect("it does not panic");
        }
        assert_eq!(*items.lock(), 0);
    });
}
