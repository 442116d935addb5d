// SPDX-License-Identifier: MIT OR Apache-2.0
//! softmm as a primary MMU: what a consumer that is generic over the source sees.
//!
//! Delivery blocks: the change waits for the callback, and nothing goes unheard. A subscription is an interval
//! notifier; it outlives the address space and then says so. A pin is FOLL_PIN, with FOLL_WRITE for
//! write access.
//!
//! Locks: subscribe takes none of the mm's; the others mmap_lock for reading, and fault.

use crate::error::FaultError;
use crate::gup::{Foll, UserPages};
use crate::mm::Mm;
use interleave::{AtomicBool, MaySleep, Ordering};
use mmu_notifier::primary;
use mmu_notifier::{
    Access, Blocks, Gone, GupError, IdentityError, InsideInvalidation, IntervalNotifier, Invalidate,
    PageAddr, PageIdentity, Pfn, PrimaryMmu, Range, RegisterError, Seq, SubscribeError, Subscription,
    Unheard,
};
use std::sync::Arc;

/// One range of an [`Mm`] that is listened to.
pub struct MmSubscription {
    exiting: Arc<AtomicBool>,
    notifier: IntervalNotifier,
}

/// Pages of an [`Mm`] that are pinned.
pub struct MmPin {
    range: Range,
    access: Access,
    pages: UserPages,
}

impl PrimaryMmu for Mm {
    type Delivery = Blocks;
    type Subscription = MmSubscription;
    type Pin = MmPin;

    fn subscribe(
        &self,
        cx: &mut MaySleep<'_>,
        range: Range,
        callback: Arc<dyn Invalidate>,
    ) -> Result<MmSubscription, SubscribeError> {
        let notifier = self.notifiers.insert_interval(cx, range, callback).map_err(|error| match error {
            RegisterError::Exited => SubscribeError::Released(range),
            error => SubscribeError::Source { range, source: Box::new(error) },
        })?;
        Ok(MmSubscription { exiting: self.exiting.clone(), notifier })
    }

    fn fault_in(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<(), GupError> {
        // As hmm_range_fault: present for the access when looked at; no reference outlives the call.
        let foll = if access == Access::Write { Foll::GET.write() } else { Foll::GET };
        self.get_pages(cx, range, access, foll).map(drop)
    }

    fn pin(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<MmPin, GupError> {
        self.pin_with(cx, range, access, Foll::PIN)
    }

    fn page_identity(&self, cx: &mut MaySleep<'_>, page: PageAddr) -> Result<PageIdentity, IdentityError> {
        // Page tables of a vma stay while mmap_lock is held; elsewhere there are none to look at.
        let vmas = self.vmas.read(cx);
        if vmas.exited {
            return Err(IdentityError::Released(page));
        }
        let pte = vmas.find(page.get()).map(|_| self.peek_pte(page)).filter(|pte| pte.is_present());
        Ok(PageIdentity {
            pfn: pte.map(|pte| pte.pfn()),
            present: pte.is_some(),
            writable: pte.map(|pte| pte.is_writable()),
            exclusive: pte.map(|pte| !pte.is_special() && self.machine().frames().mapcount(pte.pfn()) == 1),
        })
    }

    fn cannot_hear(&self) -> &'static [Unheard] {
        &[]
    }
}

impl Mm {
    /// As [`PrimaryMmu::pin`] with FOLL_LONGTERM: for as long as the holder likes, as fixed buffers of io_uring.
    ///
    /// # Errors
    /// As for [`PrimaryMmu::pin`].
    pub fn pin_longterm(
        &self,
        cx: &mut MaySleep<'_>,
        range: Range,
        access: Access,
    ) -> Result<MmPin, GupError> {
        self.pin_with(cx, range, access, Foll::PIN.longterm())
    }

    fn pin_with(
        &self,
        cx: &mut MaySleep<'_>,
        range: Range,
        access: Access,
        foll: Foll,
    ) -> Result<MmPin, GupError> {
        let foll = if access == Access::Write { foll.write() } else { foll };
        let pages = self.get_pages(cx, range, access, foll)?;
        Ok(MmPin { range, access, pages })
    }

    /// get_user_pages of a consumer that need not be a thread of the process: the process does not end meanwhile
    /// (mmget_not_zero).
    fn get_pages(
        &self,
        cx: &mut MaySleep<'_>,
        range: Range,
        access: Access,
        foll: Foll,
    ) -> Result<UserPages, GupError> {
        let user = self.weak().upgrade().and_then(|mm| mm.mmget()).ok_or(GupError::Released(range))?;
        let pages = self.get_user_pages(cx, range, foll);
        let pages = pages.map_err(|error| self.gup_error(range, access, error));
        user.mmput(cx);
        pages
    }

    fn gup_error(&self, range: Range, access: Access, error: FaultError) -> GupError {
        if self.exiting.load(Ordering::SeqCst) {
            return GupError::Released(range);
        }
        match error {
            FaultError::Unmapped(at) => GupError::NotMapped { range, access, at },
            FaultError::Access(at) => GupError::AccessDenied { range, access, at },
            FaultError::OutOfMemory(limit) => GupError::NoMemory { range, limit: limit.to_string() },
            FaultError::Reaped(_) | FaultError::PastEnd(_) | FaultError::NotPinnable(_) => {
                GupError::Source { range, source: Box::new(error) }
            }
        }
    }
}

impl Subscription for MmSubscription {
    type Seq = Seq;

    fn range(&self) -> Range {
        self.notifier.range()
    }

    fn read_begin(&self, cx: &mut MaySleep<'_>) -> Result<Seq, Gone> {
        if self.exiting.load(Ordering::SeqCst) {
            return Err(Gone::Released);
        }
        Ok(self.notifier.read_begin(cx)?)
    }

    fn read_retry(&self, seq: Seq) -> bool {
        self.notifier.read_retry(seq)
    }

    fn unsubscribe(&self, cx: &mut MaySleep<'_>) -> Result<(), InsideInvalidation> {
        self.notifier.remove(cx)
    }
}

impl primary::Pin for MmPin {
    fn range(&self) -> Range {
        self.range
    }

    fn access(&self) -> Access {
        self.access
    }

    fn pfn(&self, page: PageAddr) -> Option<Pfn> {
        let index = page.vpn().checked_sub(self.range.start() >> mmu_notifier::PAGE_SHIFT)?;
        self.pages.frames().nth(usize::try_from(index).ok()?).map(|frame| frame.pfn)
    }

    fn unpin(self, _: &mut MaySleep<'_>, written: bool) {
        if written {
            self.pages.set_dirty();
        }
    }
}
