// SPDX-License-Identifier: MIT OR Apache-2.0
//! The thread that runs the callbacks and frees what the monitor may not free.
//!
//! It is an ordinary application thread: a callback may munmap, free, allocate and lock, and wait for a thread that
//! is itself waiting in munmap, because the monitor never waits for this thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::futex;
use super::shared::Shared;

pub(super) fn run(shared: &Shared) {
    shared.callback_tid.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Release);
    loop {
        let notes = shared.notes.load(Ordering::SeqCst);
        let last = shared.monitor_gone.load(Ordering::Acquire);
        // Before `note`: whatever the monitor let go it had put on `note` before.
        let free = shared.free.take();
        if last {
            shared.shut();
        }
        for node in shared.note.take() {
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
            shared.release_stray(range);
        }
        if last {
            return;
        }
        futex::wait(&shared.notes, notes, Duration::from_secs(60));
    }
}
