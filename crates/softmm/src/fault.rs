// SPDX-License-Identifier: MIT OR Apache-2.0
//! Page faults: handle_mm_fault, and those on anonymous memory (all versions); those on files are in
//! [`crate::fault_file`].
//!
//! Sequence: nothing when a page becomes present (non-present to present is never notified): a read of an untouched
//! page maps the zero page, [ set special, RO ]; a write maps a new exclusive page, [ set RW dirty ]. A write to a
//! present read-only pte, or an unshare, goes to [`crate::cow`]; a swap entry to [`crate::swap_fault`].
//!
//! Locks: mmap_lock for reading. (Since 6.4 a fault of user space tries the lock of the vma first, which excludes the
//! same writers; gup always takes mmap_lock.) Page tables and the page are allocated outside the ptl, and the pte is
//! looked at again under it.

use crate::error::FaultError;
use crate::frame::ZERO_PAGE;
use crate::mm::Mm;
use crate::page_table::{PteGuard, TableId};
use crate::pte::Pte;
use crate::vma::VmaTree;
use interleave::{MaySleep, Ordering};
use mmu_notifier::{Access, PageAddr};

/// What a fault is for (FAULT_FLAG_WRITE, FAULT_FLAG_UNSHARE; never both).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FaultFlag {
    Read,
    Write,
    /// Give the page an exclusive copy and leave it read-only (5.19).
    Unshare,
}

/// What a fault did.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Faulted {
    /// A page was made ready for writing, by copy-on-write or reuse (VM_FAULT_WRITE). Not said of a first touch.
    pub(crate) write: bool,
}

impl Mm {
    /// The page fault of a CPU: afterwards the access may work (another thread may have changed things again).
    ///
    /// # Errors
    /// [`FaultError`]: the signal that the thread would get, or no memory.
    pub fn page_fault(
        &self,
        cx: &mut MaySleep<'_>,
        page: PageAddr,
        access: Access,
    ) -> Result<(), FaultError> {
        let vmas = self.vmas.read(cx);
        let flag = match access {
            Access::Read => FaultFlag::Read,
            Access::Write => FaultFlag::Write,
        };
        let vma = vmas.find(page.get()).ok_or(FaultError::Unmapped(page))?;
        let allowed = match access {
            Access::Read => vma.prot.readable(),
            Access::Write => vma.prot.writable(),
        };
        if !allowed {
            return Err(FaultError::Access(page));
        }
        self.handle_mm_fault(cx, &vmas, page, flag).map(drop)
    }

    /// `vmas` is proof that mmap_lock is held. Whether the mapping allows the access is the caller's business:
    /// FOLL_FORCE comes here all the same.
    pub(crate) fn handle_mm_fault(
        &self,
        cx: &mut MaySleep<'_>,
        vmas: &VmaTree,
        page: PageAddr,
        flag: FaultFlag,
    ) -> Result<Faulted, FaultError> {
        if self.unstable.load(Ordering::SeqCst) {
            return Err(FaultError::Reaped(page));
        }
        let vma = vmas.find(page.get()).ok_or(FaultError::Unmapped(page))?;
        let tables = self.machine().tables();
        let leaf = self.page_table.alloc_leaf(cx, tables, page)?;
        let pte = self.page_table.peek(tables, page);
        if let Some(file) = vma.file.as_ref().filter(|_| pte.is_none()) {
            return self.do_fault(cx, vmas, (vma, file), leaf, page, flag);
        }
        if pte.is_none() {
            return self.do_anonymous_page(cx, vmas, leaf, page, flag);
        }
        if pte.is_swap() {
            return self.do_swap_page(cx, vmas, leaf, page, pte, flag);
        }
        let touch = match flag {
            FaultFlag::Read => Pte::ACCESSED,
            FaultFlag::Write if pte.is_writable() => Pte::ACCESSED | Pte::DIRTY,
            FaultFlag::Write if vma.shared() => {
                let Some(file) = &vma.file else { return Ok(Faulted::default()) };
                return self.wp_page_shared(cx, (vma, file), leaf, page, pte);
            }
            FaultFlag::Write | FaultFlag::Unshare => return self.do_wp_page(cx, vmas, leaf, page, pte, flag),
        };
        let mut guard = PteGuard::lock(tables, leaf, cx);
        if guard.get(page) == pte {
            guard.set_bits(page, touch);
        }
        // If not, somebody was faster; the access decides whether to fault again.
        Ok(Faulted::default())
    }

    fn do_anonymous_page(
        &self,
        cx: &mut MaySleep<'_>,
        vmas: &VmaTree,
        leaf: TableId,
        page: PageAddr,
        flag: FaultFlag,
    ) -> Result<Faulted, FaultError> {
        let vma = vmas.find(page.get()).ok_or(FaultError::Unmapped(page))?;
        let (tables, frames) = (self.machine().tables(), self.machine().frames());
        if flag != FaultFlag::Write {
            let mut guard = PteGuard::lock(tables, leaf, cx);
            if guard.get(page).is_none() {
                guard.set(page, Pte::new(ZERO_PAGE, Pte::SPECIAL | Pte::ACCESSED).modify(vma.prot));
            }
            return Ok(Faulted::default());
        }
        self.anon_vma_prepare(cx, vmas, page);
        let new = frames.alloc_zeroed()?;
        let mut guard = PteGuard::lock(tables, leaf, cx);
        let won = guard.get(page).is_none();
        if won {
            self.add_new_anon_rmap(vma, new, page);
            let write = if vma.prot.writable() { Pte::WRITE | Pte::DIRTY } else { 0 };
            guard.set(page, Pte::new(new, 0).modify(vma.prot).with(write | Pte::ACCESSED));
        }
        drop(guard);
        if !won {
            frames.put(new, 1);
        }
        Ok(Faulted::default())
    }
}
