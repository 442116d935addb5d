// SPDX-License-Identifier: MIT OR Apache-2.0
//! `mmu_interval_notifier` (5.5+): a notifier for one range, with the sequence that makes mirroring it correct.
//!
//! | state of `invalidate_seq` | meaning |
//! |---|---|
//! | starts at 2, even | no active range matches a notifier; the index may change |
//! | odd | at least one range is active that matched; all active ranges share this one value |
//!
//! A start makes it odd if a notifier overlaps, and its callback stores the odd value as its own
//! ([`SetSeq::set`](crate::SetSeq::set)). Only the last end makes it even; then deferred insertions and removals
//! are applied and waiters woken. A notifier collides iff its own value equals the mm's, so one that is inserted
//! while a range is active starts out colliding: it did not hear the start. The start of a range that fails
//! (non-blockable) is ended here, by itself.
//!
//! Lock order: `insert`, `remove` and `read_begin` may sleep until callbacks have run, so they must not be called
//! with a lock that a callback takes. Lockdep reports it through the class
//! [`INVALIDATE_START`](crate::INVALIDATE_START).

use std::fmt;
use std::panic::Location;
use std::sync::Arc;

use interleave::explore::{SiteKind, mutated};
use interleave::{MaySleep, Ordering};

use crate::Range;
use crate::inside::{self, InsideInvalidation};
use crate::itree::{Interval, Removal};
use crate::primary::{Invalidate, Seq};
use crate::registry::{INVALIDATE_START_MAP, NotifierSubscriptions, RegisterError};

/// A notifier for one range of an mm. Dropping it is [`IntervalNotifier::remove`] without the wait: no callback
/// starts afterwards, one may still run.
#[must_use = "dropping it removes the notifier"]
pub struct IntervalNotifier {
    mm: Arc<NotifierSubscriptions>,
    interval: Arc<Interval>,
}

impl NotifierSubscriptions {
    /// Calls `callback` for every invalidation that overlaps `range` (`mmu_interval_notifier_insert`). While any
    /// range is active the notifier begins colliding: [`IntervalNotifier::read_begin`] waits.
    ///
    /// # Errors
    /// [`RegisterError::Exited`] once the mm is being torn down.
    #[track_caller]
    pub fn insert_interval(
        self: &Arc<Self>,
        cx: &mut MaySleep<'_>,
        range: Range,
        callback: Arc<dyn Invalidate>,
    ) -> Result<IntervalNotifier, RegisterError> {
        if !inside::any(self.id()) {
            self.prime_lockdep(cx);
        }
        let interval = {
            let mut state = self.state.lock(cx);
            if state.exiting {
                return Err(RegisterError::Exited);
            }
            let interval = state.itree.insert(range, callback);
            self.publish_seq(&state.itree);
            interval
        };
        Ok(IntervalNotifier { mm: Arc::clone(self), interval })
    }

    fn remove_interval(&self, cx: &mut MaySleep<'_>, interval: &Arc<Interval>) -> Option<Seq> {
        let removal = self.state.lock(cx).itree.remove(interval);
        match removal {
            Removal::Done(_) => None,
            Removal::AfterEndOf(seq) => Some(seq),
        }
    }
}

impl IntervalNotifier {
    /// What it listens to.
    pub fn range(&self) -> Range {
        self.interval.range
    }

    /// Begins a read: waits while an invalidation of the range is active, then returns its sequence
    /// (`mmu_interval_read_begin`). Get the pages after it, and install them only if
    /// [`IntervalNotifier::read_retry`] says false under the lock that the callback takes.
    ///
    /// # Errors
    /// [`InsideInvalidation`] where it would wait for its own caller.
    #[track_caller]
    pub fn read_begin(&self, cx: &mut MaySleep<'_>) -> Result<Seq, InsideInvalidation> {
        if inside::any(self.mm.id()) {
            return Err(InsideInvalidation);
        }
        drop(INVALIDATE_START_MAP.acquire(cx));
        let (seq, invalidating) = {
            let state = self.mm.state.lock(cx);
            let seq = self.interval.seq.load(Ordering::Acquire);
            (seq, seq == state.itree.seq())
        };
        if !mutated(SiteKind::Wait, Location::caller()) && invalidating {
            self.mm.wait_for_end_of(cx, Seq::new(seq));
        }
        Ok(Seq::new(seq))
    }

    /// Has the range been invalidated since `seq`? True: the pages must be got again. Never sleeps; one load.
    /// Call it under the lock that the callback holds around [`SetSeq::set`](crate::SetSeq::set).
    #[track_caller]
    pub fn read_retry(&self, seq: Seq) -> bool {
        let off = mutated(SiteKind::Retry, Location::caller());
        !off && self.interval.seq.load(Ordering::Acquire) != seq.get()
    }

    /// Removes the notifier; no callback runs after it returns. Waits for the end of active ranges, if one matched any
    /// notifier (`mmu_interval_notifier_remove`). A second call only waits.
    ///
    /// # Errors
    /// [`InsideInvalidation`] where it would wait for its own caller; nothing has changed then.
    #[track_caller]
    pub fn remove(&self, cx: &mut MaySleep<'_>) -> Result<(), InsideInvalidation> {
        if inside::any(self.mm.id()) {
            return Err(InsideInvalidation);
        }
        drop(INVALIDATE_START_MAP.acquire(cx));
        if let Some(seq) = self.mm.remove_interval(cx, &self.interval) {
            self.mm.wait_for_end_of(cx, seq);
        }
        Ok(())
    }
}

impl Drop for IntervalNotifier {
    fn drop(&mut self) {
        self.interval.dropped.store(true, Ordering::Release);
        // In atomic context the entry stays in the index, silent, until the mm goes.
        let _ = MaySleep::try_enter(|cx| self.mm.remove_interval(cx, &self.interval));
    }
}

impl fmt::Debug for IntervalNotifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seq = self.interval.seq.load(Ordering::Relaxed);
        f.debug_struct("IntervalNotifier").field("range", &self.range()).field("seq", &seq).finish()
    }
}
