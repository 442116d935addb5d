// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sleeping lock.
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use parking_lot::lock_api::RawMutex as _;

use crate::{Context, LockClass, MaySleep, might_sleep};

/// A lock whose waiters sleep. Locking wants a [`MaySleep`]; any context may try.
pub struct Mutex<T: ?Sized> {
    raw: parking_lot::RawMutex,
    class: &'static LockClass,
    digest: Option<fn(&T) -> u64>,
    data: UnsafeCell<T>,
}

// SAFETY: the raw lock hands out the data to one thread at a time, so sharing the lock sends the data.
unsafe impl<T: ?Sized + Send> Sync for Mutex<T> {}
// SAFETY: moving the lock moves the data, and nothing in it belongs to a thread.
unsafe impl<T: ?Sized + Send> Send for Mutex<T> {}

impl<T> Mutex<T> {
    /// A lock of class `class`.
    #[track_caller]
    pub fn new(class: &'static LockClass, data: T) -> Self {
        Self::const_new(class, data)
    }

    /// A lock in a static.
    pub const fn const_new(class: &'static LockClass, data: T) -> Self {
        Mutex { raw: parking_lot::RawMutex::INIT, class, digest: None, data: UnsafeCell::new(data) }
    }

    /// A lock whose data can be hashed by an explorer.
    #[track_caller]
    pub fn with_digest(class: &'static LockClass, data: T, digest: fn(&T) -> u64) -> Self {
        Mutex { digest: Some(digest), ..Self::new(class, data) }
    }

    /// Takes the data out.
    pub fn into_inner(self) -> T {
        self.data.into_inner()
    }
}

impl<T: ?Sized> Mutex<T> {
    /// Locks, sleeping until it is free.
    #[track_caller]
    pub fn lock(&self, _cx: &mut MaySleep<'_>) -> MutexGuard<'_, T> {
        might_sleep();
        self.raw.lock();
        MutexGuard { lock: self, _thread: PhantomData }
    }

    /// [`lock`](Self::lock) of a second lock of a class that is already held, `subclass` levels down.
    #[track_caller]
    pub fn lock_nested(&self, cx: &mut MaySleep<'_>, _subclass: u8) -> MutexGuard<'_, T> {
        self.lock(cx)
    }

    /// Locks if it is free.
    #[track_caller]
    pub fn try_lock<C: Context + ?Sized>(&self, _cx: &mut C) -> Option<MutexGuard<'_, T>> {
        self.raw.try_lock().then(|| MutexGuard { lock: self, _thread: PhantomData })
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

/// The lock is held while this lives.
#[must_use]
pub struct MutexGuard<'l, T: ?Sized> {
    lock: &'l Mutex<T>,
    _thread: PhantomData<*mut ()>,
}

// SAFETY: a shared guard gives out `&T` only.
unsafe impl<T: ?Sized + Sync> Sync for MutexGuard<'_, T> {}

impl<T: ?Sized> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: this guard holds the lock, so nobody else has a reference to the data.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T: ?Sized> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`, and `&mut self` is the only way through this guard.
        unsafe { &mut *self.lock.data.get() }
    }
}

impl<T: ?Sized> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: this guard holds the lock.
        unsafe { self.lock.raw.unlock() }
    }
}

impl<'l, T: ?Sized> MutexGuard<'l, T> {
    pub(crate) fn lock_of(&self) -> &'l Mutex<T> {
        self.lock
    }
}
