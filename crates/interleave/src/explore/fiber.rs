// SPDX-License-Identifier: MIT OR Apache-2.0
//! The stacks that virtual threads run on. A fiber outlives the thread: it is reused by the next execution.
//!
//! All `unsafe` of the engine that concerns switching is here.

use std::cell::Cell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};

/// What a virtual thread runs.
pub(super) type Job = Box<dyn FnOnce()>;

/// What came out of a job that panicked.
pub(super) type Payload = Box<dyn std::any::Any + Send>;

/// Why a fiber gave the processor back.
pub(super) enum Paused {
    /// It called [`pause`].
    Midway,
    /// Its job is done, or has panicked.
    Ended(Option<Payload>),
}

type Resume = Option<Job>;

pub(super) struct Fiber(Coroutine<Resume, Paused, ()>);

thread_local! {
    /// The yielder of the fiber that runs on this OS thread.
    static RUNNING: Cell<*const Yielder<Resume, Paused>> = const { Cell::new(std::ptr::null()) };
}

impl Fiber {
    pub(super) fn new(stack: usize) -> io::Result<Fiber> {
        Ok(Fiber(Coroutine::with_stack(DefaultStack::new(stack)?, |yielder, mut job: Resume| {
            while let Some(run) = job {
                RUNNING.set(yielder);
                let panicked = catch_unwind(AssertUnwindSafe(run)).err();
                job = yielder.suspend(Paused::Ended(panicked));
            }
        })))
    }

    /// Begins a job, or goes on with one, until it pauses or ends.
    pub(super) fn run(&mut self, job: Resume) -> Paused {
        match self.0.resume(job) {
            CoroutineResult::Yield(paused) => paused,
            CoroutineResult::Return(()) => Paused::Ended(None),
        }
    }
}

/// Gives the processor back to whoever called [`Fiber::run`], until that is called again.
///
/// # Panics
/// Outside a fiber.
pub(super) fn pause() {
    let yielder = RUNNING.get();
    // SAFETY: the pointer is null, or was set by the fiber that runs on this OS thread now: it is set when a job
    // begins, and again below whenever one goes on. A fiber's yielder lives on its stack, below the running job.
    let running = unsafe { yielder.as_ref() }.unwrap_or_else(|| panic!("no virtual thread is running"));
    running.suspend(Paused::Midway);
    RUNNING.set(yielder);
}
