// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the primary MMU calls: the `mmu_notifier_*` functions of one mm, and the section between start and end.
//!
//! Order, as in Linux 6.x: at the start interval notifiers before list notifiers, at the end likewise; the list
//! from the latest registered to the first. A dispatch walks the list as it was when the section began, less those
//! that have been unregistered since; so whoever heard a start and is still there hears its end, and nobody hears
//! an end without a start.

use std::marker::PhantomData;
use std::sync::Arc;

use interleave::{Atomic, Context, MaySleep, Ordering, PageContext, Sleep, preempt_disable};

use crate::inside::{self, InCallback};
use crate::itree::{Batch, Interval};
use crate::primary::{Seq, SetSeq};
use crate::registry::{INVALIDATE_START_MAP, List, Listed, NotifierSubscriptions};
use crate::rules::Breach;
use crate::{Cursor, Event, Invalidation, MmuNotifier, Ops, PageAddr, Pte, Range, WouldBlock};

/// An invalidation between its start and its end; the page tables change while it lives. Belongs to its thread.
///
/// It must be ended by [`InvalidateSection::invalidate_range_end`]: whoever drops it leaves notifiers waiting, so
/// that panics.
#[must_use = "an invalidation that was started must be ended"]
#[derive(Debug)]
pub struct InvalidateSection<'mm> {
    mm: &'mm NotifierSubscriptions,
    inv: Invalidation,
    list: Option<List>,
    parity: usize,
    open: bool,
    thread: PhantomData<*const ()>,
}

/// What a start hands from the lock to the callbacks.
struct Started {
    cursor: Cursor,
    batch: Batch,
    seq: Seq,
}

impl NotifierSubscriptions {
    /// Before the page tables of `inv.range` change: calls everyone who listens to it, and returns when they have
    /// dropped their translations. The range is blockable, whatever `inv` says. A callback that fails all the same
    /// is recorded as a [`Breach`] and taken to have succeeded.
    #[track_caller]
    pub fn invalidate_range_start(&self, cx: &mut MaySleep<'_>, inv: Invalidation) -> InvalidateSection<'_> {
        let inv = Invalidation { blockable: true, ..inv };
        let (section, started) = self.begin(cx, inv);
        let _map = INVALIDATE_START_MAP.acquire(cx);
        let _ = self.start_intervals(cx, &inv, started);
        let _ = section.start_list(cx);
        section
    }

    /// Like [`NotifierSubscriptions::invalidate_range_start`] for the oom reaper (4.19+): callbacks may only try.
    ///
    /// # Errors
    /// [`WouldBlock`], if a callback would have to block. The page tables must not be changed, and there is
    /// nothing to end: those who heard the start have been given their end, as far as the [`Rules`](crate::Rules)
    /// say so.
    #[track_caller]
    pub fn invalidate_range_start_nonblock(
        &self,
        cx: &mut MaySleep<'_>,
        inv: Invalidation,
    ) -> Result<InvalidateSection<'_>, WouldBlock> {
        let inv = inv.nonblock();
        let (mut section, started) = self.begin(cx, inv);
        let _map = INVALIDATE_START_MAP.acquire(cx);
        if self.start_intervals(cx, &inv, started).is_err() {
            section.close(cx, true);
            return Err(WouldBlock);
        }
        if section.start_list(cx).is_err() {
            let ends_intervals = self.rules().failed_start_ends_intervals;
            section.close(cx, ends_intervals);
            return Err(WouldBlock);
        }
        Ok(section)
    }

    fn begin(&self, cx: &mut MaySleep<'_>, inv: Invalidation) -> (InvalidateSection<'_>, Started) {
        let mut state = self.state.lock(cx);
        let (cursor, batch) = state.itree.start(inv.range);
        self.publish_seq(&state.itree);
        let started = Started { cursor, batch, seq: Seq::new(state.itree.seq()) };
        let (list, parity) = (state.list.clone(), state.parity);
        self.open[parity].fetch_add(1, Ordering::AcqRel);
        drop(state);
        inside::enter_section(self.id());
        let thread = PhantomData;
        (InvalidateSection { mm: self, inv, list, parity, open: true, thread }, started)
    }

    /// Calls the interval notifiers that overlap. Stops at the first failure of a non-blockable range.
    fn start_intervals(
        &self,
        cx: &mut MaySleep<'_>,
        inv: &Invalidation,
        started: Started,
    ) -> Result<(), WouldBlock> {
        let Started { mut cursor, mut batch, seq } = started;
        loop {
            for interval in batch.iter().flatten() {
                if self.invalidate_interval(cx, interval, inv, seq).is_ok() {
                    continue;
                }
                if !inv.blockable {
                    return Err(WouldBlock);
                }
                self.breach(cx, Breach::FailedBlockable(*inv));
            }
            if batch[batch.len() - 1].is_none() {
                return Ok(());
            }
            // The sequence is odd since the first match, so the index stands still between two holds of the lock.
            batch = self.state.lock(cx).itree.more(&mut cursor);
        }
    }

    fn invalidate_interval(
        &self,
        cx: &mut MaySleep<'_>,
        interval: &Arc<Interval>,
        inv: &Invalidation,
        seq: Seq,
    ) -> Result<(), WouldBlock> {
        if interval.dropped.load(Ordering::Acquire) {
            return Ok(());
        }
        let _inside = InCallback::enter(self.id(), Arc::as_ptr(interval).addr());
        let set = SetSeq::new(&interval.seq, seq);
        sleep(cx, inv.blockable, |cx| interval.callback.invalidate(cx, inv, set)).map(drop)
    }

    /// The mm dies: every interval notifier hears it, whatever its range.
    pub(crate) fn release_intervals(&self, cx: &mut MaySleep<'_>) {
        let inv = Invalidation::new(Range::ALL, Event::Release);
        let (mut section, started) = self.begin(cx, inv);
        let _ = self.start_intervals(cx, &inv, started);
        section.close(cx, true);
    }

    /// The page at `page` is no longer mapped or writable; until 4.13.
    pub fn invalidate_page(&self, mut cx: PageContext<'_, '_>, page: PageAddr) {
        self.each(&mut cx, Ops::PAGE, |cx, n| n.invalidate_page(cx.reborrow(), page));
    }

    /// The same for the notifiers that have no `change_pte`, where Linux called the one in place of the other (until 3.6), or
    /// was proposed to (2014).
    pub fn invalidate_page_without_change_pte(&self, mut cx: PageContext<'_, '_>, page: PageAddr) {
        self.each(&mut cx, Ops::PAGE, |cx, n| {
            if !n.ops().contains(Ops::CHANGE_PTE) {
                n.invalidate_page(cx.reborrow(), page);
            }
        });
    }

    /// Is there a list notifier (`mm_has_notifiers`)? Out of date at once, unless nobody registers.
    pub fn has_notifiers(&self, cx: &mut impl Context) -> bool {
        self.state.lock(cx).list.is_some()
    }

    /// The entry of `page` is cleared and flushed and will be `pte` (`set_pte_at_notify`); until 6.9.
    pub fn change_pte(&self, cx: &mut Atomic<'_>, page: PageAddr, pte: Pte) {
        self.each(cx, Ops::CHANGE_PTE, |cx, n| n.change_pte(cx, page, pte));
    }

    /// The CPU's TLB is being flushed for `range` (`mmu_notifier_invalidate_range` from 3.19, this name from 6.6).
    pub fn arch_invalidate_secondary_tlbs(&self, cx: &mut Atomic<'_>, range: Range) {
        self.each(cx, Ops::SECONDARY_TLBS, |cx, n| n.arch_invalidate_secondary_tlbs(cx, range));
    }

    /// Has anyone accessed `range`? All are asked, forget it, and flush.
    pub fn clear_flush_young(&self, cx: &mut Atomic<'_>, range: Range) -> bool {
        let mut young = false;
        self.each(cx, Ops::CLEAR_FLUSH_YOUNG, |cx, n| young |= n.clear_flush_young(cx, range));
        young
    }

    /// Has anyone accessed `range`? All are asked, and forget it.
    pub fn clear_young(&self, cx: &mut Atomic<'_>, range: Range) -> bool {
        let mut young = false;
        self.each(cx, Ops::CLEAR_YOUNG, |cx, n| young |= n.clear_young(cx, range));
        young
    }

    /// Has anyone accessed `range`? The first who says yes ends it.
    pub fn test_young(&self, cx: &mut Atomic<'_>, range: Range) -> bool {
        let mut young = false;
        self.each(cx, Ops::TEST_YOUNG, |cx, n| young = young || n.test_young(cx, range));
        young
    }

    fn each<C: Context>(&self, cx: &mut C, op: Ops, mut call: impl FnMut(&mut C, &dyn MmuNotifier)) {
        let list = self.state.lock(cx).list.clone();
        for listed in list.iter().flat_map(|list| list.iter()).filter(|l| l.ops.contains(op)) {
            if let Some(_callback) = listed.enter(self.id()) {
                call(cx, &*listed.notifier);
            }
        }
    }

    /// The range is over for waiters; `ends_interval` is false only to leak as Linux does.
    fn close_range(&self, cx: &mut impl Context, parity: usize, ends_interval: bool) {
        let mut state = self.state.lock(cx);
        let removed = ends_interval.then(|| state.itree.end()).flatten();
        self.publish_seq(&state.itree);
        let last = self.open[parity].fetch_sub(1, Ordering::AcqRel) == 1;
        let wake = removed.is_some() || (last && state.registering);
        drop(state);
        drop(removed);
        if wake {
            self.wait.wake_all();
        }
    }
}

impl InvalidateSection<'_> {
    /// What is being invalidated.
    pub fn invalidation(&self) -> &Invalidation {
        &self.inv
    }

    /// The page tables have changed (`mmu_notifier_invalidate_range_end`). The CPU's TLB may still be unflushed, the
    /// pages not yet freed.
    #[track_caller]
    pub fn invalidate_range_end(self, cx: &mut MaySleep<'_>) {
        let secondary_tlbs = self.mm.rules().end_invalidates_secondary_tlbs;
        self.end(cx, secondary_tlbs);
    }

    /// The same where the secondary TLBs have been flushed under the page-table lock already
    /// (`mmu_notifier_invalidate_range_only_end`, 4.15 to 6.5).
    #[track_caller]
    pub fn invalidate_range_only_end(self, cx: &mut MaySleep<'_>) {
        self.end(cx, false);
    }

    #[track_caller]
    fn end(mut self, cx: &mut MaySleep<'_>, secondary_tlbs: bool) {
        let _map = INVALIDATE_START_MAP.acquire(cx);
        self.close(cx, true);
        for listed in self.listed() {
            if let Some(_callback) = listed.enter(self.mm.id()) {
                if secondary_tlbs && listed.ops.contains(Ops::SECONDARY_TLBS) {
                    preempt_disable(cx, |cx| {
                        listed.notifier.arch_invalidate_secondary_tlbs(cx, self.inv.range)
                    });
                }
                end_one(cx, listed, &self.inv);
            }
        }
    }

    fn listed(&self) -> impl Iterator<Item = &Arc<Listed>> {
        self.list.iter().flat_map(|list| list.iter())
    }

    /// Calls the start of every list notifier, also after one has failed. If one has, those who succeeded get
    /// their end.
    fn start_list(&self, cx: &mut MaySleep<'_>) -> Result<(), WouldBlock> {
        let inv = &self.inv;
        let mut failed: Vec<*const Listed> = Vec::new();
        for listed in self.listed().filter(|l| l.ops.contains(Ops::START)) {
            let Some(_callback) = listed.enter(self.mm.id()) else { continue };
            let result = sleep(cx, inv.blockable, |cx| listed.notifier.invalidate_range_start(cx, inv));
            if result.is_ok() {
                continue;
            }
            if inv.blockable {
                self.mm.breach(cx, Breach::FailedBlockable(*inv));
                continue;
            }
            if listed.ops.contains(Ops::END) {
                self.mm.breach(cx, Breach::FailedStartWithEnd(*inv));
            }
            failed.push(Arc::as_ptr(listed));
        }
        if failed.is_empty() {
            return Ok(());
        }
        if self.mm.rules().failed_start_ends_others {
            for listed in self.listed().filter(|l| !failed.contains(&Arc::as_ptr(l))) {
                if let Some(_callback) = listed.enter(self.mm.id()) {
                    end_one(cx, listed, inv);
                }
            }
        }
        Err(WouldBlock)
    }

    fn close(&mut self, cx: &mut impl Context, ends_interval: bool) {
        if std::mem::replace(&mut self.open, false) {
            self.mm.close_range(cx, self.parity, ends_interval);
            inside::leave_section(self.mm.id());
        }
    }
}

impl Drop for InvalidateSection<'_> {
    fn drop(&mut self) {
        if !self.open {
            return;
        }
        // Waiters must not hang for it, whether the thread panics already or is about to.
        let _ = MaySleep::try_enter(|cx| {
            self.mm.breach(cx, Breach::NotEnded(self.inv));
            self.close(cx, true);
        });
        if !std::thread::panicking() {
            panic!("{}", Breach::NotEnded(self.inv));
        }
    }
}

fn end_one(cx: &mut MaySleep<'_>, listed: &Listed, inv: &Invalidation) {
    if listed.ops.contains(Ops::END) {
        sleep(cx, inv.blockable, |cx| listed.notifier.invalidate_range_end(cx, inv));
    }
}

/// The context of a callback for a range that is blockable or not.
fn sleep<R>(cx: &mut MaySleep<'_>, blockable: bool, f: impl FnOnce(Sleep<'_, '_>) -> R) -> R {
    if blockable { f(Sleep::May(cx)) } else { cx.non_block(|cx| f(Sleep::TryOnly(cx))) }
}
