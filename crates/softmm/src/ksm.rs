// SPDX-License-Identifier: MIT OR Apache-2.0
//! KSM: two pages with the same contents become one, read-only for both: write_protect_page, replace_page.
//!
//! A merge is two steps, each with its own sequence. The page is locked and ksmd holds a reference.
//!
//! | profile | write_protect_page | replace_page |
//! |---|---|---|
//! | v3_16 | S; [ if the pte is writable or dirty: clr; count?; C; **set** RO clean ]; E | S; [ pte_same? clr; C; **set** the merged page, RO; put ]; E |
//! | unwrapped_a, _b, _c | the same without S and E; _b: P after the unlock, _c: P beside C, for who has no change_pte | likewise |
//! | v3_19 .. v4_14 | S; [ clr R; count?; C; **set** ]; R E | S; [ clr R; C; **set**; put ]; R E |
//! | v5_10 | S; [ clr; count?; C; **set** ]; R E | S; [ clr; C; **set**; put ]; R E |
//! | v6_18 | S; [ if writable, dirty or exclusive: clr A; count?; pinned?; **set** ]; E | S; [ clr A; **set**; put ]; E |
//!
//! *count?*: mapcount + 1 + (in the swap cache?) must be all references; else somebody else may write the page: the old
//! pte is put back, without a word. The count is **only** looked at if the pte is writable or dirty (or the page
//! exclusive, v6_18): a page that is read-only and clean already is merged away under whoever pins it.
//!
//! Afterwards the contents are compared, and no CPU can write them any more. A store un-merges by [`crate::cow`].
//!
//! A merged page has no anon_vma but a list of those of the places that were merged into it: reclaim looks at the
//! mms that were merged first, then at those that fork has made of them since.
//!
//! What is not here: the trees and the scanner that find candidates. [`Machine::ksm_merge`] is what ksmd does with
//! a pair that it has found.
//!
//! Locks: `ksm_thread_mutex` -> mmap_lock for reading -> page lock (tried for) -> S..E -> ptl.

use crate::frame::{FrameId, Held};
use crate::machine::Machine;
use crate::mm::{Mm, MmId};
use crate::notify::End;
use crate::page_table::Ptes;
use crate::pte::Pte;
use crate::rmap::Visit;
use crate::vma::Vma;
use interleave::{Atomic, Digest, LockClass, MaySleep, SpinLock};
use mmu_notifier::{PageAddr, Pfn};
use std::collections::BTreeMap;
use std::ops::ControlFlow;

static STABLE_NODE: LockClass = LockClass::new("ksm_stable_node");

/// What came of an attempt to merge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Merge {
    /// The pages are one, or the page is KSM's.
    Merged,
    /// No anonymous page there, or no mergeable mapping (MADV_MERGEABLE).
    NotMergeable,
    /// Somebody has the page locked.
    Busy,
    /// There are references that no mapping explains, or a pin.
    Held,
    /// The contents differ, or the page changed meanwhile.
    Differs,
}

/// One place that was merged (rmap_item).
#[derive(Clone, Copy)]
struct RmapItem {
    anon_vma: u64,
    index: PageAddr,
    mm: MmId,
}

impl Digest for RmapItem {
    fn digest(&self) -> u64 {
        (self.anon_vma, self.index.get(), self.mm.number()).digest()
    }
}

/// What was merged into which page, by the life of the page; that of a page which is gone is forgotten at the next
/// merge.
pub(crate) struct StableNodes {
    nodes: SpinLock<BTreeMap<FrameId, Vec<RmapItem>>>,
}

impl StableNodes {
    pub(crate) fn new() -> StableNodes {
        StableNodes { nodes: SpinLock::with_digest(&STABLE_NODE, BTreeMap::new(), BTreeMap::digest) }
    }
}

impl Machine {
    /// stable_tree_append.
    fn stable_tree_append(&self, cx: &mut MaySleep<'_>, kpage: Pfn, item: RmapItem) {
        let (frames, kpage) = (self.frames(), self.frames().id(kpage));
        let mut nodes = self.stable_nodes().nodes.lock(cx);
        nodes.retain(|frame, _| frames.is_live(*frame));
        nodes.entry(kpage).or_default().push(item);
    }

    /// rmap_walk_ksm: the mms that were merged first, then their forks.
    pub(crate) fn rmap_walk_ksm(&self, cx: &mut MaySleep<'_>, pfn: Pfn, visit: &mut Visit<'_>) {
        let id = self.frames().id(pfn);
        let items = self.stable_nodes().nodes.lock(cx).get(&id).cloned().unwrap_or_default();
        for forks in [false, true] {
            for item in &items {
                let walked = self.anon_vma_walk(cx, item.anon_vma, item.index, &mut |cx, mm, page| {
                    if (mm.id() != item.mm) == forks {
                        visit(cx, mm, page)
                    } else {
                        ControlFlow::Continue(())
                    }
                });
                if walked.is_break() {
                    return;
                }
            }
        }
    }

    /// try_to_merge_two_pages: the page at `a` becomes KSM's and stands for the one at `b` too. If `b` then cannot be
    /// merged, `a` gets a page of its own again (break_cow).
    pub fn ksm_merge(&self, cx: &mut MaySleep<'_>, a: (&Mm, PageAddr), b: (&Mm, PageAddr)) -> Merge {
        let _ksmd = self.ksm_thread_mutex().lock(cx);
        let kpage = match self.try_to_merge(cx, a, None) {
            Ok(kpage) => kpage,
            Err(why) => return why,
        };
        let _held = Held::adopt(self.frames(), kpage);
        match self.try_to_merge(cx, b, Some(kpage)) {
            Ok(other) => {
                self.frames().put(other, 1);
                Merge::Merged
            }
            Err(why) => {
                let vmas = a.0.vmas.read(cx);
                // Without memory the page stays KSM's: read-only, and nobody else has it.
                let _ = a.0.break_ksm(cx, &vmas, a.1);
                why
            }
        }
    }

    /// The page at `b` is replaced by `kpage`, which is KSM's already (a match in the stable tree).
    pub fn ksm_merge_with(&self, cx: &mut MaySleep<'_>, kpage: FrameId, b: (&Mm, PageAddr)) -> Merge {
        let _ksmd = self.ksm_thread_mutex().lock(cx);
        let frames = self.frames();
        if !frames.try_get(kpage.pfn, 1) {
            return Merge::Differs;
        }
        let _held = Held::adopt(frames, kpage.pfn);
        if frames.id(kpage.pfn) != kpage || !frames.is_ksm(kpage.pfn) {
            return Merge::Differs;
        }
        match self.try_to_merge(cx, b, Some(kpage.pfn)) {
            Ok(other) => {
                frames.put(other, 1);
                Merge::Merged
            }
            Err(why) => why,
        }
    }

    /// try_to_merge_with_ksm_page. The page that was there, with a reference.
    fn try_to_merge(
        &self,
        cx: &mut MaySleep<'_>,
        (mm, at): (&Mm, PageAddr),
        kpage: Option<Pfn>,
    ) -> Result<Pfn, Merge> {
        let frames = self.frames();
        let vmas = mm.vmas.read(cx);
        let vma = vmas.find(at.get()).filter(|vma| vma.mergeable).ok_or(Merge::NotMergeable)?;
        let pfn = mm.anon_page_at(cx, at).ok_or(Merge::NotMergeable)?;
        let held = Held::adopt(frames, pfn);
        if kpage != Some(pfn) {
            let was_merged = frames.is_ksm(pfn);
            mm.try_to_merge_one_page(cx, vma, at, pfn, kpage)?;
            if !was_merged {
                let (anon_vma, index) = (vma.anon_vma().unwrap_or_default(), vma.anon_index(at));
                let item = RmapItem { anon_vma, index, mm: mm.id() };
                self.stable_tree_append(cx, kpage.unwrap_or(pfn), item);
            }
        }
        std::mem::forget(held);
        Ok(pfn)
    }
}

impl Mm {
    /// The anonymous page that is mapped at `page`, with a reference (follow_page with FOLL_GET).
    fn anon_page_at(&self, cx: &mut MaySleep<'_>, page: PageAddr) -> Option<Pfn> {
        let pte = self.peek_pte(page);
        let guard = self.mapped_pte(cx, page, pte.pfn())?;
        let (pte, frames) = (guard.get(page), self.machine().frames());
        if !pte.is_mapped() || pte.is_special() || !frames.is_anon(pte.pfn()) {
            return None;
        }
        frames.get(pte.pfn(), 1);
        Some(pte.pfn())
    }

    fn try_to_merge_one_page(
        &self,
        cx: &mut MaySleep<'_>,
        vma: &Vma,
        at: PageAddr,
        pfn: Pfn,
        kpage: Option<Pfn>,
    ) -> Result<(), Merge> {
        let frames = self.machine().frames();
        let _lock = frames.trylock_page(cx, pfn).ok_or(Merge::Busy)?;
        if frames.is_ksm(pfn) {
            return if kpage.is_none() { Ok(()) } else { Err(Merge::Differs) };
        }
        let seen = self.write_protect_page(cx, at, pfn)?;
        match kpage {
            None => {
                frames.set_ksm(pfn);
                frames.set_dirty(pfn);
                Ok(())
            }
            Some(kpage) if frames.identical(pfn, kpage) => self.replace_page(cx, vma, at, seen, kpage),
            Some(_) => Err(Merge::Differs),
        }
    }

    /// Nobody can write the page through this pte afterwards; what the pte is then.
    fn write_protect_page(&self, cx: &mut MaySleep<'_>, at: PageAddr, pfn: Pfn) -> Result<Pte, Merge> {
        let frames = self.machine().frames();
        let mut result = Err(Merge::Differs);
        self.change_pte_section(cx, at, End::Full, |cx| {
            let Some(mut guard) = self.mapped_pte(cx, at, pfn) else { return false };
            let (ptes, cx) = guard.split();
            let seen = ptes.get(at);
            let exclusive = self.machine().profile().has_exclusive() && frames.exclusive(pfn);
            if !seen.is_writable() && !seen.is_dirty() && !exclusive {
                result = Ok(seen);
                return false;
            }
            let old = self.ksm_clear_flush(ptes, cx, at);
            let cached = u32::from(frames.swap_slot(pfn).is_some());
            let explained = frames.mapcount(pfn) + 1 + cached;
            if frames.refcount(pfn) != explained || (exclusive && frames.maybe_dma_pinned(pfn)) {
                ptes.set(at, old);
                result = Err(Merge::Held);
                return false;
            }
            frames.set_exclusive(pfn, false);
            if old.is_dirty() {
                frames.set_dirty(pfn);
            }
            let new = old.without(Pte::WRITE | Pte::DIRTY);
            self.set_pte_at_notify(ptes, cx, at, new);
            result = Ok(new);
            true
        });
        result
    }

    fn replace_page(
        &self,
        cx: &mut MaySleep<'_>,
        vma: &Vma,
        at: PageAddr,
        seen: Pte,
        kpage: Pfn,
    ) -> Result<(), Merge> {
        let (machine, frames) = (self.machine(), self.machine().frames());
        let pfn = seen.pfn();
        let replaced = self.change_pte_section(cx, at, End::Full, |cx| {
            let Some(mut guard) = self.mapped_pte(cx, at, pfn).filter(|guard| guard.get(at) == seen) else {
                return false;
            };
            let (ptes, cx) = guard.split();
            frames.get(kpage, 1);
            frames.add_rmap(kpage);
            self.ksm_clear_flush(ptes, cx, at);
            let new = Pte::new(kpage, Pte::ACCESSED).modify(vma.prot);
            self.set_pte_at_notify(ptes, cx, at, new);
            frames.remove_rmap(pfn);
            if frames.mapcount(pfn) == 0 {
                machine.try_to_free_swap(cx, pfn);
            }
            frames.put(pfn, 1);
            true
        });
        if replaced { Ok(()) } else { Err(Merge::Differs) }
    }

    fn ksm_clear_flush(&self, ptes: &mut Ptes<'_>, cx: &mut Atomic<'_>, at: PageAddr) -> Pte {
        if self.machine().profile().ksm_flushes_secondary {
            self.clear_flush_notify(ptes, cx, at)
        } else {
            self.clear_flush(ptes, cx, at)
        }
    }
}
