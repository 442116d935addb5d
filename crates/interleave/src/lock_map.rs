// SPDX-License-Identifier: MIT OR Apache-2.0
//! A lock class without a lock: rules of order about things that are not locks.
//!
//! The kernel has such maps for `fs_reclaim` and for `mmu_notifier_invalidate_range_start`: whoever allocates memory
//! under a lock that reclaim takes is wrong, also if reclaim does not run this time.
//!
//! A map never waits and threads share nothing through it, so that no schedule can tell two orders of two sections
//! apart: under exploration it is noted, for the trace and the lock set, and is no scheduling point. For the same
//! reason a map in a static serves in every world.

use std::fmt;
use std::marker::PhantomData;
use std::panic::Location;

use crate::lockdep;
use crate::world::{self, OpKind};
use crate::{Context, LockClass};

/// A section that has a place in the order of locks without being one. Any context may enter it. Meant for statics.
pub struct LockMap {
    class: &'static LockClass,
}

impl LockMap {
    /// A map of class `class`.
    pub const fn new(class: &'static LockClass) -> Self {
        LockMap { class }
    }

    /// Enters the section. It is checked as a lock that is waited for, and never waits.
    #[track_caller]
    #[inline]
    pub fn acquire<C: Context + ?Sized>(&self, _cx: &mut C) -> LockMapGuard<'_> {
        let site = Location::caller();
        let node = lockdep::check(self.class, 0, self.address(), site);
        world::tell(OpKind::MapAcquire, self.class, site);
        lockdep::acquired(node, self.address(), site);
        LockMapGuard { map: self, _thread: PhantomData }
    }

    /// Its class.
    pub fn class(&self) -> &'static LockClass {
        self.class
    }

    #[inline(always)]
    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }
}

impl fmt::Debug for LockMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LockMap({})", self.class.name())
    }
}

/// The section lasts while this lives.
#[must_use = "the section ends at once"]
#[derive(Debug)]
pub struct LockMapGuard<'l> {
    map: &'l LockMap,
    _thread: PhantomData<*mut ()>,
}

impl Drop for LockMapGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        let site = lockdep::released(self.map.address()).unwrap_or(Location::caller());
        world::tell(OpKind::MapRelease, self.map.class, site);
    }
}
