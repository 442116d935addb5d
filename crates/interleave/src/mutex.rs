// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sleeping lock.
//!
//! Sleeping is for process context:
//! ```compile_fail,E0308
//! use interleave::{LockClass, MaySleep, Mutex, preempt_disable};
//! static CLASS: LockClass = LockClass::new("doc");
//! let mutex = Mutex::new(&CLASS, 0);
//! MaySleep::enter(|cx| preempt_disable(cx, |atomic| { mutex.lock(atomic); }));
//! ```
//! and a section that must not block may only try:
//! ```compile_fail,E0308
//! use interleave::{LockClass, MaySleep, Mutex};
//! static CLASS: LockClass = LockClass::new("doc");
//! let mutex = Mutex::new(&CLASS, 0);
//! MaySleep::enter(|cx| cx.non_block(|nb| { mutex.lock(nb); }));
//! ```
//! ```
//! # use interleave::{LockClass, MaySleep, Mutex};
//! # static CLASS: LockClass = LockClass::new("doc");
//! # let mutex = Mutex::new(&CLASS, 0);
//! MaySleep::enter(|cx| cx.non_block(|nb| assert!(mutex.try_lock(nb).is_some())));
//! ```

use std::cell::UnsafeCell;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::panic::Location;

use crate::birth::ObjectKind;
use crate::lockdep;
use crate::raw::RawLock;
use crate::{Context, LockClass, MaySleep, might_sleep};

/// A lock whose waiters sleep. Locking wants a [`MaySleep`]; any context may try. In statics:
/// [`const_new`](Self::const_new), plain only. Not poisoned by panics.
pub struct Mutex<T: ?Sized> {
    raw: RawLock,
    class: &'static LockClass,
    digest: Option<fn(&T) -> u64>,
    /// Protected by `raw`.
    data: UnsafeCell<T>,
}

// SAFETY: the raw lock hands out the data to one thread at a time, so sharing the lock only sends the data.
unsafe impl<T: ?Sized + Send> Sync for Mutex<T> {}
// SAFETY: moving the lock moves the data, and nothing else in it belongs to a thread.
unsafe impl<T: ?Sized + Send> Send for Mutex<T> {}

impl<T> Mutex<T> {
    /// A lock of class `class`, in the world of the calling thread.
    #[track_caller]
    #[inline]
    pub fn new(class: &'static LockClass, data: T) -> Self {
        let raw =
            RawLock::here(ObjectKind::Mutex, Some(class), Location::caller(), size_of::<T>() == 0, || None);
        Mutex { raw, class, digest: None, data: UnsafeCell::new(data) }
    }

    /// A lock in a static; it cannot be used under exploration.
    pub const fn const_new(class: &'static LockClass, data: T) -> Self {
        Mutex { raw: RawLock::plain(), class, digest: None, data: UnsafeCell::new(data) }
    }

    /// A lock whose data an explorer can hash, to recognise a state.
    #[track_caller]
    pub fn with_digest(class: &'static LockClass, data: T, digest: fn(&T) -> u64) -> Self {
        let raw =
            RawLock::here(ObjectKind::Mutex, Some(class), Location::caller(), false, || Some(digest(&data)));
        Mutex { raw, class, digest: Some(digest), data: UnsafeCell::new(data) }
    }

    /// Takes the data out.
    pub fn into_inner(self) -> T {
        self.data.into_inner()
    }
}

impl<T: ?Sized> Mutex<T> {
    /// Locks, sleeping until it is free.
    #[track_caller]
    #[inline]
    pub fn lock(&self, cx: &mut MaySleep<'_>) -> MutexGuard<'_, T> {
        self.lock_nested(cx, 0)
    }

    /// [`lock`](Self::lock) of a second lock of a class that is already held: `subclass` tells the two apart, as a
    /// parent and a child in fork. Subclasses from [`MAX_SUBCLASSES`](crate::MAX_SUBCLASSES) on are one.
    #[track_caller]
    #[inline]
    pub fn lock_nested(&self, _cx: &mut MaySleep<'_>, subclass: u8) -> MutexGuard<'_, T> {
        let site = Location::caller();
        might_sleep();
        let node = lockdep::check(self.class, subclass, self.address(), site);
        self.raw.lock(Some(self.class), site);
        lockdep::acquired(node, self.address(), site);
        MutexGuard { lock: self, subclass, _thread: PhantomData }
    }

    /// Locks if it is free.
    #[track_caller]
    #[inline]
    pub fn try_lock<C: Context + ?Sized>(&self, _cx: &mut C) -> Option<MutexGuard<'_, T>> {
        let site = Location::caller();
        if !self.raw.try_lock(Some(self.class), site) {
            return None;
        }
        lockdep::acquired_by_try(self.class, self.address(), site);
        Some(MutexGuard { lock: self, subclass: 0, _thread: PhantomData })
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

impl<T: ?Sized> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mutex({})", self.class.name())
    }
}

/// The lock is held while this lives.
#[must_use = "the lock is let go at once"]
pub struct MutexGuard<'l, T: ?Sized> {
    lock: &'l Mutex<T>,
    subclass: u8,
    /// The held stack is the thread's own: the guard stays on it.
    _thread: PhantomData<*mut ()>,
}

// SAFETY: a shared guard gives out `&T` only.
unsafe impl<T: ?Sized + Sync> Sync for MutexGuard<'_, T> {}

impl<'l, T: ?Sized> MutexGuard<'l, T> {
    /// What it takes to lock again: the lock, and the subclass.
    pub(crate) fn origin(&self) -> (&'l Mutex<T>, u8) {
        (self.lock, self.subclass)
    }
}

impl<T: ?Sized> Deref for MutexGuard<'_, T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: this guard holds the lock, so nobody else has a reference to the data.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T: ?Sized> DerefMut for MutexGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`, and `&mut self` is the only way through this guard.
        unsafe { &mut *self.lock.data.get() }
    }
}

impl<T: ?Sized> Drop for MutexGuard<'_, T> {
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

impl<T: ?Sized + fmt::Debug> fmt::Debug for MutexGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}
