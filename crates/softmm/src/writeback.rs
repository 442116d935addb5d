// SPDX-License-Identifier: MIT OR Apache-2.0
//! Writeback of a regular file: fsync(2), clear_page_dirty_for_io, page_mkclean (mm/page-writeback.c, mm/rmap.c).
//!
//! Sequence, per dirty page and per **shared** vma that covers it, if anybody maps the page at all; then the page is
//! written out. The next write faults, and the page becomes dirty again before it can be changed.
//!
//! | profile | one vma |
//! |---|---|
//! | v3_16, unwrapped_*, v3_19 | [ pte writable or dirty? clr; **set** read-only and clean ]; if so P, may sleep |
//! | v4_12 | [ the same; P, atomic ] |
//! | v4_14 | S; [ the same; R ]; R E |
//! | v5_10 | S(PROTECTION_PAGE); [ the same ]; R E |
//! | v6_18 | S(PROTECTION_PAGE); [ pte writable or dirty? clr A; **set** ]; E |
//!
//! P comes only for a pte that was changed, S and E always.
//!
//! The page stays where it is: only the permission goes. A device that pins it keeps writing, and what it writes after
//! the page was written out is lost unless the pin's owner sets it dirty (set_page_dirty_lock).
//!
//! Shmem has no dirty accounting and no writeback: fsync does nothing.
//!
//! Locks: page lock over i_mmap (for reading; a mutex until 3.18) over ptl. **No mmap_lock.**

use crate::mm::Mm;
use crate::page_cache::{File, LockedPage};
use crate::profile::Unmap;
use crate::pte::Pte;
use interleave::{MaySleep, PageContext};
use mmu_notifier::{Event, PageAddr, Pfn, Range};

impl File {
    /// Writes every dirty page out. Afterwards each is clean and read-only in every mapping, unless it was written since.
    pub fn fsync(&self, cx: &mut MaySleep<'_>) {
        if !self.kind().dirty_accounted() {
            return;
        }
        for index in self.cached_in(cx, 0..u64::MAX) {
            let Some(page) = self.find_lock(cx, index) else { continue };
            self.write_page(cx, index, &page);
        }
    }

    /// Cleans a locked page, if it is dirty.
    pub(crate) fn write_page(&self, cx: &mut MaySleep<'_>, index: u64, page: &LockedPage<'_>) {
        let frames = self.frames();
        if !frames.dirty(page.pfn()) {
            return;
        }
        if self.page_mkclean(cx, index, page) {
            frames.set_dirty(page.pfn());
        }
        if frames.clear_dirty(page.pfn()) {
            self.write_out(cx, index, page);
        }
    }

    /// Did any pte have to be changed?
    fn page_mkclean(&self, cx: &mut MaySleep<'_>, index: u64, page: &LockedPage<'_>) -> bool {
        if self.frames().mapcount(page.pfn()) == 0 {
            return false;
        }
        let i_mmap = self.i_mmap_lock_read(cx);
        let mut cleaned = false;
        for rmap in i_mmap.iter().filter(|rmap| rmap.shared) {
            let Some((mm, at)) = rmap.mm().zip(rmap.address(index)) else { continue };
            cleaned |= mm.page_mkclean_one(cx, at, page.pfn());
        }
        cleaned
    }
}

impl Mm {
    fn page_mkclean_one(&self, cx: &mut MaySleep<'_>, page: PageAddr, pfn: Pfn) -> bool {
        match self.machine().profile().unmap {
            Unmap::Pair => {
                let range = Range::page(page);
                self.invalidate(cx, range, Event::ProtectionPage, |cx| self.mkclean_pte(cx, page, pfn))
            }
            Unmap::PageUnderPtl => self.mkclean_pte(cx, page, pfn),
            Unmap::PageAfterUnlock => {
                let cleaned = self.mkclean_pte(cx, page, pfn);
                if cleaned {
                    self.notifiers.invalidate_page(PageContext::May(cx), page);
                }
                cleaned
            }
        }
    }

    fn mkclean_pte(&self, cx: &mut MaySleep<'_>, page: PageAddr, pfn: Pfn) -> bool {
        let Some(mut guard) = self.mapped_pte(cx, page, pfn) else { return false };
        let (ptes, cx) = guard.split();
        let seen = ptes.get(page);
        if !(seen.is_writable() || seen.is_dirty()) {
            return false;
        }
        let pte = self.clear_flush(ptes, cx, page);
        ptes.set(page, pte.without(Pte::WRITE | Pte::DIRTY));
        let profile = self.machine().profile();
        match profile.unmap {
            Unmap::PageUnderPtl => self.notifiers.invalidate_page(PageContext::Atomic(cx), page),
            Unmap::Pair if profile.unmap_flushes_secondary => {
                self.invalidate_secondary(cx, Range::page(page));
            }
            Unmap::Pair | Unmap::PageAfterUnlock => {}
        }
        true
    }
}
