// SPDX-License-Identifier: MIT OR Apache-2.0
//! The primary MMU as its consumers see it, whoever it is: the mm of this repository, or the running kernel.
//!
//! # The protocol
//!
//! A consumer keeps translations of a range (a device page table, a registration, a cache of addresses). The primary
//! MMU changes what lies behind the range at any time. There is one way to be right, the same for every source:
//!
//! ```text
//! writer (the primary MMU)                      reader (the consumer)
//!                                               again:
//! start: callback {                               seq = read_begin()        waits while a change is in flight
//!     lock(driver)                                get the pages             without the driver's lock: it may fault
//!     the sequence moves                          lock(driver)
//!     drop the translations                       if read_retry(seq) { unlock; goto again }
//!     wait until no access is in flight           install the translations
//!     unlock(driver)                              unlock(driver)
//! }
//! the page tables change
//! end
//! ```
//!
//! * The check and the installation are one critical section of the driver's lock, and the callback moves the sequence
//!   and drops the translations in one. Either the callback comes first, and the check fails; or the
//!   installation does, and the callback drops it.
//! * The pages are got without the driver's lock: getting them can fault, a fault can invalidate, and the callback
//!   wants the lock.
//! * `read_begin` waits for changes in flight. A reader that got its pages between start and the change of the
//!   page table would hold the old page, and no second callback would come (the "start gap" of drivers that listen
//!   to start alone).
//! * Neither `read_begin` nor unsubscribing may be called from a callback, or with a lock that the callback takes.
//!
//! # What differs between sources
//!
//! Nothing of the above: **correctness rests on `read_begin` and `read_retry` alone**. When a callback runs differs,
//! and it is in the type [`PrimaryMmu::Delivery`]:
//!
//! | delivery | the change waits for the callback | sequence has moved | a translation may be used |
//! |---|---|---|---|
//! | [`Blocks`] | yes | before the page tables change | while it is installed |
//! | [`CountedBefore`] | no | before the page tables change | after `read_retry` said false |
//! | [`After`] | until the event is read, not until it is handled | before the changing system call returns | after `read_retry` said false; racy with other threads |
//!
//! So a consumer that is generic over the source asks `read_retry` before each use of a translation; over
//! [`Blocks`] that is redundant and costs a load. With a callback that comes late, dropping the translation is
//! housekeeping. What a source never reports is in [`PrimaryMmu::cannot_hear`].

use std::fmt;
use std::panic::Location;
use std::sync::Arc;

use interleave::explore::{SiteKind, mutated};
use interleave::{AtomicU64, MaySleep, Ordering, Sleep};

use crate::{Access, InsideInvalidation, Invalidation, PageAddr, Pfn, Range, WouldBlock};

mod error;

pub use error::{Gone, GupError, IdentityError, SourceError, SubscribeError};

/// A point in the life of a range, from `read_begin`. Means something to its subscription only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Seq(u64);

impl Seq {
    /// For sources that count by themselves.
    pub const fn new(value: u64) -> Seq {
        Seq(value)
    }

    /// The count.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// What a callback moves its subscription's sequence with (`mmu_interval_set_seq`).
#[derive(Debug)]
pub struct SetSeq<'a> {
    moves: Option<(&'a AtomicU64, Seq)>,
}

/// Proof that the sequence has moved; what a callback that did its work returns.
#[derive(Debug)]
pub struct SeqMoved(());

impl<'a> SetSeq<'a> {
    /// Stores `seq` in `cell` when the callback says so.
    pub fn new(cell: &'a AtomicU64, seq: Seq) -> SetSeq<'a> {
        SetSeq { moves: Some((cell, seq)) }
    }

    /// For sources whose sequence has moved before the callback.
    pub const fn already_moved() -> SetSeq<'a> {
        SetSeq { moves: None }
    }

    /// Moves the sequence. Under the lock of the consumer that also guards installation, before translations are
    /// dropped.
    #[track_caller]
    pub fn set(self) -> SeqMoved {
        if let Some((cell, seq)) = self.moves
            && !mutated(SiteKind::Bump, Location::caller())
        {
            cell.store(seq.0, Ordering::Release);
        }
        SeqMoved(())
    }

    /// Forgets to move it: for models of drivers with that bug.
    pub fn skip_against_the_rules(self) -> SeqMoved {
        SeqMoved(())
    }
}

/// The callback of a subscription (`mmu_interval_notifier_ops`).
pub trait Invalidate: Send + Sync {
    /// What lies behind the subscribed range changes in `inv.range`, which may reach beyond it. Move the sequence
    /// with `seq`, drop the translations and wait until no access through them is in flight.
    ///
    /// The caller can hold any lock of the mm: see [`MmuNotifier`](crate::MmuNotifier).
    ///
    /// # Errors
    /// [`WouldBlock`], if `cx` may only try; the invalidation is then given up.
    fn invalidate(
        &self,
        cx: Sleep<'_, '_>,
        inv: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock>;
}

mod sealed {
    pub trait Sealed {}
}

/// When the callback runs, seen from the change; see the [module](self).
pub trait Delivery: sealed::Sealed {
    /// The name, for reports.
    const NAME: &'static str;
    /// Does the change wait until the callback has returned?
    const BLOCKS: bool;
    /// Has the sequence moved before any thread can see the change?
    const COUNTED_BEFORE: bool;
}

/// The change waits for the callback: softmm, and drivers in the kernel.
#[derive(Debug)]
pub enum Blocks {}

/// The sequence moves before the page tables change, the callback runs later: the kernel's tracepoints.
#[derive(Debug)]
pub enum CountedBefore {}

/// The event comes after the change and before its system call returns: userfaultfd.
#[derive(Debug)]
pub enum After {}

impl sealed::Sealed for Blocks {}
impl sealed::Sealed for CountedBefore {}
impl sealed::Sealed for After {}

impl Delivery for Blocks {
    const NAME: &'static str = "blocks";
    const BLOCKS: bool = true;
    const COUNTED_BEFORE: bool = true;
}

impl Delivery for CountedBefore {
    const NAME: &'static str = "counted before";
    const BLOCKS: bool = false;
    const COUNTED_BEFORE: bool = true;
}

impl Delivery for After {
    const NAME: &'static str = "after";
    const BLOCKS: bool = false;
    const COUNTED_BEFORE: bool = false;
}

/// A kind of change that a source never reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unheard {
    /// The change, as the user would name it ("mprotect", "KSM merge").
    pub change: &'static str,
    /// Why the source does not hear it.
    pub why: &'static str,
}

/// Owns page tables that others mirror.
pub trait PrimaryMmu: Send + Sync {
    /// When callbacks run.
    type Delivery: Delivery;
    /// What [`PrimaryMmu::subscribe`] gives.
    type Subscription: Subscription;
    /// What [`PrimaryMmu::pin`] gives.
    type Pin: Pin;

    /// Calls `callback` for every change in `range` until the subscription ends.
    ///
    /// # Errors
    /// [`SubscribeError`], if the source cannot hear the range; never a subscription that silently misses more than
    /// [`PrimaryMmu::cannot_hear`] says.
    fn subscribe(
        &self,
        cx: &mut MaySleep<'_>,
        range: Range,
        callback: Arc<dyn Invalidate>,
    ) -> Result<Self::Subscription, SubscribeError>;

    /// Makes every page of `range` present for `access`.
    ///
    /// # Errors
    /// [`GupError`]; pages before the failing one may have been faulted in.
    fn fault_in(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<(), GupError>;

    /// Faults in the pages of `range` and takes references (`pin_user_pages`). A pin keeps the pages, not the
    /// mapping: the range can be unmapped or replaced under it.
    ///
    /// # Errors
    /// [`GupError`]; nothing is pinned then. It says what was wrong at some moment of the call: ask
    /// [`read_retry`](Subscription::read_retry) before believing it, and know that mapping something where nothing
    /// was moves no sequence.
    fn pin(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<Self::Pin, GupError>;

    /// What lies behind `page` now. Out of date when it returns, unless bracketed by `read_begin` and `read_retry`.
    ///
    /// # Errors
    /// [`IdentityError`], if the source cannot tell.
    fn page_identity(&self, cx: &mut MaySleep<'_>, page: PageAddr) -> Result<PageIdentity, IdentityError>;

    /// Every kind of change that is never reported, with the reason. Empty: complete.
    fn cannot_hear(&self) -> &'static [Unheard];

    /// Returns at a moment when every change that anybody can see the effect of has moved its sequence: what
    /// [`read_retry_ordered`](Subscription::read_retry_ordered) says about memory that was mapped before this call is
    /// then as good as [`read_retry`](Subscription::read_retry). One call serves many lookups; where the sequence moves
    /// before the change there is nothing to wait for.
    ///
    /// # Errors
    /// [`Gone`], if nobody can say.
    fn settle(&self) -> Result<(), Gone> {
        Ok(())
    }

    /// A number that only grows, and that has grown when any subscribed range has changed, where one load can tell.
    ///
    /// The promise: if `e = era()` was loaded, and *then* `read_retry(seq)` was false, and later `era()` is `e` again,
    /// then `read_retry(seq)` would still be false. So whoever keeps `e` beside a translation need not look at its
    /// subscription until it moves. Less than `i64::MAX`. `None`: there is no such number, or the source is gone, or this is a
    /// forked child; ask the subscription.
    fn era(&self) -> Option<u64> {
        None
    }

    /// What is counted now where [`Count::key`] says, of a [`Count`] that a subscription of this mm gave: while it is what
    /// the count says, the subscription's `read_retry` is false. A load or two. `None` as for `era`.
    fn count(&self, _key: u64) -> Option<u64> {
        None
    }

    /// As [`era`](Self::era) for [`Subscription::read_retry_ordered`]: the same number, where both are given.
    fn era_ordered(&self) -> Option<u64> {
        self.era()
    }
}

/// What is counted of a range: see [`Subscription::count_at`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// Where it is counted, for [`PrimaryMmu::count`]. Less than `i64::MAX`: users keep a mark beside it.
    pub key: u64,
    /// What it is while nothing changes.
    pub value: u64,
}

/// One range that is listened to. Dropping it unsubscribes without waiting for a callback that runs.
pub trait Subscription: Send + Sync {
    /// A point in the life of the range. Means something to this subscription only.
    type Seq: Copy + Send + Sync + fmt::Debug;

    /// What it listens to.
    fn range(&self) -> Range;

    /// Waits until no invalidation of the range is in flight, then returns its sequence.
    ///
    /// # Errors
    /// [`Gone`]: no sequence of this subscription will ever be trustworthy again, or
    /// ([`Gone::InsideInvalidation`]) the caller waits for itself.
    #[track_caller]
    fn read_begin(&self, cx: &mut MaySleep<'_>) -> Result<Self::Seq, Gone>;

    /// Has anything in the range changed since `seq`, or may have? True: get the pages again. Never sleeps, costs
    /// a load or two.
    #[track_caller]
    fn read_retry(&self, seq: Self::Seq) -> bool;

    /// What is counted of the range, and nearly nothing else, while nothing in it has changed since `seq`. `None` where
    /// that is not counted, or not in a load or two.
    fn count_at(&self, _seq: Self::Seq) -> Option<Count> {
        None
    }

    /// As [`read_retry`](Subscription::read_retry), about the changes alone whose system call has returned before this
    /// call, in happens-before order: not enough where another thread can be in the middle of giving the memory
    /// back while this one is already handed its address. Loads only, for every source.
    #[track_caller]
    fn read_retry_ordered(&self, seq: Self::Seq) -> bool {
        self.read_retry(seq)
    }

    /// Ends the subscription; no callback runs after it returns. May sleep.
    ///
    /// # Errors
    /// [`InsideInvalidation`], from a callback; the subscription stands.
    fn unsubscribe(&self, cx: &mut MaySleep<'_>) -> Result<(), InsideInvalidation>;
}

/// References to the pages behind a range. Dropping it unpins pages that nobody wrote.
pub trait Pin: Send + Sync {
    /// What was pinned.
    fn range(&self) -> Range;

    /// How it may be used.
    fn access(&self) -> Access;

    /// The page that was pinned at `page`; `None` outside the range, or if the source cannot tell.
    fn pfn(&self, page: PageAddr) -> Option<Pfn>;

    /// Lets the pages go; `written`: they are marked dirty first (`unpin_user_pages_dirty_lock`).
    fn unpin(self, cx: &mut MaySleep<'_>, written: bool);
}

/// What a source knows about one page of the address space. `None`: it cannot know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct PageIdentity {
    /// The page; `None` also where nothing is present.
    pub pfn: Option<Pfn>,
    /// Is a page mapped now?
    pub present: bool,
    /// May the CPU write through the entry now?
    pub writable: Option<bool>,
    /// Is this mm the only one that maps the page?
    pub exclusive: Option<bool>,
}

impl fmt::Display for Unheard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.change, self.why)
    }
}
