// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the live sources have in common, seen from [`HostMm`](super::HostMm).

use std::fmt;
use std::sync::Arc;

use interleave::{MaySleep, Sleep};
use mmu_notifier::primary::{
    After, Count, CountedBefore, Delivery, Gone, Invalidate, SetSeq, SubscribeError, Unheard,
};
use mmu_notifier::{InsideInvalidation, Invalidation, Range};

use crate::uffd::{DEAF, UffdSource};
use crate::{kvm, uffd};

/// A live source of notifications about this process's mm.
pub trait Source: Send + Sync {
    /// When its callbacks run.
    type Delivery: Delivery;
    /// One range of it.
    type Watch: LiveWatch;
    /// Does it hear what is done to a file behind a shared mapping (truncate, hole punch)?
    const FILES: bool;
    /// What it never reports.
    const CANNOT_HEAR: &'static [Unheard];

    /// Listen to `range`.
    ///
    /// # Errors
    /// [`SubscribeError`], if the source cannot hear the range, or cannot call back and `callback` is given.
    fn watch(
        &self,
        range: Range,
        callback: Option<Arc<dyn Invalidate>>,
    ) -> Result<Self::Watch, SubscribeError>;

    /// As [`PrimaryMmu::settle`](mmu_notifier::primary::PrimaryMmu::settle).
    ///
    /// # Errors
    /// [`Gone`].
    fn settle(&self) -> Result<(), Gone> {
        Ok(())
    }

    /// As [`PrimaryMmu::era`](mmu_notifier::primary::PrimaryMmu::era).
    fn era(&self) -> Option<u64> {
        None
    }

    /// As [`PrimaryMmu::count`](mmu_notifier::primary::PrimaryMmu::count).
    fn count(&self, _: u64) -> Option<u64> {
        None
    }

    /// As [`PrimaryMmu::era_ordered`](mmu_notifier::primary::PrimaryMmu::era_ordered).
    fn era_ordered(&self) -> Option<u64> {
        self.era()
    }
}

/// One range of a live source. Dropping it ends it, as a fence.
pub trait LiveWatch: Send + Sync {
    /// A point in its life.
    type Seq: Copy + Send + Sync + fmt::Debug;

    /// The range.
    fn range(&self) -> Range;

    /// What has happened so far.
    ///
    /// # Errors
    /// [`Gone`].
    fn snapshot(&self) -> Result<Self::Seq, Gone>;

    /// Has anything been announced since? `false` is a promise.
    fn changed_since(&self, seq: Self::Seq) -> bool;

    /// As [`Subscription::read_retry_ordered`](mmu_notifier::primary::Subscription::read_retry_ordered).
    fn changed_since_ordered(&self, seq: Self::Seq) -> bool {
        self.changed_since(seq)
    }

    /// As [`Subscription::count_at`](mmu_notifier::primary::Subscription::count_at).
    fn count_at(&self, _: Self::Seq) -> Option<Count> {
        None
    }

    /// No callback runs after it returns.
    ///
    /// # Errors
    /// [`InsideInvalidation`], from its own callback.
    fn unsubscribe(&self) -> Result<(), InsideInvalidation>;
}

/// Callbacks of the live sources run on threads of ours, which may sleep; they come late, so the sequence has moved.
fn call(callback: &dyn Invalidate, range: Range) {
    MaySleep::enter(|cx| {
        let inv = Invalidation::of_unknown_kind(range);
        // A range that blocks cannot be refused.
        let _ = callback.invalidate(Sleep::May(cx), &inv, SetSeq::already_moved());
    });
}

/// A [`kvm::Watch`], with its callback if it has one.
pub struct KvmWatch {
    watch: kvm::Watch,
    subscription: Option<kvm::Subscription>,
}

impl fmt::Debug for KvmWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmWatch").field("watch", &self.watch).finish_non_exhaustive()
    }
}

impl KvmWatch {
    /// The source's own watch, which can also be asked about ageing.
    pub fn kvm(&self) -> &kvm::Watch {
        &self.watch
    }
}

impl Source for kvm::KvmSource {
    type Delivery = CountedBefore;
    type Watch = KvmWatch;
    const FILES: bool = true;
    const CANNOT_HEAR: &'static [Unheard] =
        &[Unheard { change: "exit", why: "the notifier goes with the mm; nobody is left in it to be told" }];

    fn watch(&self, range: Range, callback: Option<Arc<dyn Invalidate>>) -> Result<KvmWatch, SubscribeError> {
        let gone = |e: kvm::Gone| SubscribeError::Source { range, source: e.into() };
        let subscription = callback.map(|callback| {
            self.subscribe(range, move |notice| match notice {
                kvm::Notice::Range(record) if record.kind == kvm::Kind::Age => {}
                kvm::Notice::Range(record) => call(&*callback, record.within(range)),
                _ => call(&*callback, range),
            })
            .map_err(|e| SubscribeError::Source { range, source: e.into() })
        });
        let subscription = subscription.transpose()?;
        // With a callback the watch must fail with the thread that calls it.
        let watch = match &subscription {
            Some(subscription) => subscription.watch().clone(),
            None => kvm::KvmSource::watch(self, range).map_err(gone)?,
        };
        Ok(KvmWatch { watch, subscription })
    }

    #[inline]
    fn era(&self) -> Option<u64> {
        kvm::KvmSource::era(self)
    }

    #[inline]
    fn count(&self, key: u64) -> Option<u64> {
        kvm::KvmSource::count(self, key)
    }
}

impl LiveWatch for KvmWatch {
    type Seq = kvm::Seq;

    fn range(&self) -> Range {
        self.watch.range()
    }

    fn snapshot(&self) -> Result<kvm::Seq, Gone> {
        self.watch.snapshot().map_err(|e| match e {
            kvm::Gone::Forked => Gone::Forked,
            other => Gone::Closed { why: other.to_string() },
        })
    }

    #[inline]
    fn changed_since(&self, seq: kvm::Seq) -> bool {
        self.watch.changed_since(seq)
    }

    fn count_at(&self, seq: kvm::Seq) -> Option<Count> {
        self.watch.count_at(seq)
    }

    fn unsubscribe(&self) -> Result<(), InsideInvalidation> {
        let Some(subscription) = &self.subscription else { return Ok(()) };
        if subscription.is_calling() {
            return Err(InsideInvalidation);
        }
        subscription.silence();
        Ok(())
    }
}

const UFFD_CANNOT_HEAR: [Unheard; DEAF.len()] = {
    let mut unheard = [Unheard { change: "", why: "" }; DEAF.len()];
    let mut i = 0;
    while i < DEAF.len() {
        unheard[i] = Unheard { change: DEAF[i].operation, why: DEAF[i].reason };
        i += 1;
    }
    unheard
};

impl Source for UffdSource {
    type Delivery = After;
    type Watch = uffd::Watch;
    const FILES: bool = false;
    const CANNOT_HEAR: &'static [Unheard] = &UFFD_CANNOT_HEAR;

    fn watch(
        &self,
        range: Range,
        callback: Option<Arc<dyn Invalidate>>,
    ) -> Result<uffd::Watch, SubscribeError> {
        let watch = match callback {
            Some(callback) => self.watch_with(range, move |change| call(&*callback, change.range)),
            None => UffdSource::watch(self, range),
        };
        watch.map_err(|e| match e {
            uffd::WatchError::Gone(e) => SubscribeError::Source { range, source: e.into() },
            other => SubscribeError::Unsupported { range, why: other.to_string() },
        })
    }

    fn settle(&self) -> Result<(), Gone> {
        self.probe().map(drop).map_err(gone)
    }

    #[inline]
    fn era_ordered(&self) -> Option<u64> {
        UffdSource::era(self)
    }
}

/// A source's own words for it.
fn gone(gone: uffd::Gone) -> Gone {
    match gone {
        uffd::Gone::Forked => Gone::Forked,
        other => Gone::Closed { why: other.to_string() },
    }
}

impl LiveWatch for uffd::Watch {
    type Seq = uffd::Seq;

    fn range(&self) -> Range {
        uffd::Watch::range(self)
    }

    fn snapshot(&self) -> Result<uffd::Seq, Gone> {
        uffd::Watch::snapshot(self).map_err(gone)
    }

    /// Strict: one system call of some 200 ns, which waits while a change of watched memory is in flight.
    fn changed_since(&self, seq: uffd::Seq) -> bool {
        self.changed_since_strict(seq)
    }

    #[inline]
    fn changed_since_ordered(&self, seq: uffd::Seq) -> bool {
        uffd::Watch::changed_since_ordered(self, seq)
    }

    fn unsubscribe(&self) -> Result<(), InsideInvalidation> {
        if self.is_calling() {
            return Err(InsideInvalidation);
        }
        self.silence();
        Ok(())
    }
}
