// SPDX-License-Identifier: MIT OR Apache-2.0
//! The two list notifiers that tell the oracle when the driver's callbacks have returned and when they are about to run.

use crate::oracle::Oracle;
use interleave::{Atomic, MaySleep, PageContext, Sleep};
use mmu_notifier::{Invalidation, MmuNotifier, Ops, PageAddr, Pte, Range, WouldBlock};
use std::sync::Arc;

/// Called after the driver's callbacks.
pub(super) struct Behind(pub(super) Arc<Oracle>);

impl MmuNotifier for Behind {
    fn ops(&self) -> Ops {
        Ops::START | Ops::PAGE | Ops::CHANGE_PTE | Ops::RELEASE
    }

    fn invalidate_range_start(&self, _: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        self.0.started(inv.range);
        Ok(())
    }

    fn invalidate_page(&self, _: PageContext<'_, '_>, page: PageAddr) {
        self.0.told("invalidate_page", Range::page(page));
    }

    fn change_pte(&self, _: &mut Atomic<'_>, page: PageAddr, _: Pte) {
        self.0.told("change_pte", Range::page(page));
    }

    fn release(&self, _: &mut MaySleep<'_>) {
        self.0.told("release", Range::ALL);
    }
}

/// Called before the driver's callbacks.
pub(super) struct Before(pub(super) Arc<Oracle>);

impl MmuNotifier for Before {
    fn ops(&self) -> Ops {
        Ops::END
    }

    fn invalidate_range_end(&self, _: Sleep<'_, '_>, inv: &Invalidation) {
        self.0.ending(inv.range);
    }
}
