// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why nobody goes on, in words.

use std::fmt::Write;

use super::exec::{Exec, Status, Tid};
use super::replay::op_name;
use crate::birth::ObjectKind;
use crate::world::OpKind;

impl Exec {
    /// Who waits for what, who has it, and what each of them holds.
    pub(super) fn deadlock(&self) -> String {
        let mut text = String::from("nobody can go on");
        for (tid, thread) in self.threads.iter().enumerate() {
            if thread.status != Status::Finished {
                let op = &thread.op;
                let _ = write!(text, "\n  `{}` waits: {} at {}", thread.name, op_name(self, op), op.site);
                self.blockers(tid, &mut text);
                self.holds(tid, &mut text);
            }
        }
        text
    }

    /// Where each thread is, when there are too many steps.
    pub(super) fn livelock(&self) -> String {
        let mut text = format!("not ended after {} steps", self.made);
        for (tid, thread) in self.threads.iter().enumerate() {
            if thread.status == Status::Finished {
                continue;
            }
            let (name, op, steps) = (&thread.name, &thread.op, thread.made);
            let _ = write!(text, "\n  `{name}`, {steps} steps, is at: {} at {}", op_name(self, op), op.site);
            self.holds(tid, &mut text);
        }
        text
    }

    fn blockers(&self, tid: Tid, text: &mut String) {
        let op = &self.threads[tid].op;
        if let OpKind::Join(other) = op.kind {
            let _ = write!(text, "\n    for the end of `{}`", self.threads[other as usize].name);
        }
        let Some(object) = self.object_of(op) else { return };
        for holder in object.writer.iter().chain(&object.readers) {
            if holder.tid == tid && matches!(op.kind, OpKind::Lock) && object.readers.is_empty() {
                let _ = write!(text, "\n    which it holds itself since {}", holder.site);
            } else if holder.tid != tid || !object.readers.is_empty() {
                let waits = object.writer.is_some_and(|w| w.tid == holder.tid) && !object.readers.is_empty();
                let has = if waits { "waited for first by" } else { "held by" };
                let _ = write!(text, "\n    {has} `{}` since {}", self.threads[holder.tid].name, holder.site);
            }
        }
    }

    fn holds(&self, tid: Tid, text: &mut String) {
        for (object, holder) in self.held_by(tid) {
            let name = match (object.class, object.kind) {
                (Some(class), _) => class.name(),
                (None, ObjectKind::Once) => "a once cell",
                (None, _) => "an object",
            };
            let _ = write!(text, "\n    holds `{name}` since {}", holder.site);
        }
    }
}
