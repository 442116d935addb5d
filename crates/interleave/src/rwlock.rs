// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sleeping readers-writer lock. A reader queues behind a waiting writer.
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use parking_lot::lock_api::{RawRwLock as _, RawRwLockDowngrade as _};

use crate::{Context, LockClass, MaySleep, might_sleep};

/// Many readers or one writer; waiters sleep, and a reader queues behind a waiting writer.
pub struct RwLock<T: ?Sized> {
    raw: parking_lot::RawRwLock,
    class: &'static LockClass,
    digest: Option<fn(&T) -> u64>,
    data: UnsafeCell<T>,
}

// SAFETY: the raw lock gives either shared access from many threads (T: Sync) or exclusive access from one (T: Send).
unsafe impl<T: ?Sized + Send + Sync> Sync for RwLock<T> {}
// SAFETY: moving the lock moves the data, and nothing in it belongs to a thread.
unsafe impl<T: ?Sized + Send> Send for RwLock<T> {}

impl<T> RwLock<T> {
    /// A lock of class `class`.
    #[track_caller]
    pub fn new(class: &'static LockClass, data: T) -> Self {
        Self::const_new(class, data)
    }

    /// A lock in a static.
    pub const fn const_new(class: &'static LockClass, data: T) -> Self {
        RwLock { raw: parking_lot::RawRwLock::INIT, class, digest: None, data: UnsafeCell::new(data) }
    }

    /// A lock whose data can be hashed by an explorer.
    #[track_caller]
    pub fn with_digest(class: &'static LockClass, data: T, digest: fn(&T) -> u64) -> Self {
        RwLock { digest: Some(digest), ..Self::new(class, data) }
    }

    /// Takes the data out.
    pub fn into_inner(self) -> T {
        self.data.into_inner()
    }
}

impl<T: ?Sized> RwLock<T> {
    /// Locks for reading.
    #[track_caller]
    pub fn read(&self, _cx: &mut MaySleep<'_>) -> ReadGuard<'_, T> {
        might_sleep();
        self.raw.lock_shared();
        ReadGuard { lock: self, _thread: PhantomData }
    }

    /// [`read`](Self::read) of a second lock of a class that is already held.
    #[track_caller]
    pub fn read_nested(&self, cx: &mut MaySleep<'_>, _subclass: u8) -> ReadGuard<'_, T> {
        self.read(cx)
    }

    /// Locks for writing.
    #[track_caller]
    pub fn write(&self, _cx: &mut MaySleep<'_>) -> WriteGuard<'_, T> {
        might_sleep();
        self.raw.lock_exclusive();
        WriteGuard { lock: self, _thread: PhantomData }
    }

    /// [`write`](Self::write) of a second lock of a class that is already held.
    #[track_caller]
    pub fn write_nested(&self, cx: &mut MaySleep<'_>, _subclass: u8) -> WriteGuard<'_, T> {
        self.write(cx)
    }

    /// Locks for reading if nobody writes or waits to write.
    #[track_caller]
    pub fn try_read<C: Context + ?Sized>(&self, _cx: &mut C) -> Option<ReadGuard<'_, T>> {
        self.raw.try_lock_shared().then(|| ReadGuard { lock: self, _thread: PhantomData })
    }

    /// Locks for writing if it is free.
    #[track_caller]
    pub fn try_write<C: Context + ?Sized>(&self, _cx: &mut C) -> Option<WriteGuard<'_, T>> {
        self.raw.try_lock_exclusive().then(|| WriteGuard { lock: self, _thread: PhantomData })
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

/// The lock is held for reading while this lives.
#[must_use]
pub struct ReadGuard<'l, T: ?Sized> {
    lock: &'l RwLock<T>,
    _thread: PhantomData<*mut ()>,
}

/// The lock is held for writing while this lives.
#[must_use]
pub struct WriteGuard<'l, T: ?Sized> {
    lock: &'l RwLock<T>,
    _thread: PhantomData<*mut ()>,
}

// SAFETY: a shared guard gives out `&T` only.
unsafe impl<T: ?Sized + Sync> Sync for ReadGuard<'_, T> {}
// SAFETY: a shared guard gives out `&T` only.
unsafe impl<T: ?Sized + Sync> Sync for WriteGuard<'_, T> {}

impl<'l, T: ?Sized> WriteGuard<'l, T> {
    /// Becomes a reader without letting another writer in between.
    #[track_caller]
    pub fn downgrade(this: Self) -> ReadGuard<'l, T> {
        let lock = this.lock;
        std::mem::forget(this);
        // SAFETY: `this` held the lock for writing, and is forgotten, so that it does not unlock.
        unsafe { lock.raw.downgrade() };
        ReadGuard { lock, _thread: PhantomData }
    }
}

impl<T: ?Sized> Deref for ReadGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: this guard holds the lock for reading, so there is no `&mut` to the data.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T: ?Sized> Deref for WriteGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: this guard holds the lock for writing, so nobody else has a reference to the data.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T: ?Sized> DerefMut for WriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`, and `&mut self` is the only way through this guard.
        unsafe { &mut *self.lock.data.get() }
    }
}

impl<T: ?Sized> Drop for ReadGuard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: this guard holds the lock for reading.
        unsafe { self.lock.raw.unlock_shared() }
    }
}

impl<T: ?Sized> Drop for WriteGuard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: this guard holds the lock for writing.
        unsafe { self.lock.raw.unlock_exclusive() }
    }
}
