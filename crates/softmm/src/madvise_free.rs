// SPDX-License-Identifier: MIT OR Apache-2.0
//! madvise(MADV_FREE): madvise_free_single_vma (4.5 and later; the page side as of 4.12).
//!
//! Sequence, per vma in the range: S(CLEAR, the part of the vma); [ swap entries given back; pte of a page: **clean and old** ]; E;
//! flush. Nothing is unmapped: the page may be discarded by reclaim later (see [`crate::reclaim`]), with a sequence of its own, unless
//! it has been written again by then, through a pte or through a pin that marks it dirty. A device that writes without either loses
//! what it writes.
//!
//! A dirty page, or one in the swap cache, is passed over if somebody else maps it too; the zero page always.
//!
//! What is not here: the batch (lru_lazyfree) in which a page waits before it becomes free to discard.
//!
//! Locks: mmap_lock for reading (v6_18: the lock of a single vma); ptl; the page lock is only tried for.

use crate::error::ChangeError;
use crate::madvise::hole;
use crate::mm::Mm;
use crate::page_table::{PteGuard, Ptes, by_leaf};
use crate::tlb::MmuGather;
use interleave::{Atomic, MaySleep};
use mmu_notifier::{Event, PageAddr, Pfn, Range};

impl Mm {
    /// Lets the kernel throw the contents of `range` away when it needs the memory; until then they can be read, and a store
    /// keeps its page.
    ///
    /// # Errors
    /// [`ChangeError::Hole`] if not all of `range` is mapped; the rest is done. [`ChangeError::NotAnonymous`] where a file is
    /// mapped, or if the kernel has no MADV_FREE; what comes before is done.
    pub fn madvise_free(&self, cx: &mut MaySleep<'_>, range: Range) -> Result<(), ChangeError> {
        let vmas = self.vmas.read(cx);
        if vmas.exited {
            return Err(ChangeError::Exited);
        }
        if !self.machine().profile().madvise_free {
            return Err(ChangeError::NotAnonymous(range.first_page()));
        }
        for vma in vmas.overlapping(range) {
            let Some(piece) = vma.range.intersection(range) else { continue };
            if vma.file.is_some() {
                return Err(ChangeError::NotAnonymous(piece.first_page()));
            }
            let mut gather = MmuGather::new(self);
            self.invalidate(cx, piece, Event::Clear, |cx| self.free_ptes(cx, &mut gather, piece));
            gather.finish(cx);
        }
        hole(&vmas, range).map_or(Ok(()), |page| Err(ChangeError::Hole(page)))
    }

    fn free_ptes(&self, cx: &mut MaySleep<'_>, gather: &mut MmuGather<'_>, range: Range) {
        let tables = self.machine().tables();
        for piece in by_leaf(range) {
            let Some(leaf) = self.page_table.leaf(tables, piece.first_page()) else { continue };
            let mut guard = PteGuard::lock(tables, leaf, cx);
            let (ptes, cx) = guard.split();
            piece.iter_pages().for_each(|page| self.free_pte(cx, gather, ptes, page));
        }
    }

    fn free_pte(&self, cx: &mut Atomic<'_>, gather: &mut MmuGather<'_>, ptes: &mut Ptes<'_>, page: PageAddr) {
        let pte = ptes.get(page);
        if let Some(slot) = pte.swap_slot() {
            ptes.get_and_clear(page);
            self.machine().free_swap_and_cache(cx, slot);
            return;
        }
        if !pte.is_mapped() || pte.is_special() || !self.make_clean(cx, pte.pfn()) {
            return;
        }
        if pte.is_young() || pte.is_dirty() {
            ptes.make_clean_and_old(page);
            gather.cover(Range::page(page));
        }
        self.machine().frames().set_lazyfree(pte.pfn(), true);
    }

    /// May the page be discarded without a trace?
    fn make_clean(&self, cx: &mut Atomic<'_>, pfn: Pfn) -> bool {
        let (machine, frames) = (self.machine(), self.machine().frames());
        if frames.swap_slot(pfn).is_none() && !frames.dirty(pfn) {
            return true;
        }
        let Some(lock) = frames.trylock_page(cx, pfn) else { return false };
        let cached = frames.swap_slot(pfn).is_some();
        let alone = frames.mapcount(pfn) == 1 && (!cached || machine.try_to_free_swap(cx, pfn));
        if alone {
            frames.clear_dirty(pfn);
        }
        drop(lock);
        alone
    }
}
