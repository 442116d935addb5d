// SPDX-License-Identifier: MIT OR Apache-2.0
//! Fault injection: an allocation that fails though there is enough (the kernel's fail-nth, failslab and fail_page_alloc).

use interleave::{AtomicU64, Ordering};

/// What a machine hands out and can run out of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allocation {
    /// A page frame.
    Frame,
    /// A page-table page.
    Table,
    /// A slot of the swap area. Without one reclaim gives up ([`Reclaim::NoSwap`](crate::Reclaim::NoSwap)); nothing else fails.
    SwapSlot,
}

impl Allocation {
    /// Every kind.
    pub const ALL: [Allocation; 3] = [Allocation::Frame, Allocation::Table, Allocation::SwapSlot];
}

/// When the next failure of one kind of allocation comes.
pub(crate) struct FailNth {
    /// How many allocations from now one fails; 0 is never.
    left: AtomicU64,
}

impl FailNth {
    pub(crate) fn never() -> FailNth {
        FailNth { left: AtomicU64::new(0) }
    }

    pub(crate) fn set(&self, n: u64) {
        self.left.store(n, Ordering::SeqCst);
    }

    pub(crate) fn is_due(&self) -> bool {
        self.left.load(Ordering::SeqCst) != 0
    }

    /// One more allocation is asked for: does it fail?
    pub(crate) fn fails_now(&self) -> bool {
        let mut left = self.left.load(Ordering::SeqCst);
        while left != 0 {
            match self.left.compare_exchange(left, left - 1, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return left == 1,
                Err(now) => left = now,
            }
        }
        false
    }
}
