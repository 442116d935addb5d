// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reference counts.
use crate::atomic::{AtomicU32, Ordering, fence};

/// A reference count, as the kernel's `kref`: begins at one, and zero is final. Any context. Not for statics: it
/// belongs to an object that ends.
#[derive(Debug)]
pub struct RefCount(AtomicU32);

impl RefCount {
    /// One reference.
    #[track_caller]
    #[allow(clippy::new_without_default, reason = "a count without an owner is a mistake")]
    pub fn new() -> Self {
        RefCount(AtomicU32::new(1))
    }

    /// One more; the caller has one.
    ///
    /// # Panics
    /// If the count is zero, or has reached 2^31.
    #[track_caller]
    pub fn get(&self) {
        let before = self.0.fetch_add(1, Ordering::Relaxed);
        assert!(before != 0 && before < 1 << 31, "RefCount::get on a count of {before}");
    }

    /// One more, unless the object is on its way out.
    #[track_caller]
    pub fn get_unless_zero(&self) -> bool {
        let mut n = self.0.load(Ordering::Relaxed);
        while n != 0 {
            match self.0.compare_exchange(n, n + 1, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => n = now,
            }
        }
        false
    }

    /// One fewer; whether it was the last, so that the caller must release the object.
    ///
    /// # Panics
    /// If the count is zero.
    #[track_caller]
    pub fn put(&self) -> bool {
        let before = self.0.fetch_sub(1, Ordering::Release);
        assert!(before != 0, "RefCount::put on a count of zero");
        if before == 1 {
            fence(Ordering::Acquire);
        }
        before == 1
    }
}
