// SPDX-License-Identifier: MIT OR Apache-2.0
//! munmap(2) (all versions).
//!
//! Sequence: detach the vmas; downgrade mmap_lock; S(UNMAP, the whole span asked for, holes included);
//! per leaf table [ clr' ; remove rmap; gather the page ], and if the batch fills up: flush; put; **E**; unlink
//! from rmap; free_pgtables; flush; put. With the flush go R (v3_19 .. v5_10) and A (v6_18), so they come after E.
//! Nothing fires if no vma lies in the span.
//!
//! Locks: mmap_lock for writing, then for reading (v5_10 and later; there only munmap(2) itself downgrades, a
//! MAP_FIXED overlay does not); ptl around each batch; S and E with mmap_lock alone.

use crate::mm::Mm;
use crate::tlb::MmuGather;
use crate::vma::{Vma, VmaTree};
use crate::zap::Zap;
use interleave::{MaySleep, WriteGuard};
use mmu_notifier::{Event, Range};

impl Mm {
    /// Unmaps every page of `range`, mapped or not.
    pub fn munmap(&self, cx: &mut MaySleep<'_>, range: Range) {
        let mut vmas = self.vmas.write(cx);
        let pieces = vmas.detach(range);
        if pieces.is_empty() {
            return;
        }
        self.relink_files(cx, &vmas, range, &pieces, true);
        let neighbours = vmas.neighbours(range);
        if self.machine().profile().munmap_downgrades {
            let held = WriteGuard::downgrade(vmas);
            self.unmap_region(cx, &held, range, &pieces, neighbours);
            drop(held);
        } else {
            self.unmap_region(cx, &vmas, range, &pieces, neighbours);
            drop(vmas);
        }
    }

    /// The overlay's munmap: mmap_lock stays held for writing.
    pub(crate) fn munmap_locked(&self, cx: &mut MaySleep<'_>, vmas: &mut VmaTree, range: Range) {
        let pieces = vmas.detach(range);
        let neighbours = vmas.neighbours(range);
        if !pieces.is_empty() {
            self.relink_files(cx, vmas, range, &pieces, true);
            self.unmap_region(cx, vmas, range, &pieces, neighbours);
        }
    }

    /// unmap_vmas, free_pgtables and tlb_finish_mmu for vmas that are out of the tree. `neighbours`: see
    /// [`VmaTree::neighbours`].
    fn unmap_region(
        &self,
        cx: &mut MaySleep<'_>,
        vmas: &VmaTree,
        span: Range,
        pieces: &[Vma],
        neighbours: (u64, u64),
    ) {
        let mut gather = MmuGather::new(self);
        self.invalidate(cx, span, Event::Unmap, |cx| {
            for piece in pieces {
                self.zap(cx, &mut gather, piece.range, Zap::All);
            }
        });
        // Before the tables go: nobody may find them through a file or an anon_vma any more.
        self.relink_files(cx, vmas, span, pieces, false);
        for piece in pieces {
            self.unlink_anon_vmas(cx, piece);
        }
        self.free_pgtables(cx, &mut gather, span, neighbours);
        gather.finish(cx);
    }

    pub(crate) fn free_pgtables(
        &self,
        cx: &mut MaySleep<'_>,
        gather: &mut MmuGather<'_>,
        span: Range,
        neighbours: (u64, u64),
    ) {
        let tables = self.machine().tables();
        self.page_table
            .free_tables(cx, tables, span, neighbours, &mut |page, table| gather.remove_table(page, table));
    }
}
