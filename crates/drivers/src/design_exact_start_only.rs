// SPDX-License-Identifier: MIT OR Apache-2.0
//! Design 2: the exact range, start only: what i915 did until 5.13, without its accidents.
//!
//! invalidate_range_start: mutex; for each object that overlaps the range: cancel whoever gets its pages; wait for the GPU; unbind and
//! unpin it; unlock. release: everything, and nothing is bound again.
//!
//! It pays for changes of its own memory alone. It has the start gap: pages got after the callback and before the change are the
//! old ones, and no second callback comes.
//!
//! Lock order: that of the common part (design.rs).

use crate::callbacks::{Callback, Callbacks};
use crate::design::{self, Design, Gpu};
use crate::driver::{Holds, Kind, SubmitError};
use crate::engine::RequestId;
use crate::op::{Binding, DeviceOp};
use interleave::{MaySleep, Sleep};
use mmu_notifier::{Invalidation, MmuNotifier, Ops, WouldBlock};
use std::sync::Arc;

/// What it is.
pub static KIND: Kind = Kind {
    name: "design-exact-start-only",
    kernel: "design",
    summary: "a start drops the objects in its range",
    holds: Holds::Pages,
    callbacks: Callbacks::of(&[Callback::Start, Callback::Release]),
    reads: true,
    open: |cx, mm, device, options| {
        Ok(design::open(cx, mm, device, &KIND, options, |gpu| Arc::new(ExactStartOnly(gpu)))?)
    },
};

/// See the module.
pub struct ExactStartOnly(Gpu);

impl MmuNotifier for ExactStartOnly {
    fn ops(&self) -> Ops {
        Ops::START | Ops::RELEASE
    }

    fn invalidate_range_start(&self, cx: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        let Sleep::May(cx) = cx else { return Err(WouldBlock) };
        if self.0.drop_range(cx, inv.range) {
            self.0.context.effect(Callback::Start);
        }
        Ok(())
    }

    fn release(&self, cx: &mut MaySleep<'_>) {
        self.0.release(cx);
    }
}

impl Design for ExactStartOnly {
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
