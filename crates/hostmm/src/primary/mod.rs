// SPDX-License-Identifier: MIT OR Apache-2.0
//! The running kernel as a [`PrimaryMmu`]: this process's own mm, heard through a live source.
//!
//! `read_begin` takes the source's snapshot first and then waits with an [mm barrier](crate::barrier) for what was
//! in flight at that moment; `read_retry` is the source's own check. Between them lies whatever the caller does to
//! get the pages. A subscription whose snapshot has not moved since its last barrier needs no new one.
//!
//! The barrier waits for what holds the mm's locks. That is all that the kvm source announces, since it is called under
//! them. userfaultfd announces MADV_DONTNEED, FREE and REMOVE to its reader first and takes the locks afterwards, so over
//! the uffd source a page can be got that another thread is giving up at that moment; its list of what it cannot
//! hear says so.
//!
//! Lock order: `host_settled`, held across a barrier, before the barrier's `file_links` and `file_link`.

mod source;

use std::fmt;
use std::sync::Arc;

use interleave::{LockClass, MaySleep, Mutex};
use mmu_notifier::primary::{
    Count, Gone, GupError, IdentityError, Invalidate, PageIdentity, Pin, PrimaryMmu, SubscribeError,
    Subscription, Unheard,
};
use mmu_notifier::{Access, InsideInvalidation, PageAddr, Pfn, Range};

use crate::barrier::{BarrierError, Files, MmBarrier};
use crate::page::{Frame, PageError, Pages, PidOrSelf};
use crate::pin::{self, PinError, Pinner};
use crate::sys::mm;

pub use source::{KvmWatch, LiveWatch, Source};

static SETTLED: LockClass = LockClass::new("host_settled");

/// Why the parts around a source are not there.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The page tables of this process cannot be read.
    #[error(transparent)]
    Page(#[from] PageError),
    /// The mappings cannot be read.
    #[error(transparent)]
    Barrier(#[from] BarrierError),
    /// Nothing can be pinned.
    #[error(transparent)]
    Pin(#[from] PinError),
}

/// This process's mm, heard through `S`.
#[derive(Debug)]
pub struct HostMm<S> {
    source: S,
    barrier: Arc<MmBarrier>,
    pages: Pages,
    pinner: Pinner,
}

impl<S: Source> HostMm<S> {
    /// The mm of the calling process, with `pins` slots for pins (at most [`pin::MAX_SLOTS`]).
    ///
    /// Context: may sleep.
    ///
    /// # Errors
    /// [`HostError`], which names what is missing.
    pub fn new(source: S, pins: u32) -> Result<HostMm<S>, HostError> {
        Ok(HostMm {
            source,
            barrier: Arc::new(MmBarrier::open()?),
            pages: Pages::open(PidOrSelf::Myself)?,
            pinner: Pinner::new(pins)?,
        })
    }

    /// The source.
    pub fn source(&self) -> &S {
        &self.source
    }

    /// What tells which page is where.
    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    /// A subscription without a callback: the owner asks, nobody calls.
    ///
    /// # Errors
    /// [`SubscribeError`].
    pub fn watch(&self, range: Range) -> Result<HostSubscription<S::Watch>, SubscribeError> {
        self.source.watch(range, None).map(|watch| self.subscription(watch))
    }

    fn subscription(&self, watch: S::Watch) -> HostSubscription<S::Watch> {
        let settled = Settled { seq: None, files: S::FILES.then(Files::default) };
        HostSubscription { watch, barrier: Arc::clone(&self.barrier), settled: Mutex::new(&SETTLED, settled) }
    }
}

impl<S: Source> PrimaryMmu for HostMm<S> {
    type Delivery = S::Delivery;
    type Subscription = HostSubscription<S::Watch>;
    type Pin = HostPin;

    fn subscribe(
        &self,
        _cx: &mut MaySleep<'_>,
        range: Range,
        callback: Arc<dyn Invalidate>,
    ) -> Result<Self::Subscription, SubscribeError> {
        self.source.watch(range, Some(callback)).map(|watch| self.subscription(watch))
    }

    /// `MADV_POPULATE_READ` or `MADV_POPULATE_WRITE` (Linux 5.14): what `hmm_range_fault` does for a driver.
    fn fault_in(&self, _cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<(), GupError> {
        mm::populate(range, access == Access::Write).map_err(|e| self.explain(range, access, e))
    }

    /// An io_uring fixed buffer: `FOLL_PIN | FOLL_LONGTERM | FOLL_WRITE` whatever `access` says, so memory that may
    /// not be written cannot be pinned for reading either.
    fn pin(&self, _cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<HostPin, GupError> {
        Ok(HostPin { held: self.pinner.pin_for(range, access)?, access })
    }

    fn page_identity(&self, _cx: &mut MaySleep<'_>, page: PageAddr) -> Result<PageIdentity, IdentityError> {
        let identity = self
            .pages
            .identity(page)
            .map_err(|source| IdentityError::Source { page, source: source.into() })?;
        if identity.frame == Frame::Hidden {
            let missing = "CAP_SYS_ADMIN (page frame numbers are hidden from other users)".into();
            return Err(IdentityError::NotPermitted { page, missing });
        }
        Ok(PageIdentity {
            pfn: identity.pfn().map(|pfn| Pfn(pfn.get())),
            present: identity.entry.is_present(),
            // pagemap shows no write permission of the entry, only that of the mapping is known.
            writable: None,
            exclusive: identity.entry.is_present().then(|| identity.entry.is_exclusive()),
        })
    }

    fn cannot_hear(&self) -> &'static [Unheard] {
        S::CANNOT_HEAR
    }

    fn settle(&self) -> Result<(), Gone> {
        self.source.settle()
    }

    #[inline]
    fn era(&self) -> Option<u64> {
        self.source.era()
    }

    #[inline]
    fn count(&self, key: u64) -> Option<u64> {
        self.source.count(key)
    }

    #[inline]
    fn era_ordered(&self) -> Option<u64> {
        self.source.era_ordered()
    }
}

impl<S: Source> HostMm<S> {
    /// Which page it was, as far as the mappings tell.
    fn explain(&self, range: Range, access: Access, source: std::io::Error) -> GupError {
        let maps = self.pages.maps();
        if let Some(hole) = maps.holes(range).ok().and_then(|holes| holes.first().copied()) {
            return GupError::NotMapped { range, access, at: hole.first_page() };
        }
        let denied = maps.in_range(range).unwrap_or_default().into_iter().find(|vma| match access {
            Access::Write => !vma.write,
            Access::Read => !vma.read,
        });
        match denied.and_then(|vma| vma.range.intersection(range)) {
            Some(part) => GupError::AccessDenied { range, access, at: part.first_page() },
            None => GupError::Source { range, source: source.into() },
        }
    }
}

/// A range of this process's memory that is listened to. Dropping it unsubscribes, as a fence.
pub struct HostSubscription<W: LiveWatch> {
    watch: W,
    barrier: Arc<MmBarrier>,
    settled: Mutex<Settled<W::Seq>>,
}

/// What the last barrier of a range left.
struct Settled<Seq> {
    /// A snapshot after which a barrier was passed.
    seq: Option<Seq>,
    /// The shared files in the range; `None` if the source does not hear what is done to files.
    files: Option<Files>,
}

impl<W: LiveWatch> fmt::Debug for HostSubscription<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostSubscription").field("range", &self.range()).finish_non_exhaustive()
    }
}

impl<W: LiveWatch> HostSubscription<W> {
    /// The source's own watch, with what is special about it.
    pub fn watch(&self) -> &W {
        &self.watch
    }

    /// The sequence now, without waiting for what is in flight: good for asking later whether anything *new* was
    /// announced, and not for pinning, which [`read_begin`](Subscription::read_begin) is for.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn snapshot(&self) -> Result<W::Seq, Gone> {
        self.watch.snapshot()
    }
}

impl<W: LiveWatch> Subscription for HostSubscription<W> {
    type Seq = W::Seq;

    fn range(&self) -> Range {
        self.watch.range()
    }

    fn read_begin(&self, cx: &mut MaySleep<'_>) -> Result<W::Seq, Gone> {
        let seq = self.watch.snapshot()?;
        // An operation that is in flight now and was not at `settled` has moved the sequence since. Asked after the
        // snapshot: what begins between the two is the reader's to notice, in `read_retry`.
        let mut settled = self.settled.lock(cx);
        if settled.seq.is_some_and(|settled| !self.watch.changed_since(settled)) {
            return Ok(seq);
        }
        self.barrier
            .wait(cx, self.range(), settled.files.as_mut())
            .map_err(|e| Gone::Closed { why: e.to_string() })?;
        settled.seq = Some(seq);
        Ok(seq)
    }

    #[inline]
    fn read_retry(&self, seq: W::Seq) -> bool {
        self.watch.changed_since(seq)
    }

    #[inline]
    fn read_retry_ordered(&self, seq: W::Seq) -> bool {
        self.watch.changed_since_ordered(seq)
    }

    fn count_at(&self, seq: W::Seq) -> Option<Count> {
        self.watch.count_at(seq)
    }

    fn unsubscribe(&self, _cx: &mut MaySleep<'_>) -> Result<(), InsideInvalidation> {
        self.watch.unsubscribe()
    }
}

/// Pinned pages of this process.
#[derive(Debug)]
pub struct HostPin {
    held: pin::Pin,
    access: Access,
}

impl HostPin {
    /// The fixed buffer, through which the device sees the pages.
    pub fn buffer(&self) -> &pin::Pin {
        &self.held
    }
}

impl Pin for HostPin {
    fn range(&self) -> Range {
        self.held.range()
    }

    fn access(&self) -> Access {
        self.access
    }

    /// Always `None`: io_uring does not tell which pages it holds.
    fn pfn(&self, _page: PageAddr) -> Option<Pfn> {
        None
    }

    /// The kernel marks every page dirty when the buffer goes, written or not.
    fn unpin(self, _cx: &mut MaySleep<'_>, _written: bool) {
        drop(self);
    }
}

#[cfg(test)]
mod tests;
