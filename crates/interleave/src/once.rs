// SPDX-License-Identifier: MIT OR Apache-2.0
//! Values that are set once.

use std::panic::Location;
use std::sync::OnceLock;

use crate::birth::ObjectKind;
use crate::lockdep::Site;
use crate::raw::RawLock;
use crate::{MaySleep, might_sleep};

/// A value that is set once. If the one who makes it panics, the next one tries again. Making it wants a
/// [`MaySleep`]; any context may look. In statics: [`const_new`](Self::const_new), plain only.
///
/// Only one thread at a time makes the value, under a lock that lockdep does not see: all cells of a program would be
/// one class, and a cell that is made with the help of another is no recursion.
pub struct OnceCell<T> {
    making: RawLock,
    /// Set under `making`.
    value: OnceLock<T>,
}

impl<T> OnceCell<T> {
    /// An empty cell, in the world of the calling thread.
    #[track_caller]
    pub fn new() -> Self {
        let making = RawLock::here(ObjectKind::Once, None, Location::caller(), false, || None);
        OnceCell { making, ..Self::const_new() }
    }

    /// An empty cell in a static; it cannot be used under exploration.
    pub const fn const_new() -> Self {
        OnceCell { making: RawLock::plain(), value: OnceLock::new() }
    }

    /// The value, if it is set. Never sleeps.
    #[track_caller]
    #[inline]
    pub fn get(&self) -> Option<&T> {
        self.making.look(Location::caller());
        self.value.get()
    }

    /// The value. The first caller makes it, and others sleep meanwhile.
    ///
    /// `f` must not ask for the value of this very cell: that would wait for itself for ever.
    #[track_caller]
    #[inline]
    pub fn get_or_init(&self, cx: &mut MaySleep<'_>, f: impl FnOnce(&mut MaySleep<'_>) -> T) -> &T {
        might_sleep();
        match self.get() {
            Some(value) => value,
            None => self.make(cx, Location::caller(), f),
        }
    }

    #[cold]
    fn make(&self, cx: &mut MaySleep<'_>, site: Site, f: impl FnOnce(&mut MaySleep<'_>) -> T) -> &T {
        struct Making<'a>(&'a RawLock, Site);
        impl Drop for Making<'_> {
            fn drop(&mut self) {
                // SAFETY: `make` took the lock just before it made this, and nobody else lets it go.
                unsafe { self.0.unlock(None, self.1, || 0) }
            }
        }
        self.making.lock(None, site);
        let _making = Making(&self.making, site);
        if let Some(value) = self.value.get() {
            return value;
        }
        // Not inside `OnceLock::get_or_init`, whose own lock the world would know nothing of.
        let value = f(cx);
        self.value.get_or_init(|| value)
    }
}

impl<T> Default for OnceCell<T> {
    #[track_caller]
    fn default() -> Self {
        Self::new()
    }
}

impl<T: std::fmt::Debug> std::fmt::Debug for OnceCell<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.value.fmt(f)
    }
}
