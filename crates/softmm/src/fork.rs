// SPDX-License-Identifier: MIT OR Apache-2.0
//! fork(2): dup_mmap and copy_page_range (all versions).
//!
//! Sequence, for each vma that has an anon_vma (others have nothing that the child could not fault in):
//! S(PROTECTION_PAGE, the parent's vma); write_protect_seq odd (5.11); per leaf table [ [ per pte: wrprotect the
//! parent's, set the child's; or copy a pinned page at once ] ]; seq even; **E**. After the last vma: flush of the
//! parent's TLB, which is therefore after every E. The child's range is never notified: nothing of it was visible.
//!
//! R goes with E (v3_19 .. v5_10), A with the flush (v6_18): nobody else flushes secondary TLBs.
//!
//! v3_16 .. v4_14: every page becomes shared, also one that a device holds. v5_10 and later: a page that may be pinned
//! (FOLL_PIN) and is exclusive (v6_18) stays the parent's, writable, and the child gets a copy. gup_fast takes no
//! lock that fork holds, so it checks `write_protect_seq` (5.11) and lets go of what it pinned if fork ran
//! meanwhile. FOLL_GET references are not protected.
//!
//! Locks: mmap_lock of the parent for writing, of the child for writing (subclass 1); ptl of the child, then of the
//! parent (subclass 1).

use crate::error::{ForkError, OutOfMemory};
use crate::mm::{Mm, MmUser};
use crate::page_table::{PteGuard, Ptes, TableId, by_leaf};
use crate::pte::Pte;
use crate::vma::Vma;
use interleave::{MaySleep, Ordering};
use mmu_notifier::{Event, PageAddr, Pfn, Range};

impl Mm {
    /// A child with the same mappings and contents, copy-on-write.
    ///
    /// # Errors
    /// [`ForkError`]; there is no child then, and everything it had is given back.
    pub fn fork(&self, cx: &mut MaySleep<'_>) -> Result<MmUser, ForkError> {
        let child = Mm::create(self.machine_arc())?;
        match self.dup_mmap(cx, &child) {
            Ok(()) => Ok(child),
            Err(error) => {
                child.mmput(cx);
                Err(error)
            }
        }
    }

    fn dup_mmap(&self, cx: &mut MaySleep<'_>, child: &Mm) -> Result<(), ForkError> {
        let _no_uprobes = self.machine().dup_mmap_sem().read(cx);
        let vmas = self.vmas.write(cx);
        if vmas.exited {
            return Err(ForkError::Exited);
        }
        let mut copies = child.vmas.write_nested(cx, 1);
        copies.has_uprobes = vmas.has_uprobes;
        let result = vmas.iter().try_for_each(|vma| {
            let copy = vma.for_child(|| self.machine().fresh_id());
            child.anon_vma_fork(cx, &copy);
            let range = copy.range;
            let file = copy.file.is_some();
            let needs_copy = copy.anon_vma().is_some() || copy.is_mixed_map();
            copies.insert(copy);
            if file {
                child.relink_files(cx, &copies, range, &[], false);
            }
            match copies.find(range.start()).filter(|_| needs_copy) {
                Some(copy) => self.copy_page_range(cx, child, copy),
                None => Ok(()),
            }
        });
        self.machine().flush_tlb_range(cx, self, Range::ALL);
        Ok(result?)
    }

    fn copy_page_range(&self, cx: &mut MaySleep<'_>, child: &Mm, copy: &Vma) -> Result<(), OutOfMemory> {
        let range = copy.range;
        if copy.shared() {
            // VM_MIXEDMAP: copied because its ptes cannot be faulted in again, and not changed.
            return by_leaf(range).try_for_each(|piece| self.copy_leaf(cx, child, piece, copy));
        }
        self.invalidate(cx, range, Event::ProtectionPage, |cx| {
            self.write_protect_seq.fetch_add(1, Ordering::SeqCst);
            let result = by_leaf(range).try_for_each(|piece| self.copy_leaf(cx, child, piece, copy));
            self.write_protect_seq.fetch_add(1, Ordering::SeqCst);
            result
        })
    }

    /// copy_pte_range: `piece` lies under one leaf table.
    fn copy_leaf(
        &self,
        cx: &mut MaySleep<'_>,
        child: &Mm,
        piece: Range,
        copy: &Vma,
    ) -> Result<(), OutOfMemory> {
        let (tables, frames) = (self.machine().tables(), self.machine().frames());
        let Some(first) = piece.iter_pages().next() else { return Ok(()) };
        let Some(from) = self.page_table.leaf(tables, first) else { return Ok(()) };
        let to = child.page_table.alloc_leaf(cx, tables, first)?;
        let mut at = piece.start();
        let mut spare = None;
        while let Ok(rest) = Range::new(at, piece.end() - at) {
            let stopped = self.copy_ptes(cx, (from, to), rest, (child, copy), &mut spare);
            at = stopped.map_or(piece.end(), PageAddr::get);
            if stopped.is_some() {
                // A page must be copied now. It is allocated with no ptl held (page_copy_prealloc may sleep).
                spare = Some(frames.alloc()?);
            }
        }
        if let Some(unused) = spare {
            frames.put(unused, 1);
        }
        Ok(())
    }

    /// One section under both ptls. Stops at the page that needs a `spare` frame which is not there.
    fn copy_ptes(
        &self,
        cx: &mut MaySleep<'_>,
        (from, to): (TableId, TableId),
        range: Range,
        (child, copy): (&Mm, &Vma),
        spare: &mut Option<Pfn>,
    ) -> Option<PageAddr> {
        let (tables, frames) = (self.machine().tables(), self.machine().frames());
        let mut to = PteGuard::lock(tables, to, cx);
        let (to, cx) = to.split();
        let mut from = PteGuard::lock_nested(tables, from, cx);
        for page in range.iter_pages() {
            let pte = from.get(page);
            if pte.is_none() {
                continue;
            }
            if let Some(slot) = pte.swap_slot() {
                self.machine().swap().duplicate(from.split().1, slot);
                from.set(page, pte.swap_shared());
                to.set(page, pte.swap_shared());
            } else if !pte.is_special() && self.must_copy_now(pte.pfn()) {
                let Some(new) = spare.take() else { return Some(page) };
                frames.copy_contents(new, pte.pfn());
                child.add_new_anon_rmap(copy, new, page);
                let write = if copy.prot.writable() { Pte::WRITE } else { 0 };
                to.set(page, Pte::new(new, 0).modify(copy.prot).with(Pte::DIRTY | write));
            } else {
                self.copy_present_pte(&mut from, to, page, (pte, copy.shared()));
            }
        }
        None
    }

    fn must_copy_now(&self, pfn: Pfn) -> bool {
        let (profile, frames) = (self.machine().profile(), self.machine().frames());
        let own = frames.is_anon(pfn) && (!profile.has_exclusive() || frames.exclusive(pfn));
        profile.fork_copies_pinned && own && self.maybe_pinned(pfn)
    }

    fn copy_present_pte(
        &self,
        from: &mut Ptes<'_>,
        to: &mut Ptes<'_>,
        page: PageAddr,
        (pte, shared): (Pte, bool),
    ) {
        if !pte.is_special() {
            let frames = self.machine().frames();
            frames.get(pte.pfn(), 1);
            frames.add_rmap(pte.pfn());
            frames.set_exclusive(pte.pfn(), false);
        }
        if shared {
            return to.set(page, pte.without(Pte::DIRTY | Pte::ACCESSED));
        }
        if pte.is_writable() {
            from.write_protect(page);
        }
        to.set(page, pte.without(Pte::WRITE | Pte::ACCESSED));
    }
}
