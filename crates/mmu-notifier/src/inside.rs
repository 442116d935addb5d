// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the running thread is inside of: callbacks, and sections between start and end.
//!
//! Linux hangs where a thread waits for a section or a callback that it is itself in. This is how such a wait is seen
//! before it begins, and refused.

use std::cell::RefCell;

use interleave::PerThread;

/// The calling thread is between the start and the end of an invalidation of this mm, or in one of its callbacks,
/// and asked for something that waits for the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "called inside an invalidation of the same mm, whose end it would wait for: call it from a thread that is in no callback"
)]
pub struct InsideInvalidation;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Frame {
    Section { mm: usize },
    Callback { mm: usize, notifier: usize },
}

static FRAMES: PerThread<RefCell<Vec<Frame>>> = PerThread::new(|| RefCell::new(Vec::new()));

fn push(frame: Frame) {
    FRAMES.with(|frames| frames.borrow_mut().push(frame));
}

fn pop(frame: Frame) {
    FRAMES.with(|frames| {
        let mut frames = frames.borrow_mut();
        if let Some(at) = frames.iter().rposition(|f| *f == frame) {
            frames.remove(at);
        }
    });
}

fn count(frame: impl Fn(Frame) -> bool) -> u32 {
    FRAMES.with(|frames| frames.borrow().iter().filter(|f| frame(**f)).count() as u32)
}

/// Sections of one mm end in any order, so they are entered and left by calls.
pub(crate) fn enter_section(mm: usize) {
    push(Frame::Section { mm });
}

pub(crate) fn leave_section(mm: usize) {
    pop(Frame::Section { mm });
}

/// The thread is in a callback while this lives.
pub(crate) struct InCallback(Frame);

impl InCallback {
    pub(crate) fn enter(mm: usize, notifier: usize) -> InCallback {
        let frame = Frame::Callback { mm, notifier };
        push(frame);
        InCallback(frame)
    }
}

impl Drop for InCallback {
    fn drop(&mut self) {
        pop(self.0);
    }
}

/// Is the thread in a section or callback of `mm`?
pub(crate) fn any(mm: usize) -> bool {
    count(|f| matches!(f, Frame::Section { mm: m } | Frame::Callback { mm: m, .. } if m == mm)) > 0
}

/// Is the thread in a callback of `mm`?
pub(crate) fn callback(mm: usize) -> bool {
    count(|f| matches!(f, Frame::Callback { mm: m, .. } if m == mm)) > 0
}

/// How many callbacks of `notifier` is the thread in?
pub(crate) fn callbacks_of(mm: usize, notifier: usize) -> u32 {
    count(|f| f == Frame::Callback { mm, notifier })
}
