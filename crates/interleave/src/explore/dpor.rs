// SPDX-License-Identifier: MIT OR Apache-2.0
//! Source-DPOR: which other choices an execution asks for.
//!
//! Two steps *race* if they do not commute, are of different threads, and nothing orders them but themselves. To see
//! the other order, something must be tried instead of the first: a thread that can begin the sequence of all steps
//! that do not come after the first, up to and with the second. If none of those threads is tried at that node, one is
//! added (Abdulla, Aronis, Jonsson, Sagonas, POPL 2014).
//!
//! Two details are easily got wrong. Any of those *initials* will do, and the first step of the racing thread need not
//! be one: something before it in the sequence may come before it for good. And a step can race by what it does after
//! its operation (a [`Ghost`](super::Ghost)): its accesses are looked at one by one, each with the orders that those
//! before it have made.

use super::access::{Access, Mode};
use super::exec::{Exec, Phase, Set, Status, Tid};
use super::path::Node;
use crate::world::OpKind;

/// One more than the index of the last step of each thread that comes before something.
type Clock = Vec<u32>;

fn join(into: &mut [u32], from: &[u32]) {
    into.iter_mut().zip(from).for_each(|(a, b)| *a = (*a).max(*b));
}

/// An access that may race with one to come.
#[derive(Clone, Copy)]
struct Past {
    step: u32,
    tid: Tid,
    access: Access,
}

#[derive(Default)]
struct History {
    past: Vec<Past>,
    released: Clock,
    released_shared: Clock,
}

struct Analysis<'a> {
    exec: &'a Exec,
    threads: usize,
    /// Of each thread now.
    clocks: Vec<Clock>,
    /// After each step.
    after: Vec<Clock>,
    objects: Vec<History>,
    /// What will wake each thread.
    wakes: Vec<Clock>,
}

/// Adds to the nodes what the races of the execution ask for.
pub(super) fn reverse_races(exec: &Exec, nodes: &mut [Node]) {
    let threads = exec.threads.len();
    let clock = || vec![0; threads];
    let history =
        || History { past: Vec::new(), released: vec![0; threads], released_shared: vec![0; threads] };
    let mut analysis = Analysis {
        exec,
        threads,
        clocks: (0..threads).map(|_| clock()).collect(),
        after: Vec::with_capacity(nodes.len()),
        objects: exec.objects().iter().map(|_| history()).collect(),
        wakes: (0..threads).map(|_| clock()).collect(),
    };
    for index in 0..nodes.len().min(exec.steps.len()) {
        analysis.step(index, nodes);
    }
    for tid in 0..threads {
        if let Some(access) = analysis.next_take(tid, analysis.after.len()) {
            analysis.waiting(tid, access, nodes);
        }
    }
}

impl Analysis<'_> {
    fn step(&mut self, index: usize, nodes: &mut [Node]) {
        let exec = self.exec;
        let tid = exec.steps[index].tid;
        if exec.footprint(index).iter().any(|access| access.mode == Mode::Barrier) {
            // What waits for a lock now comes after this step, but could have had the lock before.
            for other in (0..self.threads).filter(|&other| other != tid) {
                if let Some(access) = self.next_take(other, index) {
                    self.waiting(other, access, nodes);
                }
            }
        }
        self.clocks[tid][tid] = index as u32 + 1;
        let mut races: Vec<u32> = Vec::new();
        for &access in exec.footprint(index) {
            self.races(tid, access, &mut races);
            self.order(tid, index, access);
        }
        self.after.push(self.clocks[tid].clone());
        for race in races {
            self.reverse(race as usize, index, tid, nodes);
        }
    }

    /// The lock that `tid` waits for, or is about to take, after step `index`.
    fn next_take(&self, tid: Tid, index: usize) -> Option<Access> {
        let exec = self.exec;
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

    /// `tid` waits for a lock, perhaps for ever: it races with who has it.
    fn waiting(&mut self, tid: Tid, access: Access, nodes: &mut [Node]) {
        let mut races = Vec::new();
        self.races(tid, access, &mut races);
        let index = self.after.len();
        self.after.push(self.clocks[tid].clone());
        for race in races {
            self.reverse(race as usize, index, tid, nodes);
        }
        self.after.pop();
    }

    /// The steps that race with `access`, which `tid` is about to make.
    fn races(&self, tid: Tid, access: Access, races: &mut Vec<u32>) {
        if !access.can_race() {
            return;
        }
        let now = &self.clocks[tid];
        let first = races.len();
        for past in self.objects[access.object as usize].past.iter().rev() {
            let ordered = past.tid == tid || now[past.tid] > past.step;
            if ordered || !past.access.races_with_later(access) {
                continue;
            }
            let between = races[first..].iter().any(|&r| self.after[r as usize][past.tid] > past.step);
            if !between && !races.contains(&past.step) {
                races.push(past.step);
            }
        }
    }

    /// Notes what `access`, of step `index` of `tid`, comes after, and what comes after it.
    fn order(&mut self, tid: Tid, index: usize, access: Access) {
        let other = access.object as usize;
        let mut now = std::mem::take(&mut self.clocks[tid]);
        match access.mode {
            Mode::Release => join(&mut self.objects[other].released, &now),
            Mode::ReleaseShared => join(&mut self.objects[other].released_shared, &now),
            Mode::Acquire => {
                join(&mut now, &self.objects[other].released);
                join(&mut now, &self.objects[other].released_shared);
            }
            Mode::AcquireShared => join(&mut now, &self.objects[other].released),
            Mode::Start => join(&mut self.clocks[other], &now),
            Mode::Join => join(&mut now, &self.clocks[other]),
            Mode::Wake => self.wakes[other].clone_from(&now),
            Mode::Woken => join(&mut now, &self.wakes[tid]),
            Mode::Barrier => {
                for clock in self.clocks.iter().filter(|clock| !clock.is_empty()) {
                    join(&mut now, clock);
                }
                for clock in self.clocks.iter_mut().filter(|clock| !clock.is_empty()) {
                    join(clock, &now);
                }
            }
            _ => {
                for past in &self.objects[other].past {
                    if past.tid != tid && past.access.races_with_later(access) {
                        // Of this very step there is no clock yet; a step does not race with itself.
                        join(&mut now, &self.after[past.step as usize]);
                    }
                }
                let past = Past { step: index as u32, tid, access };
                self.objects[other].past.push(past);
            }
        }
        self.clocks[tid] = now;
    }

    /// Sees to it that the other order of the race between steps `first` and `second`, of `tid`, is tried.
    fn reverse(&self, first: usize, second: usize, tid: Tid, nodes: &mut [Node]) {
        let steps = &self.exec.steps;
        let racer = steps[first].tid;
        let mut begun: Set = 0;
        let mut initials: Set = 0;
        // Steps after the first that do not come after it, by thread: the earliest of each.
        let mut earlier: Vec<usize> = Vec::new();
        let independent = (first + 1..second).filter(|&k| self.after[k][racer] <= first as u32);
        for (k, thread) in independent.map(|k| (k, steps[k].tid)).chain([(second, tid)]) {
            if begun & (1 << thread) == 0 {
                begun |= 1 << thread;
                let preceded = earlier.iter().any(|&m| self.after[k][steps[m].tid] > m as u32);
                if !preceded {
                    initials |= 1 << thread;
                }
            }
            earlier.push(k);
            if begun.count_ones() as usize == self.threads {
                break;
            }
        }
        let node = &mut nodes[first];
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
