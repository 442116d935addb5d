// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table: every driver beside every path under every profile that was asked for, within a time.
//!
//! All cells are explored without preemptions first, then with one, then with two, until the time is over; so every
//! cell has an answer before any has a better one, and each says how far it came. No verdict is written down here.

use crate::oracle::Rule;
use crate::path::{PATHS, Path};
use crate::scenario::{Cell, Facts, explore};
use drivers::{Callback, Callbacks, DRIVERS, Holds, Kind};
use interleave::explore::{Failure, Strategy};
use interleave::{LockClass, MaySleep, Mutex, scope};
use mmu_notifier::Access;
use softmm::KernelProfile;
use std::time::{Duration, Instant};

static QUEUE: LockClass = LockClass::new("cells");

/// How far an exploration came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Not explored at all, or not even without preemptions.
    Nothing,
    /// Every order of at most this many preemptions.
    Preemptions(u32),
}

/// What is known of one cell.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Which.
    pub cell: Cell,
    /// Each rule that breaks, with a schedule that shows it.
    pub broken: Vec<(Rule, Failure)>,
    /// Failures that are no verdict.
    pub odd: Vec<Failure>,
    /// What was seen.
    pub facts: Facts,
    /// How far it came.
    pub reach: Reach,
    /// Executions.
    pub executions: u64,
}

impl Answer {
    fn unknown(cell: Cell) -> Answer {
        Answer {
            cell,
            broken: Vec::new(),
            odd: Vec::new(),
            facts: Facts::default(),
            reach: Reach::Nothing,
            executions: 0,
        }
    }

    /// Is there nothing left to find out, short of another strategy?
    fn settled(&self) -> bool {
        !self.broken.is_empty() || self.facts.refused.is_some() || !self.odd.is_empty()
    }

    fn deepen(&mut self, bound: u32, time: Duration) {
        let outcome = explore(&self.cell, Strategy::Preemptions(bound), Some(time));
        if outcome.report.exhausted {
            self.reach = Reach::Preemptions(bound);
        }
        self.executions += outcome.report.executions;
        self.facts = outcome.facts;
        self.broken = outcome.failures;
        self.odd = outcome.odd;
    }
}

/// A driver with the way in which it binds.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// The driver.
    pub kind: &'static Kind,
    /// How it binds.
    pub access: Access,
}

/// Every driver binding for writing, and those that can bind for reading and keep pages in that way too.
pub fn rows() -> Vec<Row> {
    let write = DRIVERS.iter().map(|&kind| Row { kind, access: Access::Write });
    let reads = DRIVERS.iter().filter(|kind| kind.reads && kind.holds != Holds::ProcessTable);
    let mut rows: Vec<Row> = write.chain(reads.map(|&kind| Row { kind, access: Access::Read })).collect();
    rows.sort_by_key(|row| DRIVERS.iter().position(|kind| std::ptr::eq(*kind, row.kind)));
    rows
}

/// What to answer.
#[derive(Debug, Clone)]
pub struct Question {
    /// Drivers.
    pub rows: Vec<Row>,
    /// Paths.
    pub paths: Vec<&'static Path>,
    /// Kernels.
    pub profiles: Vec<KernelProfile>,
    /// Preemptions at most.
    pub bound: u32,
    /// Time for all of it.
    pub time: Duration,
    /// OS threads.
    pub threads: usize,
}

impl Default for Question {
    fn default() -> Question {
        Question {
            rows: rows(),
            paths: PATHS.iter().collect(),
            profiles: vec![KernelProfile::V3_16, KernelProfile::UNWRAPPED_A, KernelProfile::V6_18],
            bound: 2,
            time: Duration::from_secs(50),
            threads: 2,
        }
    }
}

/// Answers. `progress` hears of each cell: bound, cells done, cells in all.
pub fn answer(
    cx: &mut MaySleep<'_>,
    question: &Question,
    progress: &(dyn Fn(u32, usize, usize) + Sync),
) -> Vec<Answer> {
    let began = Instant::now();
    let mut answers = Vec::new();
    for row in &question.rows {
        for profile in &question.profiles {
            for path in &question.paths {
                let (kind, access) = (row.kind, row.access);
                let cell = Cell { kind, access, path, profile: *profile, callbacks: Callbacks::ALL };
                answers.push(Answer::unknown(cell));
            }
        }
    }
    for bound in 0..=question.bound {
        deepen(cx, &mut answers, bound, question, began, progress);
    }
    answers
}

fn deepen(
    cx: &mut MaySleep<'_>,
    answers: &mut [Answer],
    bound: u32,
    question: &Question,
    began: Instant,
    progress: &(dyn Fn(u32, usize, usize) + Sync),
) {
    let open: Vec<&mut Answer> = answers.iter_mut().filter(|answer| !answer.settled()).collect();
    let all = open.len();
    let queue = Mutex::new(&QUEUE, open.into_iter());
    let work = |cx: &mut MaySleep<'_>| {
        loop {
            let mut cells = queue.lock(cx);
            let Some(answer) = cells.next() else { return };
            let left = cells.len();
            drop(cells);
            let rest = question.time.saturating_sub(began.elapsed());
            if rest.is_zero() {
                return;
            }
            // What one cell leaves over is there for the others; none may take more than four shares.
            let share = rest * question.threads as u32 * 4 / (left as u32 + 1);
            answer.deepen(bound, share.min(rest));
            progress(bound, all - left, all);
        }
    };
    scope(cx, |s, _| {
        for _ in 0..question.threads.max(1) {
            s.spawn("explorer", work);
        }
    });
}

/// The callbacks that `row` cannot do without under `profile`: each is switched off in turn, and stays off if no rule
/// breaks on any path that did not break before. Up to `bound` preemptions.
pub fn sufficient(row: Row, profile: KernelProfile, bound: u32, time: Duration) -> Callbacks {
    let broken = |path: &'static Path, callbacks| {
        let cell = Cell { kind: row.kind, access: row.access, path, profile, callbacks };
        let outcome = explore(&cell, Strategy::Preemptions(bound), Some(time));
        outcome.failures.into_iter().map(|(rule, _)| rule).collect::<Vec<_>>()
    };
    let before: Vec<_> = PATHS.iter().map(|path| broken(path, row.kind.callbacks)).collect();
    let mut kept = row.kind.callbacks;
    for callback in row.kind.callbacks.iter() {
        let fewer = kept.without(callback);
        let harmless = PATHS
            .iter()
            .zip(&before)
            .all(|(path, before)| broken(path, fewer).iter().all(|rule| before.contains(rule)));
        if harmless {
            kept = fewer;
        }
    }
    kept
}

/// Callbacks of a driver that were run and never had an effect in all of `answers`.
pub fn never_effective<'a>(answers: impl Iterator<Item = &'a Answer>) -> Vec<Callback> {
    let (mut run, mut effects) = ([0; Callback::ALL.len()], [0; Callback::ALL.len()]);
    for answer in answers {
        for kind in Callback::ALL {
            run[kind as usize] += answer.facts.callbacks[kind as usize];
            effects[kind as usize] += answer.facts.effects[kind as usize];
        }
    }
    Callback::ALL.into_iter().filter(|&kind| run[kind as usize] > 0 && effects[kind as usize] == 0).collect()
}
