// SPDX-License-Identifier: MIT OR Apache-2.0
//! The interval notifiers of one mm: `invalidate_seq`, `active_invalidate_ranges`, `itree` and `deferred_list` of
//! `struct mmu_notifier_subscriptions`, as plain data under its spin lock.
//!
//! Invariants: `seq` is odd iff a range is active and, since it became active, a notifier matched an active range
//! or was inserted; while it is odd the index does not change, so a walk may drop the lock and go on.

use std::sync::Arc;

use interleave::{AtomicBool, AtomicU64, Digest, Ordering};

use crate::primary::{Invalidate, Seq};
use crate::{Cursor, IntervalIndex, Key, Range};

/// One interval notifier (`struct mmu_interval_notifier`).
pub(crate) struct Interval {
    pub(crate) range: Range,
    pub(crate) callback: Arc<dyn Invalidate>,
    /// The last sequence that collided with it; written by its callback under the driver's lock.
    pub(crate) seq: AtomicU64,
    /// Its handle was dropped without waiting: no further callback starts.
    pub(crate) dropped: AtomicBool,
    /// Protected by the registry's lock.
    place: AtomicU64,
}

const OUTSIDE: u64 = u64::MAX;

impl Interval {
    fn place(&self) -> Option<Key> {
        match self.place.load(Ordering::Relaxed) {
            OUTSIDE => None,
            bits => Some(Key::from_bits(bits)),
        }
    }

    fn set_place(&self, key: Option<Key>) {
        self.place.store(key.map_or(OUTSIDE, Key::to_bits), Ordering::Relaxed);
    }
}

/// Notifiers fetched under one hold of the lock.
pub(crate) type Batch = [Option<Arc<Interval>>; 8];

enum Deferred {
    Insert(Arc<Interval>),
    Remove(Arc<Interval>),
}

pub(crate) struct Itree {
    seq: u64,
    active: u64,
    index: IntervalIndex<Arc<Interval>>,
    deferred: Vec<Deferred>,
}

/// By identity: what a notifier's own words hold is seen where they are read.
impl Digest for Interval {
    fn digest(&self) -> u64 {
        (self.range.start(), self.range.end(), self.seq.identity()).digest()
    }
}

impl Digest for Itree {
    fn digest(&self) -> u64 {
        let mut cursor = self.index.cursor(Range::ALL);
        let entry =
            || self.index.next(&mut cursor).map(|(key, _, interval)| (key.to_bits(), interval.digest()));
        let index: Vec<_> = std::iter::from_fn(entry).collect();
        let deferred = |deferred: &Deferred| match deferred {
            Deferred::Insert(interval) => (true, interval.digest()),
            Deferred::Remove(interval) => (false, interval.digest()),
        };
        let deferred: Vec<_> = self.deferred.iter().map(deferred).collect();
        (self.seq, self.active, index, deferred).digest()
    }
}

/// What a removal has to wait for.
pub(crate) enum Removal {
    Done(#[expect(dead_code, reason = "dropped by the caller, outside the lock")] Option<Arc<Interval>>),
    AfterEndOf(Seq),
}

impl Itree {
    pub(crate) fn new() -> Itree {
        Itree { seq: 2, active: 0, index: IntervalIndex::new(), deferred: Vec::new() }
    }

    pub(crate) fn seq(&self) -> u64 {
        self.seq
    }

    fn is_invalidating(&self) -> bool {
        self.seq & 1 == 1
    }

    /// A range becomes active. The first notifiers that match are in the batch.
    pub(crate) fn start(&mut self, range: Range) -> (Cursor, Batch) {
        self.active += 1;
        let mut cursor = self.index.cursor(range);
        let batch = self.more(&mut cursor);
        if batch[0].is_some() {
            self.seq |= 1;
        }
        (cursor, batch)
    }

    pub(crate) fn more(&self, cursor: &mut Cursor) -> Batch {
        std::array::from_fn(|_| self.index.next(cursor).map(|(_, _, interval)| Arc::clone(interval)))
    }

    /// A range ends. The last one applies what was deferred; `Some` says that waiters are to be woken, with what is to
    /// be dropped outside the lock.
    pub(crate) fn end(&mut self) -> Option<Vec<Arc<Interval>>> {
        self.active -= 1;
        if self.active > 0 || !self.is_invalidating() {
            return None;
        }
        self.seq += 1;
        let mut removed = Vec::new();
        for deferred in std::mem::take(&mut self.deferred) {
            match deferred {
                Deferred::Insert(interval) => self.place(interval),
                Deferred::Remove(interval) => removed.extend(self.take(&interval)),
            }
        }
        Some(removed)
    }

    pub(crate) fn insert(&mut self, range: Range, callback: Arc<dyn Invalidate>) -> Arc<Interval> {
        let interval = Arc::new(Interval {
            range,
            callback,
            seq: AtomicU64::new(0),
            dropped: AtomicBool::new(false),
            place: AtomicU64::new(OUTSIDE),
        });
        if self.active == 0 {
            interval.seq.store(self.seq - 1, Ordering::Release);
            self.place(Arc::clone(&interval));
            return interval;
        }
        // An active range may cover it, and its start was not heard: collide until the last one ends.
        if self.is_invalidating() {
            self.deferred.push(Deferred::Insert(Arc::clone(&interval)));
        } else {
            self.seq |= 1;
            self.place(Arc::clone(&interval));
        }
        interval.seq.store(self.seq, Ordering::Release);
        interval
    }

    pub(crate) fn remove(&mut self, interval: &Arc<Interval>) -> Removal {
        if !self.is_invalidating() {
            return Removal::Done(self.take(interval));
        }
        if interval.place().is_none() {
            // Inserted and removed while ranges were active: nobody has seen it, nobody runs it.
            let at = self
                .deferred
                .iter()
                .position(|d| matches!(d, Deferred::Insert(i) if Arc::ptr_eq(i, interval)));
            return Removal::Done(at.map(|at| match self.deferred.swap_remove(at) {
                Deferred::Insert(interval) | Deferred::Remove(interval) => interval,
            }));
        }
        if !self.deferred.iter().any(|d| matches!(d, Deferred::Remove(i) if Arc::ptr_eq(i, interval))) {
            self.deferred.push(Deferred::Remove(Arc::clone(interval)));
        }
        Removal::AfterEndOf(Seq::new(self.seq))
    }

    fn place(&mut self, interval: Arc<Interval>) {
        let key = self.index.insert(interval.range, Arc::clone(&interval));
        interval.set_place(Some(key));
    }

    fn take(&mut self, interval: &Interval) -> Option<Arc<Interval>> {
        let key = interval.place()?;
        interval.set_place(None);
        self.index.remove(key)
    }
}

#[cfg(test)]
mod tests;
