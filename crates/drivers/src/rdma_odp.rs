// SPDX-License-Identifier: MIT OR Apache-2.0
//! RDMA on-demand paging, mlx5, as of Linux 6.13: the textbook user of an interval notifier.
//!
//! Register a region (`bind`): one interval notifier over its range.
//!
//! Page fault of the device:
//! 1. mmget_not_zero, or the fault fails.
//! 2. read_begin: waits while an invalidation of the region is in flight.
//! 3. hmm_range_fault: the pages, without a reference.
//! 4. umem_mutex. read_retry: changed? Unlock and start again.
//! 5. DMA-map the pages, program the device; unlock.
//!
//! invalidate: a range that must not block is refused. umem_mutex; **move the sequence**; take the entries out of the device and wait
//! for it; DMA-unmap them, which marks written pages dirty; unlock. The sequence moves under the mutex that step 4 checks it under.
//!
//! Lock order: mmap_lock > mmu_notifier_invalidate_range_start > umem_mutex > device TLB. Steps 2 and 3 hold no lock of the driver.
//!
//! Not modelled: implicit regions and their children; prefetch; the work queues of the device.

use crate::bindings::Bindings;
use crate::callbacks::{Callback, Callbacks};
use crate::device::{Device, DeviceContext, Root};
use crate::driver::{BindError, Driver, Holds, Kind, Options, SubmitError, submit_checked};
use crate::engine::RequestId;
use crate::hmm::{dirty_if_written, hmm_range_fault};
use crate::listener::{IntervalDriver, IntervalListener};
use crate::op::{Binding, DeviceFault, DeviceOp};
use interleave::{LockClass, MaySleep, Mutex, Sleep};
use mmu_notifier::{Access, IntervalNotifier, Invalidation, PageAddr, Range, SeqMoved, SetSeq, WouldBlock};
use softmm::Mm;
use std::sync::{Arc, Weak};

static UMEM_MUTEX: LockClass = LockClass::new("umem_mutex");
static REGIONS: LockClass = LockClass::new("mlx5 regions");

/// What it is.
pub static KIND: Kind = Kind {
    name: "rdma-odp-6.13",
    kernel: "6.13",
    summary: "pins nothing; interval notifier, faults",
    holds: Holds::Nothing,
    callbacks: Callbacks::of(&[Callback::Invalidate]),
    reads: true,
    open: |cx, mm, device, options| Ok(Odp::open(cx, mm, device, options)),
};

/// See the module.
pub struct Odp {
    me: Weak<Odp>,
    options: Options,
    context: DeviceContext,
    regions: Mutex<Bindings<Arc<Region>>>,
}

struct Region {
    umem: Arc<Umem>,
    notifier: IntervalNotifier,
}

/// What the callback works on.
pub(crate) struct Umem {
    binding: Binding,
    range: Range,
    access: Access,
    umem_mutex: Mutex<()>,
}

impl Odp {
    /// A device without regions.
    pub fn open(cx: &mut MaySleep<'_>, mm: &Arc<Mm>, device: &Arc<Device>, options: Options) -> Arc<Odp> {
        let context = DeviceContext::open(cx, device, mm, KIND.name, Root::Own);
        let regions = Mutex::new(&REGIONS, Bindings::default());
        Arc::new_cyclic(|me| Odp { me: me.clone(), options, context, regions })
    }

    fn region(&self, cx: &mut MaySleep<'_>, binding: Binding) -> Option<Arc<Region>> {
        self.regions.lock(cx).get(&binding).cloned()
    }

    /// ib_umem_odp_unmap_dma_pages, under umem_mutex. Whether there was anything.
    fn unmap(&self, cx: &mut MaySleep<'_>, umem: &Umem, range: Range) -> bool {
        let taken = self.context.unmap(cx, Some(umem.binding), range);
        if taken.is_empty() {
            return false;
        }
        self.context.flush(cx, Some(umem.binding), range);
        for (.., entry) in &taken {
            dirty_if_written(&self.context, entry);
        }
        true
    }
}

impl IntervalDriver for Odp {
    type Object = Umem;

    fn invalidate(
        &self,
        umem: &Umem,
        cx: Sleep<'_, '_>,
        inv: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock> {
        let Sleep::May(cx) = cx else { return Err(WouldBlock) };
        let _umem = umem.umem_mutex.lock(cx);
        let moved = seq.set();
        if let Some(range) = inv.range.intersection(umem.range)
            && self.unmap(cx, umem, range)
        {
            self.context.effect(Callback::Invalidate);
        }
        Ok(moved)
    }
}

impl Driver for Odp {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn context(&self) -> &DeviceContext {
        &self.context
    }

    fn bind(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<Binding, BindError> {
        let binding = self.regions.lock(cx).reserve();
        let umem = Arc::new(Umem { binding, range, access, umem_mutex: Mutex::new(&UMEM_MUTEX, ()) });
        let listener = IntervalListener::new(self.me.clone(), umem.clone(), self.options);
        let notifier = self.context.mm().notifiers().insert_interval(cx, range, listener);
        let notifier = notifier.map_err(|source| BindError::Register { range, source })?;
        self.regions.lock(cx).insert(binding, Arc::new(Region { umem, notifier }));
        Ok(binding)
    }

    fn unbind(&self, cx: &mut MaySleep<'_>, binding: Binding) -> Result<(), SubmitError> {
        let region = self.regions.lock(cx).remove(&binding);
        let region = region.ok_or(SubmitError::NotBound(binding))?;
        // ib_umem_odp_release: while the notifier is there, so that no page that was written is freed before it is marked.
        let umem = region.umem.umem_mutex.lock(cx);
        self.unmap(cx, &region.umem, region.umem.range);
        drop(umem);
        // Refused in a callback only; the notifier goes with the region all the same.
        let _ = region.notifier.remove(cx);
        Ok(())
    }

    fn submit(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
    ) -> Result<RequestId, SubmitError> {
        let region = self.region(cx, binding).ok_or(SubmitError::NotBound(binding))?;
        submit_checked(cx, &self.context, binding, region.umem.range, region.umem.access, ops)
    }

    /// pagefault_real_mr.
    fn device_fault(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        page: PageAddr,
        access: Access,
    ) -> Result<(), DeviceFault> {
        let missing = DeviceFault::NoTranslation { page, access };
        let region =
            self.region(cx, binding).filter(|r| r.umem.range.contains_addr(page.get())).ok_or(missing)?;
        let user = self.context.mm().mmget().ok_or(missing)?;
        let got = region.notifier.read_begin(cx).map_err(|_| missing).and_then(|seq| {
            let got = hmm_range_fault(cx, &user, Range::page(page), access);
            Ok((seq, got.map_err(|source| DeviceFault::Refused { page, source })?))
        });
        user.mmput(cx);
        let (seq, frames) = got?;
        let _umem = region.umem.umem_mutex.lock(cx);
        if region.notifier.read_retry(seq) {
            self.context.counters().retried(1);
            return Ok(());
        }
        if self.region(cx, binding).is_none() {
            return Err(missing);
        }
        for frame in frames {
            self.context.map(cx, binding, page, frame, access == Access::Write);
        }
        Ok(())
    }

    fn close(&self, cx: &mut MaySleep<'_>) {
        let open: Vec<_> = self.regions.lock(cx).keys().copied().collect();
        for binding in open {
            let _ = self.unbind(cx, binding);
        }
        self.context.forget_requests(cx);
    }
}
