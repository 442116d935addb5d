// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an exploration has found.

use std::fmt;
use std::time::Duration;

use super::exec::{Exec, Tid};
use super::mutate::Mutant;
use super::replay::{op_name, verb};
use crate::class::LockClass;
use crate::lockdep::Site;
use crate::world::Op;

/// How an execution failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FailureKind {
    /// A thread panicked: a failed assertion, most often.
    Panic,
    /// A rule of the scenario's own, told by [`violation`](super::violation).
    Violation,
    /// Some threads wait for each other, or for nobody.
    Deadlock,
    /// lockdep: lock classes were taken in contradicting orders, or one twice.
    LockOrder,
    /// lockdep: something that may sleep was called in a section that must not.
    SleepInAtomic,
    /// The execution did not end within the bound on steps.
    Livelock,
    /// Two sections of one lock met, one of which had its lock switched off ([`Config::without`](super::Config::without)).
    Race,
    /// The scenario did not do the same under the same schedule: it depends on an address, the time, chance, the
    /// order of a hash map, or on what earlier executions left behind.
    Nondeterminism,
}

impl fmt::Display for FailureKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FailureKind::Panic => "panic",
            FailureKind::Violation => "violation",
            FailureKind::Deadlock => "deadlock",
            FailureKind::LockOrder => "lock order",
            FailureKind::SleepInAtomic => "sleep in atomic context",
            FailureKind::Livelock => "livelock",
            FailureKind::Race => "data race",
            FailureKind::Nondeterminism => "nondeterminism",
        })
    }
}

/// Something that a thread did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Event {
    /// The name of the thread.
    pub thread: String,
    /// Its number; main is zero.
    pub thread_number: usize,
    /// What it did, such as `mmap_lock.read`, or the text of a [`note`](super::note).
    pub what: String,
    /// The lock class, queue class or section concerned, if there is one.
    pub class: Option<&'static str>,
    /// What it did to it, such as `read`; `note`.
    pub verb: &'static str,
    /// Classes of the locks that the thread holds then, in the order of the locks' birth.
    pub holds: Vec<&'static str>,
    /// It did not succeed: a try failed, a lock was queued for, a wait timed out.
    pub failed: bool,
    /// Where.
    pub site: Site,
    /// The object, in the order of birth, if there is one.
    pub object: Option<u32>,
    /// The text is a note.
    pub note: bool,
}

impl Event {
    pub(super) fn new(exec: &Exec, tid: Tid, op: &Op, answer: bool) -> Event {
        Event {
            thread: exec.threads[tid].name.clone(),
            thread_number: tid,
            what: op_name(exec, op),
            class: op.class.map(LockClass::name),
            verb: verb(exec, op),
            holds: exec.held_by(tid).filter_map(|(object, _)| object.class).map(LockClass::name).collect(),
            failed: !answer,
            site: op.site,
            object: op.object,
            note: false,
        }
    }
}

/// An execution that failed, and how to see it again.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Failure {
    /// How it failed.
    pub kind: FailureKind,
    /// What is wrong, where; for a deadlock who waits for whom.
    pub message: String,
    /// For [`replay`](super::replay). Outlives edits that do not change what the named threads do. If there are several
    /// failures, a replay may stop at a lock order that another one tells of: replay without lockdep, then.
    pub replay: String,
    /// All that happened, in order.
    pub schedule: Vec<Event>,
    /// How often a thread that could have gone on had to let another go first.
    pub preemptions: usize,
    /// The number of the execution that found it, from one.
    pub execution: u64,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Failure { kind, message, replay, preemptions, .. } = self;
        writeln!(f, "{kind}: {message}")?;
        for event in &self.schedule {
            let failed = if event.failed { " (not yet)" } else { "" };
            writeln!(f, "  {:<12} {}{failed}  at {}", event.thread, event.what, event.site)?;
        }
        write!(f, "preemptions: {preemptions}\nreplay: {replay}")
    }
}

/// What an exploration did.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Report {
    /// Executions made, those included that were cut short because nothing new could come of them.
    pub executions: u64,
    /// Those cut short.
    pub pruned: u64,
    /// Steps made.
    pub steps: u64,
    /// States seen, with a cache.
    pub states: u64,
    /// All that the strategy promises was explored: there is no other failure within `bound`.
    pub exhausted: bool,
    /// The promise is for this many preemptions; `None`: for any number.
    pub bound: Option<u32>,
    /// What was found, at most [`Config::failures`](super::Config::failures).
    pub failures: Vec<Failure>,
    /// What could be switched off, if [`Config::find_sites`](super::Config::find_sites) asks for it; in order, each once.
    pub sites: Vec<Mutant>,
    /// Time it took.
    pub elapsed: Duration,
}

impl Report {
    /// Panics with the first failure, if there is one: for tests.
    ///
    /// # Panics
    /// If there is a failure, or nothing was run.
    #[track_caller]
    pub fn assert_ok(&self) {
        if let Some(failure) = self.failures.first() {
            panic!("{failure}");
        }
        assert!(self.executions > 0, "nothing was explored");
    }
}
