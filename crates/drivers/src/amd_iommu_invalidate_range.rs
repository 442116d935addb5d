// SPDX-License-Identifier: MIT OR Apache-2.0
//! AMD IOMMUv2 from Linux 3.19 on, and SVA of AMD, Intel and Arm of 6.13: one callback that does the right thing at the
//! right moment.
//!
//! The device walks the page table of the process and caches what it walks. Whoever shares the page table needs no word
//! before or after the change, but one *between* the clearing of an entry and what becomes of the page: flush now.
//! 1. arch_invalidate_secondary_tlbs (invalidate_range before 6.6): flush the range from the device's TLB; for a large range all of it.
//! 2. release: no page table any more.
//! 3. Page request of the device: handle_mm_fault for it, answer, the device walks again.
//! 4. Until 4.13 also invalidate_page and clear_flush_young: flush. Reclaim and writeback said nothing else then.
//!
//! Registration refuses it together with start and end since 6.6.
//!
//! Lock order: any, with the ptl held > device TLB. All spin locks; never sleeps.

use crate::callbacks::{Callback, Callbacks};
use crate::device::{Device, DeviceContext, Root};
use crate::driver::{BindError, Driver, Holds, Kind, OpenError, Options, SubmitError};
use crate::engine::RequestId;
use crate::listener::Registered;
use crate::op::{Binding, DeviceFault, DeviceOp};
use crate::pasid::Pasid;
use interleave::{Atomic, MaySleep, PageContext};
use mmu_notifier::{Access, MmuNotifier, Ops, PageAddr, Range};
use softmm::Mm;
use std::sync::Arc;

/// Pages from which on everything is flushed.
const FLUSH_ALL: u64 = 512;

/// What it is.
pub static KIND: Kind = Kind {
    name: "iommu-sva-6.13",
    kernel: "4.14 to 6.18",
    summary: "shares the page table; flushes when the CPUs do",
    holds: Holds::ProcessTable,
    callbacks: Callbacks::of(&[Callback::SecondaryTlbs, Callback::Release]),
    reads: true,
    open: |cx, mm, device, options| Ok(IommuSva::open(cx, mm, device, options, &KIND)?),
};

/// AMD IOMMUv2 of 3.19 to 4.13.
pub static KIND_3_19: Kind = Kind {
    name: "amd-iommu-v2-3.19",
    kernel: "3.19 to 4.13",
    summary: "shares the page table; invalidate_range and invalidate_page flush",
    callbacks: Callbacks::of(&[
        Callback::Page,
        Callback::SecondaryTlbs,
        Callback::ClearFlushYoung,
        Callback::Release,
    ]),
    open: |cx, mm, device, options| Ok(IommuSva::open(cx, mm, device, options, &KIND_3_19)?),
    ..KIND
};

/// See the module.
pub struct IommuSva {
    kind: &'static Kind,
    context: DeviceContext,
    pasid: Pasid,
    registered: Registered,
}

impl IommuSva {
    /// Binds a PASID to `mm`.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(
        cx: &mut MaySleep<'_>,
        mm: &Arc<Mm>,
        device: &Arc<Device>,
        options: Options,
        kind: &'static Kind,
    ) -> Result<Arc<IommuSva>, OpenError> {
        let driver = Arc::new(IommuSva {
            kind,
            context: DeviceContext::open(cx, device, mm, kind.name, Root::Process),
            pasid: Pasid::new(),
            registered: Registered::not_yet(),
        });
        driver.registered.register(cx, &driver, options)?;
        Ok(driver)
    }
}

impl MmuNotifier for IommuSva {
    fn ops(&self) -> Ops {
        let ops = Ops::SECONDARY_TLBS | Ops::RELEASE;
        if self.kind.callbacks.contains(Callback::Page) {
            ops | Ops::PAGE | Ops::CLEAR_FLUSH_YOUNG
        } else {
            ops
        }
    }

    fn arch_invalidate_secondary_tlbs(&self, cx: &mut Atomic<'_>, range: Range) {
        let range = if range.pages() >= FLUSH_ALL { Range::ALL } else { range };
        self.context.flush(cx, None, range);
        self.context.effect(Callback::SecondaryTlbs);
    }

    fn invalidate_page(&self, mut cx: PageContext<'_, '_>, page: PageAddr) {
        self.context.flush(&mut cx, None, Range::page(page));
        self.context.effect(Callback::Page);
    }

    fn clear_flush_young(&self, cx: &mut Atomic<'_>, range: Range) -> bool {
        self.context.flush(cx, None, range);
        self.context.effect(Callback::ClearFlushYoung);
        false
    }

    fn release(&self, cx: &mut MaySleep<'_>) {
        self.pasid.release(cx, &self.context);
        self.context.effect(Callback::Release);
    }
}

impl Driver for IommuSva {
    fn kind(&self) -> &'static Kind {
        self.kind
    }

    fn context(&self) -> &DeviceContext {
        &self.context
    }

    fn bind(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<Binding, BindError> {
        self.pasid.bind(cx, range, access)
    }

    fn unbind(&self, cx: &mut MaySleep<'_>, binding: Binding) -> Result<(), SubmitError> {
        self.pasid.unbind(cx, &self.context, binding)
    }

    fn submit(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
    ) -> Result<RequestId, SubmitError> {
        self.pasid.submit(cx, &self.context, binding, ops)
    }

    fn device_fault(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        page: PageAddr,
        access: Access,
    ) -> Result<(), DeviceFault> {
        self.pasid.page_request(cx, &self.context, binding, page, access)
    }

    fn close(&self, cx: &mut MaySleep<'_>) {
        self.registered.unregister(cx);
        self.pasid.release(cx, &self.context);
        self.context.forget_requests(cx);
    }
}
