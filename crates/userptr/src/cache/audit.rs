// SPDX-License-Identifier: MIT OR Apache-2.0
//! Audits: hits that are verified through the device, beside what the program sees.
//!
//! Off the hit path but for one test of a flag. A hit that is found stale while its source still says that nothing has
//! changed is a hole in the source, or in what the program tells of it; one whose source has spoken meanwhile may have been
//! right when it was given, and counts for nothing.

use std::num::NonZeroU32;

use interleave::{AtomicContext, AtomicU64, MaySleep, Ordering};
use mmu_notifier::primary::PrimaryMmu;
use mmu_notifier::{Access, PAGE_SIZE, Range};

use super::hit::Check;
use super::{CacheError, Lease, RegistrationCache};
use crate::device::{Device, View};

/// Which hits are audited.
pub(super) struct Audit {
    /// 0: none.
    every: u64,
    hits: AtomicU64,
}

impl Audit {
    pub(super) fn new(every: Option<NonZeroU32>) -> Audit {
        Audit { every: every.map_or(0, |n| u64::from(n.get())), hits: AtomicU64::new(0) }
    }

    #[inline(always)]
    pub(super) fn is_on(&self) -> bool {
        self.every != 0
    }

    /// Is this hit one to look at?
    fn is_due(&self) -> bool {
        self.is_on() && (self.hits.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(self.every)
    }
}

/// Changes a byte of each page, to another and, the second time, back.
fn stamp(bytes: &mut [u8]) {
    for byte in bytes.iter_mut().step_by(PAGE_SIZE as usize) {
        *byte = !*byte;
    }
}

impl<M: PrimaryMmu + 'static, D: Device<M> + 'static> RegistrationCache<M, D> {
    /// The lease of a hit, unless it is its turn and it is found stale.
    #[cold]
    #[inline(never)]
    pub(super) fn audited<'c>(&'c self, lease: Lease<'c, M, D>) -> Result<Lease<'c, M, D>, CacheError> {
        if !self.core.audit.is_due() {
            return Ok(lease);
        }
        let view = self.view(&lease);
        self.judge(lease, view)
    }

    /// As [`get`](RegistrationCache::get), of bytes that nobody else looks at: they are made to differ from those of
    /// any page that was here before.
    #[cold]
    #[inline(never)]
    pub(super) fn audited_mut(&self, bytes: &mut [u8]) -> Result<Lease<'_, M, D>, CacheError> {
        let (addr, len) = (bytes.as_mut_ptr().expose_provenance(), bytes.len());
        let want = Range::enclosing(addr as u64, len as u64)?;
        let found = self.core.hit(want, Access::Write, Check::Strict);
        let is_hit = found.is_some();
        let claim = match found {
            Some(claim) => claim,
            None => self.register(want, Access::Write).map_err(|error| *error)?,
        };
        let lease = Lease::of_hit(&self.core, self.core.hit_of(claim), addr as u64, len as u64);
        if !is_hit || !self.core.audit.is_due() {
            return Ok(lease);
        }
        stamp(bytes);
        // For the kernel, which reads them at their address.
        bytes.as_mut_ptr().expose_provenance();
        let view = self.view(&lease);
        stamp(bytes);
        self.judge(lease, view)
    }

    fn view(&self, lease: &Lease<'_, M, D>) -> Result<View, AtomicContext> {
        let (addr, len) = (lease.addr() as u64, lease.len() as u64);
        MaySleep::try_enter(|cx| self.core.device.view(cx, &self.core.mm, lease.mapping(), addr, len))
    }

    fn judge<'c>(
        &'c self,
        lease: Lease<'c, M, D>,
        view: Result<View, AtomicContext>,
    ) -> Result<Lease<'c, M, D>, CacheError> {
        let counters = &self.core.counters;
        counters.audited.add(1);
        match view {
            Ok(View::Same) => Ok(lease),
            // Asked after the look: what has changed since the hit was announced by now, if it is ever announced.
            Ok(View::Other { at }) if lease.is_current() => {
                counters.audited_stale.add(1);
                counters.in_vain.add(1);
                let (range, index) = (lease.registered(), lease.index());
                self.core.kill(index, self.core.slab.state(index));
                Err(CacheError::Stale { range, at })
            }
            Ok(View::Other { .. } | View::Unknown { .. }) | Err(_) => {
                counters.unaudited.add(1);
                Ok(lease)
            }
        }
    }
}
