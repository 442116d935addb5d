// SPDX-License-Identifier: MIT OR Apache-2.0
//! Schedules as text that outlives unrelated edits.
//!
//! `main, binder@mmap_lock.read, mm@ptl.lock#2, binder`: main runs until it cannot go on; binder runs until it is about
//! to read-lock an `mmap_lock`; mm runs until it is about to take a `ptl` for the second time in this turn; binder
//! runs on. After the last turn, whoever runs goes on, and then the first that can. No line or step numbers: a turn
//! means the same when the code around it has changed. For a thread that is not started yet, whoever runs goes on as
//! far as that is possible. A turn that cannot be taken is passed over, and said so.
//!
//! `[page_lock; mmap_lock] ...`: somebody tries locks of these classes, so that letting them go is a step of its own.

use std::fmt::Write;

use super::exec::{Exec, Tid};
use super::search::Choice;
use crate::birth::ObjectKind;
use crate::world::{Op, OpKind};

/// What it takes to run a schedule again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Schedule {
    pub(super) watched: Vec<String>,
    pub(super) turns: Vec<Turn>,
}

/// One thread's uninterrupted steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Turn {
    pub(super) thread: String,
    /// The operation before which it is preempted, and the how manieth of that name in this turn.
    pub(super) until: Option<(String, u32)>,
}

/// Names `op` as a kernel person would, without a place: `mmap_lock.read`.
pub(super) fn op_name(exec: &Exec, op: &Op) -> String {
    let verb = verb(exec, op);
    match op.class {
        Some(class) => format!("{}.{verb}", class.name()),
        None => {
            let file = op.site.file().rsplit('/').next().unwrap_or_default();
            format!("{}.{verb}", file.strip_suffix(".rs").unwrap_or(file))
        }
    }
}

/// What `op` does: `read`.
pub(super) fn verb(exec: &Exec, op: &Op) -> &'static str {
    let rw = exec.object_of(op).is_some_and(|object| object.kind == ObjectKind::RwLock);
    match op.kind {
        OpKind::Lock if rw => "write",
        OpKind::Lock => "lock",
        OpKind::LockShared => "read",
        OpKind::TryLock if rw => "try_write",
        OpKind::TryLock => "try_lock",
        OpKind::TryLockShared => "try_read",
        OpKind::Unlock => "unlock",
        OpKind::UnlockShared => "unlock_read",
        OpKind::Downgrade => "downgrade",
        OpKind::Down => "down",
        OpKind::TryDown => "try_down",
        OpKind::Up => "up",
        OpKind::Load => "load",
        OpKind::Store => "store",
        OpKind::Rmw => "update",
        OpKind::Fence => "fence",
        OpKind::WaitPrepare => "prepare_to_wait",
        OpKind::WaitCancel => "finish_wait",
        OpKind::Wait(_) => "wait",
        OpKind::WakeOne => "wake_one",
        OpKind::WakeAll => "wake_all",
        OpKind::Spawn => "spawn",
        OpKind::Join(_) => "join",
        OpKind::Yield => "yield",
        OpKind::SpinHint => "spin",
        OpKind::Now => "now",
        OpKind::Sleep(_) => "sleep",
        OpKind::PerThread => "per_thread",
        OpKind::Ghost => "ghost",
        OpKind::GhostRead => "ghost_read",
        OpKind::MapAcquire => "begin",
        OpKind::MapRelease => "end",
    }
}

/// The turns of an execution that has ended and was remembered, without those that come to pass by themselves.
pub(super) fn turns(exec: &Exec) -> Vec<Turn> {
    let mut turns: Vec<Turn> = Vec::new();
    let trail = &exec.trail;
    let mut at = 0;
    while at < trail.len() {
        let tid = trail[at].tid;
        let end = trail[at..].iter().position(|s| s.tid != tid).map_or(trail.len(), |n| at + n);
        // The next operation of this thread is what it was about to do when it was left.
        let next = trail[end..].iter().find(|s| s.tid == tid).map_or(exec.threads[tid].op, |s| s.op);
        let preempted = trail.get(end).is_some_and(|s| s.preempts);
        let until = preempted.then(|| {
            let name = op_name(exec, &next);
            let before = trail[at..end].iter().filter(|s| op_name(exec, &s.op) == name).count();
            (name, before as u32 + 1)
        });
        turns.push(Turn { thread: exec.threads[tid].name.clone(), until });
        at = end;
    }
    turns
}

/// Writes a schedule down.
pub(super) fn write(watched: &[String], turns: &[Turn]) -> String {
    let mut text = if watched.is_empty() { String::new() } else { format!("[{}] ", watched.join("; ")) };
    for (n, turn) in turns.iter().enumerate() {
        let comma = if n == 0 { "" } else { ", " };
        let _ = write!(text, "{comma}{}", turn.thread);
        match &turn.until {
            None => {}
            Some((op, 1)) => text.extend(["@", op]),
            Some((op, n)) => {
                let _ = write!(text, "@{op}#{n}");
            }
        }
    }
    text
}

/// Reads a schedule.
pub(super) fn read(text: &str) -> Option<Schedule> {
    let (watched, text) = match text.trim_start().strip_prefix('[') {
        Some(text) => text.split_once(']')?,
        None => ("", text),
    };
    let names = watched.split(';').map(str::trim).filter(|name| !name.is_empty());
    let watched = names.map(str::to_owned).collect();
    let turn = |part: &str| {
        let part = part.trim();
        let (thread, until) = match part.split_once('@') {
            None => (part, None),
            Some((thread, op)) => {
                let (op, n) = match op.rsplit_once('#') {
                    None => (op, 1),
                    Some((op, n)) => (op, n.parse().ok().filter(|&n| n > 0)?),
                };
                (thread, Some((op.to_owned(), n)))
            }
        };
        (!thread.is_empty()).then(|| Turn { thread: thread.to_owned(), until })
    };
    let turns: Option<Vec<Turn>> = text.split(',').filter(|part| !part.trim().is_empty()).map(turn).collect();
    Some(Schedule { watched, turns: turns? })
}

/// Follows turns.
pub(super) struct Follow {
    turns: Vec<Turn>,
    at: usize,
    /// Operations of the name that ends the turn, seen in this turn.
    seen: u32,
    /// Steps taken in this turn.
    taken: bool,
    /// Turns that could not be taken.
    pub(super) missed: Vec<String>,
}

impl Follow {
    pub(super) fn new(turns: Vec<Turn>) -> Follow {
        Follow { turns, at: 0, seen: 0, taken: false, missed: Vec::new() }
    }

    fn advance(&mut self) {
        self.at += 1;
        (self.seen, self.taken) = (0, false);
    }

    pub(super) fn pick(&mut self, choice: &Choice<'_>) -> Tid {
        while let Some(turn) = self.turns.get(self.at) {
            let tid =
                (0..choice.exec.threads.len()).find(|&tid| choice.exec.threads[tid].name == turn.thread);
            if tid.is_none()
                && let Some(current) = choice.current()
            {
                // Whoever runs may be on the way to start it.
                return current;
            }
            let Some(tid) = tid.filter(|&tid| choice.enabled & (1 << tid) != 0) else {
                if !self.taken {
                    self.missed.push(write(&[], std::slice::from_ref(turn)));
                }
                self.advance();
                continue;
            };
            if let Some((op, n)) = &turn.until
                && op_name(choice.exec, &choice.exec.threads[tid].op) == *op
            {
                self.seen += 1;
                if self.seen == *n {
                    self.advance();
                    continue;
                }
            }
            self.taken = true;
            return tid;
        }
        choice.default()
    }
}
