// SPDX-License-Identifier: MIT OR Apache-2.0
//! Page ageing and reclaim of the page cache: the file half of page_referenced and try_to_unmap (mm/rmap.c,
//! mm/vmscan.c). The anonymous half is [`crate::reclaim`].
//!
//! Sequence of ageing, per vma that maps the page: [ accessed cleared; Y ]. No flush on x86: a CPU that has the
//! translation cached may use it unseen.
//!
//! Sequence of unmapping, per vma that covers the page, until nobody maps it:
//!
//! | profile | one vma |
//! |---|---|
//! | v3_16, unwrapped_*, v3_19 | [ Y; clr; dirty pte: set_page_dirty; remove rmap; put ]; P, may sleep |
//! | v4_12 | [ Y; clr'; ...; put; P, atomic ]; flush before the page is written |
//! | v4_14 | S; [ Y; clr'; ...; put; R ]; R E; flush |
//! | v5_10 | S; [ Y; clr'; ...; put ]; R E; flush |
//! | v6_18 | S(CLEAR); [ clr' A(everything); ...; put ]; E; flush |
//!
//! P comes only for a pte that was changed; S and E also for vmas that hold a private copy or nothing.
//! Then a dirty page is written out, and the page leaves the cache if nobody else holds it. v6_18 writes nothing: a dirty page of
//! a disk's file stays in the cache, unmapped, until somebody else has written it. A dirty page of shmem goes to swap in every
//! version, and is dirty again when it comes back.
//!
//! A pin does not keep the pte, it keeps the page: it is unmapped, and stays in the cache.
//!
//! What is not here: shmem's pages take no slot of [`crate::swap`], so that their swap space is never full.
//!
//! Locks: page lock (trylock) over i_mmap for reading over ptl; the caller has a reference. **No mmap_lock**, and any
//! thread that allocates may be the caller (direct reclaim).

use crate::mm::Mm;
use crate::page_cache::{File, FileKind, LockedPage};
use crate::profile::{SecondaryTlbs, Unmap};
use interleave::{MaySleep, PageContext};
use mmu_notifier::{Event, PageAddr, Pfn, Range};
use std::sync::Arc;

/// What became of a page of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reclaimed {
    /// It was not in the cache.
    Absent,
    /// Somebody works on it.
    Locked,
    /// It was used since the last time: a second chance.
    Referenced,
    /// It has left the cache.
    Freed,
    /// Unmapped, but still in the cache: somebody holds it, or it is dirty and reclaim does not write it.
    Kept,
}

/// What became of one pte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unmapped {
    NotMapped,
    Used,
    Done,
}

/// One walk of reclaim over the places where a page is mapped.
struct Walk<'w> {
    pfn: Pfn,
    ignore_references: bool,
    /// Whose CPUs still cache what was cleared (TLB_UBC).
    unflushed: &'w mut Vec<Arc<Mm>>,
}

impl File {
    /// Asks once whether page `index` has been accessed, by CPUs or devices, and forgets it (folio_referenced).
    pub fn referenced(&self, cx: &mut MaySleep<'_>, index: u64) -> bool {
        if self.kind() == FileKind::Xip {
            return false;
        }
        let Some(page) = self.find_lock(cx, index) else { return false };
        self.folio_referenced(cx, index, &page)
    }

    /// Tries to reclaim page `index` (shrink_page_list for one page). `ignore_references`: whether it was used does not
    /// matter (MADV_PAGEOUT).
    pub fn reclaim(&self, cx: &mut MaySleep<'_>, index: u64, ignore_references: bool) -> Reclaimed {
        if self.kind() == FileKind::Xip {
            return Reclaimed::Absent;
        }
        let page = match self.find_trylock(cx, index) {
            Ok(Some(page)) => page,
            Ok(None) => return Reclaimed::Absent,
            Err(()) => return Reclaimed::Locked,
        };
        if !ignore_references && self.folio_referenced(cx, index, &page) {
            return Reclaimed::Referenced;
        }
        let mut unflushed = Vec::new();
        let pfn = page.pfn();
        let unmapped =
            self.try_to_unmap(cx, index, Walk { pfn, ignore_references, unflushed: &mut unflushed });
        // A CPU that may still write through its TLB does so before the page is written out.
        unflushed.iter().for_each(|mm| self.machine().flush_cpus(cx, mm, Range::ALL));
        if !unmapped {
            return Reclaimed::Referenced;
        }
        if self.kind().dirty_accounted() && self.machine().profile().reclaim_writes_files {
            self.write_page(cx, index, &page);
        }
        if self.frames().mapcount(pfn) > 0 {
            return Reclaimed::Kept;
        }
        let swapped = self.kind() == FileKind::Shmem && self.frames().clear_dirty(pfn);
        if swapped {
            self.write_out(cx, index, &page);
        }
        if self.frames().dirty(pfn) {
            return Reclaimed::Kept;
        }
        match self.remove_unused(cx, index, page) {
            Ok(()) => Reclaimed::Freed,
            Err(page) => {
                if swapped {
                    self.free_blocks(cx, index..index + 1);
                    self.frames().set_dirty(page.pfn());
                }
                Reclaimed::Kept
            }
        }
    }

    fn folio_referenced(&self, cx: &mut MaySleep<'_>, index: u64, page: &LockedPage<'_>) -> bool {
        let i_mmap = self.i_mmap_lock_read(cx);
        let mut young = false;
        for rmap in i_mmap.iter() {
            let Some((mm, at)) = rmap.mm().zip(rmap.address(index)) else { continue };
            young |= mm.referenced_one(cx, at, page.pfn());
        }
        young
    }

    fn try_to_unmap(&self, cx: &mut MaySleep<'_>, index: u64, mut walk: Walk<'_>) -> bool {
        if self.frames().mapcount(walk.pfn) == 0 {
            return true;
        }
        let i_mmap = self.i_mmap_lock_read(cx);
        for rmap in i_mmap.iter() {
            let Some((mm, at)) = rmap.mm().zip(rmap.address(index)) else { continue };
            if !mm.try_to_unmap_file_one(cx, at, &mut walk) {
                return false;
            }
            if self.frames().mapcount(walk.pfn) == 0 {
                break;
            }
        }
        true
    }
}

impl Mm {
    fn referenced_one(&self, cx: &mut MaySleep<'_>, page: PageAddr, pfn: Pfn) -> bool {
        let Some(mut guard) = self.mapped_pte(cx, page, pfn) else { return false };
        let (ptes, cx) = guard.split();
        self.clear_flush_young_notify(ptes, cx, page)
    }

    /// False: the page was used, so reclaim gives up.
    fn try_to_unmap_file_one(
        self: &Arc<Mm>,
        cx: &mut MaySleep<'_>,
        page: PageAddr,
        walk: &mut Walk<'_>,
    ) -> bool {
        match self.machine().profile().unmap {
            Unmap::Pair => {
                let range = Range::page(page);
                self.invalidate(cx, range, Event::Clear, |cx| self.unmap_file_pte(cx, page, walk))
                    != Unmapped::Used
            }
            Unmap::PageUnderPtl => self.unmap_file_pte(cx, page, walk) != Unmapped::Used,
            Unmap::PageAfterUnlock => {
                let done = self.unmap_file_pte(cx, page, walk);
                if done == Unmapped::Done {
                    self.notifiers.invalidate_page(PageContext::May(cx), page);
                }
                done != Unmapped::Used
            }
        }
    }

    fn unmap_file_pte(
        self: &Arc<Mm>,
        cx: &mut MaySleep<'_>,
        page: PageAddr,
        walk: &mut Walk<'_>,
    ) -> Unmapped {
        let (machine, profile) = (self.machine(), self.machine().profile());
        let frames = machine.frames();
        let Some(mut guard) = self.mapped_pte(cx, page, walk.pfn) else { return Unmapped::NotMapped };
        let (ptes, cx) = guard.split();
        let asks = profile.unmap_asks_young && !walk.ignore_references;
        if asks && self.clear_flush_young_notify(ptes, cx, page) {
            return Unmapped::Used;
        }
        let pte = if profile.unmap_defers_flush {
            let pte = ptes.get_and_clear(page);
            walk.unflushed.push(self.clone());
            if profile.secondary_tlbs == SecondaryTlbs::CpuFlush {
                self.notifiers.arch_invalidate_secondary_tlbs(cx, Range::ALL);
            }
            pte
        } else {
            self.clear_flush(ptes, cx, page)
        };
        if pte.is_dirty() {
            frames.set_dirty(walk.pfn);
        }
        frames.remove_rmap(walk.pfn);
        frames.put(walk.pfn, 1);
        match profile.unmap {
            Unmap::PageUnderPtl => self.notifiers.invalidate_page(PageContext::Atomic(cx), page),
            Unmap::Pair if profile.unmap_flushes_secondary => {
                self.invalidate_secondary(cx, Range::page(page));
            }
            Unmap::Pair | Unmap::PageAfterUnlock => {}
        }
        Unmapped::Done
    }
}
