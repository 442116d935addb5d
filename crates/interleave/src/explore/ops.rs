// SPDX-License-Identifier: MIT OR Apache-2.0
//! What each operation waits for, and what it does to the objects.
//!
//! * A lock is the real lock's model: a writer first shuts out new readers, then waits for the old ones to leave, so
//!   that a reader queues behind a waiting writer, and a thread that reads twice can deadlock.
//! * A semaphore hands a permit to whoever has waited longest.
//! * Letting go is no scheduling point by itself: whatever others do between a thread's last step and its unlock they
//!   can as well do after it. A try-lock sees the difference, so that objects that are ever tried are `watched`.
//! * Time stands still while anybody can go on; then the earliest sleeper wakes.

use super::access::Mode;
use super::exec::{Exec, Holder, Phase, Set, Status, Step, Thread, Tid, members};
use super::hash::mix;
use crate::birth::ObjectKind;
use crate::world::{Op, OpKind};

/// Whether the thread goes on after its step, or waits for the second half of the operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Applied {
    Runs,
    Waits,
}

/// Who could make the next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Enabled {
    pub(super) set: Set,
    /// Nobody could without time going on.
    pub(super) timers: bool,
}

impl Exec {
    /// Whether `tid`, which is `thread`, could make a step, time and laziness aside.
    #[inline]
    fn ready(&self, tid: Tid, thread: &Thread) -> bool {
        if thread.status != Status::Pending {
            return false;
        }
        match (thread.op.kind, self.object_of(&thread.op)) {
            (OpKind::Lock, Some(o)) if thread.phase == Phase::Drain => o.readers.is_empty(),
            (OpKind::Lock | OpKind::LockShared, Some(o)) => o.writer.is_none(),
            (OpKind::Down, Some(o)) => thread.phase == Phase::First || o.woken & (1 << tid) != 0,
            (OpKind::Wait(_), Some(o)) => o.woken & (1 << tid) != 0,
            (OpKind::Join(other), _) => self.threads[other as usize].status == Status::Finished,
            (OpKind::Sleep(_), _) => false,
            _ => true,
        }
    }

    /// Who could make the next step: nobody, if all wait for each other.
    #[inline]
    pub(super) fn enabled(&self) -> Enabled {
        let (mut eager, mut lazy) = (0, 0);
        for (tid, thread) in self.threads.iter().enumerate() {
            if self.ready(tid, thread) {
                *(if thread.lazy { &mut lazy } else { &mut eager }) |= 1 << tid;
            }
        }
        if eager != 0 {
            return Enabled { set: eager, timers: false };
        }
        self.late(lazy)
    }

    /// Who could if nobody is eager to: those who stand back, if nobody's sleep can end.
    #[cold]
    fn late(&self, lazy: Set) -> Enabled {
        let sleepers = self.threads.iter().filter(|t| t.status == Status::Pending).filter_map(|t| t.until);
        let Some(first) = sleepers.min() else { return Enabled { set: lazy, timers: false } };
        let awake = self
            .threads
            .iter()
            .enumerate()
            .filter(|(_, t)| t.status == Status::Pending && t.until == Some(first));
        Enabled { set: awake.fold(0, |set, (tid, _)| set | 1 << tid), timers: true }
    }

    /// Whether an operation happens at once, as part of the step that is being made.
    #[inline]
    pub(super) fn at_once(&self, op: &Op) -> bool {
        match op.kind {
            OpKind::Unlock | OpKind::UnlockShared | OpKind::Downgrade | OpKind::Up => {
                !self.object_of(op).is_some_and(|object| object.watched)
            }
            OpKind::Join(other) => self.threads[other as usize].status == Status::Finished,
            OpKind::Fence
            | OpKind::Spawn
            | OpKind::Now
            | OpKind::PerThread
            | OpKind::Ghost
            | OpKind::GhostRead
            | OpKind::MapAcquire
            | OpKind::MapRelease => true,
            _ => false,
        }
    }

    /// The current thread says what it would do next.
    #[inline]
    pub(super) fn announce(&mut self, op: &Op) {
        let now = self.clock;
        let thread = &mut self.threads[self.current];
        thread.op = *op;
        thread.phase = Phase::First;
        thread.status = Status::Pending;
        thread.until = match op.kind {
            OpKind::Sleep(duration) | OpKind::Wait(Some(duration)) => Some(now.saturating_add(duration)),
            _ => None,
        };
    }

    /// Makes the step of `tid`, which is enabled, as far as the objects are concerned. `could_go_on`: whoever made
    /// the last step could have made this one.
    pub(super) fn step(&mut self, tid: Tid, could_go_on: bool) -> Applied {
        let op = self.threads[tid].op;
        let preempts = tid != self.last && could_go_on;
        self.steps.push(Step { tid, preempts, from: self.accesses.len() });
        (self.at_once, self.behind) = (0, None);
        for (other, thread) in self.threads.iter_mut().enumerate() {
            thread.lazy &= other == tid;
        }
        (self.last, self.current) = (tid, tid);
        self.remember(&op, preempts);
        let applied = self.apply(tid, &op, true);
        let thread = &mut self.threads[tid];
        thread.lazy = matches!(op.kind, OpKind::Yield | OpKind::SpinHint);
        if applied == Applied::Runs {
            thread.status = Status::Running;
            thread.until = None;
        }
        applied
    }

    /// Does `op` to the objects. `chosen`: it is a step of its own, and not part of one.
    #[inline]
    pub(super) fn apply(&mut self, tid: Tid, op: &Op, chosen: bool) -> Applied {
        let me = Holder { tid, site: op.site };
        let id = op.object.unwrap_or(u32::MAX);
        let mut answer = true;
        let mut applied = Applied::Runs;
        match op.kind {
            OpKind::Lock => applied = self.lock(me, id),
            OpKind::LockShared => {
                self.access(id, Mode::TakeShared);
                self.access(id, Mode::AcquireShared);
                self.object(id).readers.push(me);
            }
            OpKind::TryLock => {
                let object = self.object(id);
                let held = object.writer.is_some();
                answer = !held && object.readers.is_empty();
                if answer {
                    object.writer = Some(me);
                    self.access(id, Mode::TryTake);
                    self.access(id, Mode::Acquire);
                } else {
                    self.access(id, if held { Mode::LookHeld } else { Mode::Look });
                }
            }
            OpKind::TryLockShared => {
                let object = self.object(id);
                answer = object.writer.is_none();
                if answer {
                    object.readers.push(me);
                    self.access(id, Mode::TryTakeShared);
                    self.access(id, Mode::AcquireShared);
                } else {
                    self.access(id, Mode::LookHeld);
                }
            }
            OpKind::Unlock => {
                self.let_go(id, chosen.then_some(Mode::Give), Mode::Release);
                self.object(id).writer = None;
            }
            OpKind::UnlockShared => {
                self.let_go(id, chosen.then_some(Mode::GiveShared), Mode::ReleaseShared);
                let readers = &mut self.object(id).readers;
                if let Some(at) = readers.iter().rposition(|r| r.tid == tid) {
                    readers.remove(at);
                }
            }
            OpKind::Downgrade => {
                self.let_go(id, chosen.then_some(Mode::Give), Mode::Release);
                let object = self.object(id);
                object.writer = None;
                object.readers.push(me);
            }
            OpKind::Down => applied = self.down(tid, id),
            OpKind::TryDown => {
                let object = self.object(id);
                answer = object.permits > 0;
                object.permits -= usize::from(answer);
                self.access(id, if answer { Mode::TryTake } else { Mode::Look });
            }
            OpKind::Up => {
                self.let_go(id, chosen.then_some(Mode::Give), Mode::Release);
                let object = self.object(id);
                if object.waiting.is_empty() {
                    object.permits += 1;
                } else {
                    let next = object.waiting.remove(0);
                    object.woken |= 1 << next;
                    self.access(next as u32, Mode::Wake);
                }
            }
            OpKind::Load => self.access(id, Mode::Read),
            OpKind::Store | OpKind::Rmw => self.access(id, Mode::Write),
            OpKind::WaitPrepare
            | OpKind::WaitCancel
            | OpKind::Wait(_)
            | OpKind::WakeOne
            | OpKind::WakeAll => {
                answer = self.wait_queue(tid, id, op.kind);
            }
            OpKind::Join(other) => {
                self.access(other, Mode::Join);
                self.joined(other as Tid);
                let seen = self.threads[other as usize].seen;
                self.see(tid, seen);
            }
            OpKind::Sleep(_) => self.wake_by_time(tid),
            OpKind::Now => {
                let now = self.clock.as_nanos() as u64;
                self.see(tid, now);
            }
            OpKind::Ghost => self.access(id, Mode::Write),
            OpKind::GhostRead => self.access(id, Mode::Read),
            OpKind::Fence
            | OpKind::Spawn
            | OpKind::Yield
            | OpKind::SpinHint
            | OpKind::PerThread
            | OpKind::MapAcquire
            | OpKind::MapRelease => {}
        }
        self.threads[tid].answer = answer;
        if applied == Applied::Runs {
            self.observe(tid, op, answer);
        }
        if op.object.is_some() {
            self.touched(id);
        }
        self.record(op, answer && applied == Applied::Runs);
        applied
    }

    /// The current thread takes a lock that is free, without a step.
    pub(super) fn take_at_once(&mut self, op: &Op) {
        let shared = matches!(op.kind, OpKind::LockShared | OpKind::TryLockShared);
        let kind = if shared { OpKind::TryLockShared } else { OpKind::TryLock };
        self.apply(self.current, &Op { kind, ..*op }, false);
    }

    fn lock(&mut self, me: Holder, id: u32) -> Applied {
        let first = self.threads[me.tid].phase == Phase::First;
        let object = self.object(id);
        object.writer = Some(me);
        // Where readers are tried, shutting them out is a step by itself: it comes after no reader's leaving.
        let waits =
            !object.readers.is_empty() || object.watched && object.kind == ObjectKind::RwLock && first;
        if first {
            self.access(id, Mode::Take);
            self.access(id, Mode::AcquireShared);
        }
        if waits {
            self.threads[me.tid].phase = Phase::Drain;
            return Applied::Waits;
        }
        self.access(id, Mode::Acquire);
        Applied::Runs
    }

    /// `give`: how it is seen by those who try.
    fn let_go(&mut self, id: u32, give: Option<Mode>, order: Mode) {
        if let Some(give) = give {
            self.access(id, give);
        }
        if self.object(id).kind == ObjectKind::Once {
            // Whoever looks without locking sees what was made.
            self.access(id, Mode::Write);
        }
        self.access(id, order);
    }

    fn down(&mut self, tid: Tid, id: u32) -> Applied {
        if self.threads[tid].phase == Phase::Queued {
            self.object(id).woken &= !(1 << tid);
            self.access(tid as u32, Mode::Woken);
            return Applied::Runs;
        }
        self.access(id, Mode::Take);
        let object = self.object(id);
        if object.permits == 0 {
            object.waiting.push(tid);
            self.threads[tid].phase = Phase::Queued;
            return Applied::Waits;
        }
        // No order to the thread that gave the permit: before that, this step would have been possible too.
        object.permits -= 1;
        Applied::Runs
    }

    fn wait_queue(&mut self, tid: Tid, id: u32, kind: OpKind) -> bool {
        let bit = 1 << tid;
        match kind {
            OpKind::WaitPrepare => {
                self.access(id, Mode::Write);
                self.object(id).waiting.push(tid);
            }
            OpKind::Wait(_) | OpKind::WaitCancel => {
                if kind == OpKind::WaitCancel {
                    self.access(id, Mode::Write);
                }
                if self.object(id).woken & bit != 0 {
                    self.object(id).woken &= !bit;
                    self.access(tid as u32, Mode::Woken);
                    return true;
                }
                if kind != OpKind::WaitCancel {
                    self.wake_by_time(tid);
                }
                self.object(id).waiting.retain(|&t| t != tid);
                return false;
            }
            _ => {
                self.access(id, Mode::Write);
                let object = self.object(id);
                let most = if kind == OpKind::WakeOne { 1 } else { object.waiting.len() };
                let woken: Set =
                    object.waiting.drain(..most.min(object.waiting.len())).fold(0, |set, t| set | 1 << t);
                object.woken |= woken;
                for next in members(woken) {
                    self.access(next as u32, Mode::Wake);
                }
            }
        }
        true
    }

    /// Time has gone on until the sleep of `tid` ended.
    fn wake_by_time(&mut self, tid: Tid) {
        self.access(0, Mode::Barrier);
        if let Some(until) = self.threads[tid].until.take() {
            self.clock = self.clock.max(until);
        }
    }

    /// The thread learns what the operation tells it.
    #[inline]
    fn observe(&mut self, tid: Tid, op: &Op, answer: bool) {
        if !self.remembers() {
            return;
        }
        let told = match (op.kind, self.object_of(op)) {
            (OpKind::Lock | OpKind::LockShared, Some(o)) => o.value,
            (OpKind::TryLock | OpKind::TryLockShared, Some(o)) if answer => o.value,
            _ => u64::from(answer),
        };
        self.see(tid, mix(op.kind.number(), told));
    }

    /// Whether anybody asks for what threads have seen.
    #[inline]
    pub(super) fn remembers(&self) -> bool {
        self.hashing || self.remembering
    }

    /// The thread learns `what`.
    #[inline]
    pub(super) fn see(&mut self, tid: Tid, what: u64) {
        if !self.remembers() {
            return;
        }
        let thread = &mut self.threads[tid];
        thread.seen = mix(thread.seen, what);
        self.history = mix(self.history, mix(thread.key, what));
    }

    /// An operation of the current thread has happened; `value` is what the object now holds, or what was read.
    pub(super) fn done(&mut self, op: &Op, value: u64) {
        if !self.remembers() {
            return;
        }
        let (tid, Some(id)) = (self.current, op.object) else { return };
        let seen = self.threads[tid].seen;
        let object = self.object(id);
        let before = object.value;
        match op.kind {
            OpKind::Load => self.see(tid, value),
            OpKind::GhostRead => {
                let value = if object.hashed { value } else { before };
                self.see(tid, value);
            }
            OpKind::Store => object.value = value,
            OpKind::Rmw => {
                object.value = value;
                self.see(tid, mix(before, value));
            }
            OpKind::Unlock | OpKind::Downgrade if object.kind != ObjectKind::Semaphore => {
                object.value = if object.hashed { value } else { mix(before, seen) };
            }
            OpKind::Ghost => {
                object.value = if object.hashed { value } else { mix(before, seen) };
                self.see(tid, before);
            }
            _ => return,
        }
        self.touched(id);
    }

    /// The current thread promises that nothing that it saw until now matters to what it will do.
    pub(super) fn forget(&mut self) {
        let thread = &mut self.threads[self.current];
        thread.boundaries += 1;
        thread.seen = mix(thread.key, u64::from(thread.boundaries));
    }
}
