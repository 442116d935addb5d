// SPDX-License-Identifier: MIT OR Apache-2.0
//! Callbacks for ranges: who wants to be called, and the fence that ends it.
//!
//! Invariants:
//! * a callback runs on the monitor thread only, with its [`Sub::callback`] lock held and no other of ours;
//! * whoever empties `callback` under that lock has made sure that it neither runs nor will: that is the fence;
//! * a closure is never dropped under a lock of ours: what it owns may be a [`Subscription`] itself.
//!
//! Lock order: `kvm_callback`, then `kvm_subs`: a callback may subscribe and unsubscribe, and the monitor lets
//! `kvm_subs` go before it calls. Whatever locks a callback takes come between the two; who unsubscribes while holding
//! one of those waits for a callback that waits for him, which the lock-class graph reports as the inversion it is.

use super::error::Gone;
use super::record::Notice;
use super::shared::{ALIVE, MONITOR, Shared};
use interleave::{LockClass, MaySleep, Mutex};
use mmu_notifier::{IntervalIndex, Key, Range};
use rustix::thread::Pid;
use std::sync::Arc;

static KVM_SUBS: LockClass = LockClass::new("kvm_subs");
static KVM_CALLBACK: LockClass = LockClass::new("kvm_callback");

pub(crate) type Callback = Box<dyn FnMut(&Notice) + Send>;

/// One subscription, as the monitor sees it.
pub(crate) struct Sub {
    /// `None`: unsubscribed. Held while the callback runs, which is what makes unsubscribing a fence.
    callback: Mutex<Option<Callback>>,
}

impl std::fmt::Debug for Sub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sub").finish_non_exhaustive()
    }
}

/// Every subscription of a source, by range.
#[derive(Debug)]
pub(crate) struct Subs(Mutex<IntervalIndex<Arc<Sub>>>);

impl Subs {
    pub(crate) fn new() -> Subs {
        Subs(Mutex::new(&KVM_SUBS, IntervalIndex::new()))
    }

    /// Monitor only: calls back every subscription that the notice concerns, in order of address, in
    /// O(log n + hits). `hits` is empty before and after; the monitor keeps it for its capacity.
    pub(super) fn dispatch(&self, cx: &mut MaySleep<'_>, notice: &Notice, hits: &mut Vec<Arc<Sub>>) {
        let pages = match notice {
            Notice::Range(record) => record.pages(),
            Notice::Everything => Some(Range::ALL),
        };
        let Some(pages) = pages else { return };
        hits.extend(self.0.lock(cx).overlaps(pages).map(|(_, _, sub)| Arc::clone(sub)));
        for sub in hits.drain(..) {
            if let Some(callback) = sub.callback.lock(cx).as_mut() {
                callback(notice);
            }
        }
    }
}

/// Callbacks for one range, until dropped.
///
/// # Panics
/// Dropping it may wait for its callback, so it panics where the thread must not sleep (under a spin lock).
#[derive(Debug)]
pub struct Subscription {
    sub: Arc<Sub>,
    key: Key,
    shared: Arc<Shared>,
    watch: super::Watch,
    /// The thread that calls back.
    monitor: Pid,
}

impl Subscription {
    pub(crate) fn new(
        shared: &Arc<Shared>,
        monitor: Pid,
        range: Range,
        callback: Callback,
        watch: super::Watch,
    ) -> Result<Subscription, Gone> {
        let sub = Arc::new(Sub { callback: Mutex::new(&KVM_CALLBACK, Some(callback)) });
        let key = MaySleep::enter(|cx| shared.subs.0.lock(cx).insert(range, Arc::clone(&sub)));
        let this = Subscription { sub, key, shared: Arc::clone(shared), watch, monitor };
        // After it is listed: a monitor that dies from now on is seen by the watch.
        shared.check(ALIVE | MONITOR)?;
        Ok(this)
    }

    /// Is this the thread that calls back?
    pub(crate) fn is_calling(&self) -> bool {
        // A later thread may get the number of a dead monitor; no callback runs then, so the answer does not matter.
        rustix::thread::gettid() == self.monitor
    }

    /// The synchronous side of the same range. Unlike a watch without callbacks it is also gone when the monitor is.
    pub fn watch(&self) -> &super::Watch {
        &self.watch
    }

    /// No callback runs when this returns and none will, unless it is called from the callback itself: there it makes
    /// sure that this call is the last. May be called more than once, by several threads.
    pub(crate) fn silence(&self) {
        if !self.shared.at_home() {
            // A forked child: the monitor's locks may be held for ever, and there is no monitor.
            return;
        }
        MaySleep::enter(|cx| {
            drop(self.shared.subs.0.lock(cx).remove(self.key));
            let callback = if self.is_calling() {
                // Held only if it is this very callback that runs: the monitor calls one at a time.
                self.sub.callback.try_lock(cx).and_then(|mut callback| callback.take())
            } else {
                self.sub.callback.lock(cx).take()
            };
            drop(callback);
        });
    }
}

impl Drop for Subscription {
    /// A fence: when it returns, the callback is not running and never runs again. In the callback itself it cannot
    /// wait for itself: there it only makes sure that this call is the last.
    fn drop(&mut self) {
        self.silence();
    }
}
