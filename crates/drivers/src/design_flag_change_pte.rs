// SPDX-License-Identifier: MIT OR Apache-2.0
//! Design 5: change_pte may not sleep, so it notes what happened and leaves the rest to a work item.
//!
//! 1. change_pte: under a spin lock mark the objects that overlap the page as out of date; seq++; queue a work item.
//! 2. Work item: mutex; cancel, wait for the GPU, unbind and unpin what is out of date; unlock.
//! 3. Submit: an object that is out of date is dropped first.
//! 4. All else as in design 3: start and end with a sequence; release.
//!
//! With the pair around change_pte, 1 finds nothing to mark. Without the pair nothing is ever used after it was freed, since pages
//! are pinned; but between change_pte and the end of the work item the CPU writes the new page and the GPU reads the
//! old one. How long that is nobody says.
//!
//! Lock order: that of the common part (design.rs); ptl > design flags.

use crate::callbacks::{Callback, Callbacks};
use crate::design::{self, Design, Gpu};
use crate::driver::{Holds, Kind, SubmitError};
use crate::engine::RequestId;
use crate::op::{Binding, DeviceOp};
use crate::sequence::Sequence;
use crate::work::{WorkMode, WorkQueue};
use interleave::{Atomic, LockClass, MaySleep, Sleep, SpinLock};
use mmu_notifier::{Invalidation, MmuNotifier, Ops, PageAddr, Pte, Range, WouldBlock};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};

static FLAGS: LockClass = LockClass::new("design flags");
static UNBIND_WORK: LockClass = LockClass::new("work: design unbind");

/// What it is.
pub static KIND: Kind = Kind {
    name: "design-flag-change-pte",
    kernel: "design",
    summary: "change_pte sets a flag, a work item unbinds later",
    holds: Holds::Pages,
    callbacks: Callbacks::of(&[Callback::Start, Callback::End, Callback::ChangePte, Callback::Release]),
    reads: true,
    open: |cx, mm, device, options| {
        let make = |gpu| FlagChangePte::new(gpu, options.work);
        Ok(design::open(cx, mm, device, &KIND, options, make)?)
    },
};

/// See the module.
pub struct FlagChangePte {
    me: Weak<FlagChangePte>,
    gpu: Gpu,
    sequence: Sequence,
    flags: SpinLock<Flags>,
    work: WorkQueue,
}

#[derive(Default)]
struct Flags {
    ranges: BTreeMap<Binding, Range>,
    /// Bound and not out of date: what there is to mark.
    in_use: BTreeSet<Binding>,
    out_of_date: BTreeSet<Binding>,
}

impl FlagChangePte {
    fn new(gpu: Gpu, work: WorkMode) -> Arc<FlagChangePte> {
        Arc::new_cyclic(|me| FlagChangePte {
            me: me.clone(),
            gpu,
            sequence: Sequence::new(),
            flags: SpinLock::new(&FLAGS, Flags::default()),
            work: WorkQueue::new("design unbind", &UNBIND_WORK, work),
        })
    }

    /// Drops what is marked.
    fn drop_marked(&self, cx: &mut MaySleep<'_>) {
        loop {
            let marked = self.flags.lock(cx).out_of_date.pop_first();
            let Some(binding) = marked else { return };
            self.gpu.drop_object(cx, binding);
        }
    }
}

impl MmuNotifier for FlagChangePte {
    fn ops(&self) -> Ops {
        Ops::START | Ops::END | Ops::CHANGE_PTE | Ops::RELEASE
    }

    fn invalidate_range_start(&self, cx: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        let Sleep::May(cx) = cx else { return Err(WouldBlock) };
        let readers = self.sequence.start(cx);
        let dropped = self.gpu.drop_range(cx, inv.range);
        let mut flags = self.flags.lock(cx);
        let Flags { ranges, in_use, .. } = &mut *flags;
        in_use.retain(|binding| !ranges.get(binding).is_some_and(|range| range.overlaps(inv.range)));
        drop(flags);
        if dropped || readers {
            self.gpu.context.effect(Callback::Start);
        }
        Ok(())
    }

    fn invalidate_range_end(&self, mut cx: Sleep<'_, '_>, _: &Invalidation) {
        if self.sequence.end(&mut cx) {
            self.gpu.context.effect(Callback::End);
        }
    }

    fn change_pte(&self, cx: &mut Atomic<'_>, page: PageAddr, _: Pte) {
        let readers = self.sequence.bump(cx);
        let mut flags = self.flags.lock(cx);
        let Flags { ranges, in_use, out_of_date } = &mut *flags;
        let hit =
            |binding: &Binding| ranges.get(binding).is_some_and(|range| range.contains_addr(page.get()));
        let marked: Vec<_> = in_use.iter().copied().filter(hit).collect();
        for binding in &marked {
            in_use.remove(binding);
            out_of_date.insert(*binding);
        }
        drop(flags);
        if !marked.is_empty()
            && let Some(me) = self.me.upgrade()
        {
            self.work.queue(cx, move |cx| me.drop_marked(cx));
        }
        if readers || !marked.is_empty() {
            self.gpu.context.effect(Callback::ChangePte);
        }
    }

    fn release(&self, cx: &mut MaySleep<'_>) {
        self.gpu.release(cx);
    }
}

impl Design for FlagChangePte {
    fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    fn bound(&self, cx: &mut MaySleep<'_>, binding: Binding, range: Range) {
        self.flags.lock(cx).ranges.insert(binding, range);
    }

    fn submit(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
    ) -> Result<RequestId, SubmitError> {
        self.drop_marked(cx);
        let seq = &self.sequence;
        self.gpu.submit(
            cx,
            binding,
            ops,
            |cx| seq.read(cx),
            |cx, read, _| {
                // Marked from here on; a change before moved the sequence.
                self.flags.lock(cx).in_use.insert(binding);
                !seq.retry(cx, read)
            },
            |cx, binding| !self.flags.lock(cx).out_of_date.contains(&binding),
        )
    }

    fn run_work(&self, cx: &mut MaySleep<'_>) -> bool {
        self.work.run_one(cx)
    }

    fn stop(&self, cx: &mut MaySleep<'_>) {
        self.work.flush(cx);
    }
}
