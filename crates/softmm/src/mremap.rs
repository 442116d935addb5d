// SPDX-License-Identifier: MIT OR Apache-2.0
//! mremap(2) with MREMAP_MAYMOVE | MREMAP_FIXED and one length: move_vma, move_page_tables.
//!
//! Sequence: what is mapped at the new place is unmapped, as in [`crate::munmap`]; KSM's pages are parted, as by
//! MADV_UNMERGEABLE; S(UNMAP, the old range, mapped or not); per pair of leaf tables [ get and clear the old pte; **set** the new
//! one ]; E; the old range is unmapped, which is a second S(UNMAP) .. E over it. **The new range is not notified** but for what
//! was there before: where nothing was, nothing is told.
//!
//! | profile | the CPUs forget the old address |
//! |---|---|
//! | v3_16 .. v3_19 | at the end of the move, before E, with no ptl: until then the page may be freed through its new address |
//! | v4_12, v4_14 | the same; under the ptl of a batch in which a pte was dirty |
//! | v5_10, v6_18 | under the ptl of each batch; v6_18 tells A there |
//!
//! A page keeps its anon_vma and its number, so the new vma is a stranger to its neighbours: see `Vma::moved`.
//!
//! What is not here: growing and shrinking, MREMAP_DONTUNMAP, ranges of several vmas (6.17).
//!
//! Locks: mmap_lock for writing; the ptl of the old leaf, the new one nested in it. A reverse-map walk visits the old place before
//! the new one, so it meets the page at one of them.

use crate::error::{ChangeError, FaultError, MremapError};
use crate::mm::Mm;
use crate::page_table::{PteGuard, Ptes, TableId};
use crate::profile::MremapFlush;
use crate::vma::VmaTree;
use interleave::MaySleep;
use mmu_notifier::{Event, PAGE_SIZE, PageAddr, Range};

impl Mm {
    /// Moves the pages and the mapping at `from` to `to`, of the same length, replacing what is there.
    ///
    /// # Errors
    /// [`MremapError`]; the old place is as it was.
    pub fn mremap(&self, cx: &mut MaySleep<'_>, from: Range, to: Range) -> Result<(), MremapError> {
        let mut vmas = self.vmas.write(cx);
        if vmas.exited {
            return Err(MremapError::Exited);
        }
        if from.overlaps(to) || from.len() != to.len() {
            return Err(MremapError::Ranges);
        }
        let inside = |vmas: &VmaTree| vmas.find(from.start()).is_some_and(|vma| vma.range.contains(from));
        if !inside(&vmas) {
            return Err(MremapError::NotOneVma);
        }
        self.munmap_locked(cx, &mut vmas, to);
        let vma = vmas.find(from.start()).ok_or(MremapError::NotOneVma)?;
        let moved = vma.moved(from, to);
        if vma.mergeable {
            from.iter_pages().try_for_each(|page| match self.break_ksm(cx, &vmas, page) {
                Err(ChangeError::Fault(e)) => Err(MremapError::Fault(e)),
                _ => Ok(()),
            })?;
        }
        vmas.insert_merging(moved);
        if let Some(vma) = vmas.find(to.start()) {
            self.anon_vma_link(cx, vma);
        }
        self.relink_files(cx, &vmas, to, &[], false);
        let moves = match self.alloc_new_tables(cx, from, to) {
            Ok(moves) => moves,
            Err(e) => {
                self.munmap_locked(cx, &mut vmas, to);
                return Err(MremapError::Fault(e));
            }
        };
        self.invalidate(cx, from, Event::Unmap, |cx| self.move_page_tables(cx, from, &moves));
        self.munmap_locked(cx, &mut vmas, from);
        Ok(())
    }

    /// For each page under an old table that is there: old and new page, old and new leaf.
    fn alloc_new_tables(
        &self,
        cx: &mut MaySleep<'_>,
        from: Range,
        to: Range,
    ) -> Result<Vec<Move>, FaultError> {
        let tables = self.machine().tables();
        let mut moves = Vec::new();
        for (old, new) in from.iter_pages().zip(to.iter_pages()) {
            // The levels above are made as soon as there is an old table of pmds.
            if !self.page_table.populated(tables, 2, old.get()) {
                continue;
            }
            let new_leaf = self.page_table.alloc_leaf(cx, tables, new)?;
            if let Some(old_leaf) = self.page_table.leaf(tables, old) {
                moves.push(Move { old, new, leaves: (old_leaf, new_leaf) });
            }
        }
        Ok(moves)
    }

    fn move_page_tables(&self, cx: &mut MaySleep<'_>, from: Range, moves: &[Move]) {
        let tables = self.machine().tables();
        let mut flush_at_end = false;
        for batch in moves.chunk_by(|a, b| a.leaves == b.leaves) {
            let Some(&Move { leaves: (old_leaf, new_leaf), .. }) = batch.first() else { continue };
            let mut old = PteGuard::lock(tables, old_leaf, cx);
            let (old, cx) = old.split();
            let flush = if old_leaf == new_leaf {
                let moved = batch.iter().map(|m| move_pte(old, None, m)).fold(Seen::default(), Seen::or);
                self.flush_moved(cx, batch, moved)
            } else {
                let mut new = PteGuard::lock_nested(tables, new_leaf, cx);
                let (new, cx) = new.split();
                let moved =
                    batch.iter().map(|m| move_pte(old, Some(&mut *new), m)).fold(Seen::default(), Seen::or);
                self.flush_moved(cx, batch, moved)
            };
            flush_at_end |= flush;
        }
        if flush_at_end {
            self.machine().flush_tlb_range(cx, self, from);
        }
    }

    /// Must the CPUs forget the batch later?
    fn flush_moved(&self, cx: &mut interleave::Atomic<'_>, batch: &[Move], moved: Seen) -> bool {
        let now = match self.machine().profile().mremap {
            MremapFlush::AtEnd => false,
            MremapFlush::AtEndUnlessDirty => moved.dirty,
            MremapFlush::UnderPtl => true,
        };
        let span = batch.first().zip(batch.last()).and_then(|(first, last)| {
            Range::new(first.old.get(), last.old.get() + PAGE_SIZE - first.old.get()).ok()
        });
        if let Some(span) = span.filter(|_| moved.present && now) {
            self.machine().flush_tlb_range(cx, self, span);
        }
        moved.present && !now
    }
}

/// One page on its way.
struct Move {
    old: PageAddr,
    new: PageAddr,
    leaves: (TableId, TableId),
}

/// What ptes were moved.
#[derive(Default, Clone, Copy)]
struct Seen {
    present: bool,
    dirty: bool,
}

impl Seen {
    fn or(self, other: Seen) -> Seen {
        Seen { present: self.present | other.present, dirty: self.dirty | other.dirty }
    }
}

/// `new`: the table of the new place, where it is another one.
fn move_pte(old: &mut Ptes<'_>, new: Option<&mut Ptes<'_>>, m: &Move) -> Seen {
    if old.get(m.old).is_none() {
        return Seen::default();
    }
    let pte = old.get_and_clear(m.old);
    match new {
        Some(new) => new.set(m.new, pte),
        None => old.set(m.new, pte),
    }
    Seen { present: pte.is_mapped(), dirty: pte.is_mapped() && pte.is_dirty() }
}
