// SPDX-License-Identifier: MIT OR Apache-2.0
//! The world of an exploration: runs one execution at a time, on fibers of the calling OS thread.
//!
//! A thread decides on its own stack who goes on, and switches only if that is another. An execution that need not be
//! looked at further is let run out; only one that failed is unwound, and while that lasts the facade does not ask.
//!
//! Invariants: `inner` is not borrowed while a fiber runs code of the scenario; `fibers[tid]` is empty while it runs.

use std::cell::{Cell, RefCell};
use std::panic::resume_unwind;
use std::time::Duration;

use super::config::Config;
use super::contend::Learnt;
use super::exec::{Exec, Set, Status, Tid};
use super::fiber::{self, Fiber, Job, Paused};
use super::hooks;
use super::mutate::{Mutant, Mutation, SiteKind};
use super::ops::Applied;
use super::report::FailureKind;
use super::search::{Choice, Pick, Search};
use crate::birth::{Born, ObjectKind};
use crate::class::{LockClass, Node};
use crate::lockdep::{Cycles, Report, ReportKind, Site};
use crate::per_thread::{self, Slots};
use crate::task::{self, Held, Task};
use crate::world::{self, Id, Op, OpKind, World};

/// What the stack of an execution that failed is unwound with.
struct Abandoned;

pub(super) struct Inner {
    pub(super) exec: Exec,
    pub(super) search: Search,
    pub(super) max_steps: usize,
    pub(super) lockdep: bool,
    /// So are contradicting orders of lock classes, if what lockdep reports is.
    pub(super) orders: bool,
    pub(super) learnt: Learnt,
    /// Something was added to `learnt`: earlier executions had too few steps.
    pub(super) stale: bool,
    /// What nobody contends for is no point.
    pub(super) skips: bool,
    /// The rest of the execution is not looked at.
    pub(super) draining: bool,
    cycles: Cycles,
}

/// A virtual thread's stack, and its part of the thread-locals while it does not run.
struct Slot {
    /// In a box, because it is taken out while it runs: a move of more than a word costs more than the switch.
    fiber: Option<Box<Fiber>>,
    job: Option<Job>,
    task: Task,
    storage: Slots,
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(fiber) = self.fiber.take() {
            fiber.give_back();
        }
    }
}

pub(crate) struct Engine {
    pub(super) inner: RefCell<Inner>,
    slots: RefCell<Vec<Slot>>,
    aborting: Cell<bool>,
    /// Threads that have been unwound; in the [`Exec`] they stay as they were when the execution failed.
    unwound: Cell<Set>,
    /// Who goes on when a fiber pauses; `None`: the execution is over.
    next: Cell<Option<Tid>>,
    /// Whose task state is in the thread-local; `None`: that of the OS thread.
    loaded: Cell<Option<Tid>>,
    /// The task state of the OS thread, during an execution.
    own: Task,
    stack: usize,
    pub(super) mutation: Mutation,
}

impl Engine {
    pub(super) fn new(search: Search, config: &Config, learnt: Learnt) -> Engine {
        let inner = Inner {
            exec: Exec::new(search.hashes(), search.reduces()),
            skips: !config.all_points && search.skips(),
            search,
            max_steps: config.max_steps,
            lockdep: config.lockdep,
            orders: true,
            learnt,
            stale: false,
            draining: false,
            cycles: Cycles::default(),
        };
        Engine {
            inner: RefCell::new(inner),
            slots: RefCell::default(),
            aborting: Cell::new(false),
            unwound: Cell::new(0),
            next: Cell::new(None),
            loaded: Cell::new(None),
            own: Task::new(),
            stack: config.stack.max(256 << 10),
            mutation: Mutation::new(config.without, config.find_sites),
        }
    }

    /// Runs one execution of `main`, to the end or to its failure, which is then in the [`Exec`].
    pub(super) fn execute(&self, main: Job, op: Op) {
        {
            let mut inner = self.inner.borrow_mut();
            inner.draining = false;
            inner.exec.reset(op);
        }
        self.mutation.reset();
        self.aborting.set(false);
        self.unwound.set(0);
        task::save(&self.own);
        let _own = Own(self);
        self.give(0, main);
        self.next.set(Some(0));
        while let Some(tid) = self.next.get() {
            self.resume(tid);
        }
        if self.inner.borrow().exec.fault.is_some() {
            self.tear_down();
        }
    }

    /// Gives the stacks back between two executions, so that another engine can use them.
    pub(super) fn rest(&self) {
        self.slots.borrow_mut().clear();
    }

    fn give(&self, tid: Tid, job: Job) {
        let mut slots = self.slots.borrow_mut();
        while slots.len() <= tid {
            let fiber = match Fiber::new(self.stack) {
                Ok(fiber) => Some(fiber),
                Err(e) => panic!("no memory for the stack of a virtual thread ({} bytes): {e}", self.stack),
            };
            slots.push(Slot { fiber, job: None, task: Task::new(), storage: Slots::default() });
        }
        slots[tid].job = Some(job);
        slots[tid].task.clear();
    }

    /// Lets `tid` run until it pauses or ends.
    fn resume(&self, tid: Tid) -> Paused {
        let (fiber, job) = {
            let slots = &mut *self.slots.borrow_mut();
            let loaded = self.loaded.replace(Some(tid));
            if loaded != Some(tid) {
                if let Some(loaded) = loaded {
                    task::save(&slots[loaded].task);
                }
                task::load(&slots[tid].task);
            }
            per_thread::swap(&slots[tid].storage);
            (slots[tid].fiber.take(), slots[tid].job.take())
        };
        let Some(mut fiber) = fiber else { unreachable!("virtual thread {tid} runs already") };
        let paused = fiber.run(job);
        {
            let slots = &mut *self.slots.borrow_mut();
            slots[tid].fiber = Some(fiber);
            per_thread::swap(&slots[tid].storage);
        }
        if let Paused::Ended(payload) = paused {
            let payload = payload.filter(|payload| !payload.is::<Abandoned>());
            if let Some(payload) = &payload {
                self.panicked(&**payload);
            }
            self.ended(tid);
            return Paused::Ended(payload);
        }
        paused
    }

    fn ended(&self, tid: Tid) {
        let storage = std::mem::take(&mut self.slots.borrow_mut()[tid].storage);
        let inner = &mut *self.inner.borrow_mut();
        inner.exec.current = tid;
        if self.aborting.get() {
            self.unwound.set(self.unwound.get() | 1 << tid);
            self.next.set(None);
            return drop(storage);
        }
        inner.exec.finish();
        if let Some(starter) = inner.exec.started() {
            self.next.set(Some(starter));
        } else {
            self.next.set(inner.decide());
        }
        drop(storage);
    }

    /// Unwinds the threads that are left, the youngest first: its elders may wait for it.
    fn tear_down(&self) {
        self.aborting.set(true);
        loop {
            let left: Vec<Tid> = {
                let exec = &self.inner.borrow().exec;
                (0..exec.threads.len())
                    .rev()
                    .filter(|&tid| exec.threads[tid].status != Status::Finished)
                    .filter(|&tid| self.unwound.get() & (1 << tid) == 0)
                    .collect()
            };
            if left.is_empty() {
                break;
            }
            let mut progress = false;
            for tid in left {
                self.inner.borrow_mut().exec.current = tid;
                progress |= matches!(self.resume(tid), Paused::Ended(_));
            }
            if !progress {
                // Their stacks lend each other what they hold, so that none can be left behind.
                tracing::error!(
                    "virtual threads of a failed execution wait for each other while they unwind"
                );
                std::process::abort();
            }
        }
    }

    /// Stops the running thread until it is resumed.
    fn pause(&self) {
        fiber::pause();
        if self.aborting.get() {
            resume_unwind(Box::new(Abandoned));
        }
    }

    /// Somebody who is still to be unwound has what the running thread wants.
    fn wait_while_unwinding(&self, op: &Op) {
        match op.kind {
            OpKind::Join(other) => {
                let left = || {
                    let threads = &self.inner.borrow().exec.threads;
                    let finished = threads.get(other as usize).is_none_or(|t| t.status == Status::Finished);
                    !finished && self.unwound.get() & (1 << other) == 0
                };
                while left() {
                    fiber::pause();
                }
            }
            // Whoever asks tries again.
            OpKind::Lock | OpKind::LockShared | OpKind::Down => fiber::pause(),
            _ => {}
        }
    }

    fn panicked(&self, payload: &(dyn std::any::Any + Send)) {
        let message = hooks::message(payload);
        let inner = &mut *self.inner.borrow_mut();
        let name = &inner.exec.threads[inner.exec.current].name;
        let message = format!("thread `{name}` panicked {message}");
        inner.exec.fail(FailureKind::Panic, message);
    }

    /// Whether the calling thread is in the middle of a panic: then the execution has failed already.
    fn panicking(&self) -> bool {
        if !std::thread::panicking() {
            return false;
        }
        let inner = &mut *self.inner.borrow_mut();
        let name = &inner.exec.threads[inner.exec.current].name;
        let message = format!("thread `{name}` panicked {}", hooks::last());
        inner.exec.fail(FailureKind::Panic, message);
        self.aborting.set(true);
        self.next.set(None);
        true
    }
}

impl Engine {
    /// What names an object beyond this execution.
    pub(crate) fn key_of(&self, object: Option<Id>) -> u64 {
        let inner = self.inner.borrow();
        object.and_then(|id| inner.exec.objects().get(id as usize)).map_or(0, |object| object.key)
    }

    pub(super) fn violation(&self, message: String) {
        if !self.aborting.get() {
            self.inner.borrow_mut().exec.fail(FailureKind::Violation, message);
        }
    }

    pub(super) fn recording(&self) -> bool {
        !self.aborting.get() && self.inner.borrow().exec.events.is_some()
    }

    pub(super) fn note(&self, text: String, site: Site) {
        self.inner.borrow_mut().exec.note(text, site);
    }

    pub(super) fn forget(&self) {
        if !self.aborting.get() {
            self.inner.borrow_mut().exec.forget();
        }
    }
}

impl Inner {
    /// Chooses who goes on, and makes the step. `None`: the execution is over.
    fn decide(&mut self) -> Option<Tid> {
        loop {
            if self.exec.fault.is_some() {
                return None;
            }
            let enabled = self.exec.enabled();
            if enabled.set == 0 {
                if !self.exec.finished() {
                    let message = self.exec.deadlock();
                    self.exec.fail(FailureKind::Deadlock, message);
                }
                return None;
            }
            if self.exec.made >= self.max_steps {
                let message = self.exec.livelock();
                self.exec.fail(FailureKind::Livelock, message);
                return None;
            }
            let choice = Choice { exec: &self.exec, enabled: enabled.set, timers: enabled.timers };
            let current = choice.current().is_some();
            let pick = if self.draining { Pick::Thread(choice.default()) } else { self.search.pick(&choice) };
            let tid = match pick {
                Pick::Thread(tid) => tid,
                Pick::Prune => {
                    self.draining = true;
                    continue;
                }
                Pick::Different(what) => {
                    let message = format!("under the same schedule, {what} than before");
                    self.exec.fail(FailureKind::Nondeterminism, message);
                    return None;
                }
            };
            if self.exec.step(tid, current) == Applied::Runs {
                return Some(tid);
            }
        }
    }

    /// Whether the last execution counts for nothing, since it had not all the steps that its schedule will have from
    /// now on. Then the search starts over, and lock orders are learnt anew: what they told was told to nobody.
    pub(super) fn starts_over(&mut self) -> bool {
        let stale = std::mem::take(&mut self.stale);
        if stale {
            self.search.restart();
            self.forget_orders();
        }
        stale
    }

    /// Orders of lock classes are learnt anew.
    pub(super) fn forget_orders(&mut self) {
        self.cycles = Cycles::default();
    }

    /// Unlocks of objects of this class are steps, from the next execution on.
    fn watch(&mut self, op: &Op) {
        if let Some(object) = self.exec.object_of(op)
            && !object.watched
            && let Some(class) = object.class
            && !self.watches(class)
        {
            self.learnt.watched.push(class.name().to_owned());
            self.stale = true;
        }
    }

    fn watches(&self, class: &LockClass) -> bool {
        self.learnt.watched.iter().any(|name| name == class.name())
    }

    fn birth(&mut self, born: &Born) -> Id {
        let watched = born.kind == ObjectKind::Once || born.class.is_some_and(|class| self.watches(class));
        self.exec.birth(born, watched, &self.learnt.contended)
    }
}

impl World for Engine {
    fn birth(&self, born: &Born) -> Id {
        self.inner.borrow_mut().birth(born)
    }

    fn point(&self, op: &Op) -> bool {
        if self.aborting.get() || self.panicking() {
            self.wait_while_unwinding(op);
            return true;
        }
        let me = {
            let inner = &mut *self.inner.borrow_mut();
            if matches!(op.kind, OpKind::TryLock | OpKind::TryLockShared | OpKind::TryDown) {
                inner.watch(op);
            }
            inner.contend(op);
            if self.mutation.off.is_some()
                && let Some(race) = self.mutation.race(&inner.exec, op)
            {
                inner.exec.fail(FailureKind::Race, race);
            }
            let me = inner.exec.current;
            if inner.exec.at_once(op) {
                inner.exec.apply(me, op, false);
                return inner.exec.threads[me].answer;
            }
            if inner.skips && inner.exec.made < inner.max_steps && inner.exec.goes_with_the_step(op) {
                inner.exec.go_with_the_step(op);
                return inner.exec.threads[me].answer;
            }
            inner.exec.announce(op);
            let next = match inner.exec.started() {
                Some(starter) => Some(starter),
                None => inner.decide(),
            };
            self.next.set(next);
            if next == Some(me) {
                return inner.exec.threads[me].answer;
            }
            me
        };
        self.pause();
        self.inner.borrow().exec.threads[me].answer
    }

    fn hashes(&self) -> bool {
        self.inner.borrow().exec.remembers()
    }

    fn done(&self, op: &Op, value: u64) {
        self.inner.borrow_mut().exec.done(op, value);
    }

    fn spawn(&self, op: &Op, name: &str, body: Box<dyn FnOnce() + Send>) -> Id {
        if self.aborting.get() || self.panicking() {
            return Id::MAX;
        }
        let tid = {
            let inner = &mut *self.inner.borrow_mut();
            assert!(
                inner.exec.threads.len() < super::exec::MAX_THREADS,
                "more than {} virtual threads in one execution",
                super::exec::MAX_THREADS
            );
            inner.exec.spawn(op, name)
        };
        self.give(tid, body);
        self.next.set(Some(tid));
        self.pause();
        tid as Id
    }

    fn off(&self, op: &Op) -> bool {
        self.mutation.asked(Mutant { kind: SiteKind::Lock, site: op.site })
    }

    fn enter_without(&self, op: &Op) -> bool {
        Engine::enter_without(self, op)
    }

    fn leave_without(&self, op: &Op) -> bool {
        self.mutation.off.is_some() && Engine::leave_without(self, op)
    }

    fn thread_name(&self, thread: Id) -> String {
        let threads = &self.inner.borrow().exec.threads;
        threads.get(thread as usize).map_or_else(String::new, |thread| thread.name.clone())
    }

    fn noted(&self, op: &Op) {
        self.inner.borrow_mut().exec.record(op, true);
    }

    fn now(&self) -> Duration {
        self.inner.borrow().exec.clock
    }

    fn aborting(&self) -> bool {
        self.aborting.get()
    }

    fn reported(&self, report: &Report) {
        let kind = match report.kind {
            ReportKind::SleepInAtomic => FailureKind::SleepInAtomic,
            ReportKind::Inversion | ReportKind::Recursion => FailureKind::LockOrder,
            ReportKind::Exhausted => return,
        };
        let inner = &mut *self.inner.borrow_mut();
        if inner.lockdep && (inner.orders || kind != FailureKind::LockOrder) {
            inner.exec.fail(kind, report.to_string());
        }
    }

    fn ordered(&self, outer: Held, inner: Node, same_lock: bool, site: Site) {
        let report = self.inner.borrow_mut().cycles.add(outer, inner, same_lock, site);
        if let Some(report) = report {
            self.reported(&report);
        }
    }

    fn panicked(&self, payload: &(dyn std::any::Any + Send)) {
        Engine::panicked(self, payload);
    }

    fn engine(&self) -> Option<&Engine> {
        Some(self)
    }
}

/// Makes the running thread the OS thread again when dropped.
struct Own<'a>(&'a Engine);

impl Drop for Own<'_> {
    fn drop(&mut self) {
        self.0.loaded.set(None);
        task::load(&self.0.own);
    }
}

/// In the world of an engine while this lives.
pub(super) struct Inside {
    before: Option<&'static dyn World>,
}

impl Inside {
    /// # Safety
    /// The engine outlives the guard, and all its executions end before the guard is dropped.
    pub(super) unsafe fn new(engine: &Engine) -> Inside {
        // SAFETY: the reference is reachable through the thread's world, which the guard takes back, and from the
        // stacks of virtual threads, which are empty at the end of each execution.
        let engine: &'static Engine = unsafe { &*std::ptr::from_ref(engine) };
        Inside { before: world::install(Some(engine)) }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        world::install(self.before);
    }
}
