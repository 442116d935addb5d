// SPDX-License-Identifier: MIT OR Apache-2.0
//! Design 3: start and end with a sequence: the protocol that became mmu_interval_notifier.
//!
//! 1. invalidate_range_start: **first** count++ under a spin lock. Then as in design 2: mutex; cancel, wait, unbind and unpin what overlaps;
//!    unlock. Counting comes first: whoever looks after the mutex was dropped must see it.
//! 2. invalidate_range_end: seq++, count--.
//! 3. Submit: seq; get the pages; mutex; **count != 0 or seq has moved: EAGAIN**; else use them.
//! 4. release: everything, and nothing is bound again.
//!
//! No gap: pages got between a start and its end are not used. change_pte is not needed, if the pair stands around it; without
//! the pair nobody tells.
//!
//! Lock order: that of the common part (design.rs); the count's spin lock is a leaf.

use crate::callbacks::{Callback, Callbacks};
use crate::design::{self, Design, Gpu};
use crate::driver::{Holds, Kind, SubmitError};
use crate::engine::RequestId;
use crate::op::{Binding, DeviceOp};
use crate::sequence::Sequence;
use interleave::{MaySleep, Sleep};
use mmu_notifier::{Invalidation, MmuNotifier, Ops, WouldBlock};
use std::sync::Arc;

/// What it is.
pub static KIND: Kind = Kind {
    name: "design-start-with-seq",
    kernel: "design",
    summary: "start and end with a sequence, exact range",
    holds: Holds::Pages,
    callbacks: Callbacks::of(&[Callback::Start, Callback::End, Callback::Release]),
    reads: true,
    open: |cx, mm, device, options| {
        let make = |gpu| Arc::new(StartWithSeq { gpu, sequence: Sequence::new() });
        Ok(design::open(cx, mm, device, &KIND, options, make)?)
    },
};

/// See the module.
pub struct StartWithSeq {
    gpu: Gpu,
    sequence: Sequence,
}

impl MmuNotifier for StartWithSeq {
    fn ops(&self) -> Ops {
        Ops::START | Ops::END | Ops::RELEASE
    }

    fn invalidate_range_start(&self, cx: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        let Sleep::May(cx) = cx else { return Err(WouldBlock) };
        let readers = self.sequence.start(cx);
        if self.gpu.drop_range(cx, inv.range) || readers {
            self.gpu.context.effect(Callback::Start);
        }
        Ok(())
    }

    fn invalidate_range_end(&self, mut cx: Sleep<'_, '_>, _: &Invalidation) {
        if self.sequence.end(&mut cx) {
            self.gpu.context.effect(Callback::End);
        }
    }

    fn release(&self, cx: &mut MaySleep<'_>) {
        self.gpu.release(cx);
    }
}

impl Design for StartWithSeq {
    fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    fn submit(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
    ) -> Result<RequestId, SubmitError> {
        let seq = &self.sequence;
        self.gpu.submit(cx, binding, ops, |cx| seq.read(cx), |cx, read, _| !seq.retry(cx, read), |_, _| true)
    }
}
