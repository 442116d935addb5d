// SPDX-License-Identifier: MIT OR Apache-2.0
//! Page ageing and reclaim of the page cache: the file half of folio_referenced and try_to_unmap (mm/rmap.c,
//! mm/vmscan.c; v6.18).
//!
//! Sequence of ageing, per vma that maps the page: [ accessed cleared; Y ]. No flush on x86: a CPU that has the
//! translation cached may use it unseen.
//!
//! Sequence of unmapping, per vma that covers the page, until nobody maps it: S(CLEAR, the page); [ clr A; dirty pte:
//! set_page_dirty; remove rmap; put ]; E. Vmas that only hold a private copy hear it too. Then a dirty page is written
//! out, and the page leaves the cache if nobody else holds it.
//!
//! A pin does not keep the pte, it keeps the page: it is unmapped, and stays in the cache.
//! Shmem pages would go to swap; that is not modelled, so they stay once they are dirty.
//!
//! Locks: page lock (trylock) over i_mmap for reading over ptl; the caller has a reference. **No mmap_lock**, and any
//! thread that allocates may be the caller (direct reclaim).

use crate::mm::Mm;
use crate::page_cache::{File, LockedPage};
use crate::page_table::PteGuard;
use crate::pte::Pte;
use interleave::MaySleep;
use mmu_notifier::{Event, PageAddr, Pfn, Range};

/// What became of a page of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reclaimed {
    /// It was not in the cache.
    Absent,
    /// Somebody works on it.
    Locked,
    /// It has left the cache.
    Freed,
    /// Unmapped, but still in the cache: somebody holds it, or there is nowhere to write it.
    Kept,
}

impl File {
    /// Asks once whether page `index` has been accessed, by CPUs or devices, and forgets it (folio_referenced).
    pub fn referenced(&self, cx: &mut MaySleep<'_>, index: u64) -> bool {
        let Some(page) = self.find_lock(cx, index) else { return false };
        let i_mmap = self.i_mmap_lock_read(cx);
        let mut young = false;
        for rmap in i_mmap.iter() {
            let Some((mm, at)) = rmap.mm().zip(rmap.address(index)) else { continue };
            young |= mm.referenced_one(cx, at, page.pfn());
        }
        young
    }

    /// Reclaims page `index`, accessed or not (shrink_folio_list for one folio).
    pub fn reclaim(&self, cx: &mut MaySleep<'_>, index: u64) -> Reclaimed {
        let page = match self.find_trylock(cx, index) {
            Ok(Some(page)) => page,
            Ok(None) => return Reclaimed::Absent,
            Err(()) => return Reclaimed::Locked,
        };
        self.try_to_unmap(cx, index, &page);
        if self.kind().dirty_accounted() {
            self.write_page(cx, index, &page);
        }
        let frames = self.frames();
        if frames.mapcount(page.pfn()) > 0 || frames.dirty(page.pfn()) {
            return Reclaimed::Kept;
        }
        match self.remove_unused(cx, index, page) {
            Ok(()) => Reclaimed::Freed,
            Err(_) => Reclaimed::Kept,
        }
    }

    fn try_to_unmap(&self, cx: &mut MaySleep<'_>, index: u64, page: &LockedPage<'_>) {
        let pfn = page.pfn();
        if self.frames().mapcount(pfn) == 0 {
            return;
        }
        let i_mmap = self.i_mmap_lock_read(cx);
        for rmap in i_mmap.iter() {
            let Some((mm, at)) = rmap.mm().zip(rmap.address(index)) else { continue };
            mm.try_to_unmap_file_one(cx, at, pfn);
            if self.frames().mapcount(pfn) == 0 {
                break;
            }
        }
    }
}

impl Mm {
    fn referenced_one(&self, cx: &mut MaySleep<'_>, page: PageAddr, pfn: Pfn) -> bool {
        let tables = self.machine().tables();
        let Some(leaf) = self.page_table.leaf(tables, page) else { return false };
        let mut guard = PteGuard::lock(tables, leaf, cx);
        let seen = guard.get(page);
        if !seen.is_present() || seen.pfn() != pfn {
            return false;
        }
        let (ptes, cx) = guard.split();
        let young = ptes.test_and_clear_young(page);
        self.notifiers.clear_flush_young(cx, Range::page(page)) || young
    }

    fn try_to_unmap_file_one(&self, cx: &mut MaySleep<'_>, page: PageAddr, pfn: Pfn) {
        self.invalidate(cx, Range::page(page), Event::Clear, |cx| self.unmap_file_pte(cx, page, pfn));
    }

    /// True if the pte led to the page.
    fn unmap_file_pte(&self, cx: &mut MaySleep<'_>, page: PageAddr, pfn: Pfn) -> bool {
        let (tables, frames) = (self.machine().tables(), self.machine().frames());
        let Some(leaf) = self.page_table.leaf(tables, page) else { return false };
        let mut guard = PteGuard::lock(tables, leaf, cx);
        let seen: Pte = guard.get(page);
        if !seen.is_present() || seen.pfn() != pfn {
            return false;
        }
        let (ptes, cx) = guard.split();
        let pte = ptes.get_and_clear(page);
        self.machine().flush_tlb_range(cx, self, Range::page(page));
        if pte.is_dirty() {
            frames.set_dirty(pfn);
        }
        frames.remove_rmap(pfn);
        frames.put(pfn, 1);
        true
    }
}
