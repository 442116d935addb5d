// SPDX-License-Identifier: MIT OR Apache-2.0
//! A fault on a page that may not be written as it is: do_wp_page, wp_page_copy (v6.18).
//!
//! Sequence: alloc and copy; S(CLEAR, the page); [ pte_same? clr A; **set**; remove rmap of the old page ]; E; put.
//! Reuse and un-share in place notify nothing: the page stays, and read-only to writable needs no shootdown.
//!
//! Who may write in place (the reuse rule) is what kernels differ in:
//! * <= 5.8: sole mapper (mapcount + swapcount <= 1), not KSM;
//! * 5.9 to 5.18: sole reference (page_count == 1), which moves a pinned page away from its device;
//! * **5.19 and later, here**: PageAnonExclusive; else sole reference, and the page becomes exclusive.
//!
//! FAULT_FLAG_UNSHARE (5.19) takes the same path for a FOLL_PIN read pin, and maps the copy read-only.
//!
//! Locks: mmap_lock for reading; ptl; an extra reference on the old page from the first ptl section until after E, so
//! that nobody reuses the frame while it is being copied.

use crate::error::FaultError;
use crate::fault::FaultFlag;
use crate::frame::Frames;
use crate::mm::Mm;
use crate::page_table::{PteGuard, TableId};
use crate::pte::Pte;
use crate::vma::VmaTree;
use interleave::MaySleep;
use mmu_notifier::{Event, PageAddr, Pfn, Range};

impl Mm {
    /// `seen`: the present, read-only pte that the fault found. If it is another by now, nothing is done.
    pub(crate) fn do_wp_page(
        &self,
        cx: &mut MaySleep<'_>,
        vmas: &VmaTree,
        leaf: TableId,
        page: PageAddr,
        seen: Pte,
        flag: FaultFlag,
    ) -> Result<(), FaultError> {
        let (tables, frames) = (self.machine().tables(), self.machine().frames());
        let mut guard = PteGuard::lock(tables, leaf, cx);
        if guard.get(page) != seen {
            return Ok(());
        }
        let old = (!seen.is_special()).then(|| seen.pfn());
        if let Some(old) = old {
            if can_reuse(frames, old) {
                if flag == FaultFlag::Write {
                    guard.set_bits(page, Pte::WRITE | Pte::ACCESSED | Pte::DIRTY);
                }
                return Ok(());
            }
            frames.get(old, 1);
        }
        drop(guard);
        let result = self.wp_page_copy(cx, vmas, leaf, page, seen, flag);
        if let Some(old) = old {
            frames.put(old, 1);
        }
        result
    }

    fn wp_page_copy(
        &self,
        cx: &mut MaySleep<'_>,
        vmas: &VmaTree,
        leaf: TableId,
        page: PageAddr,
        seen: Pte,
        flag: FaultFlag,
    ) -> Result<(), FaultError> {
        let machine = self.machine();
        let frames = machine.frames();
        vmas.anon_vma_prepare(page.get(), || machine.fresh_id());
        let new = frames.alloc()?;
        frames.copy_contents(new, seen.pfn());
        let bits = match flag {
            FaultFlag::Write => Pte::WRITE | Pte::ACCESSED | Pte::DIRTY,
            FaultFlag::Read | FaultFlag::Unshare => Pte::ACCESSED,
        };
        let range = Range::page(page);
        let replaced = self.invalidate(cx, range, Event::Clear, |cx| {
            let mut guard = PteGuard::lock(machine.tables(), leaf, cx);
            if guard.get(page) != seen {
                return false;
            }
            let (ptes, cx) = guard.split();
            ptes.get_and_clear(page);
            machine.flush_tlb_range(cx, self, range);
            frames.add_rmap(new);
            frames.set_exclusive(new, true);
            ptes.set(page, Pte::new(new, bits));
            if !seen.is_special() {
                frames.remove_rmap(seen.pfn());
            }
            true
        });
        match (replaced, seen.is_special()) {
            (true, true) => {}
            (true, false) => frames.put(seen.pfn(), 1),
            (false, _) => frames.put(new, 1),
        }
        Ok(())
    }
}

/// The reuse rule of 5.19 and later; a frame that passes is exclusive afterwards. Under the ptl of its only pte.
fn can_reuse(frames: &Frames, pfn: Pfn) -> bool {
    if frames.is_file(pfn) {
        return false;
    }
    if frames.exclusive(pfn) {
        return true;
    }
    let sole = frames.refcount(pfn) == 1;
    if sole {
        frames.set_exclusive(pfn, true);
    }
    sole
}
