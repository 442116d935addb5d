// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a driver has done, counted.
//!
//! Counts are ghosts: nothing that is checked reads them, so counting must be no scheduling point, or an explorer
//! would try every order of two increments. Hence the standard atomics here and nowhere else in this crate.
#![expect(clippy::disallowed_types, reason = "ghosts: counted beside the execution and never read by it")]

use crate::callbacks::Callback;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

const CALLBACKS: usize = Callback::ALL.len();

/// Counters of one driver; see [`Counts`] for what they mean.
#[derive(Debug, Default)]
pub struct Counters {
    callbacks: [AtomicU64; CALLBACKS],
    effects: [AtomicU64; CALLBACKS],
    nanos: [AtomicU64; CALLBACKS],
    unbinds: AtomicU64,
    repins: AtomicU64,
    retries: AtomicU64,
    cancelled: AtomicU64,
    accesses: AtomicU64,
    faults: AtomicU64,
    flushes: AtomicU64,
    refused: AtomicU64,
}

/// What was counted up to one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Counts {
    /// Callbacks run, by kind (index: `Callback as usize`).
    pub callbacks: [u64; CALLBACKS],
    /// Of these, those that changed anything: took a translation or a flush away, moved a sequence that a reader
    /// then saw, cancelled work.
    pub effects: [u64; CALLBACKS],
    /// Translations that the driver took from its device, in pages.
    pub unbinds: u64,
    /// Pages got again for a binding that had had them before.
    pub repins: u64,
    /// Times that pages were got and thrown away because something had changed meanwhile.
    pub retries: u64,
    /// Workers whose result was dropped.
    pub cancelled: u64,
    /// Words that the device read or wrote.
    pub accesses: u64,
    /// Accesses for which the device found no translation.
    pub faults: u64,
    /// Flushes of the device's TLB.
    pub flushes: u64,
    /// Starts of ranges that must not block, which were refused.
    pub refused: u64,
}

impl Counts {
    /// Callbacks of this kind that were run.
    pub fn callbacks(&self, kind: Callback) -> u64 {
        self.callbacks[kind as usize]
    }

    /// Callbacks of this kind that had an effect.
    pub fn effects(&self, kind: Callback) -> u64 {
        self.effects[kind as usize]
    }

    /// Callbacks of all kinds.
    pub fn all_callbacks(&self) -> u64 {
        self.callbacks.iter().sum()
    }
}

macro_rules! count {
    ($($name:ident, $field:ident;)*) => {$(
        pub(crate) fn $name(&self, n: u64) {
            self.$field.fetch_add(n, Relaxed);
        }
    )*};
}

impl Counters {
    count! {
        unbound, unbinds;
        repinned, repins;
        retried, retries;
        cancelled, cancelled;
        accessed, accesses;
        faulted, faults;
        flushed, flushes;
        refused, refused;
    }

    /// A callback of this kind runs.
    pub fn called(&self, kind: Callback) {
        self.callbacks[kind as usize].fetch_add(1, Relaxed);
    }

    pub(crate) fn took(&self, kind: Callback, time: Duration) {
        self.nanos[kind as usize].fetch_add(time.as_nanos() as u64, Relaxed);
    }

    /// The callback that runs had an effect.
    pub(crate) fn effect(&self, kind: Callback) {
        self.effects[kind as usize].fetch_add(1, Relaxed);
    }

    /// Time spent in callbacks of this kind, where [`Options::measure`](crate::Options::measure) asks for it.
    pub fn time(&self, kind: Callback) -> Duration {
        Duration::from_nanos(self.nanos[kind as usize].load(Relaxed))
    }

    /// The numbers now.
    pub fn counts(&self) -> Counts {
        let read = |counters: &[AtomicU64; CALLBACKS]| std::array::from_fn(|i| counters[i].load(Relaxed));
        Counts {
            callbacks: read(&self.callbacks),
            effects: read(&self.effects),
            unbinds: self.unbinds.load(Relaxed),
            repins: self.repins.load(Relaxed),
            retries: self.retries.load(Relaxed),
            cancelled: self.cancelled.load(Relaxed),
            accesses: self.accesses.load(Relaxed),
            faults: self.faults.load(Relaxed),
            flushes: self.flushes.load(Relaxed),
            refused: self.refused.load(Relaxed),
        }
    }
}
