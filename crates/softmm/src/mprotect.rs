// SPDX-License-Identifier: MIT OR Apache-2.0
//! mprotect(2): mprotect_fixup and change_protection.
//!
//! Sequence, per vma in the range whose protection differs: split and merge vmas; then per slice of the page table
//! that has anything in it: S(PROTECTION_VMA, from the first entry that has a page table, to the end of the slice);
//! per leaf table [ clr', **set** per pte ]; **E**; and after the last slice: flush.
//!
//! | profile | slice | entry | flush, after E |
//! |---|---|---|---|
//! | v3_16 .. v5_10 | 1 GiB | 2 MiB | the whole vma part, if a pte was changed; no R but E's |
//! | v6_18 | 512 GiB | 1 GiB | the ptes that lost or gained something, and A |
//!
//! A range without page tables is not notified at all. Swap entries stay. A pte gets no write permission from a
//! private mapping: the next store faults and [`crate::cow`] decides, but v6_18 decides for exclusive pages here.
//! In a shared mapping it gets it where no file system wants to hear of the first store.
//!
//! Locks: mmap_lock for writing; ptl.

use crate::error::ChangeError;
use crate::mm::Mm;
use crate::page_table::{PteGuard, by_leaf, entry_span};
use crate::profile::{Mprotect, SecondaryTlbs};
use crate::pte::Pte;
use crate::tlb::MmuGather;
use crate::vma::{Prot, Vma};
use interleave::MaySleep;
use mmu_notifier::{Event, PageAddr, Range};

impl Mm {
    /// Gives `range` the protection `prot`.
    ///
    /// # Errors
    /// [`ChangeError::Hole`]; what lies before the hole has been changed.
    pub fn mprotect(&self, cx: &mut MaySleep<'_>, range: Range, prot: Prot) -> Result<(), ChangeError> {
        let mut vmas = self.vmas.write(cx);
        if vmas.exited {
            return Err(ChangeError::Exited);
        }
        let mut at = range.start();
        while let Ok(rest) = Range::new(at, range.end() - at) {
            let hole = || PageAddr::containing(at).map_or(ChangeError::Exited, ChangeError::Hole);
            let vma = vmas.find(at).ok_or_else(hole)?;
            let Some(piece) = vma.range.intersection(rest) else { return Err(hole()) };
            at = piece.end();
            if vma.prot == prot {
                continue;
            }
            vmas.modify(piece, |vma| vma.prot = prot);
            self.relink_files(cx, &vmas, piece, &[], false);
            let Some(vma) = vmas.find(piece.start()) else { continue };
            self.anon_vma_link(cx, vma);
            self.change_protection(cx, vma, piece);
        }
        Ok(())
    }

    fn change_protection(&self, cx: &mut MaySleep<'_>, vma: &Vma, range: Range) {
        let (profile, tables) = (self.machine().profile(), self.machine().tables());
        let level = match profile.mprotect {
            Mprotect::FromFirstPmd => 1,
            Mprotect::FromFirstPud => 2,
        };
        let mut gather = MmuGather::new(self);
        for slice in slices(range, entry_span(level + 1)) {
            let mut entries = slices(slice, entry_span(level));
            let populated = entries.find(|entry| self.page_table.populated(tables, level, entry.start()));
            let Some(from) =
                populated.and_then(|first| Range::new(first.start(), slice.end() - first.start()).ok())
            else {
                continue;
            };
            self.invalidate(cx, from, Event::ProtectionVma, |cx| {
                by_leaf(from).for_each(|piece| self.change_ptes(cx, vma, piece, &mut gather));
            });
        }
        match profile.secondary_tlbs {
            SecondaryTlbs::CpuFlush => gather.finish(cx),
            // flush_tlb_range tells no secondary TLB here: the ends of the sections did.
            _ if gather.is_dirty() => self.machine().flush_tlb_range(cx, self, range),
            _ => {}
        }
    }

    /// change_pte_range: `piece` lies under one leaf table.
    fn change_ptes(&self, cx: &mut MaySleep<'_>, vma: &Vma, piece: Range, gather: &mut MmuGather<'_>) {
        let tables = self.machine().tables();
        let leaf = piece.iter_pages().next().and_then(|first| self.page_table.leaf(tables, first));
        let Some(leaf) = leaf else { return };
        let mut guard = PteGuard::lock(tables, leaf, cx);
        for page in piece.iter_pages().filter(|&page| self.peek_pte(page).is_mapped()) {
            let old = guard.get_and_clear(page);
            let upgrade = vma.prot.writable() && self.can_change_pte_writable(vma, old);
            let new = old.modify(vma.prot).with(if upgrade { Pte::WRITE } else { 0 });
            guard.set(page, new);
            if new != old {
                gather.cover(Range::page(page));
            }
        }
    }

    /// Need no store fault to say that it may be written (can_change_pte_writable).
    fn can_change_pte_writable(&self, vma: &Vma, pte: Pte) -> bool {
        let frames = self.machine().frames();
        match &vma.file {
            // A clean pte of a file with accounting must fault, so that the file system hears of the store.
            Some(file) if file.shared => pte.is_dirty() || !file.file.kind().dirty_accounted(),
            _ => {
                let exclusive = frames.is_anon(pte.pfn()) && frames.exclusive(pte.pfn());
                self.machine().profile().mprotect_upgrades && !pte.is_special() && exclusive
            }
        }
    }
}

/// `range` cut at multiples of `span`.
fn slices(range: Range, span: u64) -> impl Iterator<Item = Range> {
    let mut at = range.start();
    std::iter::from_fn(move || {
        let end = (at & !(span - 1)).saturating_add(span).min(range.end());
        let slice = Range::new(at, end.checked_sub(at)?).ok()?;
        at = end;
        Some(slice)
    })
}
