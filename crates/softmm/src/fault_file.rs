// SPDX-License-Identifier: MIT OR Apache-2.0
//! Page faults on mappings of files: do_fault and wp_page_shared of mm/memory.c (v6.18).
//!
//! Sequence: nothing, in any version. Each of them makes a page present or a read-only pte of the same page writable:
//! * read: [ set RO ], or writable for the shared, writable mapping of a file without dirty accounting;
//! * first write to a private mapping: copy, [ set RW dirty ], without S..E, because nothing was present;
//! * write to a shared mapping: page_mkwrite, [ set RW dirty ], set_page_dirty.
//!
//! A write to a page of the cache that a private mapping shows read-only is a copy-on-write: [`crate::cow`].
//! Past the end of the file: SIGBUS. A read fault also maps the cached pages beside it, as many as `Config::fault_around`
//! says: a later write to one of them in a private mapping is a copy-on-write, which is notified, and no first touch.
//!
//! Locks: mmap_lock for reading; the page lock from before the pte is set until after set_page_dirty, so that
//! truncate and writeback come wholly before or wholly after; ptl.

use crate::error::FaultError;
use crate::fault::{FaultFlag, Faulted};
use crate::mm::Mm;
use crate::page_cache::{FileKind, LockedPage, NoPage};
use crate::page_table::{PteGuard, TableId};
use crate::pte::Pte;
use crate::vma::{Vma, VmaFile, VmaTree};
use interleave::MaySleep;
use mmu_notifier::{PAGE_SHIFT, PageAddr, Range};

/// What one leaf table maps.
const LEAF_SPAN: u64 = 512 << PAGE_SHIFT;

impl Mm {
    /// The pte was none.
    pub(crate) fn do_fault(
        &self,
        cx: &mut MaySleep<'_>,
        vmas: &VmaTree,
        (vma, file): (&Vma, &VmaFile),
        leaf: TableId,
        page: PageAddr,
        flag: FaultFlag,
    ) -> Result<Faulted, FaultError> {
        if file.file.kind() == FileKind::Xip {
            return self.xip_fault(cx, (vma, file), leaf, page).map(|()| Faulted::default());
        }
        match flag {
            FaultFlag::Write if file.shared => self.do_shared_fault(cx, (vma, file), leaf, page),
            FaultFlag::Write => self.do_cow_fault(cx, vmas, (vma, file), leaf, page),
            FaultFlag::Read | FaultFlag::Unshare => self.do_read_fault(cx, (vma, file), leaf, page),
        }
    }

    fn do_read_fault(
        &self,
        cx: &mut MaySleep<'_>,
        (vma, file): (&Vma, &VmaFile),
        leaf: TableId,
        page: PageAddr,
    ) -> Result<Faulted, FaultError> {
        let accounted = file.file.kind().dirty_accounted();
        let write = if file.shared && vma.prot.writable() && !accounted { Pte::WRITE } else { 0 };
        self.do_fault_around(cx, (vma, file), leaf, page, write);
        if !self.peek_pte(page).is_none() {
            return Ok(Faulted::default());
        }
        let mut found = file_page(cx, vma, file, page)?;
        self.finish_fault(cx, vma, &mut found, leaf, page, write);
        Ok(Faulted::default())
    }

    /// Maps what is cached in an aligned block around `page`. The block is cut at the vma, and at the page table's end;
    /// one that is cut in front reaches as much further behind.
    fn do_fault_around(
        &self,
        cx: &mut MaySleep<'_>,
        (vma, file): (&Vma, &VmaFile),
        leaf: TableId,
        page: PageAddr,
        write: u64,
    ) {
        let pages = self.machine().config().fault_around;
        if pages <= 1 {
            return;
        }
        let size = pages << PAGE_SHIFT;
        let table = page.get() & !(LEAF_SPAN - 1);
        let start = (page.get() & !(size - 1)).max(vma.range.start()).max(table);
        let end = (start + size).min(vma.range.end()).min(table + LEAF_SPAN);
        let Ok(block) = Range::new(start, end - start) else { return };
        let first = file.index(vma, block.first_page());
        for index in file.file.cached_in(cx, first..first + block.pages()) {
            let around = PageAddr::containing(start + ((index - first) << PAGE_SHIFT));
            // Whoever holds the lock of a page changes it: such a page is left out.
            if let (Ok(around), Ok(Some(mut found))) = (around, file.file.find_trylock(cx, index)) {
                self.finish_fault(cx, vma, &mut found, leaf, around, write);
            }
        }
    }

    fn do_cow_fault(
        &self,
        cx: &mut MaySleep<'_>,
        vmas: &VmaTree,
        (vma, file): (&Vma, &VmaFile),
        leaf: TableId,
        page: PageAddr,
    ) -> Result<Faulted, FaultError> {
        let (tables, frames) = (self.machine().tables(), self.machine().frames());
        self.anon_vma_prepare(cx, vmas, page);
        let new = frames.alloc()?;
        let found = match file_page(cx, vma, file, page) {
            Ok(found) => found,
            Err(error) => {
                frames.put(new, 1);
                return Err(error);
            }
        };
        frames.copy_contents(new, found.pfn());
        let mut guard = PteGuard::lock(tables, leaf, cx);
        let won = guard.get(page).is_none();
        if won {
            self.add_new_anon_rmap(vma, new, page);
            let write = if vma.prot.writable() { Pte::WRITE } else { 0 };
            let pte = Pte::new(new, 0).modify(vma.prot);
            guard.set(page, pte.with(Pte::ACCESSED | Pte::DIRTY | write));
        }
        drop(guard);
        drop(found);
        if !won {
            frames.put(new, 1);
        }
        Ok(Faulted::default())
    }

    fn do_shared_fault(
        &self,
        cx: &mut MaySleep<'_>,
        (vma, file): (&Vma, &VmaFile),
        leaf: TableId,
        page: PageAddr,
    ) -> Result<Faulted, FaultError> {
        let mut found = file_page(cx, vma, file, page)?;
        if file.file.kind().dirty_accounted() {
            // page_mkwrite is called without the page lock and takes it itself.
            found.relock(cx);
            if !self.page_mkwrite(vma, file, page, &found) {
                return Ok(Faulted::default());
            }
        }
        let frames = self.machine().frames();
        if self.finish_fault(cx, vma, &mut found, leaf, page, Pte::WRITE | Pte::DIRTY) {
            frames.set_dirty(found.pfn());
        }
        Ok(Faulted::default())
    }

    /// [ set ], if the pte is still none.
    fn finish_fault(
        &self,
        cx: &mut MaySleep<'_>,
        vma: &Vma,
        found: &mut LockedPage<'_>,
        leaf: TableId,
        page: PageAddr,
        bits: u64,
    ) -> bool {
        let (tables, frames) = (self.machine().tables(), self.machine().frames());
        let mut guard = PteGuard::lock(tables, leaf, cx);
        let won = guard.get(page).is_none();
        if won {
            frames.add_rmap(found.pfn());
            guard.set(page, Pte::new(found.pfn(), 0).modify(vma.prot).with(Pte::ACCESSED | bits));
            found.give_reference_to_mapping();
        }
        won
    }

    /// filemap_page_mkwrite: the page becomes dirty before the pte becomes writable. False: truncate was faster.
    fn page_mkwrite(&self, vma: &Vma, file: &VmaFile, page: PageAddr, locked: &LockedPage<'_>) -> bool {
        let frames = self.machine().frames();
        let valid = frames.is_page_of(locked.pfn(), file.file.id(), file.index(vma, page));
        if valid {
            frames.set_dirty(locked.pfn());
        }
        valid
    }

    /// A write to a present, read-only pte of a shared mapping. `seen` is that pte.
    pub(crate) fn wp_page_shared(
        &self,
        cx: &mut MaySleep<'_>,
        (vma, file): (&Vma, &VmaFile),
        leaf: TableId,
        page: PageAddr,
        seen: Pte,
    ) -> Result<Faulted, FaultError> {
        let (tables, frames) = (self.machine().tables(), self.machine().frames());
        let mut guard = PteGuard::lock(tables, leaf, cx);
        if guard.get(page) != seen {
            return Ok(Faulted::default());
        }
        if seen.is_special() {
            // A block of an XIP file: no page to lock, and nothing to write back (wp_pfn_shared).
            guard.set_bits(page, Pte::WRITE | Pte::ACCESSED | Pte::DIRTY);
            return Ok(Faulted::default());
        }
        frames.get(seen.pfn(), 1);
        drop(guard);
        let locked = LockedPage::lock(cx, frames, seen.pfn());
        if self.page_mkwrite(vma, file, page, &locked) {
            let mut guard = PteGuard::lock(tables, leaf, cx);
            if guard.get(page) == seen {
                guard.set_bits(page, Pte::WRITE | Pte::ACCESSED | Pte::DIRTY);
            }
        }
        drop(locked);
        frames.put(seen.pfn(), 1);
        Ok(Faulted::default())
    }
}

fn file_page<'f>(
    cx: &mut MaySleep<'_>,
    vma: &Vma,
    file: &'f VmaFile,
    page: PageAddr,
) -> Result<LockedPage<'f>, FaultError> {
    file.file.find_or_fill(cx, file.index(vma, page)).map_err(|why| match why {
        NoPage::PastEnd => FaultError::PastEnd(page),
        NoPage::OutOfMemory(error) => FaultError::OutOfMemory(error),
    })
}
