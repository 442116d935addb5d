// SPDX-License-Identifier: MIT OR Apache-2.0
//! Source-DPOR: which other choices an execution asks for.
//!
//! Two steps *race* if they do not commute, are of different threads, and nothing orders them but themselves. To see
//! the other order, something must be tried instead of the first: a thread that can begin the sequence of all steps
//! that do not come after the first, up to and with the second. If none of those threads is tried at that node, one is
//! added (Abdulla, Aronis, Jonsson, Sagonas, POPL 2014).
//!
//! An execution begins as the one before it did, up to the node where another thread was chosen. What was found out about
//! that beginning is kept, and what came after is taken back.
//!
//! Two details are easily got wrong. Any of those *initials* will do, and the first step of the racing thread need not
//! be one: something before it in the sequence may come before it for good. And a step can race by what it does after
//! its operation (a [`Ghost`](super::Ghost)): its accesses are looked at one by one, each with the orders that those
//! before it have made.

use super::access::{Access, Mode};
use super::exec::{Exec, Phase, Set, Status, Tid};
use super::path::Node;
use crate::world::OpKind;

/// For each thread one more than the index of its last step that comes before something.
type Clock = [u32];

fn join(into: &mut Clock, from: &Clock) {
    into.iter_mut().zip(from).for_each(|(a, b)| *a = (*a).max(*b));
}

/// As many clocks as are asked for, side by side: an analysis runs after each execution, and allocates nothing.
#[derive(Default)]
struct Clocks {
    threads: usize,
    ticks: Vec<u32>,
}

impl Clocks {
    fn reset(&mut self, threads: usize) {
        self.threads = threads;
        self.ticks.clear();
    }

    /// There are at least so many; new ones are zero.
    fn grow(&mut self, clocks: usize) {
        let ticks = self.threads * clocks;
        if self.ticks.len() < ticks {
            self.ticks.resize(ticks, 0);
        }
    }

    fn of(&self, index: usize) -> &Clock {
        &self.ticks[index * self.threads..][..self.threads]
    }

    fn of_mut(&mut self, index: usize) -> &mut Clock {
        &mut self.ticks[index * self.threads..][..self.threads]
    }

    fn len(&self) -> usize {
        self.ticks.len() / self.threads
    }

    fn push(&mut self, clock: &Clock) {
        self.ticks.extend_from_slice(clock);
    }

    fn pop(&mut self) {
        self.ticks.truncate(self.ticks.len() - self.threads);
    }
}

/// Which of the clocks.
#[derive(Clone, Copy)]
enum Of {
    Thread,
    Released,
    ReleasedShared,
    Wake,
}

/// What a step changed.
#[derive(Clone, Copy)]
enum Change {
    /// A clock; what it was is on the stack of the old.
    Clock(Of, usize),
    /// An access was added to those of this object.
    Access(usize),
}

/// An access that may race with one to come.
#[derive(Clone, Copy)]
struct Past {
    step: u32,
    tid: Tid,
    access: Access,
}

/// What is known of an execution, from its beginning up to some step.
#[derive(Default)]
pub(super) struct Analysis {
    threads: usize,
    /// Of each thread now.
    clocks: Clocks,
    /// After each step.
    after: Clocks,
    /// By object.
    past: Vec<Vec<Past>>,
    released: Clocks,
    released_shared: Clocks,
    /// What will wake each thread.
    wakes: Clocks,
    /// Of the thread whose access is looked at.
    now: Vec<u32>,
    /// What each step changed, to take it back.
    changes: Vec<Change>,
    old: Vec<u32>,
    /// How many `changes` there were before each step.
    marks: Vec<usize>,
    /// The first step that was judged by what comes after it.
    looked_ahead: Option<usize>,
    /// Steps that race with the one that is looked at.
    races: Vec<u32>,
    earlier: Vec<usize>,
}

impl Analysis {
    /// Adds to the nodes what the races of the execution ask for. `kept`: how many of its first steps are those of the
    /// execution before.
    pub(super) fn reverse_races(&mut self, exec: &Exec, nodes: &mut [Node], kept: usize) {
        let (threads, objects) = (exec.threads.len(), exec.objects().len());
        self.take_back(kept.min(self.looked_ahead.unwrap_or(kept)), threads);
        self.clocks.grow(threads);
        self.wakes.grow(threads);
        self.released.grow(objects);
        self.released_shared.grow(objects);
        self.past.resize_with(self.past.len().max(objects), Vec::new);
        for index in self.marks.len()..nodes.len().min(exec.steps.len()) {
            self.step(exec, index, nodes);
        }
        for tid in 0..threads {
            if let Some(access) = next_take(exec, tid, self.after.len()) {
                self.waiting(exec, tid, access, nodes);
            }
        }
    }

    /// Forgets all but the first `kept` steps.
    fn take_back(&mut self, kept: usize, threads: usize) {
        if self.looked_ahead.is_some_and(|step| step >= kept) {
            self.looked_ahead = None;
        }
        if threads != self.threads {
            self.threads = threads;
            for clocks in [&mut self.clocks, &mut self.after, &mut self.wakes] {
                clocks.reset(threads);
            }
            self.released.reset(threads);
            self.released_shared.reset(threads);
            self.past.iter_mut().for_each(Vec::clear);
            self.changes.clear();
            self.old.clear();
            self.marks.clear();
            self.looked_ahead = None;
            return;
        }
        let mut old = std::mem::take(&mut self.old);
        while self.marks.len() > kept {
            let mark = self.marks.pop().unwrap_or(0);
            self.after.pop();
            while self.changes.len() > mark {
                match self.changes.pop() {
                    Some(Change::Clock(of, index)) => {
                        let from = old.len() - threads;
                        self.clocks_of(of).of_mut(index).copy_from_slice(&old[from..]);
                        old.truncate(from);
                    }
                    Some(Change::Access(object)) => drop(self.past[object].pop()),
                    None => {}
                }
            }
        }
        self.old = old;
    }

    fn clocks_of(&mut self, of: Of) -> &mut Clocks {
        match of {
            Of::Thread => &mut self.clocks,
            Of::Released => &mut self.released,
            Of::ReleasedShared => &mut self.released_shared,
            Of::Wake => &mut self.wakes,
        }
    }

    /// A clock that is about to change.
    fn changing(&mut self, of: Of, index: usize) -> &mut Clock {
        self.changes.push(Change::Clock(of, index));
        let mut old = std::mem::take(&mut self.old);
        old.extend_from_slice(self.clocks_of(of).of(index));
        self.old = old;
        self.clocks_of(of).of_mut(index)
    }

    fn step(&mut self, exec: &Exec, index: usize, nodes: &mut [Node]) {
        let tid = exec.steps[index].tid;
        self.marks.push(self.changes.len());
        if exec.footprint(index).iter().any(|access| access.mode == Mode::Barrier) {
            // What waits for a lock now comes after this step, but could have had the lock before.
            self.looked_ahead.get_or_insert(index);
            for other in (0..self.threads).filter(|&other| other != tid) {
                if let Some(access) = next_take(exec, other, index) {
                    self.waiting(exec, other, access, nodes);
                }
            }
        }
        self.changing(Of::Thread, tid)[tid] = index as u32 + 1;
        self.races.clear();
        for &access in exec.footprint(index) {
            self.race(tid, access);
            self.order(tid, index, access);
        }
        self.after.push(self.clocks.of(tid));
        self.reverse_all(exec, index, tid, nodes);
    }

    /// `tid` waits for a lock, perhaps for ever: it races with who has it.
    fn waiting(&mut self, exec: &Exec, tid: Tid, access: Access, nodes: &mut [Node]) {
        self.races.clear();
        self.race(tid, access);
        let index = self.after.len();
        self.after.push(self.clocks.of(tid));
        self.reverse_all(exec, index, tid, nodes);
        self.after.pop();
    }

    /// Notes the steps that race with `access`, which `tid` is about to make.
    fn race(&mut self, tid: Tid, access: Access) {
        if !access.can_race() {
            return;
        }
        let now = self.clocks.of(tid);
        let first = self.races.len();
        for past in self.past[access.object as usize].iter().rev() {
            let ordered = past.tid == tid || now[past.tid] > past.step;
            if ordered || !past.access.races_with_later(access) {
                continue;
            }
            let known = &self.races;
            let between = known[first..].iter().any(|&r| self.after.of(r as usize)[past.tid] > past.step);
            if !between && !known.contains(&past.step) {
                self.races.push(past.step);
            }
        }
    }

    /// Notes what `access`, of step `index` of `tid`, comes after, and what comes after it.
    fn order(&mut self, tid: Tid, index: usize, access: Access) {
        let other = access.object as usize;
        let mut now = std::mem::take(&mut self.now);
        now.clear();
        now.extend_from_slice(self.clocks.of(tid));
        match access.mode {
            Mode::Release => join(self.changing(Of::Released, other), &now),
            Mode::ReleaseShared => join(self.changing(Of::ReleasedShared, other), &now),
            Mode::Acquire => {
                join(&mut now, self.released.of(other));
                join(&mut now, self.released_shared.of(other));
            }
            Mode::AcquireShared => join(&mut now, self.released.of(other)),
            Mode::Start => join(self.changing(Of::Thread, other), &now),
            Mode::Join => join(&mut now, self.clocks.of(other)),
            Mode::Wake => self.changing(Of::Wake, other).copy_from_slice(&now),
            Mode::Woken => join(&mut now, self.wakes.of(tid)),
            Mode::Barrier => {
                let others = (0..self.threads).filter(|&other| other != tid);
                others.clone().for_each(|other| join(&mut now, self.clocks.of(other)));
                others.for_each(|other| join(self.changing(Of::Thread, other), &now));
            }
            _ => {
                for past in &self.past[other] {
                    if past.tid != tid && past.access.races_with_later(access) {
                        // Of this very step there is no clock yet; a step does not race with itself.
                        join(&mut now, self.after.of(past.step as usize));
                    }
                }
                self.past[other].push(Past { step: index as u32, tid, access });
                self.changes.push(Change::Access(other));
            }
        }
        self.clocks.of_mut(tid).copy_from_slice(&now);
        self.now = now;
    }

    fn reverse_all(&mut self, exec: &Exec, second: usize, tid: Tid, nodes: &mut [Node]) {
        for race in 0..self.races.len() {
            self.reverse(exec, self.races[race] as usize, second, tid, nodes);
        }
    }

    /// Sees to it that the other order of the race between steps `first` and `second`, of `tid`, is tried.
    fn reverse(&mut self, exec: &Exec, first: usize, second: usize, tid: Tid, nodes: &mut [Node]) {
        let steps = &exec.steps;
        let racer = steps[first].tid;
        let node = &mut nodes[first];
        let mut begun: Set = 0;
        let mut initials: Set = 0;
        // Steps after the first that do not come after it, by thread: the earliest of each.
        let earlier = &mut self.earlier;
        earlier.clear();
        let after = &self.after;
        let independent = (first + 1..second).filter(|&k| after.of(k)[racer] <= first as u32);
        for (k, thread) in independent.map(|k| (k, steps[k].tid)).chain([(second, tid)]) {
            if begun & (1 << thread) == 0 {
                begun |= 1 << thread;
                let preceded = earlier.iter().any(|&m| after.of(k)[steps[m].tid] > m as u32);
                if !preceded {
                    initials |= 1 << thread;
                }
            }
            earlier.push(k);
            if begun.count_ones() as usize == self.threads {
                break;
            }
        }
        if initials & (node.backtrack | node.asleep) != 0 {
            return;
        }
        node.backtrack |= match initials & node.enabled {
            0 => node.enabled,
            possible if possible & (1 << tid) != 0 => 1 << tid,
            possible => possible & possible.wrapping_neg(),
        };
    }
}

/// The lock that `tid` waits for, or is about to take, after step `index`.
fn next_take(exec: &Exec, tid: Tid, index: usize) -> Option<Access> {
    if let Some(next) = (index + 1..exec.steps.len()).find(|&k| exec.steps[k].tid == tid) {
        let first = exec.footprint(next).first().copied();
        return first.filter(|access| matches!(access.mode, Mode::Take | Mode::TakeShared));
    }
    let thread = &exec.threads[tid];
    if thread.status != Status::Pending || thread.phase != Phase::First {
        return None;
    }
    let mode = match thread.op.kind {
        OpKind::Lock => Mode::Take,
        OpKind::LockShared => Mode::TakeShared,
        _ => return None,
    };
    thread.op.object.map(|object| Access { object, mode })
}
