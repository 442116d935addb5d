// SPDX-License-Identifier: MIT OR Apache-2.0
//! Page faults on mappings of files: do_fault and wp_page_shared of mm/memory.c (v6.18).
//!
//! Sequence: nothing, in any version. Each of them makes a page present or a read-only pte of the same page writable:
//! * read: [ set RO ], or writable for the shared, writable mapping of a file without dirty accounting;
//! * first write to a private mapping: copy, [ set RW dirty ], without S..E, because nothing was present;
//! * write to a shared mapping: page_mkwrite, [ set RW dirty ], set_page_dirty.
//!
//! A write to a page of the cache that a private mapping shows read-only is a copy-on-write: [`crate::cow`].
//! Past the end of the file: SIGBUS.
//!
//! A read fault also maps the pages beside it that are cached (fault-around, 3.15), so that the first write to such a page of
//! a private mapping is a copy-on-write, and is notified.
//!
//! Locks: mmap_lock for reading; the page lock from before the pte is set until after set_page_dirty, so that
//! truncate and writeback come wholly before or wholly after; ptl.

use crate::error::FaultError;
use crate::fault::{FaultFlag, Faulted};
use crate::mm::Mm;
use crate::page_cache::{FileKind, LockedPage, NoPage};
use crate::page_table::{PteGuard, TableId, entry_span};
use crate::pte::Pte;
use crate::vma::{Vma, VmaFile, VmaTree};
use interleave::MaySleep;
use mmu_notifier::{PAGE_SHIFT, PageAddr, Range};

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
        if self.machine().config().fault_around > 1
            && self.do_fault_around(cx, (vma, file), leaf, page, write)
        {
            return Ok(Faulted::default());
        }
        let mut found = file_page(cx, vma, file, page)?;
        self.finish_fault(cx, vma, &mut found, leaf, page, write);
        Ok(Faulted::default())
    }

    /// filemap_map_pages: whatever is cached, unlocked and not mapped around `page`. Was `page` itself?
    fn do_fault_around(
        &self,
        cx: &mut MaySleep<'_>,
        (vma, file): (&Vma, &VmaFile),
        leaf: TableId,
        page: PageAddr,
        bits: u64,
    ) -> bool {
        let (tables, frames) = (self.machine().tables(), self.machine().frames());
        let Some(window) = fault_around_window(vma.range, page, self.machine().config().fault_around) else {
            return false;
        };
        let first = file.index(vma, window.first_page());
        let cached = file.file.find_get_range(cx, first..first + window.pages());
        let mut unused = Vec::new();
        let mut guard = PteGuard::lock(tables, leaf, cx);
        let (ptes, atomic) = guard.split();
        for (at, index) in window.iter_pages().zip(first..) {
            let Some(&pfn) = cached.get(&index) else { continue };
            let lock = frames.trylock_page(atomic, pfn);
            let valid = frames.is_page_of(pfn, file.file.id(), index) && index < file.file.pages();
            if lock.is_some() && valid && ptes.get(at).is_none() {
                frames.add_rmap(pfn);
                ptes.set(at, Pte::new(pfn, 0).modify(vma.prot).with(Pte::ACCESSED | bits));
            } else {
                unused.push(pfn);
            }
        }
        let mapped = !ptes.get(page).is_none();
        drop(guard);
        unused.into_iter().for_each(|pfn| frames.put(pfn, 1));
        mapped
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

/// The pages around `page`: aligned, but inside the vma and the page table; the window begins with the vma if that begins in it.
fn fault_around_window(vma: Range, page: PageAddr, pages: u64) -> Option<Range> {
    let (size, table) = (pages << PAGE_SHIFT, entry_span(1));
    let table_start = page.get() & !(table - 1);
    let start = (page.get() & !(size - 1)).max(vma.start()).max(table_start);
    let end = (start + size).min(vma.end()).min(table_start + table);
    Range::new(start, end.checked_sub(start)?).ok()
}
