// SPDX-License-Identifier: MIT OR Apache-2.0
//! The run-time switch between plain running and exploration.
//!
//! One constant thread-local says whether this OS thread runs virtual threads of a [`World`]. It is empty unless an
//! exploring engine is at work on this very thread, so that one binary runs both ways at the same time. Every
//! operation of the crate looks at it, and then either goes its plain way or makes one out-of-line call into the world.
//!
//! Invariants:
//! * The world hears of an operation before it happens: [`World::point`] gets its kind, object, class and place, and
//!   returns when the calling virtual thread may do it.
//! * Objects get their numbers at birth, in the order of birth, so that a schedule means the same in each run.
//! * A lock that the world grants is then really taken, by a try that must succeed: a wrong world is a panic, and
//!   never two `&mut` to the same data.
//! * An object belongs to the world that it was born in; a constant initialiser makes it plain.

use std::any::Any;
use std::cell::Cell;
use std::panic::Location;
use std::time::Duration;

use crate::birth::Born;
use crate::class::{LockClass, Node};
use crate::explore::Engine;
use crate::lockdep::{Report, Site};
use crate::task::Held;

/// The number of an object or of a virtual thread within one execution.
pub(crate) type Id = u32;

/// What is about to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OpKind {
    Lock,
    LockShared,
    TryLock,
    TryLockShared,
    Unlock,
    UnlockShared,
    Downgrade,
    Down,
    TryDown,
    Up,
    Load,
    Store,
    Rmw,
    Fence,
    /// Registers the thread as a waiter; later wakes reach it, also while it still runs.
    WaitPrepare,
    /// Takes the registration back. Answers whether it was woken in the meantime.
    WaitCancel,
    /// Sleeps, registered, until woken. Answers whether it was woken (`false`: the timeout came first).
    Wait(Option<Duration>),
    WakeOne,
    WakeAll,
    Spawn,
    /// Sleeps until virtual thread `.0` has ended.
    Join(Id),
    Yield,
    SpinHint,
    Now,
    Sleep(Duration),
    /// Own storage of the virtual thread: seen, but never a race.
    PerThread,
    /// A ghost is changed: seen and ordered, but never a point.
    Ghost,
    /// A ghost is read.
    GhostRead,
    /// A lock map is entered or left; only ever [`noted`](World::noted).
    MapAcquire,
    MapRelease,
}

/// An operation that is about to happen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Op {
    pub(crate) kind: OpKind,
    pub(crate) object: Option<Id>,
    pub(crate) class: Option<&'static LockClass>,
    pub(crate) site: Site,
}

/// What an engine does for the virtual threads that it runs on this OS thread.
pub(crate) trait World {
    /// Numbers a new object.
    fn birth(&self, born: &Born) -> Id;

    /// Returns when the calling virtual thread may do `op`. Answers whether a try succeeds, or a waiter was woken;
    /// `true` for all else. It may unwind instead, which is how an engine ends a thread.
    ///
    /// While [`aborting`](Self::aborting) it is called only for what could not go on otherwise: a lock that another
    /// thread still holds, or the end of a thread that borrows. It then returns when that thread has been unwound so
    /// far that the lock is free, or is gone. A wait for a wake is no such thing: nobody will come, and it
    /// returns at once, so that a loop around it in a `Drop` would spin.
    fn point(&self, op: &Op) -> bool;

    /// Is the lock of `op` switched off ([`Config::without`](crate::explore::Config::without))?
    fn off(&self, op: &Op) -> bool {
        let _ = op;
        false
    }

    /// The calling virtual thread passes a lock that is switched off. Whether it takes it in earnest, which is then
    /// possible; it unwinds if it is not.
    fn enter_without(&self, op: &Op) -> bool {
        let _ = op;
        true
    }

    /// It lets go of a lock. Whether it had passed it without taking it.
    fn leave_without(&self, op: &Op) -> bool {
        let _ = op;
        false
    }

    /// `op` happens now. No scheduling point, since it neither waits nor touches what threads share: for
    /// traces, and for the lock set of the thread.
    fn noted(&self, op: &Op);

    /// Whether [`done`](Self::done) of a release is of any use, so that it pays to hash guarded data.
    fn hashes(&self) -> bool {
        true
    }

    /// `op` has happened; `value` is what a load read, what an atomic now holds, or the digest of data being unlocked.
    fn done(&self, op: &Op, value: u64);

    /// Makes a virtual thread that will run `body`. If it unwinds, `body` has been dropped.
    fn spawn(&self, op: &Op, name: &str, body: Box<dyn FnOnce() + Send>) -> Id;

    /// The name of a virtual thread.
    fn thread_name(&self, thread: Id) -> String {
        format!("virtual thread {thread}")
    }

    /// Virtual time since the beginning of the execution.
    fn now(&self) -> Duration;

    /// The execution is being unwound: `Drop`s still use the objects, and must not be scheduled any more.
    fn aborting(&self) -> bool;

    /// lockdep has found a broken rule.
    fn reported(&self, report: &Report);

    /// `inner` is about to be waited for, at `site`, while `outer` is held. `same_lock`: they are one lock.
    fn ordered(&self, outer: Held, inner: Node, same_lock: bool, site: Site) {
        let _ = (outer, inner, same_lock, site);
    }

    /// The calling virtual thread has panicked, and ends.
    fn panicked(&self, payload: &(dyn Any + Send)) {
        let _ = payload;
    }

    /// The exploring engine, if this is one.
    fn engine(&self) -> Option<&Engine> {
        None
    }
}

thread_local! {
    static WORLD: Cell<Option<&'static dyn World>> = const { Cell::new(None) };
}

/// The world that this thread is in, or `None` for plain running.
#[inline(always)]
pub(crate) fn active() -> Option<&'static dyn World> {
    WORLD.get()
}

/// Puts this OS thread into `world`, or back; returns where it was.
pub(crate) fn install(world: Option<&'static dyn World>) -> Option<&'static dyn World> {
    WORLD.replace(world)
}

/// An operation without an object. `plain` runs outside exploration, and while it is being unwound.
#[track_caller]
#[inline]
pub(crate) fn note(kind: OpKind) -> Option<&'static dyn World> {
    let world = active()?;
    announce(world, kind, Location::caller())
}

#[cold]
#[inline(never)]
fn announce(world: &'static dyn World, kind: OpKind, site: Site) -> Option<&'static dyn World> {
    if world.aborting() {
        return None;
    }
    world.point(&Op { kind, object: None, class: None, site });
    Some(world)
}

/// Tells the world of what is no scheduling point.
#[inline]
pub(crate) fn tell(kind: OpKind, class: &'static LockClass, site: Site) {
    if let Some(world) = active() {
        tell_world(world, &Op { kind, object: None, class: Some(class), site });
    }
}

#[cold]
#[inline(never)]
fn tell_world(world: &'static dyn World, op: &Op) {
    if !world.aborting() {
        world.noted(op);
    }
}

#[cfg(test)]
mod tests;
