// SPDX-License-Identifier: MIT OR Apache-2.0
//! The oom reaper: __oom_reap_task_mm, the one path whose notifications must not block.
//!
//! v3_16, v3_19: there is none. v4_12: zaps, and tells nobody. v4_14: leaves an mm alone that has a list notifier.
//!
//! Sequence of v5_10 and later, per vma: S(UNMAP, the vma, **non-blockable**). If a callback would block: no zap,
//! no E, next vma. Else [ clr' ] per pte; E, non-blockable too; flush; put. Vmas stay; every fault from the first
//! moment on is a SIGBUS.
//!
//! Locks: mmap_lock for reading, by trylock.

use crate::mm::Mm;
use crate::profile::OomReaper;
use crate::tlb::MmuGather;
use crate::zap::Zap;
use interleave::{MaySleep, Ordering};
use mmu_notifier::{Event, Range};

/// What the oom reaper achieved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reap {
    /// mmap_lock was held for writing: nothing was tried.
    Busy,
    /// This kernel has no oom reaper.
    None,
    /// The mm has a notifier, so it was left alone.
    Spared,
    /// These vmas were left alone because a callback would have blocked; all others are empty. Try again.
    Left(Vec<Range>),
}

impl Mm {
    /// Takes the pages of a process that is being killed. What was in them is lost.
    pub fn oom_reap(&self, cx: &mut MaySleep<'_>) -> Reap {
        let reaper = self.machine().profile().oom_reaper;
        if reaper == OomReaper::None {
            return Reap::None;
        }
        let Some(vmas) = self.vmas.try_read(cx) else { return Reap::Busy };
        if reaper == OomReaper::SparesNotified && self.notifiers.has_notifiers(cx) {
            return Reap::Spared;
        }
        self.unstable.store(true, Ordering::SeqCst);
        let mut left = Vec::new();
        // Pages of shared mappings would not become free.
        for vma in vmas.iter().filter(|vma| !vma.shared()) {
            let mut gather = MmuGather::new(self);
            if reaper != OomReaper::NonBlock {
                self.zap(cx, &mut gather, vma.range, Zap::All);
                gather.finish(cx);
                continue;
            }
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
