// SPDX-License-Identifier: MIT OR Apache-2.0
//! What drivers on HMM do: get pages without keeping a reference, and tell the mm what the device wrote.

use crate::device::{DeviceContext, Translation};
use crate::observer::DriverBug;
use interleave::MaySleep;
use mmu_notifier::{Access, Range};
use softmm::{FaultError, Foll, FrameId, Mm};

/// hmm_range_fault: the frames behind `range`, faulted in as needed. Nothing is held when it returns: they mean nothing
/// until the caller has seen, under its own lock, that the sequence has not moved.
///
/// Unlike the kernel's it holds a reference for as long as it takes to write down which life of the frame it saw.
pub(crate) fn hmm_range_fault(
    cx: &mut MaySleep<'_>,
    mm: &Mm,
    range: Range,
    access: Access,
) -> Result<Vec<FrameId>, FaultError> {
    let foll = if access == Access::Write { Foll::GET.write() } else { Foll::GET };
    Ok(mm.get_user_pages(cx, range, foll)?.frames().collect())
}

/// dma_unmap_page and set_page_dirty: before the mapping goes the page is still there, or the driver is broken.
pub(crate) fn dirty_if_written(context: &DeviceContext, entry: &Translation) {
    if entry.dirty && context.mm().machine().frames().mark_dirty(entry.frame).is_err() {
        context.bug(DriverBug::DirtiedFreedPage);
    }
}
