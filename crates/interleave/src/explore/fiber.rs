// SPDX-License-Identifier: MIT OR Apache-2.0
//! The stacks that virtual threads run on. A fiber outlives the thread: it is reused by the next execution, and by the
//! next exploration on whatever OS thread, since making a stack costs as much as many executions.
//!
//! All `unsafe` of the engine that concerns switching is here.

use std::cell::Cell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use parking_lot::Mutex;

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

pub(super) struct Fiber {
    coroutine: Coroutine<Resume, Paused, ()>,
    stack: usize,
    /// It has a job, which may have been begun.
    busy: bool,
}

/// Idle fibers kept for the next exploration.
const POOLED: usize = 32;

thread_local! {
    /// The yielder of the fiber that runs on this OS thread.
    static RUNNING: Cell<*const Yielder<Resume, Paused>> = const { Cell::new(std::ptr::null()) };
}

/// Fibers without a job.
static POOL: Mutex<Vec<Idle>> = Mutex::new(Vec::new());

/// A fiber that has no job, or none yet.
struct Idle(Box<Fiber>);

// SAFETY: on the stack of an idle fiber is the loop of `Fiber::new` alone, with its own yielder. The job is gone, no panic
// is under way, and nothing there belongs to the OS thread that ran it last: thread-locals are used by `run_here` only, which
// is called anew for each job.
unsafe impl Send for Idle {}

impl Fiber {
    /// A fiber with at least `stack` bytes of stack.
    pub(super) fn new(stack: usize) -> io::Result<Box<Fiber>> {
        let pooled = {
            let mut pool = POOL.lock();
            pool.iter().rposition(|Idle(fiber)| fiber.stack == stack).map(|at| pool.swap_remove(at))
        };
        if let Some(Idle(fiber)) = pooled {
            return Ok(fiber);
        }
        let coroutine = Coroutine::with_stack(DefaultStack::new(stack)?, |yielder, mut job: Resume| {
            while let Some(run) = job {
                job = yielder.suspend(Paused::Ended(run_here(yielder, run)));
            }
        });
        Ok(Box::new(Fiber { coroutine, stack, busy: false }))
    }

    /// Begins a job, or goes on with one, until it pauses or ends.
    pub(super) fn run(&mut self, job: Resume) -> Paused {
        self.busy = true;
        match self.coroutine.resume(job) {
            CoroutineResult::Yield(Paused::Midway) => Paused::Midway,
            CoroutineResult::Yield(ended) => {
                self.busy = false;
                ended
            }
            CoroutineResult::Return(()) => Paused::Ended(None),
        }
    }

    /// Keeps the fiber for the next exploration.
    pub(super) fn give_back(self: Box<Self>) {
        if self.busy {
            return;
        }
        let mut pool = POOL.lock();
        if pool.len() < POOLED {
            pool.push(Idle(self));
        }
    }
}

/// Runs a job on the calling fiber. What it panicked with, if it did.
///
/// Not inlined: between two jobs the fiber may come to another OS thread, and the address of a thread-local must not be
/// carried over from one to the other.
#[inline(never)]
fn run_here(yielder: &Yielder<Resume, Paused>, run: Job) -> Option<Payload> {
    RUNNING.set(yielder);
    catch_unwind(AssertUnwindSafe(run)).err()
}

impl Drop for Fiber {
    fn drop(&mut self) {
        if !self.busy && self.coroutine.started() && !self.coroutine.done() {
            // Told that there is no other job it returns, which is cheaper than to be unwound.
            let _returned = self.coroutine.resume(None);
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
