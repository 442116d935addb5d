// SPDX-License-Identifier: MIT OR Apache-2.0
//! A world that serialises two threads by a schedule: the locks are really the world's to grant.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Condvar, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use super::{CLASS, inside};
use crate::birth::Born;
use crate::lockdep::Report;
use crate::world::{Id, Op, OpKind, World};
use crate::*;

/// Runs two threads one operation at a time, in the order of a schedule.
struct Baton {
    state: StdMutex<Turns>,
    changed: Condvar,
}

#[derive(Default)]
struct Turns {
    schedule: VecDeque<usize>,
    /// What each thread would do next.
    pending: [Option<(OpKind, Option<Id>)>; 2],
    ended: [bool; 2],
    turn: Option<usize>,
    owner: BTreeMap<Id, usize>,
    log: Vec<(usize, OpKind)>,
    born: Id,
}

impl Turns {
    fn enabled(&self, thread: usize) -> bool {
        match self.pending[thread] {
            None => false,
            Some((OpKind::Lock, Some(object))) => !self.owner.contains_key(&object),
            Some(_) => true,
        }
    }

    /// Chooses once it is known of every thread what it would do.
    fn choose(&mut self) {
        if self.turn.is_none() && (0..2).all(|t| self.ended[t] || self.pending[t].is_some()) {
            let wanted = self.schedule.pop_front().filter(|&t| self.enabled(t));
            self.turn = wanted.or_else(|| (0..2).find(|&t| self.enabled(t)));
        }
    }
}

thread_local! {
    static ME: Cell<usize> = const { Cell::new(0) };
}

impl Baton {
    fn change(&self, f: impl FnOnce(&mut Turns)) {
        let mut turns = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        f(&mut turns);
        turns.choose();
        self.changed.notify_all();
    }
}

impl World for Baton {
    fn birth(&self, _: &Born) -> Id {
        let mut turns = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        turns.born += 1;
        turns.born
    }

    fn point(&self, op: &Op) -> bool {
        let me = ME.get();
        self.change(|turns| turns.pending[me] = Some((op.kind, op.object)));
        let turns = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut turns =
            self.changed.wait_while(turns, |t| t.turn != Some(me)).unwrap_or_else(PoisonError::into_inner);
        turns.turn = None;
        turns.pending[me] = None;
        turns.log.push((me, op.kind));
        match (op.kind, op.object) {
            (OpKind::Lock, Some(object)) => assert!(turns.owner.insert(object, me).is_none()),
            (OpKind::Unlock, Some(object)) => assert_eq!(turns.owner.remove(&object), Some(me)),
            _ => {}
        }
        true
    }

    fn noted(&self, _: &Op) {}

    fn done(&self, _: &Op, _: u64) {}

    fn spawn(&self, _: &Op, _: &str, _: Box<dyn FnOnce() + Send>) -> Id {
        unreachable!("the test has its own threads")
    }

    fn now(&self) -> Duration {
        Duration::ZERO
    }

    fn aborting(&self) -> bool {
        false
    }

    fn reported(&self, report: &Report) {
        panic!("{report}");
    }
}

/// Two threads that each put their name into a list, under a lock, twice.
fn run(schedule: &[usize]) -> (Vec<usize>, Vec<(usize, OpKind)>) {
    let turns = Turns { schedule: schedule.iter().copied().collect(), ..Turns::default() };
    let world: &'static Baton =
        Box::leak(Box::new(Baton { state: StdMutex::new(turns), changed: Condvar::new() }));
    let list = {
        let _inside = inside(world);
        Mutex::new(&CLASS, Vec::new())
    };
    std::thread::scope(|s| {
        for me in 0..2 {
            let list = &list;
            s.spawn(move || {
                ME.set(me);
                let _inside = inside(world);
                MaySleep::enter(|cx| {
                    for _ in 0..2 {
                        list.lock(cx).push(me);
                    }
                });
                world.change(|turns| turns.ended[me] = true);
            });
        }
    });
    let log = std::mem::take(&mut world.state.lock().unwrap_or_else(PoisonError::into_inner).log);
    (list.into_inner(), log)
}

#[test]
fn a_world_serialises_the_lock_operations_of_two_threads() {
    use OpKind::{Lock, Unlock};
    let (list, log) = run(&[0, 0, 0, 0, 1, 1, 1, 1]);
    assert_eq!(list, [0, 0, 1, 1]);
    assert_eq!(
        log,
        [(0, Lock), (0, Unlock), (0, Lock), (0, Unlock), (1, Lock), (1, Unlock), (1, Lock), (1, Unlock)]
    );
    assert_eq!(run(&[1, 1, 0, 0, 1, 1, 0, 0]).0, [1, 0, 1, 0]);
    // A thread whose lock is held is not chosen, whatever the schedule wants: the lock is known before it is taken.
    let (list, log) = run(&[0, 1, 1, 1, 0, 1, 0, 0]);
    assert_eq!(log[..2], [(0, Lock), (0, Unlock)]);
    assert_eq!(list, [0, 1, 0, 1]);
}
