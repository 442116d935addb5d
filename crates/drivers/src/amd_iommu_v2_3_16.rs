// SPDX-License-Identifier: MIT OR Apache-2.0
//! AMD IOMMUv2 as of Linux 3.16: the device walks the page table of the process.
//!
//! Nothing is pinned and nothing is mapped: the IOMMU's table entry for a PASID (GCR3) points to the page table of the process, and
//! the IOMMU caches what it walks. A missing page is a page request: the handler faults it in like a CPU would and answers.
//!
//! 1. invalidate_range_start: the first one that is open switches the PASID to an **empty page table**, then flushes: so the device
//!    cannot refill its TLB while the page table changes.
//! 2. invalidate_range_end: the last one switches back and flushes the (empty) translations.
//! 3. change_pte, invalidate_page, clear_flush_young: flush that page. Under a spin lock only, so any context will do.
//!    clear_flush_young always says "not young": the accessed bit is in the page table, where the mm sees it.
//! 4. release: the PASID gets no page table any more.
//!
//! Between 1 and 2 the whole process, not just the range, is empty for the device: it faults, the handler finds the page
//! present, and the device faults again. Starts that follow each other closely keep it from ever getting on (bug 38).
//!
//! Lock order: any > `iommu pasid lock` > device TLB. All spin locks.
//!
//! Not modelled: the page-request queue and its limits; access flags of the request; several PASIDs.

use crate::callbacks::{Callback, Callbacks};
use crate::device::{Device, DeviceContext, Root};
use crate::driver::{BindError, Driver, Holds, Kind, OpenError, Options, SubmitError};
use crate::engine::RequestId;
use crate::listener::Registered;
use crate::op::{Binding, DeviceFault, DeviceOp};
use crate::pasid::Pasid;
use crate::site::{bump, unbump};
use interleave::{Atomic, Context, LockClass, MaySleep, PageContext, Sleep, SpinLock};
use mmu_notifier::{Access, Invalidation, MmuNotifier, Ops, PageAddr, Pte, Range, WouldBlock};
use softmm::Mm;
use std::sync::Arc;

static PASID_LOCK: LockClass = LockClass::new("amd_iommu_v2 pasid lock");

/// What it is.
pub static KIND: Kind = Kind {
    name: "amd-iommu-v2-3.16",
    kernel: "3.16",
    summary: "shares the page table; an empty one between start and end",
    holds: Holds::ProcessTable,
    callbacks: Callbacks::of(&[
        Callback::Start,
        Callback::End,
        Callback::Page,
        Callback::ChangePte,
        Callback::ClearFlushYoung,
        Callback::Release,
    ]),
    reads: true,
    open: |cx, mm, device, options| Ok(AmdIommuV2::open(cx, mm, device, options)?),
};

/// See the module.
pub struct AmdIommuV2 {
    context: DeviceContext,
    pasid: Pasid,
    /// pasid_state.mmu_notifier_count: starts without their end. Also orders the switches of the table.
    open_ranges: SpinLock<u64>,
    registered: Registered,
}

impl AmdIommuV2 {
    /// Binds a PASID to `mm`.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(
        cx: &mut MaySleep<'_>,
        mm: &Arc<Mm>,
        device: &Arc<Device>,
        options: Options,
    ) -> Result<Arc<AmdIommuV2>, OpenError> {
        let driver = Arc::new(AmdIommuV2 {
            context: DeviceContext::open(cx, device, mm, KIND.name, Root::Process),
            pasid: Pasid::new(),
            open_ranges: SpinLock::new(&PASID_LOCK, 0),
            registered: Registered::not_yet(),
        });
        driver.registered.register(cx, &driver, options)?;
        Ok(driver)
    }

    fn flush_page(&self, cx: &mut impl Context, page: PageAddr, kind: Callback) {
        self.context.flush(cx, None, Range::page(page));
        self.context.effect(kind);
    }
}

impl MmuNotifier for AmdIommuV2 {
    fn ops(&self) -> Ops {
        Ops::START | Ops::END | Ops::PAGE | Ops::CHANGE_PTE | Ops::CLEAR_FLUSH_YOUNG | Ops::RELEASE
    }

    fn invalidate_range_start(&self, mut cx: Sleep<'_, '_>, _: &Invalidation) -> Result<(), WouldBlock> {
        let mut open = self.open_ranges.lock(&mut cx);
        let (open, cx) = open.split();
        bump(open);
        if *open == 1 {
            self.context.set_root(cx, Root::Empty);
            self.context.flush(cx, None, Range::ALL);
            self.context.effect(Callback::Start);
        }
        Ok(())
    }

    fn invalidate_range_end(&self, mut cx: Sleep<'_, '_>, _: &Invalidation) {
        let mut open = self.open_ranges.lock(&mut cx);
        let (open, cx) = open.split();
        unbump(open);
        if *open == 0 && !self.pasid.is_released() {
            self.context.set_root(cx, Root::Process);
            self.context.flush(cx, None, Range::ALL);
            self.context.effect(Callback::End);
        }
    }

    fn invalidate_page(&self, mut cx: PageContext<'_, '_>, page: PageAddr) {
        self.flush_page(&mut cx, page, Callback::Page);
    }

    fn change_pte(&self, cx: &mut Atomic<'_>, page: PageAddr, _: Pte) {
        self.flush_page(cx, page, Callback::ChangePte);
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

impl Driver for AmdIommuV2 {
    fn kind(&self) -> &'static Kind {
        &KIND
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
