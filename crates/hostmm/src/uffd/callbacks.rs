// SPDX-License-Identifier: MIT OR Apache-2.0
//! The thread that runs the callbacks and frees what the monitor may not free.
//!
//! It is an ordinary application thread: a callback may munmap, free, allocate and lock, and wait for a thread that
//! is itself waiting in munmap, because the monitor never waits for this thread.
//!
//! Lock order: a callback runs inside `uffd_callback`, which is no lock but stands for the wait of whoever drops a
//! watch: whoever does that while holding a lock that a callback takes is reported before the two ever meet.

use std::sync::Arc;
use std::time::Duration;

use interleave::{LockClass, LockMap, MaySleep, Ordering};

use super::futex;
use super::shared::{Shared, this_thread};

static UFFD_CALLBACK: LockClass = LockClass::new("uffd_callback");
/// See the module.
pub(super) static CALLBACK: LockMap = LockMap::new(&UFFD_CALLBACK);

pub(super) fn run(cx: &mut MaySleep<'_>, shared: &Shared) {
    shared.callback_tid.store(this_thread(), Ordering::Release);
    loop {
        let notes = shared.notes.load(Ordering::SeqCst);
        let last = shared.monitor_gone.load(Ordering::Acquire);
        // Before `note`: whatever the monitor let go it had put on `note` before.
        let free = shared.free.take();
        if last {
            shared.shut();
        }
        for node in shared.note.take() {
            let _running = CALLBACK.acquire(cx);
            // SAFETY: alive until it comes off `free`, after this loop.
            if unsafe { node.as_ref() }.call() {
                shared.counters.callback_panics.fetch_add(1, Ordering::Relaxed);
            }
        }
        for node in free {
            // SAFETY: the reference that `watch` made; the monitor has taken the node out of its index.
            drop(unsafe { Arc::from_raw(node.as_ptr()) });
        }
        while let Some(range) = shared.strays.pop() {
            shared.release_stray(cx, range);
        }
        if last {
            return;
        }
        futex::wait(&shared.notes, notes, Duration::from_secs(60));
    }
}
