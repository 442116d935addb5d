// SPDX-License-Identifier: MIT OR Apache-2.0
//! A batch on its way through the engine, and everybody who waits for it: its owner, those who invalidate its objects,
//! those who unbind or close them.
//!
//! It exists before it is submitted: it is attached to its objects together with the check of their sequences, and
//! submitted after that without a lock. Who finds it in between waits for both.

use interleave::{LockClass, MaySleep, Mutex, WaitQueue};

use crate::device::{Fence, FenceError};

static JOB: LockClass = LockClass::new("userptr_job");
static JOB_DONE: LockClass = LockClass::new("userptr_job_done");

enum State<F> {
    /// On its way to the engine.
    Submitting,
    /// The engine has it.
    Running(F),
    /// Somebody waits for the engine, for all of us.
    Awaited,
    /// Done. The owner takes the outcome.
    Done(Option<Result<(), FenceError>>),
}

pub(super) struct Job<F> {
    state: Mutex<State<F>>,
    done: WaitQueue,
}

/// Somebody waits for the engine. Dropped, the batch is done, also if the fence panics: the others must not wait for ever.
struct Awaiting<'j, F: Fence> {
    job: &'j Job<F>,
    outcome: Option<Result<(), FenceError>>,
}

impl<F: Fence> Drop for Awaiting<'_, F> {
    fn drop(&mut self) {
        let outcome = self.outcome.take();
        let _ = MaySleep::try_enter(|cx| *self.job.state.lock(cx) = State::Done(outcome));
        self.job.done.wake_all();
    }
}

impl<F: Fence> Job<F> {
    pub(super) fn new() -> Job<F> {
        Job { state: Mutex::new(&JOB, State::Submitting), done: WaitQueue::new(&JOB_DONE) }
    }

    /// The engine has taken it, or will not (`None`).
    pub(super) fn submitted(&self, cx: &mut MaySleep<'_>, fence: Option<F>) {
        *self.state.lock(cx) = fence.map_or(State::Done(None), State::Running);
        self.done.wake_all();
    }

    pub(super) fn is_done(&self, cx: &mut MaySleep<'_>) -> bool {
        match &*self.state.lock(cx) {
            State::Done(_) => true,
            State::Running(fence) => fence.is_signaled(),
            State::Submitting | State::Awaited => false,
        }
    }

    /// Returns when the engine is through with it. Whoever is first waits for the fence, the others for him.
    pub(super) fn wait(&self, cx: &mut MaySleep<'_>) {
        let mut state = self.state.lock(cx);
        loop {
            match std::mem::replace(&mut *state, State::Awaited) {
                State::Running(fence) => {
                    drop(state);
                    let mut awaiting = Awaiting { job: self, outcome: None };
                    awaiting.outcome = Some(fence.wait(cx));
                    return;
                }
                State::Done(outcome) => {
                    *state = State::Done(outcome);
                    return;
                }
                other => {
                    *state = other;
                    state = self.done.wait(cx, state);
                }
            }
        }
    }

    /// How it ended; for its owner, who has waited.
    pub(super) fn take_outcome(&self, cx: &mut MaySleep<'_>) -> Result<(), FenceError> {
        match &mut *self.state.lock(cx) {
            State::Done(outcome) => outcome.take().unwrap_or(Ok(())),
            _ => Ok(()),
        }
    }
}
