// SPDX-License-Identifier: MIT OR Apache-2.0
//! A number for each thread, small and dense, to pick lease slots by. It is a hint: two threads may have one number.

use std::cell::Cell;

use interleave::{AtomicUsize, Ordering, explore};

thread_local! {
    /// Plus one; 0 is none yet.
    static NUMBER: Cell<usize> = const { Cell::new(0) };
}

/// The number of the calling thread.
#[inline(always)]
pub(super) fn number() -> usize {
    match NUMBER.get() {
        0 => first(),
        n => n - 1,
    }
}

#[cold]
fn first() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::const_new(1);
    // Virtual threads are one thread here, whatever ran before.
    if explore::exploring() {
        return 0;
    }
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    NUMBER.set(number);
    number - 1
}
