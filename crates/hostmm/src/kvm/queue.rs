// SPDX-License-Identifier: MIT OR Apache-2.0
//! Notices on their way from the thread that reads the ring to the thread that calls back.
//!
//! Bounded: while it is full the reader waits, the ring fills up behind it, and what does not fit there is counted and
//! told as [`Notice::Everything`].
//!
//! Lock order: `kvm_notices` is a leaf.

use std::collections::VecDeque;

use interleave::{LockClass, MaySleep, Mutex, WaitQueue};

use super::record::Notice;

static NOTICES: LockClass = LockClass::new("kvm_notices");
static NOTICES_CHANGED: LockClass = LockClass::new("kvm_notices_changed");

/// Notices that the reader may be ahead of the callbacks.
const BOUND: usize = 256;

#[derive(Debug)]
pub(super) struct Queue {
    /// `None`: closed.
    notices: Mutex<Option<VecDeque<Notice>>>,
    changed: WaitQueue,
}

impl Queue {
    pub(super) fn new() -> Queue {
        let notices = Some(VecDeque::with_capacity(BOUND));
        Queue { notices: Mutex::new(&NOTICES, notices), changed: WaitQueue::new(&NOTICES_CHANGED) }
    }

    /// Waits for room. False: closed.
    pub(super) fn push(&self, cx: &mut MaySleep<'_>, notice: Notice) -> bool {
        let mut notices = self.notices.lock(cx);
        loop {
            match &mut *notices {
                None => return false,
                Some(queued) if queued.len() < BOUND => {
                    queued.push_back(notice);
                    break;
                }
                Some(_) => notices = self.changed.wait(cx, notices),
            }
        }
        drop(notices);
        self.changed.wake_all();
        true
    }

    /// Waits for a notice. `None`: closed.
    pub(super) fn pop(&self, cx: &mut MaySleep<'_>) -> Option<Notice> {
        let mut notices = self.notices.lock(cx);
        let notice = loop {
            if let Some(notice) = notices.as_mut()?.pop_front() {
                break notice;
            }
            notices = self.changed.wait(cx, notices);
        };
        drop(notices);
        self.changed.wake_all();
        Some(notice)
    }

    /// Both ends return from now on; what is queued is dropped.
    pub(super) fn close(&self, cx: &mut MaySleep<'_>) {
        *self.notices.lock(cx) = None;
        self.changed.wake_all();
    }
}
