// SPDX-License-Identifier: MIT OR Apache-2.0
//! A failure as a person reads it: one lane for each thread, time goes down, at most [`LINES`] lines.
//!
//! What is shown are the moments that were noted (what a thread sets out to do, callbacks, accesses of the device), the changes of
//! page table entries, and, where the thread changes, what it does next. If that is too much, the end is kept: what broke
//! the rule is there.

use crate::oracle::Rule;
use crate::scenario::Cell;
use interleave::explore::{Event, Failure};
use std::fmt::Write;

/// Lines of a diagram at most.
pub const LINES: usize = 20;

/// Columns of a lane at most, its gap included.
const WIDTH: usize = 60;

/// Sets everything up and judges at the end; its own steps are of no interest.
const MAIN: &str = "main";

/// The lanes of a failure.
pub fn lanes(failure: &Failure) -> String {
    let mut shown: Vec<(&str, String)> = Vec::new();
    let (mut last, mut racing) = (None, false);
    for event in &failure.schedule {
        let turn = last != Some(event.thread_number);
        last = Some(event.thread_number);
        let is_main = event.thread == MAIN;
        racing |= !is_main;
        if event.note || racing && !is_main && (turn || sets_pte(event)) {
            let text = text(event);
            if shown.last().is_none_or(|last| *last != (event.thread.as_str(), text.clone())) {
                shown.push((&event.thread, text));
            }
        }
    }
    let skip = (shown.len() + 2).saturating_sub(LINES).min(shown.len());
    let shown = &shown[if skip > 0 { skip } else { 0 }..];
    let mut names: Vec<&str> = Vec::new();
    for (thread, _) in shown {
        if !names.contains(thread) {
            names.push(thread);
        }
    }
    let width = |name: &str| {
        let texts = shown.iter().filter(|(thread, _)| *thread == name).map(|(_, text)| text.chars().count());
        (texts.max().unwrap_or(0).max(name.len()) + 2).min(WIDTH)
    };
    let mut out = String::new();
    for name in &names {
        let _ = write!(out, "{name:<width$}", width = width(name));
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
    if skip > 0 {
        let _ = writeln!(out, "({skip} earlier)");
    }
    for (thread, text) in shown {
        let before = names.iter().take_while(|name| *name != thread);
        let indent: usize = before.map(|name| width(name)).sum();
        let _ = writeln!(out, "{:indent$}{text}", "");
    }
    out
}

/// Is it a change of a page table entry?
fn sets_pte(event: &Event) -> bool {
    ["page_table.store", "page_table.update"].contains(&event.what.as_str())
}

fn text(event: &Event) -> String {
    if event.note {
        return event.what.clone();
    }
    if sets_pte(event) {
        return "the pte changes".to_owned();
    }
    let file = event.site.file().rsplit('/').next().unwrap_or_default();
    let waits = if event.failed { ", waits" } else { "" };
    format!("{} ({file}:{}{waits})", event.what, event.site.line())
}

/// All there is to say of a broken rule: which, where the kernel has it, the lanes, and how to see it again.
pub fn explain(cell: &Cell, rule: Rule, failure: &Failure) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{cell}: {} ({})", rule, cell.path.kernel);
    let _ = writeln!(out, "rule: {}", rule.source());
    let first = failure.message.lines().next().unwrap_or_default();
    // Where the judge stands in the source tells nothing of the failure.
    let _ = writeln!(out, "{}", first.split(" at crates/").next().unwrap_or(first));
    out.push_str(&lanes(failure));
    let _ = write!(out, "preemptions: {}\nreplay: {}", failure.preemptions, failure.replay);
    out
}
