// SPDX-License-Identifier: MIT OR Apache-2.0
//! Design 1: "start with overkill". Whatever changes, the GPU loses everything.
//!
//! invalidate_range_start, of any range: mutex; cancel whoever gets pages; wait for the GPU; unbind and unpin every object; unlock.
//! release: the same, and nothing is bound again.
//!
//! It needs no index of ranges and can miss none. It pays for each change anywhere in the process with all objects, and
//! it has the start gap all the same: pages got after the callback and before the change are the old ones.
//!
//! Lock order: that of the common part (design.rs).

use crate::callbacks::{Callback, Callbacks};
use crate::design::{self, Design, Gpu};
use crate::driver::{Holds, Kind, SubmitError};
use crate::engine::RequestId;
use crate::op::{Binding, DeviceOp};
use interleave::{MaySleep, Sleep};
use mmu_notifier::{Invalidation, MmuNotifier, Ops, Range, WouldBlock};
use std::sync::Arc;

/// What it is.
pub static KIND: Kind = Kind {
    name: "design-drop-everything",
    kernel: "design",
    summary: "any start drops every object",
    holds: Holds::Pages,
    callbacks: Callbacks::of(&[Callback::Start, Callback::Release]),
    reads: true,
    open: |cx, mm, device, options| {
        Ok(design::open(cx, mm, device, &KIND, options, |gpu| Arc::new(DropEverything(gpu)))?)
    },
};

/// See the module.
pub struct DropEverything(Gpu);

impl MmuNotifier for DropEverything {
    fn ops(&self) -> Ops {
        Ops::START | Ops::RELEASE
    }

    fn invalidate_range_start(&self, cx: Sleep<'_, '_>, _: &Invalidation) -> Result<(), WouldBlock> {
        let Sleep::May(cx) = cx else { return Err(WouldBlock) };
        if self.0.drop_range(cx, Range::ALL) {
            self.0.context.effect(Callback::Start);
        }
        Ok(())
    }

    fn release(&self, cx: &mut MaySleep<'_>) {
        self.0.release(cx);
    }
}

impl Design for DropEverything {
    fn gpu(&self) -> &Gpu {
        &self.0
    }

    fn submit(
        &self,
        cx: &mut MaySleep<'_>,
        binding: Binding,
        ops: &[DeviceOp],
    ) -> Result<RequestId, SubmitError> {
        self.0.submit(cx, binding, ops, |_| (), |_, (), _| true, |_, _| true)
    }
}
