// SPDX-License-Identifier: MIT OR Apache-2.0
//! One execution as the engine sees it: virtual threads, objects, what each thread would do next, and what happened.
//!
//! A *step* is what one thread does from one scheduling point to just before its next. Its footprint is the list of
//! [`Access`](super::access::Access)es that it made, by which a search knows what commutes.
//!
//! Invariants: objects and threads are numbered in the order of their birth; the objects' state changes only in
//! [`ops`](super::ops), for the thread whose step it is.

use std::time::Duration;

use super::access::{Access, Mode};
use super::hash::{Keys, mix};
use super::report::{Event, FailureKind};
use crate::birth::{Born, ObjectKind};
use crate::class::LockClass;
use crate::lockdep::Site;
use crate::world::{Op, OpKind};

/// The number of a virtual thread; main is zero.
pub(super) type Tid = usize;

/// A set of virtual threads.
pub(super) type Set = u64;

/// Virtual threads in one execution.
pub(super) const MAX_THREADS: usize = Set::BITS as usize;

/// The threads of a set, in order.
pub(super) fn members(mut set: Set) -> impl Iterator<Item = Tid> {
    std::iter::from_fn(move || {
        let tid = set.trailing_zeros() as usize;
        (set != 0).then(|| {
            set &= set - 1;
            tid
        })
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// Runs, or waits for a thread that it has just started to come to its first point.
    Running,
    /// Would do `op` next.
    Pending,
    Finished,
}

/// How far an operation is that takes two steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    First,
    /// A writer that keeps new readers out, and waits for the old ones to leave.
    Drain,
    /// In the queue of a semaphore.
    Queued,
}

pub(super) struct Thread {
    /// No other thread of the execution has it.
    pub(super) name: String,
    /// The same in each execution in which the same thread starts it as its n-th.
    pub(super) key: u64,
    pub(super) status: Status,
    pub(super) op: Op,
    pub(super) phase: Phase,
    /// What the point answers.
    pub(super) answer: bool,
    /// Whoever waits for it to come to its first point.
    pub(super) starter: Option<Tid>,
    /// Hash of all that it has seen: with its code, that is its local state.
    pub(super) seen: u64,
    pub(super) births: u32,
    pub(super) spawns: u32,
    pub(super) boundaries: u32,
    /// It spins: it stands back until another thread has made a step.
    pub(super) lazy: bool,
    /// When its sleep ends.
    pub(super) until: Option<Duration>,
    joined: bool,
    /// Operations that were steps, or would have been.
    pub(super) made: usize,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Holder {
    pub(super) tid: Tid,
    pub(super) site: Site,
}

pub(super) struct Object {
    pub(super) kind: ObjectKind,
    pub(super) class: Option<&'static LockClass>,
    pub(super) born: Site,
    pub(super) key: u64,
    /// `value` is a digest of the data; else it is a hash of the history of the data.
    pub(super) hashed: bool,
    /// Somebody tries it, so that letting it go is a step of its own.
    pub(super) watched: bool,
    /// A lock that guards no data.
    pub(super) bare: bool,
    /// Who has come to it while others could, and who of them to change it; once it is contended, no more.
    pub(super) users: Set,
    pub(super) changers: Set,
    pub(super) contended: bool,
    pub(super) value: u64,
    /// Who excludes all others, or waits to, in phase [`Phase::Drain`].
    pub(super) writer: Option<Holder>,
    pub(super) readers: Vec<Holder>,
    pub(super) permits: usize,
    /// Waiters of a queue or a semaphore, in the order of their coming.
    pub(super) waiting: Vec<Tid>,
    /// Waiters that have been woken, or given a permit, and do not know it yet.
    pub(super) woken: Set,
    /// Its part in the hash of the state.
    pub(super) part: u64,
}

pub(super) struct Step {
    pub(super) tid: Tid,
    /// The thread that made the step before could have gone on.
    pub(super) preempts: bool,
    /// Where its footprint begins.
    pub(super) from: usize,
}

/// An operation that was a step, or would have been one if anybody contended for its object.
pub(super) struct Trail {
    pub(super) tid: Tid,
    pub(super) op: Op,
    /// The thread that did the one before could have gone on.
    pub(super) preempts: bool,
}

/// How an execution failed.
pub(super) struct Fault {
    pub(super) kind: FailureKind,
    pub(super) message: String,
}

pub(super) struct Exec {
    pub(super) threads: Vec<Thread>,
    objects: Vec<Object>,
    /// How many of `objects` are of this execution.
    live: usize,
    pub(super) steps: Vec<Step>,
    /// What the threads did that could have been a step, if somebody wants `events` or `history`.
    pub(super) trail: Vec<Trail>,
    /// Operations that were steps, or would have been one if anybody contended for their objects.
    pub(super) made: usize,
    /// Those of them that went with the step.
    pub(super) at_once: u32,
    /// The object of the last of them, if others could have gone before it.
    pub(super) behind: Option<u32>,
    /// Threads that nobody has joined.
    unjoined: u32,
    pub(super) accesses: Vec<Access>,
    /// Who runs, or whose step it is.
    pub(super) current: Tid,
    /// Whose step it is: not `current` while a new thread goes to its first point.
    pub(super) last: Tid,
    pub(super) clock: Duration,
    pub(super) fault: Option<Fault>,
    /// Everything that happens, if somebody wants it.
    pub(super) events: Option<Vec<Event>>,
    /// Sum of the objects' parts in the hash of the state.
    pub(super) parts: u64,
    pub(super) hashing: bool,
    /// Somebody wants the `history`.
    pub(super) remembering: bool,
    /// Somebody wants the footprints of steps.
    pub(super) footprints: bool,
    /// A hash of all that happened, to compare two runs of one schedule.
    pub(super) history: u64,
    /// Names of threads of earlier executions, for their memory.
    spare: Vec<String>,
}

impl Exec {
    /// `hashing`: somebody will ask for the hash of a state; `footprints`: for what steps did.
    pub(super) fn new(hashing: bool, footprints: bool) -> Exec {
        Exec {
            threads: Vec::new(),
            objects: Vec::new(),
            live: 0,
            steps: Vec::new(),
            trail: Vec::new(),
            made: 0,
            at_once: 0,
            behind: None,
            unjoined: 0,
            accesses: Vec::new(),
            current: 0,
            last: 0,
            clock: Duration::ZERO,
            fault: None,
            events: None,
            parts: 0,
            hashing,
            remembering: false,
            footprints,
            history: 0,
            spare: Vec::new(),
        }
    }

    /// Begins another execution, with the thread `main` running.
    pub(super) fn reset(&mut self, op: Op) {
        self.spare.extend(self.threads.drain(..).map(|thread| thread.name));
        self.live = 0;
        self.steps.clear();
        self.trail.clear();
        (self.made, self.at_once, self.behind, self.unjoined) = (0, 0, None, 0);
        self.accesses.clear();
        (self.current, self.last, self.clock, self.parts, self.history) = (0, 0, Duration::ZERO, 0, 0);
        self.fault = None;
        if let Some(events) = &mut self.events {
            events.clear();
        }
        self.add_thread("main", 1, op, None);
    }

    fn add_thread(&mut self, name: &str, key: u64, op: Op, starter: Option<Tid>) -> Tid {
        let mut unique = self.spare.pop().unwrap_or_default();
        unique.clear();
        if name.bytes().any(|c| matches!(c, b',' | b'@' | b' ')) {
            unique.extend(name.chars().map(|c| if matches!(c, ',' | '@' | ' ') { '_' } else { c }));
        } else {
            unique.push_str(name);
        }
        for n in 2.. {
            if self.threads.iter().all(|t| t.name != unique) {
                break;
            }
            unique.truncate(name.len());
            unique.extend(["~", &n.to_string()]);
        }
        self.unjoined += 1;
        self.threads.push(Thread {
            name: unique,
            key,
            status: Status::Running,
            op,
            phase: Phase::First,
            answer: true,
            starter,
            seen: key,
            births: 0,
            spawns: 0,
            boundaries: 0,
            lazy: false,
            until: None,
            joined: false,
            made: 0,
        });
        self.threads.len() - 1
    }

    /// Adds a thread that the current one starts, and that runs until its first point.
    pub(super) fn spawn(&mut self, op: &Op, name: &str) -> Tid {
        let parent = &mut self.threads[self.current];
        parent.spawns += 1;
        let key = mix(parent.key, u64::from(parent.spawns) << 32);
        self.record(op, true);
        let tid = self.add_thread(name, key, *op, Some(self.current));
        self.current = tid;
        tid
    }

    pub(super) fn birth(&mut self, born: &Born, watched: bool, contended: &Keys) -> u32 {
        let thread = &mut self.threads[self.current];
        thread.births += 1;
        let key = mix(thread.key, u64::from(thread.births));
        let permits = if born.kind == ObjectKind::Semaphore { born.value.unwrap_or(0) as usize } else { 0 };
        let id = self.live;
        if id == self.objects.len() {
            self.objects.push(Object {
                kind: born.kind,
                class: born.class,
                born: born.site,
                key,
                hashed: false,
                watched: false,
                bare: false,
                users: 0,
                changers: 0,
                contended: false,
                value: 0,
                writer: None,
                readers: Vec::new(),
                permits,
                waiting: Vec::new(),
                woken: 0,
                part: 0,
            });
        }
        let object = &mut self.objects[id];
        (object.kind, object.class, object.born, object.key) = (born.kind, born.class, born.site, key);
        (object.hashed, object.value) = match born.value {
            Some(value) => (true, value),
            None => (false, thread.seen),
        };
        (object.writer, object.permits, object.woken, object.part) = (None, permits, 0, 0);
        (object.watched, object.bare) = (watched, born.bare);
        (object.users, object.changers, object.contended) = (0, 0, contended.contains(&key));
        object.readers.clear();
        object.waiting.clear();
        self.live += 1;
        self.touched(id as u32);
        id as u32
    }

    /// An object of this execution.
    #[inline]
    pub(super) fn object(&mut self, id: u32) -> &mut Object {
        &mut self.objects[..self.live][id as usize]
    }

    pub(super) fn objects(&self) -> &[Object] {
        &self.objects[..self.live]
    }

    /// What thread `tid` holds, and since where. A writer that waits for readers to leave does not hold the lock.
    pub(super) fn held_by(&self, tid: Tid) -> impl Iterator<Item = (&Object, Holder)> {
        self.objects().iter().flat_map(move |object| {
            let writer = object.writer.iter().filter(|_| object.readers.is_empty());
            let held = writer.chain(&object.readers).filter(move |holder| holder.tid == tid);
            held.map(move |holder| (object, *holder))
        })
    }

    /// The object of an operation that has one.
    #[inline]
    pub(super) fn object_of(&self, op: &Op) -> Option<&Object> {
        op.object.map(|id| &self.objects[..self.live][id as usize])
    }

    /// Renews the object's part in the hash of the state.
    #[inline]
    pub(super) fn touched(&mut self, id: u32) {
        if self.hashing {
            self.rehash(id);
        }
    }

    fn rehash(&mut self, id: u32) {
        let threads = &self.threads;
        let object = &mut self.objects[id as usize];
        let key = |tid: Tid| threads.get(tid).map_or(0, |t| t.key);
        let mut part = mix(object.key, object.value);
        part = mix(part, object.writer.map_or(0, |w| key(w.tid)));
        part = mix(part, object.readers.iter().map(|r| key(r.tid)).fold(0, u64::wrapping_add));
        part = mix(part, object.permits as u64);
        part = object.waiting.iter().fold(part, |part, &tid| mix(part, key(tid)));
        part = mix(part, members(object.woken).map(key).fold(0, u64::wrapping_add));
        self.parts = self.parts.wrapping_sub(object.part).wrapping_add(part);
        object.part = part;
    }

    /// The hash of the state: of the objects, and of what each thread has seen.
    pub(super) fn state(&self) -> u64 {
        let threads = self.threads.iter().map(|t| {
            let flags = u64::from(t.lazy) << 8 | (t.phase as u64) << 4 | t.status as u64;
            let until = t.until.map_or(0, |until| until.as_nanos() as u64 | 1);
            mix(mix(t.key, t.seen), mix(flags, until))
        });
        mix(mix(self.parts, threads.fold(0, u64::wrapping_add)), self.clock.as_nanos() as u64)
    }

    /// Adds to the footprint of the step that is being made.
    #[inline]
    pub(super) fn access(&mut self, object: u32, mode: Mode) {
        if self.footprints {
            self.accesses.push(Access { object, mode });
        }
    }

    /// What step `index` did.
    pub(super) fn footprint(&self, index: usize) -> &[Access] {
        let to = self.steps.get(index + 1).map_or(self.accesses.len(), |next| next.from);
        &self.accesses[self.steps[index].from..to]
    }

    /// Writes down an operation of the current thread, for a report.
    #[inline]
    pub(super) fn record(&mut self, op: &Op, answer: bool) {
        if self.events.is_some() {
            self.write_down(op, answer);
        }
    }

    #[cold]
    fn write_down(&mut self, op: &Op, answer: bool) {
        let event = Event::new(self, self.current, op, answer);
        self.events.iter_mut().for_each(|events| events.push(event.clone()));
    }

    /// Writes down a line of the scenario's own.
    pub(super) fn note(&mut self, text: String, site: Site) {
        let op = Op { kind: OpKind::PerThread, object: None, class: None, site };
        let event =
            Event { what: text, verb: "note", note: true, ..Event::new(self, self.current, &op, true) };
        self.events.iter_mut().for_each(|events| events.push(event.clone()));
    }

    pub(super) fn fail(&mut self, kind: FailureKind, message: String) {
        if self.fault.is_none() {
            self.fault = Some(Fault { kind, message });
        }
    }

    /// Whether all threads but the current one have been joined.
    #[inline]
    pub(super) fn alone(&self) -> bool {
        self.unjoined == 1
    }

    /// Somebody knows that `tid` has ended.
    pub(super) fn joined(&mut self, tid: Tid) {
        self.unjoined -= u32::from(!self.threads[tid].joined);
        self.threads[tid].joined = true;
    }

    /// Counts `op`, of the current thread, and keeps it if somebody wants to know.
    #[inline]
    pub(super) fn remember(&mut self, op: &Op, preempts: bool) {
        self.made += 1;
        self.threads[self.current].made += 1;
        if self.remembering {
            self.trail.push(Trail { tid: self.current, op: *op, preempts });
        }
    }

    /// Whether all threads have ended.
    pub(super) fn finished(&self) -> bool {
        self.threads.iter().all(|t| t.status == Status::Finished)
    }

    /// The current thread has come to its first point, or to its end, and whoever started it goes on.
    #[inline]
    pub(super) fn started(&mut self) -> Option<Tid> {
        let starter = self.threads[self.current].starter.take()?;
        self.access(self.current as u32, Mode::Start);
        self.current = starter;
        Some(starter)
    }

    /// Ends the current thread.
    pub(super) fn finish(&mut self) {
        let thread = &mut self.threads[self.current];
        thread.status = Status::Finished;
        thread.lazy = false;
    }

    /// A hash of the operation that `tid` would do next, the same in each execution.
    pub(super) fn pending(&self, tid: Tid) -> u64 {
        let thread = &self.threads[tid];
        let object = self.object_of(&thread.op).map_or(0, |object| object.key);
        let site = std::ptr::from_ref(thread.op.site).addr() as u64;
        mix(mix(thread.key, object), mix(thread.op.kind.number(), site))
    }
}

impl OpKind {
    /// Tells kinds apart in a hash.
    pub(super) fn number(self) -> u64 {
        match self {
            OpKind::Lock => 1,
            OpKind::LockShared => 2,
            OpKind::TryLock => 3,
            OpKind::TryLockShared => 4,
            OpKind::Unlock => 5,
            OpKind::UnlockShared => 6,
            OpKind::Downgrade => 7,
            OpKind::Down => 8,
            OpKind::TryDown => 9,
            OpKind::Up => 10,
            OpKind::Load => 11,
            OpKind::Store => 12,
            OpKind::Rmw => 13,
            OpKind::Fence => 14,
            OpKind::WaitPrepare => 15,
            OpKind::WaitCancel => 16,
            OpKind::Wait(timeout) => 17 + (u64::from(timeout.is_some()) << 8),
            OpKind::WakeOne => 18,
            OpKind::WakeAll => 19,
            OpKind::Spawn => 20,
            OpKind::Join(tid) => 21 + (u64::from(tid) << 8),
            OpKind::Yield => 22,
            OpKind::SpinHint => 23,
            OpKind::Now => 24,
            OpKind::Sleep(_) => 25,
            OpKind::PerThread => 26,
            OpKind::Ghost => 27,
            OpKind::GhostRead => 28,
            OpKind::MapAcquire => 29,
            OpKind::MapRelease => 30,
        }
    }
}
