// SPDX-License-Identifier: MIT OR Apache-2.0
//! A failure as a person reads it: one lane for each thread, time goes down, at most [`LINES`] lines.
//!
//! What is shown are the moments that the checker noted (callbacks, accesses of the device) and, where the thread changes,
//! what it did first. If that is too much, the end is kept: what broke the rule is there.

use crate::oracle::Rule;
use crate::scenario::Cell;
use interleave::explore::{Event, Failure};
use std::fmt::Write;

/// Lines of a diagram at most.
pub const LINES: usize = 20;

/// The lanes of a failure.
pub fn lanes(failure: &Failure) -> String {
    let mut names: Vec<&str> = Vec::new();
    let mut shown: Vec<&Event> = Vec::new();
    let mut last = None;
    for event in &failure.schedule {
        let turn = last != Some(event.thread_number);
        last = Some(event.thread_number);
        if event.note || turn {
            if !names.contains(&event.thread.as_str()) {
                names.push(&event.thread);
            }
            shown.push(event);
        }
    }
    let width = 44;
    let mut out = String::new();
    for name in &names {
        let _ = write!(out, "{name:<width$}");
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
    let skip = (shown.len() + 2).saturating_sub(LINES);
    if skip > 0 {
        let _ = writeln!(out, "({skip} earlier)");
    }
    for event in &shown[skip.min(shown.len())..] {
        let lane = names.iter().position(|name| *name == event.thread).unwrap_or(0);
        let _ = writeln!(out, "{:indent$}{}", "", event.what, indent = lane * width);
    }
    out
}

/// All there is to say of a broken rule: which, where the kernel has it, the lanes, and how to see it again.
pub fn explain(cell: &Cell, rule: Rule, failure: &Failure) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{cell}: {} ({})", rule, cell.path.kernel);
    let _ = writeln!(out, "rule: {}", rule.source());
    let _ = writeln!(out, "{}", failure.message.lines().next().unwrap_or_default());
    out.push_str(&lanes(failure));
    let _ = write!(out, "preemptions: {}\nreplay: {}", failure.preemptions, failure.replay);
    out
}
