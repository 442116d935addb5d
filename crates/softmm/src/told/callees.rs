// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whom a source calls, later.
//!
//! A change that concerns somebody is queued where it is counted; [`Callees::deliver`] takes the oldest and calls all that
//! listen then. After [`Callees::silence`] has returned no callback runs or begins.
//!
//! Lock order: callee > locks of the callback; the list (spin) is a leaf.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::Arc;

use interleave::{AtomicBool, Context, LockClass, MaySleep, Mutex, Ordering, PerThread, Sleep, SpinLock};
use mmu_notifier::primary::{Invalidate, SetSeq};
use mmu_notifier::{Invalidation, Range};

static CALLEES: LockClass = LockClass::new("told_callees");
static CALLEE: LockClass = LockClass::new("told_callee");

/// The callee that the thread is in a callback of.
static CALLING: PerThread<Cell<*const Callee>> = PerThread::new(|| Cell::new(std::ptr::null()));

/// Whom to call back.
pub(super) struct Callee {
    range: Range,
    callback: Arc<dyn Invalidate>,
    /// Nobody begins to call any more.
    over: AtomicBool,
    /// Held while the callback runs: to take it is a fence.
    running: Mutex<()>,
}

impl Callee {
    /// Is this thread in its callback?
    pub(super) fn is_calling(&self) -> bool {
        CALLING.with(|calling| std::ptr::eq(calling.get(), self))
    }

    fn call(&self, cx: &mut MaySleep<'_>, change: Range) {
        let _running = self.running.lock(cx);
        if self.over.load(Ordering::SeqCst) {
            return;
        }
        CALLING.with(|calling| calling.set(self));
        // In a context that may sleep it does not refuse, and nobody would hear it.
        let inv = Invalidation::of_unknown_kind(change);
        let _ = self.callback.invalidate(Sleep::May(cx), &inv, SetSeq::already_moved());
        CALLING.with(|calling| calling.set(std::ptr::null()));
    }
}

#[derive(Default)]
struct List {
    listening: Vec<Arc<Callee>>,
    untold: VecDeque<Range>,
}

/// The callees of one source, and what they are not told yet.
pub(super) struct Callees(SpinLock<List>);

impl Callees {
    pub(super) fn new() -> Callees {
        Callees(SpinLock::new(&CALLEES, List::default()))
    }

    pub(super) fn listen(
        &self,
        cx: &mut MaySleep<'_>,
        range: Range,
        callback: Arc<dyn Invalidate>,
    ) -> Arc<Callee> {
        let (over, running) = (AtomicBool::new(false), Mutex::new(&CALLEE, ()));
        let callee = Arc::new(Callee { range, callback, over, running });
        self.0.lock(cx).listening.push(Arc::clone(&callee));
        callee
    }

    /// To be delivered later. Is anybody concerned?
    pub(super) fn tell_later(&self, cx: &mut impl Context, change: Range) -> bool {
        let mut list = self.0.lock(cx);
        let concerned = list.listening.iter().any(|callee| callee.range.overlaps(change));
        if concerned {
            list.untold.push_back(change);
        }
        concerned
    }

    pub(super) fn are_untold(&self, cx: &mut impl Context) -> bool {
        !self.0.lock(cx).untold.is_empty()
    }

    /// Runs the callbacks of one change; whether there was one.
    pub(super) fn deliver(&self, cx: &mut MaySleep<'_>) -> bool {
        let mut list = self.0.lock(cx);
        let Some(change) = list.untold.pop_front() else { return false };
        let concerned = |callee: &&Arc<Callee>| callee.range.overlaps(change);
        let callees: Vec<_> = list.listening.iter().filter(concerned).cloned().collect();
        drop(list);
        for callee in callees {
            callee.call(cx, change);
        }
        true
    }

    /// Ends `callee`, as a fence; in its own callback, which cannot wait for itself, so that this call is the last.
    pub(super) fn silence(&self, cx: &mut MaySleep<'_>, callee: &Arc<Callee>) {
        self.0.lock(cx).listening.retain(|other| !Arc::ptr_eq(other, callee));
        callee.over.store(true, Ordering::SeqCst);
        if !callee.is_calling() {
            drop(callee.running.lock(cx));
        }
    }
}
