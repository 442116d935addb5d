// SPDX-License-Identifier: MIT OR Apache-2.0
//! A lock class without a lock: rules of order about things that are not locks.
use std::marker::PhantomData;

use crate::{Context, LockClass};

/// A section that has an order among locks without being one, such as the kernel's `fs_reclaim`.
pub struct LockMap {
    class: &'static LockClass,
}

impl LockMap {
    /// A map of class `class`.
    pub const fn new(class: &'static LockClass) -> Self {
        LockMap { class }
    }

    /// Enters the section.
    #[track_caller]
    pub fn acquire<C: Context + ?Sized>(&self, _cx: &mut C) -> LockMapGuard<'_> {
        LockMapGuard { _map: self, _thread: PhantomData }
    }

    /// Its class.
    pub fn class(&self) -> &'static LockClass {
        self.class
    }
}

/// The section lasts while this lives.
#[must_use]
pub struct LockMapGuard<'l> {
    _map: &'l LockMap,
    _thread: PhantomData<*mut ()>,
}

impl Drop for LockMapGuard<'_> {
    fn drop(&mut self) {}
}
