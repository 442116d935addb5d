// SPDX-License-Identifier: MIT OR Apache-2.0
//! The lock of atomic context.
//!
//! Its guard keeps the context borrowed, so that no sleeping lock can be taken under it:
//! ```compile_fail,E0499
//! use interleave::{LockClass, MaySleep, Mutex, SpinLock};
//! static CLASS: LockClass = LockClass::new("doc");
//! let (spin, mutex) = (SpinLock::new(&CLASS, 0), Mutex::new(&CLASS, 0));
//! MaySleep::enter(|cx| {
//!     let guard = spin.lock(cx);
//!     mutex.lock(cx);
//!     drop(guard);
//! });
//! ```
//! What it lends is an [`Atomic`], which is no help:
//! ```compile_fail,E0308
//! # use interleave::{LockClass, MaySleep, Mutex, SpinLock};
//! # static CLASS: LockClass = LockClass::new("doc");
//! # let (spin, mutex) = (SpinLock::new(&CLASS, 0), Mutex::new(&CLASS, 0));
//! MaySleep::enter(|cx| {
//!     let mut guard = spin.lock(cx);
//!     let (_data, atomic) = guard.split();
//!     mutex.lock(atomic);
//! });
//! ```
//!
//! Between real threads a waiter spins for a while and then parks, as parking_lot's does: a thread of user space can
//! lose its CPU while it holds the lock, and no preemption count prevents that.

use std::cell::UnsafeCell;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::panic::Location;

use crate::birth::ObjectKind;
use crate::context::Atomic;
use crate::lockdep;
use crate::raw::RawLock;
use crate::task::{self, InSection, Section};
use crate::{Context, LockClass};

/// A lock that any context may take, and under which nobody may sleep. In statics: [`const_new`](Self::const_new),
/// plain only. Not poisoned by panics.
pub struct SpinLock<T: ?Sized> {
    raw: RawLock,
    class: &'static LockClass,
    digest: Option<fn(&T) -> u64>,
    /// Protected by `raw`.
    data: UnsafeCell<T>,
}

// SAFETY: the raw lock hands out the data to one thread at a time, so sharing the lock only sends the data.
unsafe impl<T: ?Sized + Send> Sync for SpinLock<T> {}
// SAFETY: moving the lock moves the data, and nothing else in it belongs to a thread.
unsafe impl<T: ?Sized + Send> Send for SpinLock<T> {}

impl<T> SpinLock<T> {
    /// A lock of class `class`, in the world of the calling thread.
    #[track_caller]
    #[inline]
    pub fn new(class: &'static LockClass, data: T) -> Self {
        let raw =
            RawLock::here(ObjectKind::SpinLock, Some(class), Location::caller(), size_of::<T>() == 0, || {
                None
            });
        SpinLock { raw, class, digest: None, data: UnsafeCell::new(data) }
    }

    /// A lock in a static; it cannot be used under exploration.
    pub const fn const_new(class: &'static LockClass, data: T) -> Self {
        SpinLock { raw: RawLock::plain(), class, digest: None, data: UnsafeCell::new(data) }
    }

    /// A lock whose data an explorer can hash, to recognise a state.
    #[track_caller]
    pub fn with_digest(class: &'static LockClass, data: T, digest: fn(&T) -> u64) -> Self {
        let raw = RawLock::here(ObjectKind::SpinLock, Some(class), Location::caller(), false, || {
            Some(digest(&data))
        });
        SpinLock { raw, class, digest: Some(digest), data: UnsafeCell::new(data) }
    }

    /// Takes the data out.
    pub fn into_inner(self) -> T {
        self.data.into_inner()
    }
}

impl<T: ?Sized> SpinLock<T> {
    /// Locks. `cx` stays borrowed while the guard lives: [`SpinGuard::split`] lends the context under it.
    #[track_caller]
    #[inline]
    pub fn lock<'l, 'c, C: Context + ?Sized>(&'l self, cx: &'c mut C) -> SpinGuard<'l, 'c, T> {
        self.lock_nested(cx, 0)
    }

    /// [`lock`](Self::lock) of a second lock of a class that is already held: `subclass` tells the two apart.
    /// Subclasses from [`MAX_SUBCLASSES`](crate::MAX_SUBCLASSES) on are one.
    #[track_caller]
    #[inline]
    pub fn lock_nested<'l, 'c, C: Context + ?Sized>(
        &'l self,
        _cx: &'c mut C,
        subclass: u8,
    ) -> SpinGuard<'l, 'c, T> {
        let site = Location::caller();
        let section = task::enter(Section::Atomic, site);
        let node = lockdep::check(self.class, subclass, self.address(), site);
        self.raw.lock(Some(self.class), site);
        lockdep::acquired(node, self.address(), site);
        SpinGuard { lock: self, atomic: Atomic::lent(), _section: section }
    }

    /// Locks if it is free.
    #[track_caller]
    #[inline]
    pub fn try_lock<'l, 'c, C: Context + ?Sized>(&'l self, _cx: &'c mut C) -> Option<SpinGuard<'l, 'c, T>> {
        let site = Location::caller();
        let section = task::enter(Section::Atomic, site);
        if !self.raw.try_lock(Some(self.class), site) {
            return None;
        }
        lockdep::acquired_by_try(self.class, self.address(), site);
        Some(SpinGuard { lock: self, atomic: Atomic::lent(), _section: section })
    }

    /// The data, without locking: nobody else has the lock.
    #[inline]
    pub fn get_mut(&mut self) -> &mut T {
        self.data.get_mut()
    }

    /// Its class.
    pub fn class(&self) -> &'static LockClass {
        self.class
    }

    #[inline(always)]
    fn address(&self) -> usize {
        (&raw const self.raw).addr()
    }
}

impl<T: ?Sized> fmt::Debug for SpinLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SpinLock({})", self.class.name())
    }
}

/// The lock is held, and the thread is atomic, while this lives.
#[must_use = "the lock is let go at once"]
pub struct SpinGuard<'l, 'c, T: ?Sized> {
    lock: &'l SpinLock<T>,
    atomic: Atomic<'c>,
    /// Left after the lock is let go: fields drop after `Drop::drop`.
    _section: InSection,
}

// SAFETY: a shared guard gives out `&T` only; the token and the section are out of its reach.
unsafe impl<T: ?Sized + Sync> Sync for SpinGuard<'_, '_, T> {}

impl<'c, T: ?Sized> SpinGuard<'_, 'c, T> {
    /// The data, and the context in which to work on it.
    #[inline]
    pub fn split(&mut self) -> (&mut T, &mut Atomic<'c>) {
        // SAFETY: this guard holds the lock, and `&mut self` is the only way through it.
        (unsafe { &mut *self.lock.data.get() }, &mut self.atomic)
    }
}

impl<T: ?Sized> Deref for SpinGuard<'_, '_, T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: this guard holds the lock, so nobody else has a reference to the data.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T: ?Sized> DerefMut for SpinGuard<'_, '_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        self.split().0
    }
}

impl<T: ?Sized> Drop for SpinGuard<'_, '_, T> {
    #[inline]
    fn drop(&mut self) {
        let lock = self.lock;
        let site = lockdep::released(lock.address()).unwrap_or(Location::caller());
        // SAFETY: this guard holds the lock, so the digest reads the data alone.
        let digest = || lock.digest.map_or(0, |digest| digest(unsafe { &*lock.data.get() }));
        // SAFETY: this guard holds the lock, and is gone afterwards.
        unsafe { lock.raw.unlock(Some(lock.class), site, digest) }
    }
}

impl<T: ?Sized + fmt::Debug> fmt::Debug for SpinGuard<'_, '_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}
