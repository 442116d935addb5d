// SPDX-License-Identifier: MIT OR Apache-2.0
//! One range of a source.
//!
//! `read_begin` first takes the sequence. Then it waits for what may be in flight and has been told already: over kvm by
//! taking mmap_lock for writing and giving it back, unless nothing has moved since it last did (hostmm's `barrier`). Over
//! uffd the wait comes first, until nothing is in flight.

use std::panic::Location;
use std::sync::Arc;

use interleave::explore::{SiteKind, mutated};
use interleave::{LockClass, MaySleep, Mutex};
use mmu_notifier::primary::{Count, Gone, Subscription};
use mmu_notifier::{InsideInvalidation, PageAddr, Range, Seq};

use super::callees::Callee;
use super::events::{self, Events};
use super::how::{Fault, When};
use crate::mm::Mm;
use crate::primary::MmSubscription;

static SETTLED: LockClass = LockClass::new("told_settled");

/// Where nothing is mapped.
const HOLE: u64 = 0x7000_0000;

/// One range that is listened to. To drop it is a fence: no callback runs afterwards but the one that drops it.
pub struct ToldSubscription {
    pub(super) mm: Arc<Mm>,
    pub(super) events: Arc<Events>,
    pub(super) range: Range,
    pub(super) told: By,
    /// The sequence after which read_begin has waited last.
    pub(super) settled: Mutex<Option<Seq>>,
}

/// By whom the subscriber is told.
pub(super) enum By {
    /// softmm.
    Mm(MmSubscription),
    /// Whoever works for the source.
    Source(Arc<Callee>),
    /// Nobody.
    Nobody,
}

impl ToldSubscription {
    pub(super) fn new(mm: &Arc<Mm>, events: &Arc<Events>, range: Range, told: By) -> ToldSubscription {
        let settled = Mutex::new(&SETTLED, None);
        ToldSubscription { mm: Arc::clone(mm), events: Arc::clone(events), range, told, settled }
    }

    /// Returns when every operation on the mm has ended that holds mmap_lock now.
    fn barrier(&self, cx: &mut MaySleep<'_>) {
        if let Ok(hole) = PageAddr::new(HOLE) {
            self.mm.munmap(cx, Range::page(hole));
        }
    }

    fn has_moved(&self, seq: Seq) -> bool {
        match &self.told {
            By::Mm(_) if self.events.how.is(Fault::Unasked) => false,
            By::Mm(inner) => inner.read_retry(seq),
            _ => self.events.has_moved(events::key(self.range), seq.get()),
        }
    }
}

impl Subscription for ToldSubscription {
    type Seq = Seq;

    fn range(&self) -> Range {
        self.range
    }

    #[track_caller]
    fn read_begin(&self, cx: &mut MaySleep<'_>) -> Result<Seq, Gone> {
        if let By::Mm(inner) = &self.told {
            return inner.read_begin(cx);
        }
        if self.events.is_released() {
            return Err(Gone::Released);
        }
        let waits = !mutated(SiteKind::Wait, Location::caller());
        if self.events.is_late() {
            let epoch = if waits { Some(self.events.quiet_epoch(cx)) } else { self.events.era() };
            return Ok(Seq::new(epoch.unwrap_or_default()));
        }
        let seq = Seq::new(self.events.count_of(events::key(self.range)));
        let mut settled = self.settled.lock(cx);
        if waits && *settled != Some(seq) {
            self.barrier(cx);
        }
        *settled = Some(seq);
        Ok(seq)
    }

    #[track_caller]
    fn read_retry(&self, seq: Seq) -> bool {
        if mutated(SiteKind::Retry, Location::caller()) {
            return false;
        }
        // In this order: what ends in between has moved the sequence.
        self.events.probe() || self.has_moved(seq)
    }

    #[track_caller]
    fn read_retry_ordered(&self, seq: Seq) -> bool {
        !mutated(SiteKind::Retry, Location::caller()) && self.has_moved(seq)
    }

    fn count_at(&self, seq: Seq) -> Option<Count> {
        let how = self.events.how;
        if how.when != When::InTime || !how.counted {
            return None;
        }
        let count = Count { key: events::key(self.range), value: seq.get() };
        self.events.give(count.key, count.value);
        Some(count)
    }

    fn unsubscribe(&self, cx: &mut MaySleep<'_>) -> Result<(), InsideInvalidation> {
        match &self.told {
            By::Mm(inner) => inner.unsubscribe(cx)?,
            By::Source(callee) if callee.is_calling() => return Err(InsideInvalidation),
            By::Source(callee) => self.events.callees.silence(cx, callee),
            By::Nobody => {}
        }
        Ok(())
    }
}

impl Drop for ToldSubscription {
    fn drop(&mut self) {
        if let By::Source(callee) = &self.told {
            // Where nobody may sleep it goes on listening for whoever is gone.
            let _ = MaySleep::try_enter(|cx| self.events.callees.silence(cx, callee));
        }
    }
}
