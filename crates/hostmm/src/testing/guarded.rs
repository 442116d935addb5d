// SPDX-License-Identifier: MIT OR Apache-2.0
//! An allocator for tests of threads that must not allocate.

use std::alloc::{GlobalAlloc, Layout, System};

use interleave::{AtomicU32, Ordering};

/// The thread that must not; 0: none.
static FORBIDDEN: AtomicU32 = AtomicU32::const_new(0);

/// The system's allocator, which aborts the process when a thread allocates or frees that was forbidden to: the
/// `#[global_allocator]` of a test binary.
#[derive(Debug)]
pub struct Guarded;

impl Guarded {
    /// From now on this thread, by the kernel's name of it, must neither allocate nor free. One at a time.
    pub fn forbid(tid: u32) {
        FORBIDDEN.store(tid, Ordering::Release);
    }

    /// Every thread may.
    pub fn allow() {
        Guarded::forbid(0);
    }
}

fn check() {
    let forbidden = FORBIDDEN.load(Ordering::Acquire);
    if forbidden != 0 && rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned() == forbidden {
        std::process::abort();
    }
}

// SAFETY: System does the work.
unsafe impl GlobalAlloc for Guarded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        check();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        check();
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}
