// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the lease slots are made of. Apart, so that tests/loom.rs can put loom's in their place.

pub(crate) use interleave::{
    AsymmetricFence, AtomicQuad, AtomicU64, AtomicWord, AtomicWords, Here, NoBarrier, Ordering,
};

/// Lease slots of one thread: with a count beside them, a pair of cache lines. Loom has fewer.
pub(crate) const SLOTS: usize = 7;

/// A cell whose users keep the rules of sharing themselves.
pub(crate) struct Cell<T>(std::cell::UnsafeCell<T>);

impl<T> Cell<T> {
    pub(crate) fn new(value: T) -> Cell<T> {
        Cell(std::cell::UnsafeCell::new(value))
    }

    /// For reading.
    #[inline]
    pub(crate) fn with<R>(&self, f: impl FnOnce(*const T) -> R) -> R {
        f(self.0.get())
    }

    /// For writing.
    #[inline]
    pub(crate) fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
        f(self.0.get())
    }
}
