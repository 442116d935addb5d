// SPDX-License-Identifier: MIT OR Apache-2.0
//! The oom reaper: __oom_reap_task_mm (v6.18), the one path whose notifications must not block (4.19 and later;
//! before, it left mms with notifiers alone).
//!
//! Sequence, per vma: S(UNMAP, the vma, **non-blockable**). If a callback would block: no zap, no E, next vma. Else
//! [ clr' ] per pte; E, non-blockable too; flush; put. Vmas stay; every fault from the first moment on is a SIGBUS.
//!
//! Locks: mmap_lock for reading, by trylock.

use crate::mm::Mm;
use crate::tlb::MmuGather;
use crate::zap::Zap;
use interleave::{MaySleep, Ordering};
use mmu_notifier::{Event, Range};

/// What the oom reaper achieved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reap {
    /// mmap_lock was held for writing: nothing was tried.
    Busy,
    /// These vmas were left alone because a callback would have blocked; all others are empty. Try again.
    Left(Vec<Range>),
}

impl Mm {
    /// Takes the pages of a process that is being killed. What was in them is lost.
    pub fn oom_reap(&self, cx: &mut MaySleep<'_>) -> Reap {
        let Some(vmas) = self.vmas.try_read(cx) else { return Reap::Busy };
        self.unstable.store(true, Ordering::SeqCst);
        let mut left = Vec::new();
        // Pages of shared mappings would not become free.
        for vma in vmas.iter().filter(|vma| !vma.shared()) {
            let mut gather = MmuGather::new(self);
            let zapped = self.invalidate_nonblock(cx, vma.range, Event::Unmap, |cx| {
                self.zap(cx, &mut gather, vma.range, Zap::All);
            });
            if zapped.is_err() {
                left.push(vma.range);
            }
            gather.finish(cx);
        }
        Reap::Left(left)
    }
}
