// SPDX-License-Identifier: MIT OR Apache-2.0
//! Page ageing, and reclaim of an anonymous page: shrink_page_list for one page, try_to_unmap_one.
//!
//! Ageing (page_referenced), per place where rmap finds the page: [ pte young test and clear; Y ]. Idle tracking
//! calls clear_young instead (v4_12 and later), which flushes nothing.
//!
//! Reclaim: trylock_page; ageing (a page that was used is left alone); add_to_swap; unmap everywhere; write out if
//! dirty; take it out of the swap cache and free it, **if nobody else holds a reference**; else it stays in the
//! swap cache and the next fault finds it there. One place:
//!
//! | profile | sequence |
//! |---|---|
//! | v3_16, unwrapped_*, v3_19 | [ Y; clr; swap_duplicate; **set** swap entry; remove rmap; put ]; P, may sleep |
//! | v4_12 | [ Y; clr'; ...; **set**; put; P, atomic ]; flush before the page is written |
//! | v4_14 | S; [ Y; clr'; ...; **set**; put; R ]; E; flush |
//! | v5_10 | S; [ Y; clr'; ...; **set**; put ]; R E; flush |
//! | v6_18 | S; [ clr' A(everything); exclusive and pinned? put the pte back; **set**; put ]; E; flush |
//!
//! If Y says that the page was used, the place is left as it is and reclaim gives up; a P comes only for a pte that was
//! changed, S and E always.
//!
//! Pinned pages: until v5_10 they are unmapped and written like all others, and kept by the reference; v6_18 leaves
//! them alone before it unmaps, and finds out at each pte if a pin came meanwhile.
//!
//! A page that MADV_FREE has given up gets no swap entry: **set** is nothing, and the page is free afterwards. If it has been
//! written since, or somebody holds a reference, the pte is put back (v4_12 and later).
//!
//! What is not here: lists of pages and the choice among them; the caller names the page.
//!
//! Locks: page lock (tried for); anon_vma for reading around each walk; S..E; ptl. No mmap_lock, so none that a
//! process holds keeps this away from its mm.

use crate::frame::{FrameId, Held};
use crate::machine::Machine;
use crate::mm::Mm;
use crate::profile::{SecondaryTlbs, Unmap};
use crate::pte::Pte;
use interleave::{MaySleep, PageContext};
use mmu_notifier::{Event, PageAddr, Pfn, Range};
use std::ops::ControlFlow;
use std::sync::Arc;

/// What reclaim did with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reclaim {
    /// It is free; its contents are in swap, or nobody wanted them.
    Reclaimed,
    /// It was used since the last time: a second chance.
    Referenced,
    /// It is still mapped: somebody used it meanwhile, or pins it (5.19).
    Mapped,
    /// Somebody holds a reference. It may have been unmapped, and is in the swap cache then.
    Held,
    /// Somebody has it locked.
    Busy,
    /// No free slot in the swap area.
    NoSwap,
    /// Not a page that this can reclaim: free, the zero page, the page cache's.
    NotAnonymous,
}

/// What became of one pte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unmapped {
    NotMapped,
    Failed,
    Done,
}

/// One walk of reclaim over the places where a page is mapped.
struct Unmapping<'r> {
    pfn: Pfn,
    ignore_references: bool,
    /// Whose CPUs still cache what was cleared (TLB_UBC).
    unflushed: &'r mut Vec<Arc<Mm>>,
}

impl Machine {
    /// Tries to reclaim a page. `ignore_references`: whether it was used does not matter (MADV_PAGEOUT).
    pub fn reclaim_page(&self, cx: &mut MaySleep<'_>, frame: FrameId, ignore_references: bool) -> Reclaim {
        let (frames, profile, pfn) = (self.frames(), self.profile(), frame.pfn);
        if !frames.try_get(pfn, 1) {
            return Reclaim::NotAnonymous;
        }
        let held = Held::adopt(frames, pfn);
        let anon = frames.is_anon(pfn) || frames.swap_slot(pfn).is_some();
        if frames.id(pfn) != frame || !anon {
            return Reclaim::NotAnonymous;
        }
        let Some(lock) = frames.trylock_page(cx, pfn) else { return Reclaim::Busy };
        if !ignore_references && self.referenced(cx, pfn) {
            return Reclaim::Referenced;
        }
        if frames.swap_slot(pfn).is_none() && !frames.is_lazyfree(pfn) {
            if profile.reclaim_spares_pinned && frames.maybe_dma_pinned(pfn) {
                return Reclaim::Held;
            }
            if !self.add_to_swap(cx, pfn) {
                return Reclaim::NoSwap;
            }
        }
        let mut unflushed = Vec::new();
        self.try_to_unmap(cx, Unmapping { pfn, ignore_references, unflushed: &mut unflushed });
        // A CPU that may still write through its TLB does so before the page is written out.
        unflushed.iter().for_each(|mm| self.flush_cpus(cx, mm, Range::ALL));
        if frames.mapcount(pfn) > 0 {
            self.try_to_free_swap_if_full(cx, pfn);
            return Reclaim::Mapped;
        }
        if profile.reclaim_spares_pinned && frames.maybe_dma_pinned(pfn) {
            return Reclaim::Held;
        }
        if frames.dirty(pfn) {
            self.swap_out(cx, pfn);
        }
        // This one, and the swap cache's if it is there. Whoever takes one more comes too late.
        let ours = if frames.swap_slot(pfn).is_some() { 2 } else { 1 };
        if !frames.freeze(pfn, ours) {
            return Reclaim::Held;
        }
        std::mem::forget(held);
        self.detach_cached(cx, pfn);
        drop(lock);
        frames.free_frozen(pfn);
        Reclaim::Reclaimed
    }

    /// Has a CPU or a device used the page since the last call (page_referenced, folio_referenced)? Forgets it.
    pub fn page_referenced(&self, cx: &mut MaySleep<'_>, frame: FrameId) -> bool {
        self.age(cx, frame, |machine, cx, pfn| machine.referenced(cx, pfn)).unwrap_or(false)
    }

    /// The same for idle tracking (page_idle_clear_pte_refs), which flushes no secondary TLB. None: this kernel has
    /// none, or there is no such page.
    pub fn page_idle_clear_refs(&self, cx: &mut MaySleep<'_>, frame: FrameId) -> Option<bool> {
        if !self.profile().clear_young {
            return None;
        }
        self.age(cx, frame, |machine, cx, pfn| {
            let mut young = false;
            machine.rmap_walk(cx, pfn, |cx, mm, page| {
                if let Some(mut guard) = mm.mapped_pte(cx, page, pfn) {
                    let (ptes, cx) = guard.split();
                    young |= ptes.test_and_clear_young(page);
                    young |= mm.notifiers.clear_young(cx, Range::page(page));
                }
                ControlFlow::Continue(())
            });
            young
        })
    }

    fn age(
        &self,
        cx: &mut MaySleep<'_>,
        frame: FrameId,
        walk: impl FnOnce(&Machine, &mut MaySleep<'_>, Pfn) -> bool,
    ) -> Option<bool> {
        if !self.frames().try_get(frame.pfn, 1) {
            return None;
        }
        let _held = Held::adopt(self.frames(), frame.pfn);
        (self.frames().id(frame.pfn) == frame).then(|| walk(self, cx, frame.pfn))
    }

    fn referenced(&self, cx: &mut MaySleep<'_>, pfn: Pfn) -> bool {
        let mut young = false;
        self.rmap_walk(cx, pfn, |cx, mm, page| {
            if let Some(mut guard) = mm.mapped_pte(cx, page, pfn) {
                let (ptes, cx) = guard.split();
                young |= mm.clear_flush_young_notify(ptes, cx, page);
            }
            ControlFlow::Continue(())
        });
        young
    }

    fn try_to_unmap(&self, cx: &mut MaySleep<'_>, mut unmapping: Unmapping<'_>) {
        let frames = self.frames();
        let pfn = unmapping.pfn;
        self.rmap_walk(cx, pfn, |cx, mm, page| {
            let done = mm.try_to_unmap_one(cx, page, &mut unmapping);
            if done == Unmapped::Failed || frames.mapcount(pfn) == 0 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
    }
}

impl Mm {
    /// Has a device used the page at `page`? Forgets nothing (khugepaged and DAMON look so).
    pub fn test_young(&self, cx: &mut MaySleep<'_>, page: PageAddr) -> bool {
        let pte = self.peek_pte(page);
        let Some(mut guard) = self.mapped_pte(cx, page, pte.pfn()) else { return false };
        let (ptes, cx) = guard.split();
        ptes.get(page).is_young() || self.notifiers.test_young(cx, Range::page(page))
    }

    /// ptep_clear_flush_young_notify. x86 leaves its own TLB alone.
    pub(crate) fn clear_flush_young_notify(
        &self,
        ptes: &mut crate::page_table::Ptes<'_>,
        cx: &mut interleave::Atomic<'_>,
        page: PageAddr,
    ) -> bool {
        let young = ptes.test_and_clear_young(page);
        self.notifiers.clear_flush_young(cx, Range::page(page)) | young
    }

    fn try_to_unmap_one(
        self: &Arc<Mm>,
        cx: &mut MaySleep<'_>,
        page: PageAddr,
        unmapping: &mut Unmapping<'_>,
    ) -> Unmapped {
        match self.machine().profile().unmap {
            Unmap::Pair => {
                self.invalidate(cx, Range::page(page), Event::Clear, |cx| self.unmap_pte(cx, page, unmapping))
            }
            Unmap::PageUnderPtl => self.unmap_pte(cx, page, unmapping),
            Unmap::PageAfterUnlock => {
                let done = self.unmap_pte(cx, page, unmapping);
                if done == Unmapped::Done {
                    self.notifiers.invalidate_page(PageContext::May(cx), page);
                }
                done
            }
        }
    }

    fn unmap_pte(
        self: &Arc<Mm>,
        cx: &mut MaySleep<'_>,
        page: PageAddr,
        unmapping: &mut Unmapping<'_>,
    ) -> Unmapped {
        let (machine, profile, pfn) = (self.machine(), self.machine().profile(), unmapping.pfn);
        let frames = machine.frames();
        let Some(mut guard) = self.mapped_pte(cx, page, pfn) else { return Unmapped::NotMapped };
        let (ptes, cx) = guard.split();
        let asks = profile.unmap_asks_young && !unmapping.ignore_references;
        if asks && self.clear_flush_young_notify(ptes, cx, page) {
            return Unmapped::Failed;
        }
        let slot = frames.swap_slot(pfn);
        if slot.is_none() && !frames.is_lazyfree(pfn) {
            return Unmapped::Failed;
        }
        let old = if profile.unmap_defers_flush {
            let old = ptes.get_and_clear(page);
            unmapping.unflushed.push(self.clone());
            if profile.secondary_tlbs == SecondaryTlbs::CpuFlush {
                // arch_tlbbatch_add_pending: everything, at once.
                self.notifiers.arch_invalidate_secondary_tlbs(cx, Range::ALL);
            }
            old
        } else {
            self.clear_flush(ptes, cx, page)
        };
        if old.is_dirty() {
            frames.set_dirty(pfn);
        }
        if let Some(slot) = slot {
            let exclusive = profile.has_exclusive() && frames.exclusive(pfn);
            if exclusive && frames.maybe_dma_pinned(pfn) {
                ptes.set(page, old);
                return Unmapped::Failed;
            }
            machine.swap().duplicate(cx, slot);
            frames.set_exclusive(pfn, false);
            ptes.set(page, Pte::swap(slot, exclusive));
        } else if !frames.may_discard(pfn) {
            ptes.set(page, old);
            return Unmapped::Failed;
        }
        frames.remove_rmap(pfn);
        frames.put(pfn, 1);
        match profile.unmap {
            Unmap::PageUnderPtl => self.notifiers.invalidate_page(PageContext::Atomic(cx), page),
            Unmap::Pair if profile.unmap_flushes_secondary => {
                self.invalidate_secondary(cx, Range::page(page))
            }
            Unmap::Pair | Unmap::PageAfterUnlock => {}
        }
        Unmapped::Done
    }
}
