// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sleeping until another thread says so.
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::{Atomic, LockClass, MaySleep, MutexGuard, might_sleep};

/// Threads sleep here until they are woken. A waiter registers before it tests, so no wake-up is lost.
pub struct WaitQueue {
    woken: Mutex<u64>,
    cond: Condvar,
    class: &'static LockClass,
}

impl WaitQueue {
    /// An empty queue.
    pub fn new(class: &'static LockClass) -> Self {
        WaitQueue { woken: Mutex::new(0), cond: Condvar::new(), class }
    }

    /// Sleeps until `cond` holds. Whoever makes it hold calls [`wake_one`](Self::wake_one) or [`wake_all`](Self::wake_all) afterwards.
    #[track_caller]
    pub fn wait_event(&self, cx: &mut MaySleep<'_>, mut cond: impl FnMut() -> bool) {
        self.wait_event_with(cx, |_| cond());
    }

    /// [`wait_event`](Self::wait_event) whose condition takes spin locks.
    #[track_caller]
    pub fn wait_event_with(&self, cx: &mut MaySleep<'_>, cond: impl FnMut(&mut Atomic<'_>) -> bool) {
        let done = self.event(cx, None, cond);
        debug_assert!(done);
    }

    /// [`wait_event`](Self::wait_event) for at most `timeout`; whether `cond` held.
    #[track_caller]
    pub fn wait_event_timeout(
        &self,
        cx: &mut MaySleep<'_>,
        timeout: Duration,
        mut cond: impl FnMut() -> bool,
    ) -> bool {
        self.event(cx, Some(timeout), |_| cond())
    }

    #[track_caller]
    fn event(
        &self,
        _cx: &mut MaySleep<'_>,
        timeout: Option<Duration>,
        mut cond: impl FnMut(&mut Atomic<'_>) -> bool,
    ) -> bool {
        might_sleep();
        let deadline = timeout.map(|t| Instant::now() + t);
        loop {
            let seen = *self.woken.lock();
            if cond(&mut Atomic::lent()) {
                return true;
            }
            let mut woken = self.woken.lock();
            while *woken == seen {
                match deadline {
                    None => self.cond.wait(&mut woken),
                    Some(d) => {
                        if self.cond.wait_until(&mut woken, d).timed_out() {
                            drop(woken);
                            return cond(&mut Atomic::lent());
                        }
                    }
                }
            }
        }
    }

    /// Unlocks, sleeps until woken, locks again. May return without a wake-up: test the condition in a loop.
    #[track_caller]
    pub fn wait<'l, T: ?Sized>(&self, cx: &mut MaySleep<'_>, guard: MutexGuard<'l, T>) -> MutexGuard<'l, T> {
        self.sleep(cx, None, guard).0
    }

    /// [`wait`](Self::wait) for at most `timeout`; whether it was woken.
    #[track_caller]
    pub fn wait_timeout<'l, T: ?Sized>(
        &self,
        cx: &mut MaySleep<'_>,
        guard: MutexGuard<'l, T>,
        timeout: Duration,
    ) -> (MutexGuard<'l, T>, bool) {
        self.sleep(cx, Some(timeout), guard)
    }

    #[track_caller]
    fn sleep<'l, T: ?Sized>(
        &self,
        cx: &mut MaySleep<'_>,
        timeout: Option<Duration>,
        guard: MutexGuard<'l, T>,
    ) -> (MutexGuard<'l, T>, bool) {
        might_sleep();
        let deadline = timeout.map(|t| Instant::now() + t);
        let lock = guard.lock_of();
        let mut woken = self.woken.lock();
        let seen = *woken;
        drop(guard);
        let mut in_time = true;
        while *woken == seen && in_time {
            match deadline {
                None => self.cond.wait(&mut woken),
                Some(d) => in_time = !self.cond.wait_until(&mut woken, d).timed_out(),
            }
        }
        drop(woken);
        (lock.lock(cx), in_time)
    }

    /// Wakes the longest waiting thread. Never sleeps; any context.
    #[track_caller]
    pub fn wake_one(&self) {
        // The first version has no queue: waking more is allowed, waking fewer is not.
        self.wake_all();
    }

    /// Wakes all. Never sleeps; any context.
    #[track_caller]
    pub fn wake_all(&self) {
        *self.woken.lock() += 1;
        self.cond.notify_all();
    }

    /// Its class.
    pub fn class(&self) -> &'static LockClass {
        self.class
    }
}
