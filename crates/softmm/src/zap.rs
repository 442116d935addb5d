// SPDX-License-Identifier: MIT OR Apache-2.0
//! zap_pte_range: the clearing of ptes that every unmapping path shares (munmap, exit, DONTNEED, truncate, the oom
//! reaper).
//!
//! Swap entries are given back. Sequence, inside the caller's S..E, per leaf table: [ clr' ; dirty pte of a file: set_page_dirty; remove rmap; gather the
//! page ]. Two things force the flush to come **before the ptl is dropped**, and the free right after it: a full batch,
//! and a dirty pte of a file, because from the moment that writeback finds no mapper it believes the page clean (3.15).
//! Since 6.2 such a page keeps its mapcount until that flush.
//!
//! Locks: the ptl around each batch. The caller keeps the page tables: mmap_lock over a vma there, or i_mmap over a vma
//! that is still linked in it.

use crate::mm::Mm;
use crate::page_table::{PteGuard, Ptes, by_leaf};
use crate::tlb::MmuGather;
use interleave::MaySleep;
use mmu_notifier::{Event, PageAddr, Pfn, Range};

/// Which pages go (zap_details).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Zap {
    /// All (even_cows).
    All,
    /// Pages of files alone: private copies stay (hole punch).
    FilePages,
}

/// What happened to one pte.
enum Zapped {
    Kept,
    Gone,
    /// A dirty page of a file, which must be flushed under this ptl.
    DirtyFile(Pfn),
}

impl Mm {
    /// zap_page_range_single: S(CLEAR, `range`); zap; E; flush; put.
    pub(crate) fn zap_page_range_single(&self, cx: &mut MaySleep<'_>, range: Range, what: Zap) {
        let mut gather = MmuGather::new(self);
        self.invalidate(cx, range, Event::Clear, |cx| self.zap(cx, &mut gather, range, what));
        gather.finish(cx);
    }

    /// Clears the ptes of `range` and gathers their pages (zap_page_range). The caller is inside S..E.
    pub(crate) fn zap(&self, cx: &mut MaySleep<'_>, gather: &mut MmuGather<'_>, range: Range, what: Zap) {
        let (tables, frames) = (self.machine().tables(), self.machine().frames());
        for piece in by_leaf(range) {
            let mut pages = piece.iter_pages().peekable();
            let Some(leaf) = pages.peek().and_then(|&first| self.page_table.leaf(tables, first)) else {
                continue;
            };
            while pages.peek().is_some() {
                let mut guard = PteGuard::lock(tables, leaf, cx);
                let (ptes, atomic) = guard.split();
                let mut dirty = Vec::new();
                let mut full = false;
                for page in pages.by_ref() {
                    if let Some(slot) = ptes.get(page).swap_slot().filter(|_| what == Zap::All) {
                        ptes.get_and_clear(page);
                        self.machine().free_swap_and_cache(atomic, slot);
                        continue;
                    }
                    match self.zap_one(ptes, gather, page, what, &mut full) {
                        Zapped::DirtyFile(pfn) => dirty.push(pfn),
                        Zapped::Kept | Zapped::Gone => {}
                    }
                    if full {
                        break;
                    }
                }
                let force = full || !dirty.is_empty();
                let delays_rmap = self.machine().profile().zap_delays_rmap;
                if !delays_rmap {
                    dirty.drain(..).for_each(|pfn| frames.remove_rmap(pfn));
                }
                if force {
                    gather.flush_tlb(atomic);
                }
                dirty.drain(..).for_each(|pfn| frames.remove_rmap(pfn));
                drop(guard);
                if force {
                    gather.flush(cx);
                }
            }
        }
    }

    fn zap_one(
        &self,
        ptes: &mut Ptes<'_>,
        gather: &mut MmuGather<'_>,
        page: PageAddr,
        what: Zap,
        full: &mut bool,
    ) -> Zapped {
        let frames = self.machine().frames();
        let seen = ptes.get(page);
        let counted = (seen.is_mapped() && !seen.is_special()).then(|| seen.pfn());
        let file = counted.filter(|&pfn| frames.is_file(pfn));
        if !seen.is_mapped() || (what == Zap::FilePages && counted.is_some() && file.is_none()) {
            return Zapped::Kept;
        }
        let pte = ptes.get_and_clear(page);
        *full = gather.remove_page(page, counted);
        match file.filter(|_| pte.is_dirty()) {
            Some(pfn) => {
                frames.set_dirty(pfn);
                Zapped::DirtyFile(pfn)
            }
            None => {
                counted.into_iter().for_each(|pfn| frames.remove_rmap(pfn));
                Zapped::Gone
            }
        }
    }
}
