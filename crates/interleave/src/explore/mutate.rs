// SPDX-License-Identifier: MIT OR Apache-2.0
//! Mutation: one operation is switched off, by its place in the source, and the scenario is explored without it. If nothing
//! breaks, the scenario does not test it, or the program does not need it.
//!
//! What "off" means is decided where the operation is:
//! * A lock that guards no data (of size zero) excludes nobody.
//! * A lock that guards data cannot hand out two `&mut`. It does not wait: if it is held, or if another thread comes to the
//!   lock, or waits at it, while this one is inside, that is a failure of kind [`FailureKind::Race`]. So what is found
//!   is that two sections of one lock can meet, and not what would become of the data.
//! * A lock at which a try was switched off is taken in the same way.
//! * Everything else asks [`mutated`]: a retry check says "nothing has changed", a sequence stands still, a flush or a wait
//!   does nothing.
//!
//! Places are found by running: [`Config::find_sites`](super::Config::find_sites) reports every one that was asked for.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::fmt;
use std::panic::Location;

use super::engine::Engine;
use super::exec::{Exec, Status, Tid};
use super::replay::op_name;
use super::report::FailureKind;
use crate::lockdep::Site;
use crate::world::{Op, OpKind, World, active};

/// What an operation does that can be switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum SiteKind {
    /// Excludes others.
    Lock,
    /// Looks whether anything has changed since.
    Retry,
    /// Moves a sequence or a count that others look at.
    Bump,
    /// Takes cached translations away.
    Flush,
    /// Waits until something in flight is over.
    Wait,
}

impl fmt::Display for SiteKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            SiteKind::Lock => "lock",
            SiteKind::Retry => "retry check",
            SiteKind::Bump => "sequence bump",
            SiteKind::Flush => "flush",
            SiteKind::Wait => "wait",
        })
    }
}

/// An operation of the program, named by its place: what is switched off by [`Config::without`](super::Config::without).
///
/// Two are the same if kind, file, line and column are.
#[derive(Clone, Copy, Debug)]
pub struct Mutant {
    /// What it does.
    pub kind: SiteKind,
    /// Where it is asked for.
    pub site: &'static Location<'static>,
}

impl Mutant {
    fn key(&self) -> (&str, u32, u32, SiteKind) {
        (self.site.file(), self.site.line(), self.site.column(), self.kind)
    }
}

impl PartialEq for Mutant {
    fn eq(&self, other: &Mutant) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Mutant {}

impl PartialOrd for Mutant {
    fn partial_cmp(&self, other: &Mutant) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Mutant {
    fn cmp(&self, other: &Mutant) -> Ordering {
        self.key().cmp(&other.key())
    }
}

impl fmt::Display for Mutant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.kind, self.site)
    }
}

/// Is the operation of this `kind` at `site` switched off? Never outside of an exploration. Whoever asks takes the place
/// of its caller: `mutated(kind, Location::caller())` in a `#[track_caller]` function.
#[inline]
pub fn mutated(kind: SiteKind, site: &'static Location<'static>) -> bool {
    active().and_then(World::engine).is_some_and(|engine| engine.mutation.asked(Mutant { kind, site }))
}

/// The part of an engine that switches off, and finds what there is to switch off.
#[derive(Default)]
pub(super) struct Mutation {
    pub(super) off: Option<Mutant>,
    /// What was asked for, if somebody wants to know.
    pub(super) seen: Option<RefCell<BTreeSet<Mutant>>>,
    inside: RefCell<Vec<Inside>>,
}

/// A thread that is in a section whose lock is switched off.
struct Inside {
    tid: Tid,
    object: u32,
    site: Site,
    /// It may be in there with other readers.
    shared: bool,
    /// It holds nothing: the lock guards no data.
    bare: bool,
}

/// Whether `kind` takes a lock, and if so, whether others may share it.
fn takes(kind: OpKind) -> Option<bool> {
    match kind {
        OpKind::Lock | OpKind::TryLock => Some(false),
        OpKind::LockShared | OpKind::TryLockShared => Some(true),
        _ => None,
    }
}

impl Mutation {
    pub(super) fn new(off: Option<Mutant>, find: bool) -> Mutation {
        Mutation { off, seen: find.then(RefCell::default), inside: RefCell::default() }
    }

    /// Another execution begins.
    pub(super) fn reset(&self) {
        if self.off.is_some() {
            self.inside.borrow_mut().clear();
        }
    }

    #[inline]
    pub(super) fn asked(&self, mutant: Mutant) -> bool {
        if self.off.is_none() && self.seen.is_none() {
            return false;
        }
        if let Some(seen) = &self.seen {
            seen.borrow_mut().insert(mutant);
        }
        self.off == Some(mutant)
    }

    /// Two sections of one lock meet, once the current thread has come to `op`; in words.
    pub(super) fn race(&self, exec: &Exec, op: &Op) -> Option<String> {
        let id = op.object?;
        let shared = takes(op.kind)?;
        let me = exec.current;
        let inside = self.inside.borrow();
        let meets = |i: &&Inside| i.object == id && i.tid != me && !i.bare && !(i.shared && shared);
        let other = inside.iter().find(meets)?;
        Some(told(exec, op, (other.tid, other.site), me))
    }

    /// As [`race`](Self::race), for the current thread, which enters the section of `op` without its lock.
    fn race_on_entry(&self, exec: &Exec, op: &Op) -> Option<String> {
        let shared = takes(op.kind)?;
        let me = exec.current;
        let object = exec.object_of(op)?;
        let readers = object.readers.iter().filter(|_| !shared);
        let holder = object.writer.iter().chain(readers).find(|holder| holder.tid != me);
        let meets = |theirs: &Op| match (theirs.kind, takes(theirs.kind)) {
            (_, Some(theirs)) => !(theirs && shared),
            // At the same place, about to enter as this thread does.
            (OpKind::Load, None) => !shared && self.asked(Mutant { kind: SiteKind::Lock, site: theirs.site }),
            _ => false,
        };
        let waits = exec.threads.iter().enumerate().find(|(tid, thread)| {
            *tid != me
                && thread.status == Status::Pending
                && thread.op.object == op.object
                && meets(&thread.op)
        });
        let other = match (holder, waits) {
            (Some(holder), _) => (holder.tid, holder.site),
            (None, Some((tid, thread))) => (tid, thread.op.site),
            (None, None) => return None,
        };
        Some(told(exec, op, other, me))
    }
}

fn told(exec: &Exec, op: &Op, (other, site): (Tid, Site), me: Tid) -> String {
    let name = |tid: Tid| &exec.threads[tid].name;
    format!(
        "data race on {} between `{}` at {site} and `{}` at {}",
        op_name(exec, op),
        name(other),
        name(me),
        op.site
    )
}

impl Engine {
    /// The current thread comes into the section of a lock that is switched off. Whether it has to take the lock all the
    /// same: it is free, and nobody else may have its data.
    pub(super) fn enter_without(&self, op: &Op) -> bool {
        self.inner.borrow_mut().contend(op);
        // Others may come first, as at the lock.
        self.point(&Op { kind: OpKind::Load, ..*op });
        let race = {
            let inner = &mut *self.inner.borrow_mut();
            let (tid, object) = (inner.exec.current, op.object.unwrap_or(u32::MAX));
            let bare = inner.exec.object_of(op).is_some_and(|object| object.bare);
            let shared = takes(op.kind) == Some(true);
            self.mutation.inside.borrow_mut().push(Inside { tid, object, site: op.site, shared, bare });
            if bare {
                return false;
            }
            let race = self.mutation.race_on_entry(&inner.exec, op);
            match &race {
                None => inner.exec.take_at_once(op),
                Some(race) => inner.exec.fail(FailureKind::Race, race.clone()),
            }
            race
        };
        if race.is_some() {
            // The execution has failed: this point unwinds it.
            self.point(op);
        }
        true
    }

    /// The current thread lets go of a lock. Whether it held nothing.
    pub(super) fn leave_without(&self, op: &Op) -> bool {
        if !matches!(op.kind, OpKind::Unlock | OpKind::UnlockShared) {
            return false;
        }
        let mut inside = self.mutation.inside.borrow_mut();
        let tid = self.inner.borrow().exec.current;
        let at = inside.iter().rposition(|i| i.tid == tid && Some(i.object) == op.object);
        at.is_some_and(|at| inside.swap_remove(at).bare)
    }
}
