// SPDX-License-Identifier: MIT OR Apache-2.0
//! The lock of atomic context.
use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::panic::Location;

use parking_lot::lock_api::RawMutex as _;

use crate::context::Atomic;
use crate::task::{self, InSection, Section};
use crate::{Context, LockClass};

/// A lock that any context may take, and under which nobody may sleep.
pub struct SpinLock<T: ?Sized> {
    raw: parking_lot::RawMutex,
    class: &'static LockClass,
    digest: Option<fn(&T) -> u64>,
    data: UnsafeCell<T>,
}

// SAFETY: the raw lock hands out the data to one thread at a time, so sharing the lock sends the data.
unsafe impl<T: ?Sized + Send> Sync for SpinLock<T> {}
// SAFETY: moving the lock moves the data, and nothing in it belongs to a thread.
unsafe impl<T: ?Sized + Send> Send for SpinLock<T> {}

impl<T> SpinLock<T> {
    /// A lock of class `class`.
    #[track_caller]
    pub fn new(class: &'static LockClass, data: T) -> Self {
        Self::const_new(class, data)
    }

    /// A lock in a static.
    pub const fn const_new(class: &'static LockClass, data: T) -> Self {
        SpinLock { raw: parking_lot::RawMutex::INIT, class, digest: None, data: UnsafeCell::new(data) }
    }

    /// A lock whose data can be hashed by an explorer.
    #[track_caller]
    pub fn with_digest(class: &'static LockClass, data: T, digest: fn(&T) -> u64) -> Self {
        SpinLock { digest: Some(digest), ..Self::new(class, data) }
    }

    /// Takes the data out.
    pub fn into_inner(self) -> T {
        self.data.into_inner()
    }
}

impl<T: ?Sized> SpinLock<T> {
    /// Locks. `cx` stays borrowed while the guard lives: use [`SpinGuard::split`] for the context under it.
    #[track_caller]
    pub fn lock<'l, 'c, C: Context + ?Sized>(&'l self, _cx: &'c mut C) -> SpinGuard<'l, 'c, T> {
        let section = task::enter(Section::Atomic, Location::caller());
        self.raw.lock();
        SpinGuard { lock: self, atomic: Atomic::lent(), _section: section }
    }

    /// [`lock`](Self::lock) of a second lock of a class that is already held.
    #[track_caller]
    pub fn lock_nested<'l, 'c, C: Context + ?Sized>(
        &'l self,
        cx: &'c mut C,
        _subclass: u8,
    ) -> SpinGuard<'l, 'c, T> {
        self.lock(cx)
    }

    /// Locks if it is free.
    #[track_caller]
    pub fn try_lock<'l, 'c, C: Context + ?Sized>(&'l self, _cx: &'c mut C) -> Option<SpinGuard<'l, 'c, T>> {
        let section = task::enter(Section::Atomic, Location::caller());
        self.raw.try_lock().then(|| SpinGuard { lock: self, atomic: Atomic::lent(), _section: section })
    }

    /// The data, without locking: nobody else has the lock.
    pub fn get_mut(&mut self) -> &mut T {
        self.data.get_mut()
    }

    /// Its class.
    pub fn class(&self) -> &'static LockClass {
        self.class
    }
}

/// The lock is held, and the thread is atomic, while this lives.
#[must_use]
pub struct SpinGuard<'l, 'c, T: ?Sized> {
    lock: &'l SpinLock<T>,
    atomic: Atomic<'c>,
    _section: InSection,
}

impl<'c, T: ?Sized> SpinGuard<'_, 'c, T> {
    /// The data, and the context in which it may be worked on.
    pub fn split(&mut self) -> (&mut T, &mut Atomic<'c>) {
        // SAFETY: this guard holds the lock, and `&mut self` is the only way through it.
        (unsafe { &mut *self.lock.data.get() }, &mut self.atomic)
    }
}

impl<T: ?Sized> Deref for SpinGuard<'_, '_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: this guard holds the lock, so nobody else has a reference to the data.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T: ?Sized> DerefMut for SpinGuard<'_, '_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.split().0
    }
}

impl<T: ?Sized> Drop for SpinGuard<'_, '_, T> {
    fn drop(&mut self) {
        // SAFETY: this guard holds the lock.
        unsafe { self.lock.raw.unlock() }
    }
}
