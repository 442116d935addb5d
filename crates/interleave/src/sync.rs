// SPDX-License-Identifier: MIT OR Apache-2.0
//! What [`wait_list`](crate::wait_list) is made of, in one place: tests/loom.rs puts loom's twins in its stead.

use std::time::Instant;

pub(crate) use std::sync::Arc;
pub(crate) use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
pub(crate) use std::thread::{Thread, current};

pub(crate) use parking_lot::Mutex;

/// Parks until unparked, or `deadline`, or for no reason.
pub(crate) fn park(deadline: Option<Instant>) {
    match deadline {
        None => std::thread::park(),
        Some(deadline) => std::thread::park_timeout(deadline.saturating_duration_since(Instant::now())),
    }
}

/// Whether `deadline` is past.
pub(crate) fn past(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|deadline| Instant::now() >= deadline)
}
