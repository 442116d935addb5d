// SPDX-License-Identifier: MIT OR Apache-2.0
//! A batch on its way to the engine, and everybody who waits for it: its owner, those who invalidate its objects,
//! those who unbind or close them.
//!
//! It exists before it is submitted: it is attached to its objects together with the check of their sequences, and
//! submitted after that without a lock. Who finds it in between waits for both. From then on each waits for the engine by
//! himself, so that one who stops waiting is nobody else's concern.

use std::sync::Arc;
use std::time::Duration;

use interleave::{LockClass, MaySleep, Mutex, WaitQueue};

use crate::device::{Fence, FenceError, WaitError};

static JOB: LockClass = LockClass::new("userptr_job");
static SUBMITTED: LockClass = LockClass::new("userptr_job_submitted");

enum State<F> {
    /// On its way to the engine.
    Submitting,
    /// The engine has it, or would not have it.
    Submitted(Option<Arc<F>>),
}

pub(super) struct Job<F> {
    state: Mutex<State<F>>,
    submitted: WaitQueue,
}

impl<F: Fence> Job<F> {
    pub(super) fn new() -> Job<F> {
        Job { state: Mutex::new(&JOB, State::Submitting), submitted: WaitQueue::new(&SUBMITTED) }
    }

    /// The engine has taken it, or will not (`None`).
    pub(super) fn submitted(&self, cx: &mut MaySleep<'_>, fence: Option<F>) {
        *self.state.lock(cx) = State::Submitted(fence.map(Arc::new));
        self.submitted.wake_all();
    }

    /// What tells of its end, once the engine has answered. Sleeps until then.
    fn fence(&self, cx: &mut MaySleep<'_>) -> Option<Arc<F>> {
        let mut state = self.state.lock(cx);
        loop {
            match &*state {
                State::Submitted(fence) => return fence.clone(),
                State::Submitting => state = self.submitted.wait(cx, state),
            }
        }
    }

    pub(super) fn is_done(&self, cx: &mut MaySleep<'_>) -> bool {
        match &*self.state.lock(cx) {
            State::Submitting => false,
            State::Submitted(fence) => fence.as_deref().is_none_or(Fence::is_signaled),
        }
    }

    /// Returns when the engine is through with it: how it ended.
    pub(super) fn wait(&self, cx: &mut MaySleep<'_>) -> Result<(), FenceError> {
        self.fence(cx).map_or(Ok(()), |fence| fence.wait(cx))
    }

    /// As [`Fence::wait_interruptible`].
    pub(super) fn wait_interruptible(
        &self,
        cx: &mut MaySleep<'_>,
        timeout: Option<Duration>,
    ) -> Result<(), WaitError> {
        self.fence(cx).map_or(Ok(()), |fence| fence.wait_interruptible(cx, timeout))
    }
}
