// SPDX-License-Identifier: MIT OR Apache-2.0
//! Read sections around callbacks, and the wait for their end: what SRCU does for mm/mmu_notifier.c.
//!
//! Linux has one SRCU domain for all notifiers of all mms, so that unregistering waits for everybody's callbacks,
//! and hangs when called from any of them. Here every subscription is a domain of its own: the fence waits for the
//! callbacks of this one notifier. A domain closes once and for ever, so one word is enough: the number of
//! readers, and a bit that keeps new ones out.
//!
//! Invariant: after [`Srcu::close`], the number of readers only falls; the reader that brings it to zero wakes.

use interleave::{AtomicU32, LockClass, MaySleep, Ordering, WaitQueue};

static SRCU: LockClass = LockClass::new("mmu_notifier_srcu");
const CLOSED: u32 = 1 << 31;

pub(crate) struct Srcu {
    readers: AtomicU32,
    idle: WaitQueue,
}

impl Srcu {
    pub(crate) fn new() -> Srcu {
        Srcu { readers: AtomicU32::new(0), idle: WaitQueue::new(&SRCU) }
    }

    /// Begins a read section; `None` once closed. Never sleeps.
    pub(crate) fn read_lock(&self) -> Option<ReadSection<'_>> {
        let section = ReadSection(self);
        let before = self.readers.fetch_add(1, Ordering::AcqRel);
        (before & CLOSED == 0).then_some(section)
    }

    /// No read section begins any more.
    pub(crate) fn close(&self) {
        self.readers.fetch_or(CLOSED, Ordering::AcqRel);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.readers.load(Ordering::Acquire) & CLOSED != 0
    }

    /// Waits until the read sections that began before [`Srcu::close`] have ended, but for `own` of the caller.
    pub(crate) fn synchronize(&self, cx: &mut MaySleep<'_>, own: u32) {
        self.idle.wait_event(cx, || self.readers.load(Ordering::Acquire) & !CLOSED <= own);
    }
}

pub(crate) struct ReadSection<'a>(&'a Srcu);

impl Drop for ReadSection<'_> {
    fn drop(&mut self) {
        if self.0.readers.fetch_sub(1, Ordering::AcqRel) & CLOSED != 0 {
            self.0.idle.wake_all();
        }
    }
}
