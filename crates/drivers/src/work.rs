// SPDX-License-Identifier: MIT OR Apache-2.0
//! Work items: what a driver hands to a kernel worker thread because it cannot do it where it is.
//!
//! Every item may run at once with every other, as on the kernel's system workqueue. Running an item and waiting for one
//! are sections of the same lock class (the kernel's lockdep map of a `work_struct`): whoever flushes while it holds a lock that the
//! work takes is reported, whether or not it hangs this time.

use interleave::explore::{SiteKind, mutated};
use interleave::{Context, LockClass, LockMap, MaySleep, SpinLock, WaitQueue, spawn};
use std::collections::VecDeque;
use std::panic::Location;
use std::sync::Arc;

static QUEUE: LockClass = LockClass::new("workqueue");

/// Who runs work items.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WorkMode {
    /// A thread of its own for each item, at once.
    #[default]
    Threads,
    /// Nobody, until [`Driver::run_work`](crate::Driver::run_work) or a flush: for scripts, and for explorations that have a
    /// worker thread of their own.
    Manual,
}

type Item = Box<dyn FnOnce(&mut MaySleep<'_>) + Send>;

#[derive(Default)]
struct State {
    items: VecDeque<Item>,
    running: usize,
}

struct Shared {
    state: SpinLock<State>,
    idle: WaitQueue,
    map: LockMap,
}

/// A workqueue.
pub(crate) struct WorkQueue {
    name: &'static str,
    mode: WorkMode,
    shared: Arc<Shared>,
}

impl WorkQueue {
    /// `class`: of the work, for lockdep.
    pub(crate) fn new(name: &'static str, class: &'static LockClass, mode: WorkMode) -> WorkQueue {
        let state = SpinLock::new(&QUEUE, State::default());
        let shared = Shared { state, idle: WaitQueue::new(&QUEUE), map: LockMap::new(class) };
        WorkQueue { name, mode, shared: Arc::new(shared) }
    }

    /// schedule_work. Any context.
    pub(crate) fn queue(&self, cx: &mut impl Context, item: impl FnOnce(&mut MaySleep<'_>) + Send + 'static) {
        self.shared.state.lock(cx).items.push_back(Box::new(item));
        if self.mode == WorkMode::Threads {
            let shared = self.shared.clone();
            drop(spawn(self.name, move |cx| {
                shared.run_one(cx);
            }));
        }
    }

    /// Runs the oldest item, if there is one that nobody has begun.
    pub(crate) fn run_one(&self, cx: &mut MaySleep<'_>) -> bool {
        self.shared.run_one(cx)
    }

    /// flush_workqueue: returns when every item queued before has run. Runs those that nobody has begun.
    #[track_caller]
    pub(crate) fn flush(&self, cx: &mut MaySleep<'_>) {
        if mutated(SiteKind::Wait, Location::caller()) {
            return;
        }
        drop(self.shared.map.acquire(cx));
        while self.shared.run_one(cx) {}
        let shared = &self.shared;
        shared.idle.wait_event_with(cx, |cx| shared.state.lock(cx).running == 0);
    }
}

impl Shared {
    fn run_one(&self, cx: &mut MaySleep<'_>) -> bool {
        let mut state = self.state.lock(cx);
        let Some(item) = state.items.pop_front() else { return false };
        state.running += 1;
        drop(state);
        {
            let _map = self.map.acquire(cx);
            item(cx);
        }
        self.state.lock(cx).running -= 1;
        self.idle.wake_all();
        true
    }
}
