// SPDX-License-Identifier: MIT OR Apache-2.0
//! Threads asleep, in the order of their coming: the plain side of [`WaitQueue`](crate::WaitQueue).
//!
//! Protocol: a waiter registers, then tests its condition, then parks; a waker makes the condition true, then looks
//! for waiters. Each puts a full fence between its two steps, so that at least one of them sees the other: the waiter
//! the condition, or the waker the waiter. tests/loom.rs checks this very file under weak memory.
//!
//! Invariants: `waiting` is the length of `list`, changed under its lock; a waiter is in `list` until exactly one of
//! [`cancel`](WaitList::cancel) and [`wake`](WaitList::wake) takes it out. Lock order: `list` is a leaf.

use std::collections::VecDeque;
use std::time::Instant;

use super::sync::{Arc, AtomicBool, AtomicUsize, Mutex, Ordering, Thread, current, fence, park, past};

pub(crate) struct Waiter {
    woken: AtomicBool,
    thread: Thread,
}

impl Waiter {
    pub(crate) fn new() -> Arc<Waiter> {
        Arc::new(Waiter { woken: AtomicBool::new(false), thread: current() })
    }

    /// Parks until woken (`true`) or `deadline` is past (`false`).
    pub(crate) fn sleep(&self, deadline: Option<Instant>) -> bool {
        // Another user of this thread's park token may have left it set: only `woken` counts.
        while !self.woken.load(Ordering::Acquire) {
            if past(deadline) {
                return false;
            }
            park(deadline);
        }
        true
    }

    pub(crate) fn wake(&self) {
        self.woken.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

pub(crate) struct WaitList {
    waiting: AtomicUsize,
    list: Mutex<VecDeque<Arc<Waiter>>>,
}

impl WaitList {
    pub(crate) const fn new(list: Mutex<VecDeque<Arc<Waiter>>>, waiting: AtomicUsize) -> WaitList {
        WaitList { waiting, list }
    }

    /// Puts the calling thread at the end.
    pub(crate) fn register(&self) -> Arc<Waiter> {
        let waiter = Waiter::new();
        let mut list = self.list.lock();
        list.push_back(Arc::clone(&waiter));
        self.waiting.store(list.len(), Ordering::Relaxed);
        drop(list);
        // Between registering and testing: pairs with the fence in `wake`.
        fence(Ordering::SeqCst);
        waiter
    }

    /// Takes `waiter` out. `true` if a wake had done so: the wake is then the caller's to use or to pass on.
    #[must_use]
    pub(crate) fn cancel(&self, waiter: &Arc<Waiter>) -> bool {
        let mut list = self.list.lock();
        let Some(at) = list.iter().position(|w| Arc::ptr_eq(w, waiter)) else { return true };
        list.remove(at);
        self.waiting.store(list.len(), Ordering::Relaxed);
        false
    }

    /// Wakes the `most` that have waited longest.
    pub(crate) fn wake(&self, most: usize) {
        // Between making the condition true and looking for waiters: pairs with the fence in `register`.
        fence(Ordering::SeqCst);
        if self.waiting.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut list = self.list.lock();
        let taken = most.min(list.len());
        let woken: Vec<_> = list.drain(..taken).collect();
        self.waiting.store(list.len(), Ordering::Relaxed);
        drop(list);
        for waiter in woken {
            waiter.wake();
        }
    }
}
