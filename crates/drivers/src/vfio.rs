// SPDX-License-Identifier: MIT OR Apache-2.0
//! VFIO type 1 and iommufd: long-term pins and no notifier (Linux 6.13).
//!
//! 1. map: pin the pages (FOLL_PIN | FOLL_LONGTERM, FOLL_WRITE if the device may write); write the IOMMU's page table.
//! 2. The device reads and writes. Nobody tells anybody anything.
//! 3. unmap: clear the IOMMU's page table; flush its TLB; mark the pages dirty if the device could write; unpin.
//!
//! The mapping follows the pages and not the address, by design: munmap and mmap of the range leave the device on the old pages.
//! What it relies on instead: fork copies pinned pages (5.9), the CPU writes pinned pages in place (PageAnonExclusive, 5.19),
//! and a read pin un-shares first (5.19).
//!
//! Lock order: `iommu->lock` > mmap_lock (the pins are taken under it) > device TLB. No callback, so nothing comes from below.

use crate::bindings::Bindings;
use crate::callbacks::Callbacks;
use crate::device::{Device, DeviceContext, Root};
use crate::driver::{BindError, Driver, Holds, Kind, SubmitError, in_process, submit_checked};
use crate::engine::RequestId;
use crate::op::{Binding, DeviceOp};
use interleave::{LockClass, MaySleep, Mutex};
use mmu_notifier::{Access, Range};
use softmm::{Foll, Mm, UserPages};
use std::sync::Arc;

static IOMMU_LOCK: LockClass = LockClass::new("vfio iommu->lock");

/// What it is.
pub static KIND: Kind = Kind {
    name: "vfio-6.13",
    kernel: "6.13",
    summary: "pins for as long as it is mapped, no notifier",
    holds: Holds::Pages,
    callbacks: Callbacks::NONE,
    reads: true,
    open: |cx, mm, device, _| Ok(Vfio::open(cx, mm, device)),
};

/// See the module.
pub struct Vfio {
    context: DeviceContext,
    iommu: Mutex<Iommu>,
}

#[derive(Default)]
struct Iommu {
    dma_list: Bindings<Dma>,
}

struct Dma {
    range: Range,
    access: Access,
    pages: UserPages,
}

impl Vfio {
    /// A container with one device.
    pub fn open(cx: &mut MaySleep<'_>, mm: &Arc<Mm>, device: &Arc<Device>) -> Arc<Vfio> {
        let context = DeviceContext::open(cx, device, mm, KIND.name, Root::Own).following_pages();
        Arc::new(Vfio { context, iommu: Mutex::new(&IOMMU_LOCK, Iommu::default()) })
    }

    fn unmap(&self, cx: &mut MaySleep<'_>, binding: Binding, dma: Dma) {
        self.context.unmap(cx, Some(binding), dma.range);
        self.context.flush(cx, Some(binding), dma.range);
        if dma.access == Access::Write {
            dma.pages.set_dirty();
        }
    }

    /// VFIO_IOMMU_MAP_DMA.
    fn map_dma(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<Binding, BindError> {
        let mut iommu = self.iommu.lock(cx);
        if iommu.dma_list.values().any(|dma| dma.range.overlaps(range)) {
            return Err(BindError::Overlaps(range));
        }
        let foll = Foll::PIN.longterm();
        let foll = if access == Access::Write { foll.write() } else { foll };
        let pages = self.context.mm().get_user_pages(cx, range, foll);
        let pages = pages.map_err(|source| BindError::Fault { range, source })?;
        let binding = iommu.dma_list.reserve();
        for (page, frame) in range.iter_pages().zip(pages.frames()) {
            self.context.map(cx, binding, page, frame, access == Access::Write);
        }
        iommu.dma_list.insert(binding, Dma { range, access, pages });
        Ok(binding)
    }
}

impl Driver for Vfio {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn context(&self) -> &DeviceContext {
        &self.context
    }

    fn bind(&self, cx: &mut MaySleep<'_>, range: Range, access: Access) -> Result<Binding, BindError> {
        let map_dma = |cx: &mut MaySleep<'_>| self.map_dma(cx, range, access);
        in_process(cx, self.context.mm(), map_dma).unwrap_or(Err(BindError::Exited(range)))
    }

    fn unbind(&self, cx: &mut MaySleep<'_>, binding: Binding) -> Result<(), SubmitError> {
        let mut iommu = self.iommu.lock(cx);
        let dma = iommu.dma_list.remove(&binding).ok_or(SubmitError::NotBound(binding))?;
        self.unmap(cx, binding, dma);
        Ok(())
    }

    fn submit(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
    ) -> Result<RequestId, SubmitError> {
        let iommu = self.iommu.lock(cx);
        let dma = iommu.dma_list.get(&binding).ok_or(SubmitError::NotBound(binding))?;
        submit_checked(cx, &self.context, binding, dma.range, dma.access, ops)
    }

    fn close(&self, cx: &mut MaySleep<'_>) {
        let mut iommu = self.iommu.lock(cx);
        for (binding, dma) in iommu.dma_list.take_all() {
            self.unmap(cx, binding, dma);
        }
        self.context.forget_requests(cx);
    }
}
