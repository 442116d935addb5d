// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sleeping until another thread says so.
//!
//! No wake-up is lost: a waiter registers before it tests its condition, and a wake that reaches a waiter which needs
//! it no longer is passed on to the next. Wake-ups without a cause are possible, so conditions are tested in loops.

use std::fmt;
use std::panic::Location;
use std::time::{Duration, Instant};

use crate::birth::{Birth, ObjectKind};
use crate::lockdep::Site;
use crate::sync::{Arc, AtomicUsize, Mutex};
use crate::task::{self, Section};
use crate::wait_list::{WaitList, Waiter};
use crate::world::{OpKind, World};
use crate::{Atomic, LockClass, MaySleep, MutexGuard, might_sleep};

/// Threads sleep here until they are woken, in the order of their coming. Waiting wants a [`MaySleep`]; any
/// context may wake. In statics: [`const_new`](Self::const_new), plain only.
pub struct WaitQueue {
    plain: WaitList,
    birth: Birth,
    class: &'static LockClass,
}

/// A thread that is registered as a waiter, on the side where it waits.
enum Registered {
    Plain(Arc<Waiter>),
    Explored(&'static dyn World),
}

impl WaitQueue {
    /// An empty queue, in the world of the calling thread.
    #[track_caller]
    pub fn new(class: &'static LockClass) -> Self {
        let birth = Birth::here(ObjectKind::WaitQueue, Some(class), Location::caller(), || None);
        WaitQueue { birth, ..Self::const_new(class) }
    }

    /// An empty queue in a static; it cannot be used under exploration.
    pub const fn const_new(class: &'static LockClass) -> Self {
        let plain = WaitList::new(Mutex::new(std::collections::VecDeque::new()), AtomicUsize::new(0));
        WaitQueue { plain, birth: Birth::CONST, class }
    }

    /// Sleeps until `cond` holds. Whoever makes it hold wakes the queue afterwards.
    ///
    /// `cond` runs as the kernel's does, between being registered and sleeping: it must not sleep.
    #[track_caller]
    pub fn wait_event(&self, cx: &mut MaySleep<'_>, mut cond: impl FnMut() -> bool) {
        self.event(cx, None, &mut |_| cond());
    }

    /// [`wait_event`](Self::wait_event) with a condition that takes spin locks.
    #[track_caller]
    pub fn wait_event_with(&self, cx: &mut MaySleep<'_>, mut cond: impl FnMut(&mut Atomic<'_>) -> bool) {
        self.event(cx, None, &mut cond);
    }

    /// [`wait_event`](Self::wait_event) for at most `timeout`. Whether `cond` held.
    #[track_caller]
    pub fn wait_event_timeout(
        &self,
        cx: &mut MaySleep<'_>,
        timeout: Duration,
        mut cond: impl FnMut() -> bool,
    ) -> bool {
        self.event(cx, Some(timeout), &mut |_| cond())
    }

    #[track_caller]
    fn event(
        &self,
        _cx: &mut MaySleep<'_>,
        timeout: Option<Duration>,
        cond: &mut dyn FnMut(&mut Atomic<'_>) -> bool,
    ) -> bool {
        let site = Location::caller();
        might_sleep();
        let mut holds = || {
            let _section = task::enter(Section::Atomic, site);
            cond(&mut Atomic::lent())
        };
        if self.birth.world(site).is_none() && holds() {
            return true;
        }
        // A timeout too long for the clock is none.
        let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        loop {
            let entry = Entry { queue: self, site, registered: Some(self.register(site)) };
            if holds() {
                return true;
            }
            match entry.sleep(timeout, deadline) {
                Slept::Woken => {}
                Slept::TimedOut => return holds(),
                Slept::Abandoned => return false,
            }
        }
    }

    /// Lets the lock go, sleeps until woken, and locks again. It may return without a cause: test in a loop.
    #[track_caller]
    pub fn wait<'l, T: ?Sized>(&self, cx: &mut MaySleep<'_>, guard: MutexGuard<'l, T>) -> MutexGuard<'l, T> {
        self.unlock_and_sleep(cx, None, guard).0
    }

    /// [`wait`](Self::wait) for at most `timeout`. Whether it was woken.
    #[track_caller]
    pub fn wait_timeout<'l, T: ?Sized>(
        &self,
        cx: &mut MaySleep<'_>,
        guard: MutexGuard<'l, T>,
        timeout: Duration,
    ) -> (MutexGuard<'l, T>, bool) {
        self.unlock_and_sleep(cx, Some(timeout), guard)
    }

    #[track_caller]
    fn unlock_and_sleep<'l, T: ?Sized>(
        &self,
        cx: &mut MaySleep<'_>,
        timeout: Option<Duration>,
        guard: MutexGuard<'l, T>,
    ) -> (MutexGuard<'l, T>, bool) {
        let site = Location::caller();
        might_sleep();
        let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        let (lock, subclass) = guard.origin();
        let entry = Entry { queue: self, site, registered: Some(self.register(site)) };
        drop(guard);
        let woken = matches!(entry.sleep(timeout, deadline), Slept::Woken);
        (lock.lock_nested(cx, subclass), woken)
    }

    fn register(&self, site: Site) -> Registered {
        match self.birth.world(site) {
            None => Registered::Plain(self.plain.register()),
            Some(world) => {
                if !world.aborting() {
                    world.point(&self.birth.op(OpKind::WaitPrepare, Some(self.class), site));
                }
                Registered::Explored(world)
            }
        }
    }

    /// Wakes the thread that has waited longest. Never sleeps; any context.
    #[track_caller]
    pub fn wake_one(&self) {
        self.wake(OpKind::WakeOne, 1, Location::caller());
    }

    /// Wakes all. Never sleeps; any context.
    #[track_caller]
    pub fn wake_all(&self) {
        self.wake(OpKind::WakeAll, usize::MAX, Location::caller());
    }

    fn wake(&self, kind: OpKind, most: usize, site: Site) {
        match self.birth.world(site) {
            None => self.plain.wake(most),
            Some(world) if world.aborting() => {}
            Some(world) => {
                world.point(&self.birth.op(kind, Some(self.class), site));
            }
        }
    }

    /// Its class.
    pub fn class(&self) -> &'static LockClass {
        self.class
    }
}

impl fmt::Debug for WaitQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WaitQueue({})", self.class.name())
    }
}

/// How a sleep ended.
enum Slept {
    Woken,
    TimedOut,
    /// The execution is being unwound, and nobody will come.
    Abandoned,
}

/// A registration. Dropped while registered, also by a condition that panics, it is taken back.
struct Entry<'q> {
    queue: &'q WaitQueue,
    site: Site,
    registered: Option<Registered>,
}

impl Entry<'_> {
    fn sleep(mut self, timeout: Option<Duration>, deadline: Option<Instant>) -> Slept {
        let woken = match &self.registered {
            Some(Registered::Plain(waiter)) => {
                // A wake that comes between the end of the sleep and the cancelling counts.
                waiter.sleep(deadline) || self.queue.plain.cancel(waiter)
            }
            Some(Registered::Explored(world)) if world.aborting() => {
                self.registered = None;
                return Slept::Abandoned;
            }
            Some(Registered::Explored(world)) => {
                world.point(&self.queue.birth.op(OpKind::Wait(timeout), Some(self.queue.class), self.site))
            }
            None => true,
        };
        self.registered = None;
        if woken { Slept::Woken } else { Slept::TimedOut }
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        let woken = match self.registered.take() {
            None => false,
            Some(Registered::Plain(waiter)) => self.queue.plain.cancel(&waiter),
            Some(Registered::Explored(world)) => {
                !world.aborting()
                    && world.point(&self.queue.birth.op(
                        OpKind::WaitCancel,
                        Some(self.queue.class),
                        self.site,
                    ))
            }
        };
        if woken {
            // This thread did not need the wake; the next one may.
            self.queue.wake(OpKind::WakeOne, 1, self.site);
        }
    }
}
