// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sleeping readers-writer lock.
//!
//! A reader queues behind a waiting writer, so that writers are not starved (parking_lot's rule, and the kernel
//! rwsem's). Hence a thread that reads twice can wait for ever on a writer that came in between, and lockdep treats
//! a read as it treats a write: second reads are recursion, and orders among reads count.

use std::cell::UnsafeCell;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::panic::Location;

use parking_lot::RawRwLock;
use parking_lot::lock_api::{RawRwLock as _, RawRwLockDowngrade as _};

use crate::birth::{Birth, ObjectKind};
use crate::lockdep::{self, Site};
use crate::raw::{attempt, grant, release};
use crate::world::OpKind;
use crate::{Context, LockClass, MaySleep, might_sleep};

/// Many readers or one writer; waiters sleep. Locking wants a [`MaySleep`]; any context may try. In statics:
/// [`const_new`](Self::const_new), plain only. Not poisoned by panics.
pub struct RwLock<T: ?Sized> {
    raw: RawRwLock,
    birth: Birth,
    class: &'static LockClass,
    digest: Option<fn(&T) -> u64>,
    /// Protected by `raw`.
    data: UnsafeCell<T>,
}

// SAFETY: the raw lock gives either shared access from many threads (T: Sync) or exclusive access from one (T: Send).
unsafe impl<T: ?Sized + Send + Sync> Sync for RwLock<T> {}
// SAFETY: moving the lock moves the data, and nothing else in it belongs to a thread.
unsafe impl<T: ?Sized + Send> Send for RwLock<T> {}

impl<T> RwLock<T> {
    /// A lock of class `class`, in the world of the calling thread.
    #[track_caller]
    #[inline]
    pub fn new(class: &'static LockClass, data: T) -> Self {
        let birth = Birth::here(ObjectKind::RwLock, Some(class), Location::caller(), || None);
        RwLock { birth, ..Self::const_new(class, data) }
    }

    /// A lock in a static; it cannot be used under exploration.
    pub const fn const_new(class: &'static LockClass, data: T) -> Self {
        RwLock { raw: RawRwLock::INIT, birth: Birth::CONST, class, digest: None, data: UnsafeCell::new(data) }
    }

    /// A lock whose data an explorer can hash, to recognise a state.
    #[track_caller]
    pub fn with_digest(class: &'static LockClass, data: T, digest: fn(&T) -> u64) -> Self {
        let birth = Birth::here(ObjectKind::RwLock, Some(class), Location::caller(), || Some(digest(&data)));
        RwLock { birth, digest: Some(digest), ..Self::const_new(class, data) }
    }

    /// Takes the data out.
    pub fn into_inner(self) -> T {
        self.data.into_inner()
    }
}

impl<T: ?Sized> RwLock<T> {
    /// Locks for reading, sleeping while somebody writes or waits to write.
    #[track_caller]
    #[inline]
    pub fn read(&self, cx: &mut MaySleep<'_>) -> ReadGuard<'_, T> {
        self.read_nested(cx, 0)
    }

    /// [`read`](Self::read) of a second lock of a class that is already held: `subclass` tells the two apart.
    /// Subclasses from [`MAX_SUBCLASSES`](crate::MAX_SUBCLASSES) on are one.
    #[track_caller]
    #[inline]
    pub fn read_nested(&self, _cx: &mut MaySleep<'_>, subclass: u8) -> ReadGuard<'_, T> {
        let site = Location::caller();
        might_sleep();
        let node = lockdep::check(self.class, subclass, self.address(), site);
        match self.birth.world(site) {
            None => self.raw.lock_shared(),
            Some(world) => grant(world, self.birth, OpKind::LockShared, Some(self.class), site, &|| {
                self.raw.try_lock_shared()
            }),
        }
        lockdep::acquired(node, self.address(), site);
        ReadGuard { lock: self, _thread: PhantomData }
    }

    /// Locks for writing, sleeping until it is free.
    #[track_caller]
    #[inline]
    pub fn write(&self, cx: &mut MaySleep<'_>) -> WriteGuard<'_, T> {
        self.write_nested(cx, 0)
    }

    /// [`write`](Self::write) of a second lock of a class that is already held: `subclass` tells the two apart.
    /// Subclasses from [`MAX_SUBCLASSES`](crate::MAX_SUBCLASSES) on are one.
    #[track_caller]
    #[inline]
    pub fn write_nested(&self, _cx: &mut MaySleep<'_>, subclass: u8) -> WriteGuard<'_, T> {
        let site = Location::caller();
        might_sleep();
        let node = lockdep::check(self.class, subclass, self.address(), site);
        match self.birth.world(site) {
            None => self.raw.lock_exclusive(),
            Some(world) => grant(world, self.birth, OpKind::Lock, Some(self.class), site, &|| {
                self.raw.try_lock_exclusive()
            }),
        }
        lockdep::acquired(node, self.address(), site);
        WriteGuard { lock: self, _thread: PhantomData }
    }

    /// Locks for reading if nobody writes or waits to write.
    #[track_caller]
    #[inline]
    pub fn try_read<C: Context + ?Sized>(&self, _cx: &mut C) -> Option<ReadGuard<'_, T>> {
        let site = Location::caller();
        let taken = match self.birth.world(site) {
            None => self.raw.try_lock_shared(),
            Some(world) => attempt(world, self.birth, OpKind::TryLockShared, Some(self.class), site, &|| {
                self.raw.try_lock_shared()
            }),
        };
        if !taken {
            return None;
        }
        lockdep::acquired_by_try(self.class, self.address(), site);
        Some(ReadGuard { lock: self, _thread: PhantomData })
    }

    /// Locks for writing if it is free.
    #[track_caller]
    #[inline]
    pub fn try_write<C: Context + ?Sized>(&self, _cx: &mut C) -> Option<WriteGuard<'_, T>> {
        let site = Location::caller();
        let taken = match self.birth.world(site) {
            None => self.raw.try_lock_exclusive(),
            Some(world) => attempt(world, self.birth, OpKind::TryLock, Some(self.class), site, &|| {
                self.raw.try_lock_exclusive()
            }),
        };
        if !taken {
            return None;
        }
        lockdep::acquired_by_try(self.class, self.address(), site);
        Some(WriteGuard { lock: self, _thread: PhantomData })
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

    /// The digest of the data.
    ///
    /// # Safety
    /// The caller holds the lock, for reading at least.
    unsafe fn digest(&self) -> u64 {
        // SAFETY: the caller holds the lock, so nobody has a `&mut` to the data.
        self.digest.map_or(0, |digest| digest(unsafe { &*self.data.get() }))
    }

    #[inline(always)]
    fn released(&self) -> Site {
        lockdep::released(self.address()).unwrap_or(Location::caller())
    }
}

impl<T: ?Sized> fmt::Debug for RwLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RwLock({})", self.class.name())
    }
}

/// The lock is held for reading while this lives.
#[must_use = "the lock is let go at once"]
pub struct ReadGuard<'l, T: ?Sized> {
    lock: &'l RwLock<T>,
    /// The held stack is the thread's own: the guard stays on it.
    _thread: PhantomData<*mut ()>,
}

/// The lock is held for writing while this lives.
#[must_use = "the lock is let go at once"]
pub struct WriteGuard<'l, T: ?Sized> {
    lock: &'l RwLock<T>,
    /// The held stack is the thread's own: the guard stays on it.
    _thread: PhantomData<*mut ()>,
}

// SAFETY: a shared guard gives out `&T` only.
unsafe impl<T: ?Sized + Sync> Sync for ReadGuard<'_, T> {}
// SAFETY: a shared guard gives out `&T` only.
unsafe impl<T: ?Sized + Sync> Sync for WriteGuard<'_, T> {}

impl<'l, T: ?Sized> WriteGuard<'l, T> {
    /// Becomes a reader without letting another writer in between (the kernel's `downgrade_write`).
    #[track_caller]
    pub fn downgrade(this: Self) -> ReadGuard<'l, T> {
        let lock = this.lock;
        std::mem::forget(this);
        let site = Location::caller();
        // SAFETY: `this` held the lock for writing, and is forgotten, so that it does not unlock.
        let downgrade = || unsafe { lock.raw.downgrade() };
        match lock.birth.world(site) {
            None => downgrade(),
            Some(world) => release(
                world,
                lock.birth.op(OpKind::Downgrade, Some(lock.class), site),
                // SAFETY: the lock is held until `downgrade`, and for reading afterwards.
                || unsafe { lock.digest() },
                downgrade,
            ),
        }
        ReadGuard { lock, _thread: PhantomData }
    }
}

impl<T: ?Sized> Deref for ReadGuard<'_, T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: this guard holds the lock for reading, so there is no `&mut` to the data.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T: ?Sized> Deref for WriteGuard<'_, T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: this guard holds the lock for writing, so nobody else has a reference to the data.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T: ?Sized> DerefMut for WriteGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`, and `&mut self` is the only way through this guard.
        unsafe { &mut *self.lock.data.get() }
    }
}

impl<T: ?Sized> Drop for ReadGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        let lock = self.lock;
        let site = lock.released();
        // SAFETY: this guard holds the lock for reading, and is gone afterwards.
        let unlock = || unsafe { lock.raw.unlock_shared() };
        match lock.birth.world(site) {
            None => unlock(),
            Some(world) => {
                // SAFETY: this guard still holds the lock for reading.
                let digest = || unsafe { lock.digest() };
                release(world, lock.birth.op(OpKind::UnlockShared, Some(lock.class), site), digest, unlock);
            }
        }
    }
}

impl<T: ?Sized> Drop for WriteGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        let lock = self.lock;
        let site = lock.released();
        // SAFETY: this guard holds the lock for writing, and is gone afterwards.
        let unlock = || unsafe { lock.raw.unlock_exclusive() };
        match lock.birth.world(site) {
            None => unlock(),
            Some(world) => {
                // SAFETY: this guard still holds the lock for writing.
                let digest = || unsafe { lock.digest() };
                release(world, lock.birth.op(OpKind::Unlock, Some(lock.class), site), digest, unlock);
            }
        }
    }
}

impl<T: ?Sized + fmt::Debug> fmt::Debug for ReadGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<T: ?Sized + fmt::Debug> fmt::Debug for WriteGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}
