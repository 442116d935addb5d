// SPDX-License-Identifier: MIT OR Apache-2.0
//! Execute in place: files whose blocks are memory and are mapped as they are (mm/filemap_xip.c, until 3.19; DAX since).
//!
//! Sequence of a fault: none: [ **set** block, special ], or for a hole in a private mapping [ **set** sparse page, RO ].
//! When a hole gets its block (write(2), or a fault of a shared mapping), the sparse page must go from every private
//! mapping (__xip_unmap), per mapping that shows it: [ clr; remove rmap ]; P, may sleep; put. P comes **before** put, or a
//! device would use a page that is free; and after the unlock, so that by then the CPU may have mapped the block.
//!
//! A block has no `struct page`: nobody can hold it, get_user_pages fails. The sparse page is an ordinary page and can be
//! held for reading; who does and does not hear P stays behind with zeros.
//!
//! The sparse page belongs to its file here and goes with it; the kernel has one for all files and keeps it.
//!
//! Locks: mmap_lock for reading or inode_lock; xip_sparse_mutex; i_mmap (a mutex; a rwsem for reading in v3_19); ptl.

use crate::error::{FaultError, OutOfMemory};
use crate::mm::Mm;
use crate::page_cache::{File, FileKind};
use crate::page_table::{PteGuard, TableId};
use crate::pte::Pte;
use crate::vma::{Vma, VmaFile};
use interleave::{MaySleep, PageContext};
use mmu_notifier::{PageAddr, Pfn};

impl File {
    /// The block of page `index` (get_xip_mem without create).
    pub(crate) fn xip_block(&self, cx: &mut MaySleep<'_>, index: u64) -> Option<Pfn> {
        self.cached_pfn(cx, index)
    }

    /// Gives page `index` a block if it has none, and takes the sparse page out of every mapping of it.
    pub(crate) fn xip_create(&self, cx: &mut MaySleep<'_>, index: u64) -> Result<Pfn, OutOfMemory> {
        let sparse = self.xip_sparse.lock(cx);
        if let Some(block) = self.xip_block(cx, index) {
            return Ok(block);
        }
        let block = self.frames().alloc_zeroed()?;
        self.insert_block(cx, index, block);
        if let Some(page) = *sparse {
            self.xip_unmap(cx, index, page);
        }
        Ok(block)
    }

    /// __xip_unmap.
    fn xip_unmap(&self, cx: &mut MaySleep<'_>, index: u64, sparse: Pfn) {
        let i_mmap = self.i_mmap_lock_read(cx);
        for rmap in i_mmap.iter() {
            let Some((mm, at)) = rmap.mm().zip(rmap.address(index)) else { continue };
            let Some(mut guard) = mm.mapped_pte(cx, at, sparse) else { continue };
            let (ptes, atomic) = guard.split();
            mm.clear_flush(ptes, atomic, at);
            self.frames().remove_rmap(sparse);
            drop(guard);
            mm.notifiers.invalidate_page(PageContext::May(cx), at);
            self.frames().put(sparse, 1);
        }
    }
}

impl Mm {
    /// xip_file_fault: the pte was none.
    pub(crate) fn xip_fault(
        &self,
        cx: &mut MaySleep<'_>,
        (vma, file): (&Vma, &VmaFile),
        leaf: TableId,
        page: PageAddr,
    ) -> Result<(), FaultError> {
        debug_assert_eq!(file.file.kind(), FileKind::Xip);
        let (of, index) = (&file.file, file.index(vma, page));
        // Stands for the locks of the filesystem: the block stays until the pte is set.
        let _truncate_waits = of.invalidate_lock.read(cx);
        if index >= of.pages() {
            return Err(FaultError::PastEnd(page));
        }
        let block = match of.xip_block(cx, index) {
            Some(block) => Some(block),
            None if file.shared => Some(of.xip_create(cx, index)?),
            None => None,
        };
        let (tables, frames) = (self.machine().tables(), self.machine().frames());
        if let Some(block) = block {
            let mut guard = PteGuard::lock(tables, leaf, cx);
            if guard.get(page).is_none() {
                guard.set(page, Pte::new(block, Pte::SPECIAL).modify(vma.prot).with(Pte::ACCESSED));
            }
            return Ok(());
        }
        let mut sparse = of.xip_sparse.lock(cx);
        if of.xip_block(cx, index).is_some() {
            // It has just got one: fault again.
            return Ok(());
        }
        let zeros = match *sparse {
            Some(zeros) => zeros,
            None => *sparse.insert(frames.alloc_file_zeroed()?),
        };
        let mut guard = PteGuard::lock(tables, leaf, cx);
        if guard.get(page).is_none() {
            frames.get(zeros, 1);
            frames.add_rmap(zeros);
            guard.set(page, Pte::new(zeros, 0).modify(vma.prot).with(Pte::ACCESSED));
        }
        drop(guard);
        drop(sparse);
        Ok(())
    }
}
