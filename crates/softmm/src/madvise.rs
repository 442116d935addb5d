// SPDX-License-Identifier: MIT OR Apache-2.0
//! madvise(2): MADV_DONTNEED, MADV_MERGEABLE, MADV_UNMERGEABLE. MADV_FREE is [`crate::madvise_free`].
//!
//! MADV_DONTNEED, per vma in the range: S(CLEAR, the part of the vma); zap as in [`crate::munmap`]; E; flush; put.
//! v4_14 flushes inside S..E once more. v6_18 flushes and puts once, after the last vma. Swap entries are given
//! back. Vmas stay: the next touch finds zeros. Two of them may run in one range at the same time: mmap_lock is
//! held for reading only.
//!
//! MADV_UNMERGEABLE: every page of KSM's is replaced by a write fault (v6_18: by un-sharing), each with the sequence of
//! [`crate::cow`]; mmap_lock for writing.
//!
//! Locks: mmap_lock for reading (DONTNEED; v6_18 takes the lock of a single vma instead, which excludes the same
//! writers) or writing; ptl.

use crate::error::ChangeError;
use crate::fault::FaultFlag;
use crate::mm::Mm;
use crate::tlb::MmuGather;
use crate::vma::VmaTree;
use crate::zap::Zap;
use interleave::MaySleep;
use mmu_notifier::{Event, PageAddr, Range};

impl Mm {
    /// Throws the contents of `range` away.
    ///
    /// # Errors
    /// [`ChangeError::Hole`] if not all of `range` is mapped; everything that is has been emptied.
    pub fn madvise_dontneed(&self, cx: &mut MaySleep<'_>, range: Range) -> Result<(), ChangeError> {
        let vmas = self.vmas.read(cx);
        if vmas.exited {
            return Err(ChangeError::Exited);
        }
        let profile = self.machine().profile();
        let mut gather = MmuGather::new(self);
        for piece in vmas.overlapping(range).filter_map(|vma| vma.range.intersection(range)) {
            self.invalidate(cx, piece, Event::Clear, |cx| {
                self.zap(cx, &mut gather, piece, Zap::All);
                if profile.dontneed_flushes_inside {
                    self.machine().flush_tlb_range(cx, self, piece);
                }
            });
            if !profile.madvise_batches {
                gather.flush(cx);
            }
        }
        gather.finish(cx);
        hole(&vmas, range).map_or(Ok(()), |page| Err(ChangeError::Hole(page)))
    }

    /// Allows KSM to merge the pages of `range`, or takes back what it has merged and forbids it.
    ///
    /// # Errors
    /// [`ChangeError::Hole`] as above; or no memory for a page to be given back, whose vma stays mergeable.
    pub fn madvise_mergeable(
        &self,
        cx: &mut MaySleep<'_>,
        range: Range,
        mergeable: bool,
    ) -> Result<(), ChangeError> {
        let mut vmas = self.vmas.write(cx);
        if vmas.exited {
            return Err(ChangeError::Exited);
        }
        let pieces: Vec<Range> = vmas
            .overlapping(range)
            .filter(|vma| !vma.shared())
            .filter_map(|vma| vma.range.intersection(range))
            .collect();
        for piece in pieces {
            if !mergeable {
                piece.iter_pages().try_for_each(|page| self.break_ksm(cx, &vmas, page))?;
            }
            vmas.modify(piece, |vma| vma.mergeable = mergeable);
            if let Some(vma) = vmas.find(piece.start()) {
                self.anon_vma_link(cx, vma);
            }
            self.relink_files(cx, &vmas, piece, &[], false);
        }
        hole(&vmas, range).map_or(Ok(()), |page| Err(ChangeError::Hole(page)))
    }

    /// Replaces a page of KSM's by one of the mm's own.
    pub(crate) fn break_ksm(
        &self,
        cx: &mut MaySleep<'_>,
        vmas: &VmaTree,
        page: PageAddr,
    ) -> Result<(), ChangeError> {
        let unshares = self.machine().profile().read_pin_unshares;
        let flag = if unshares { FaultFlag::Unshare } else { FaultFlag::Write };
        loop {
            let pte = self.peek_pte(page);
            if !pte.is_mapped() || !self.machine().frames().is_ksm(pte.pfn()) {
                return Ok(());
            }
            self.handle_mm_fault(cx, vmas, page, flag)?;
        }
    }
}

/// The first page of `range` that no vma covers.
pub(crate) fn hole(vmas: &VmaTree, range: Range) -> Option<PageAddr> {
    let mut at = range.start();
    for vma in vmas.overlapping(range) {
        if vma.range.start() > at {
            break;
        }
        at = vma.range.end();
    }
    if at < range.end() { PageAddr::containing(at).ok() } else { None }
}
