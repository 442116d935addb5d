// SPDX-License-Identifier: MIT OR Apache-2.0
//! The callbacks of a secondary MMU: `struct mmu_notifier_ops` of every kernel generation since 3.16.
//!
//! | callback | kernels | context |
//! |---|---|---|
//! | `invalidate_range_start`, `invalidate_range_end` | all | may sleep, unless the range is non-blockable (4.19+) |
//! | `invalidate_page` | until 4.13 | until 4.10 after the page-table lock; 4.11 to 4.13 under it |
//! | `change_pte` | until 6.9 | under the page-table lock |
//! | `arch_invalidate_secondary_tlbs` | 3.19 to 6.5 as `invalidate_range`; 6.6+ | under and outside the page-table lock: atomic |
//! | `clear_flush_young`, `test_young` | all (a range since 3.19) | under the page-table lock |
//! | `clear_young` | 4.2+ | under the page-table lock |
//! | `release` | all | may sleep; exactly once |
//!
//! Even where a callback may sleep, its caller can hold mmap_lock, i_mmap and anon_vma locks, a page lock, and can be
//! in direct reclaim. A callback must not take any of these, allocate memory that may reclaim, nor wait for work
//! that does. The class [`INVALIDATE_START`](crate::INVALIDATE_START) makes lockdep report it.

use std::fmt;
use std::ops::BitOr;

use interleave::{Atomic, MaySleep, PageContext, Sleep};

use crate::{Invalidation, PageAddr, Pte, Range};

/// A callback was asked not to block and could not do its work without blocking (`-EAGAIN`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the range must be invalidated without blocking and a callback would block: retry, or blockable")]
pub struct WouldBlock;

/// Which callbacks a notifier has. Linux's rules depend on the presence of a callback, not on what it does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Ops(u16);

impl Ops {
    pub(crate) const fn bits(self) -> u16 {
        self.0
    }

    /// No callback.
    pub const NONE: Ops = Ops(0);
    /// `invalidate_range_start`.
    pub const START: Ops = Ops(1);
    /// `invalidate_range_end`.
    pub const END: Ops = Ops(1 << 1);
    /// `invalidate_page`.
    pub const PAGE: Ops = Ops(1 << 2);
    /// `change_pte`.
    pub const CHANGE_PTE: Ops = Ops(1 << 3);
    /// `arch_invalidate_secondary_tlbs`, called `invalidate_range` before 6.6.
    pub const SECONDARY_TLBS: Ops = Ops(1 << 4);
    /// `clear_flush_young`.
    pub const CLEAR_FLUSH_YOUNG: Ops = Ops(1 << 5);
    /// `clear_young`.
    pub const CLEAR_YOUNG: Ops = Ops(1 << 6);
    /// `test_young`.
    pub const TEST_YOUNG: Ops = Ops(1 << 7);
    /// `release`.
    pub const RELEASE: Ops = Ops(1 << 8);

    const NAMES: [&'static str; 9] = [
        "invalidate_range_start",
        "invalidate_range_end",
        "invalidate_page",
        "change_pte",
        "arch_invalidate_secondary_tlbs",
        "clear_flush_young",
        "clear_young",
        "test_young",
        "release",
    ];

    /// Are all of `other` here?
    pub const fn contains(self, other: Ops) -> bool {
        self.0 & other.0 == other.0
    }

    /// Is any of `other` here?
    pub const fn intersects(self, other: Ops) -> bool {
        self.0 & other.0 != 0
    }

    /// The callbacks of both; `|` in constants.
    pub const fn and(self, other: Ops) -> Ops {
        Ops(self.0 | other.0)
    }
}

impl BitOr for Ops {
    type Output = Ops;

    fn bitor(self, other: Ops) -> Ops {
        self.and(other)
    }
}

impl fmt::Debug for Ops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = Ops::NAMES.iter().enumerate().filter(|(i, _)| self.0 >> i & 1 == 1);
        for (n, (_, name)) in names.enumerate() {
            f.write_str(if n == 0 { "" } else { " | " })?;
            f.write_str(name)?;
        }
        if self.0 == 0 { f.write_str("none") } else { Ok(()) }
    }
}

/// A secondary MMU that hears every change of one mm (`struct mmu_notifier`).
///
/// The context of a callback is its first argument, so a callback that sleeps where it must not does not compile:
///
/// ```compile_fail,E0308
/// use interleave::{Atomic, LockClass, Mutex};
/// use mmu_notifier::{MmuNotifier, Ops, PageAddr, Pte};
///
/// static CLASS: LockClass = LockClass::new("driver");
/// struct Driver(Mutex<u64>);
///
/// impl MmuNotifier for Driver {
///     fn ops(&self) -> Ops {
///         Ops::CHANGE_PTE
///     }
///     fn change_pte(&self, cx: &mut Atomic<'_>, _: PageAddr, _: Pte) {
///         *self.0.lock(cx) += 1; // a mutex sleeps; change_pte runs under the page-table lock
///     }
/// }
/// ```
///
/// Nor does one that takes a mutex under its own spin lock, whose guard borrows the context:
///
/// ```compile_fail,E0499
/// use interleave::{LockClass, MaySleep, Mutex, SpinLock};
/// use mmu_notifier::{MmuNotifier, Ops};
///
/// static CLASS: LockClass = LockClass::new("driver");
/// struct Driver { list: SpinLock<Vec<u64>>, table: Mutex<u64> }
///
/// impl MmuNotifier for Driver {
///     fn ops(&self) -> Ops {
///         Ops::RELEASE
///     }
///     fn release(&self, cx: &mut MaySleep<'_>) {
///         let list = self.list.lock(cx);
///         *self.table.lock(cx) = list.len() as u64;
///     }
/// }
/// ```
///
/// Nor one that keeps its context to sleep later:
///
/// ```compile_fail,E0521
/// use interleave::MaySleep;
/// use mmu_notifier::{MmuNotifier, Ops};
///
/// struct Driver;
///
/// impl MmuNotifier for Driver {
///     fn ops(&self) -> Ops {
///         Ops::RELEASE
///     }
///     fn release(&self, cx: &mut MaySleep<'_>) {
///         keep(cx); // wants a context for ever
///     }
/// }
/// fn keep(_: &'static mut MaySleep<'static>) {}
/// ```
pub trait MmuNotifier: Send + Sync {
    /// Which of the callbacks below are meant to be called. Constant for the life of the notifier.
    fn ops(&self) -> Ops;

    /// The translations of `inv.range` are about to change: drop those of the secondary MMU and wait until no access
    /// through them is in flight. Between this and [`MmuNotifier::invalidate_range_end`] the range must not be mapped
    /// again; such sections nest and overlap, so count them.
    ///
    /// # Errors
    /// [`WouldBlock`], for a non-blockable range only. Such a notifier must not have
    /// [`Ops::END`] (5.12+): after a failure some notifiers get the end call and this one cannot know whether.
    fn invalidate_range_start(&self, cx: Sleep<'_, '_>, inv: &Invalidation) -> Result<(), WouldBlock> {
        let _ = (cx, inv);
        Ok(())
    }

    /// The translations have changed. The CPU's TLB may still be unflushed and the old pages not yet freed.
    fn invalidate_range_end(&self, cx: Sleep<'_, '_>, inv: &Invalidation) {
        let _ = (cx, inv);
    }

    /// The page at `page` is no longer mapped, or no longer writable. Removed in 4.14, since it came after
    /// the change and under either context.
    fn invalidate_page(&self, cx: PageContext<'_, '_>, page: PageAddr) {
        let _ = (cx, page);
    }

    /// The entry of `page` is cleared and flushed and will be `pte`. Removed in 6.10.
    fn change_pte(&self, cx: &mut Atomic<'_>, page: PageAddr, pte: Pte) {
        let _ = (cx, page, pte);
    }

    /// The CPU flushes its TLB for `range`: flush the TLBs that walk the CPU's page table (`invalidate_range`
    /// before 6.6).
    fn arch_invalidate_secondary_tlbs(&self, cx: &mut Atomic<'_>, range: Range) {
        let _ = (cx, range);
    }

    /// Was `range` accessed since the last call? Forgets it, and flushes the secondary TLB.
    fn clear_flush_young(&self, cx: &mut Atomic<'_>, range: Range) -> bool {
        let _ = (cx, range);
        false
    }

    /// Like [`MmuNotifier::clear_flush_young`] without the flush. Since 4.2.
    fn clear_young(&self, cx: &mut Atomic<'_>, range: Range) -> bool {
        let _ = (cx, range);
        false
    }

    /// Was `range` accessed? Forgets nothing.
    fn test_young(&self, cx: &mut Atomic<'_>, range: Range) -> bool {
        let _ = (cx, range);
        false
    }

    /// The mm dies or the notifier is unregistered: drop everything and map nothing more. No other callback comes
    /// from the teardown that follows, so a notifier without this one keeps its translations of freed pages.
    /// May run beside other callbacks.
    fn release(&self, cx: &mut MaySleep<'_>) {
        let _ = cx;
    }
}
