// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whose page a frame is: of an anon_vma, of KSM, of a file, in the swap cache. Where rmap begins.
//!
//! Changes under the page lock, or while nobody else knows the page.

use super::Frames;
use crate::swap::Slot;
use interleave::Ordering;
use mmu_notifier::{PAGE_SHIFT, PageAddr, Pfn};

/// In the place of an anon_vma: a page of KSM's.
const KSM: u64 = u64::MAX;

impl Frames {
    /// Makes the page anonymous, found through that anon_vma at that address (page_set_anon_rmap, page_move_anon_rmap).
    pub(crate) fn set_anon_vma(&self, pfn: Pfn, anon_vma: u64, page: PageAddr) {
        self.frame(pfn).index.store(page.vpn(), Ordering::SeqCst);
        self.frame(pfn).anon_vma.store(anon_vma, Ordering::SeqCst);
    }

    /// Where rmap looks for the ptes of an anonymous page. None for KSM pages too.
    pub(crate) fn anon_vma(&self, pfn: Pfn) -> Option<(u64, PageAddr)> {
        let frame = self.frame(pfn);
        let anon_vma = Some(frame.anon_vma.load(Ordering::SeqCst)).filter(|&id| id != 0 && id != KSM)?;
        let page = PageAddr::new(frame.index.load(Ordering::SeqCst) << PAGE_SHIFT).ok()?;
        Some((anon_vma, page))
    }

    /// set_page_stable_node: the page is KSM's from now on.
    pub(crate) fn set_ksm(&self, pfn: Pfn) {
        self.frame(pfn).anon_vma.store(KSM, Ordering::SeqCst);
    }

    /// PageAnon: private memory, KSM's included. False for the page cache and the zero page.
    pub fn is_anon(&self, pfn: Pfn) -> bool {
        self.frame(pfn).anon_vma.load(Ordering::SeqCst) != 0
    }

    /// PageKsm: merged by KSM, so never written again.
    pub fn is_ksm(&self, pfn: Pfn) -> bool {
        self.frame(pfn).anon_vma.load(Ordering::SeqCst) == KSM
    }

    /// Its slot, while the page is in the swap cache.
    pub(crate) fn swap_slot(&self, pfn: Pfn) -> Option<Slot> {
        let slot = self.frame(pfn).swap.load(Ordering::SeqCst);
        slot.checked_sub(1).map(|slot| Slot(slot as u32))
    }

    pub(crate) fn set_swap_slot(&self, pfn: Pfn, slot: Option<Slot>) {
        self.frame(pfn).swap.store(slot.map_or(0, |slot| u64::from(slot.0) + 1), Ordering::SeqCst);
    }

    /// The frame is page `index` of `file` from now on; nobody else sees it yet.
    pub(crate) fn set_mapping(&self, pfn: Pfn, file: u64, index: u64) {
        let frame = self.frame(pfn);
        frame.index.store(index, Ordering::SeqCst);
        frame.mapping.store(file, Ordering::SeqCst);
        frame.file.store(true, Ordering::SeqCst);
    }

    /// The page cache lets go of the frame. Under the page lock.
    pub(crate) fn clear_mapping(&self, pfn: Pfn) {
        self.frame(pfn).mapping.store(0, Ordering::SeqCst);
    }

    /// Is the frame page `index` of `file`? Stable under the page lock.
    pub(crate) fn is_page_of(&self, pfn: Pfn, file: u64, index: u64) -> bool {
        let frame = self.frame(pfn);
        frame.mapping.load(Ordering::SeqCst) == file && frame.index.load(Ordering::SeqCst) == index
    }

    /// Is it a page of a file, in the page cache or truncated (not PageAnon)?
    pub fn is_file(&self, pfn: Pfn) -> bool {
        self.frame(pfn).file.load(Ordering::SeqCst)
    }
}
