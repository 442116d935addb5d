// SPDX-License-Identifier: MIT OR Apache-2.0
//! The last mmput: exit_mmap (all versions).
//!
//! Sequence: Xi (interval notifiers hear RELEASE over the whole address space) and X (list notifiers hear release, and
//! nothing afterwards); then, if anything is mapped, S(UNMAP, the whole address space), which only interval notifiers
//! still hear; [ clr' ] per pte; E; unlink from rmap; free_pgtables; flush; put.
//!
//! Consequence: a list notifier without `release` learns nothing of process exit.
//!
//! Locks: none around X; mmap_lock for reading around the zap (nobody else is left but remote gup and the oom reaper),
//! for writing around free_pgtables. mm_users is 0, so no one can become a user again.

use crate::mm::Mm;
use crate::tlb::MmuGather;
use crate::vma::VmaTree;
use crate::zap::Zap;
use interleave::{MaySleep, Ordering};
use mmu_notifier::{Event, Range};

impl Mm {
    pub(crate) fn exit_mmap(&self, cx: &mut MaySleep<'_>) {
        self.exiting.store(true, Ordering::SeqCst);
        self.notifiers.release(cx);
        let mut gather = MmuGather::new(self);
        let vmas = self.vmas.read(cx);
        let mapped = !vmas.is_empty();
        if mapped {
            self.invalidate(cx, Range::ALL, Event::Unmap, |cx| {
                for vma in vmas.iter() {
                    self.zap(cx, &mut gather, vma.range, Zap::All);
                }
            });
        }
        drop(vmas);
        let mut vmas = self.vmas.write(cx);
        let gone = vmas.detach(Range::ALL);
        if mapped {
            self.relink_files(cx, &vmas, Range::ALL, &gone, false);
            for vma in &gone {
                self.unlink_anon_vmas(cx, vma);
            }
            self.free_pgtables(cx, &mut gather, Range::ALL, (0, u64::MAX));
        }
        gather.finish(cx);
        *vmas = VmaTree::default();
        vmas.exited = true;
    }
}
