// SPDX-License-Identifier: MIT OR Apache-2.0
//! What threads contend for. An operation on anything else is no scheduling point: it is done with the step before.
//!
//! An object is *contended* once two threads have come to it, at least one of them to change it, while more than one
//! thread had yet to be joined. Which objects are is learnt: they are known by their keys, the same in each execution.
//! An execution that finds one more counts for nothing, and the search starts over ([`Inner::starts_over`]).
//!
//! So a search ends with a set of keys that every one of its executions has kept to. Why nothing is left out then:
//! suppose that some execution with a point at each operation has two threads contend for an object that is not in
//! the set, and take the shortest beginning of such an execution. Before its last operation, whatever is done to
//! objects outside of the set commutes with all that other threads do meanwhile, so that it can be moved to the left,
//! next to what its thread did before. That gives an execution of this search, in which the threads come at least as
//! far; so they contend there too, and it would have been noticed. Hence there is no such execution, all of them can be
//! rearranged in this way, and to rearrange changes nothing that a thread sees, nor adds a preemption.
//!
//! What a thread does while all others have been joined, or none has been started, comes before or after all that they
//! do, and is not counted.
//!
//! Five things would break the argument, and are no part of it:
//! * An operation that might not be done at once: a lock that is held, a wait.
//! * A contended [`Ghost`](super::Ghost) belongs to the operation before it. So an operation with such a ghost behind it
//!   counts as contended.
//! * A thread that is started runs to its first point at once: that is its first operation, whatever it is.
//! * Who spins or yields stands back at the next operation, whatever it is.
//! * A loop that nobody would ever leave: after [`AT_ONCE`] operations without a step there is one.

use super::engine::Inner;
use super::exec::{Exec, Object, Phase};
use super::hash::Keys;
use crate::birth::ObjectKind;
use crate::world::{Op, OpKind};

/// Operations that a step may have beside its first.
const AT_ONCE: u32 = 256;

/// What a search has learnt of the scenario, and all its later executions go by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Learnt {
    /// Classes of locks that are tried, by name, as a schedule that is written down has them: their unlocks are steps.
    pub(super) watched: Vec<String>,
    /// Keys of objects that threads contend for.
    pub(super) contended: Keys,
}

/// Whether an operation leaves its object as it is, and excludes nobody who does the same.
fn shares(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Load | OpKind::GhostRead | OpKind::LockShared | OpKind::TryLockShared | OpKind::UnlockShared
    )
}

impl Exec {
    /// The current thread comes to `op`. Whether it is the first to contend for the object.
    #[inline]
    fn meets(&mut self, op: &Op) -> bool {
        let (Some(id), false) = (op.object, self.alone()) else { return false };
        let me = 1 << self.current;
        let object = self.object(id);
        if object.contended {
            return false;
        }
        object.users |= me;
        let others = if shares(op.kind) {
            object.changers
        } else {
            object.changers |= me;
            object.users
        };
        others & !me != 0
    }

    /// Whether `op` of the current thread can be done with the step before.
    #[inline]
    pub(super) fn goes_with_the_step(&self, op: &Op) -> bool {
        let Some(object) = self.object_of(op) else { return false };
        let thread = &self.threads[self.current];
        let stops = thread.starter.is_some() || thread.lazy;
        !stops && self.at_once < AT_ONCE && (!object.contended || self.alone()) && is_free(object, op.kind)
    }

    /// Does so.
    pub(super) fn go_with_the_step(&mut self, op: &Op) {
        self.at_once += 1;
        if !self.alone() {
            self.behind = op.object;
        }
        self.threads[self.current].phase = Phase::First;
        self.remember(op, false);
        self.quietly(op);
    }

    /// Applies `op` to an object that nobody contends for: no search has to know.
    pub(super) fn quietly(&mut self, op: &Op) {
        let footprints = std::mem::take(&mut self.footprints);
        self.apply(self.current, op, false);
        self.footprints = footprints;
    }
}

/// Whether an operation that is done now is over at once.
fn is_free(object: &Object, kind: OpKind) -> bool {
    match kind {
        OpKind::Lock => {
            let drains = object.watched && object.kind == ObjectKind::RwLock;
            object.writer.is_none() && object.readers.is_empty() && !drains
        }
        OpKind::LockShared => object.writer.is_none(),
        OpKind::Down => object.permits > 0,
        OpKind::Wait(_) => false,
        _ => true,
    }
}

impl Inner {
    /// The current thread comes to `op`: learns from it what is contended.
    #[inline]
    pub(super) fn contend(&mut self, op: &Op) {
        if self.exec.meets(op) {
            self.contended(op.object);
        }
        if matches!(op.kind, OpKind::Ghost | OpKind::GhostRead)
            && let Some(behind) = self.exec.behind
            && self.exec.object_of(op).is_some_and(|ghost| ghost.contended)
        {
            self.contended(Some(behind));
        }
    }

    fn contended(&mut self, object: Option<u32>) {
        let Some(id) = object else { return };
        let object = self.exec.object(id);
        object.contended = true;
        self.stale |= self.learnt.contended.insert(object.key) && self.skips;
    }
}
