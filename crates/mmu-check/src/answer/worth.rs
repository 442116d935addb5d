// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a callback is good for to a driver: every path is explored with it and without it.
//!
//! * *dead code*: it was run and never changed anything.
//! * *needed*: without it, a rule breaks that holds with it; *breaks*: the other way round.
//! * *saves*: no verdict changes, but without it more pages are unbound, got again or faulted on.

use super::cost::{Operation, operation};
use super::{Answer, Effort, Row, Watcher, answer};
use crate::oracle::Rule;
use crate::path::Path;
use drivers::{Callback, Callbacks};
use interleave::MaySleep;
use softmm::KernelProfile;
use std::fmt;

/// What a callback is good for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Worth {
    /// The driver has no such callback.
    NotImplemented,
    /// This kernel does not call it on any of the paths.
    NotCalled,
    /// It was run and never had an effect.
    Dead,
    /// These paths break with it, and not without it.
    Harms(Vec<(&'static str, Vec<Rule>)>),
    /// Every path breaks with it and without it.
    Lost,
    /// These paths break without it, and not with it.
    Needed(Vec<(&'static str, Vec<Rule>)>),
    /// No verdict changes; this many pages fewer are taken from the device, got again and faulted on, over all paths
    /// once each, one after the other. Negative: more.
    Saves {
        /// Pages unbound.
        unbinds: i64,
        /// Pages got again.
        repins: i64,
        /// Faults of the device.
        faults: i64,
    },
}

impl fmt::Display for Worth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Worth::NotImplemented => f.write_str("not implemented"),
            Worth::NotCalled => f.write_str("never called"),
            Worth::Dead => f.write_str("dead code"),
            Worth::Lost => f.write_str("every path breaks with it and without it"),
            Worth::Harms(paths) => write!(f, "breaks {}", list(paths)),
            Worth::Needed(paths) => write!(f, "needed: {}", list(paths)),
            Worth::Saves { unbinds: 0, repins: 0, faults: 0 } => f.write_str("has effects, changes nothing"),
            Worth::Saves { unbinds, repins, faults } => {
                write!(f, "saves {unbinds} unbinds, {repins} re-pins, {faults} faults")
            }
        }
    }
}

fn list(paths: &[(&str, Vec<Rule>)]) -> String {
    let one = |(path, rules): &(&str, Vec<Rule>)| {
        format!("{path} ({})", rules.iter().map(|r| r.name()).collect::<Vec<_>>().join(", "))
    };
    paths.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// The paths of `one` on which a rule breaks that does not in `other`.
fn gained(one: &[Answer], other: &[Answer]) -> Vec<(&'static str, Vec<Rule>)> {
    let gained = |(one, other): (&Answer, &Answer)| {
        let there: Vec<Rule> = other.rules().collect();
        let gained: Vec<Rule> = one.rules().filter(|rule| !there.contains(rule)).collect();
        (!gained.is_empty()).then_some((one.cell.path.name, gained))
    };
    one.iter().zip(other).filter_map(gained).collect()
}

/// What `callback` is good for to `row` under `profile`, on `paths`.
pub fn worth(
    cx: &mut MaySleep<'_>,
    row: Row,
    callback: Callback,
    profile: KernelProfile,
    paths: &[&'static Path],
    effort: Effort,
    watcher: Watcher<'_>,
) -> Worth {
    if !row.kind.callbacks.contains(callback) {
        return Worth::NotImplemented;
    }
    let fewer = Callbacks::ALL.without(callback);
    let mut cells: Vec<_> = paths.iter().map(|path| row.cell(path, profile)).collect();
    cells.extend(paths.iter().map(|path| row.cell(path, profile).with(fewer)));
    let answers = answer(cx, cells, effort, watcher);
    let (with, without) = answers.split_at(paths.len());
    let (needed, harms) = (gained(without, with), gained(with, without));
    if !harms.is_empty() {
        Worth::Harms(harms)
    } else if !needed.is_empty() {
        Worth::Needed(needed)
    } else if with.iter().all(|answer| !answer.broken.is_empty()) {
        Worth::Lost
    } else if !with.iter().any(|answer| answer.called(callback)) {
        Worth::NotCalled
    } else if !with.iter().any(|answer| answer.effective(callback)) {
        Worth::Dead
    } else {
        let sum = |cx: &mut MaySleep<'_>, callbacks| {
            let mut sum = Operation::default();
            for path in paths {
                sum.add(&operation(cx, &row.cell(path, profile).with(callbacks)).unwrap_or_default());
            }
            sum
        };
        let (with, without) = (sum(cx, Callbacks::ALL), sum(cx, fewer));
        let saved = |of: fn(&Operation) -> u64| of(&without) as i64 - of(&with) as i64;
        Worth::Saves {
            unbinds: saved(|o| o.unbinds),
            repins: saved(|o| o.repins),
            faults: saved(|o| o.faults),
        }
    }
}
