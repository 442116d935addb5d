// SPDX-License-Identifier: MIT OR Apache-2.0
//! The callback: an object's pages are about to change, or have.
//!
//! Where the change waits for it (softmm, the kernel's drivers) it may be called with every lock of the mm held. It waits
//! for the batches that name this object, and for no other; so an engine must be able to finish a batch without the mm.
//! Where it comes late it does the same, as housekeeping: nothing rests on it, since each use asks for the sequence,
//! but pages that the program has given up are not held until the next batch.

use std::sync::Weak;

use interleave::{Ordering, Sleep};
use mmu_notifier::primary::{Invalidate, PrimaryMmu, SeqMoved, SetSeq};
use mmu_notifier::{Invalidation, WouldBlock};

use super::core::{Backing, Core};
use crate::device::{Device, Engine};

pub(super) struct Changed<M: PrimaryMmu, D: Device<M> + Engine> {
    pub(super) core: Weak<Core<M, D>>,
    pub(super) object: u64,
}

impl<M: PrimaryMmu, D: Device<M> + Engine> Invalidate for Changed<M, D> {
    fn invalidate(
        &self,
        cx: Sleep<'_, '_>,
        _: &Invalidation,
        seq: SetSeq<'_>,
    ) -> Result<SeqMoved, WouldBlock> {
        // Waiting for a device is nothing that can be tried.
        let Sleep::May(cx) = cx else { return Err(WouldBlock) };
        let Some(core) = self.core.upgrade() else { return Ok(seq.set()) };
        let mut books = core.lock(cx);
        let moved = seq.set();
        let Some(entry) = books.objects.get_mut(&self.object) else { return Ok(moved) };
        let detached = entry.detach(Backing::has_moved);
        drop(books);
        if detached.0.is_some() {
            core.counters.invalidated.fetch_add(1, Ordering::Relaxed);
        }
        core.let_go(cx, self.object, detached);
        core.wait_left(cx, self.object);
        Ok(moved)
    }
}
