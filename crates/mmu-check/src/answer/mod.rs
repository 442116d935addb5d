// SPDX-License-Identifier: MIT OR Apache-2.0
//! Answers: every driver beside every path under every profile that was asked for.
//!
//! All cells are explored without preemptions first, then with one, and so on; so every cell has an answer before any has a
//! better one, and each says how far it came. In between, and as long as there is time, every order of all steps is
//! tried (source-DPOR) in a number of executions that grows from turn to turn ([`turns`]): cells that are small are
//! exhausted early, and cost no more. No verdict is written down here.
//!
//! A cell is explored by one OS thread, from a machine of its own: what is found depends on the cell and the turn, and
//! not on how many threads share the work. Only a turn that time cut short depends on the machine, and then it is not
//! claimed.
//!
//! [`table`] shows it, [`worth`] and [`minimal`] switch callbacks off, [`cost`] counts and takes the time.

pub mod cost;
pub mod minimal;
pub mod table;
pub mod worth;

use crate::driver;
use crate::era::{Era, era};
use crate::oracle::Rule;
use crate::path::{PATHS, Path};
use crate::scenario::{Cell, Facts, explore_within};
use drivers::{Callback, Callbacks, Holds, Kind};
use interleave::explore::{Failure, Strategy};
use interleave::{LockClass, MaySleep, Mutex, scope};
use mmu_notifier::Access;
use softmm::KernelProfile;
use std::fmt;
use std::time::{Duration, Instant};

static QUEUE: LockClass = LockClass::new("cells");

/// How far an exploration came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    /// Not explored at all, or not even without preemptions.
    Nothing,
    /// Every order of at most this many preemptions.
    Preemptions(u32),
    /// Every order.
    Everything,
}

/// One exploration of every cell that is not settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Every order of at most this many preemptions.
    Bound(u32),
    /// Every order, unless that takes more executions than this.
    Exhaust(u64),
}

impl fmt::Display for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Turn::Bound(bound) => write!(f, "{bound} preemptions"),
            Turn::Exhaust(most) => write!(f, "every order in {most} executions"),
        }
    }
}

/// What `effort` comes to. Exhausting is tried where it costs less than the next bound would, and, after the last bound, as
/// long as there is time.
pub fn turns(effort: Effort) -> Vec<Turn> {
    let mut exhaust = (6..60).step_by(3).map(|log| Turn::Exhaust(1 << log));
    let mut turns = vec![Turn::Bound(0)];
    for bound in 1..=effort.bound {
        turns.extend(exhaust.by_ref().take(if bound == 1 { 1 } else { 2 }));
        turns.push(Turn::Bound(bound));
    }
    if effort.bound > 0 && effort.time.is_some() {
        turns.extend(exhaust);
    }
    turns
}

/// Rules that break, and failures that are no verdict.
type Broken = (Vec<(Rule, Failure)>, Vec<Failure>);

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
    /// What broke, or went wrong, in an order that no bound was set to; a bound may find it with fewer preemptions.
    beyond: Option<Broken>,
}

impl Answer {
    /// Nothing is known yet.
    pub fn unknown(cell: Cell) -> Answer {
        Answer {
            cell,
            broken: Vec::new(),
            odd: Vec::new(),
            facts: Facts::default(),
            reach: Reach::Nothing,
            executions: 0,
            beyond: None,
        }
    }

    /// Is there nothing left to find out by `turn`?
    fn settled(&self, turn: Turn) -> bool {
        let told = !self.broken.is_empty() || !self.odd.is_empty() || self.facts.refused.is_some();
        told || self.reach == Reach::Everything || matches!(turn, Turn::Exhaust(_)) && self.beyond.is_some()
    }

    fn take(&mut self, turn: Turn, time: Option<Duration>) {
        let (strategy, most) = match turn {
            Turn::Bound(bound) => (Strategy::Preemptions(bound), u64::MAX),
            Turn::Exhaust(most) => (Strategy::Dpor, most),
        };
        let outcome = explore_within(&self.cell, strategy, most, time);
        self.executions += outcome.report.executions;
        self.facts.merge(&outcome.facts);
        let sound = outcome.failures.is_empty() && outcome.odd.is_empty();
        match turn {
            _ if sound && outcome.report.exhausted => {
                let bound = outcome.report.bound.map_or(Reach::Everything, Reach::Preemptions);
                self.reach = self.reach.max(bound);
            }
            Turn::Bound(_) => (self.broken, self.odd) = (outcome.failures, outcome.odd),
            Turn::Exhaust(_) if sound => {}
            Turn::Exhaust(_) => self.beyond = Some((outcome.failures, outcome.odd)),
        }
    }

    /// What no bound has found with fewer preemptions stands.
    fn conclude(&mut self) {
        if let Some((broken, odd)) = self.beyond.take()
            && self.broken.is_empty()
            && self.odd.is_empty()
        {
            (self.broken, self.odd) = (broken, odd);
        }
    }

    /// Which rules break.
    pub fn rules(&self) -> impl Iterator<Item = Rule> {
        self.broken.iter().map(|(rule, _)| *rule)
    }

    /// Was the driver's `callback` ever run?
    pub fn called(&self, callback: Callback) -> bool {
        self.facts.callbacks[callback as usize] > 0
    }

    /// Did the driver's `callback` ever change anything?
    pub fn effective(&self, callback: Callback) -> bool {
        self.facts.effects[callback as usize] > 0
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

impl Row {
    /// The cell of this row beside `path` under `profile`, with all callbacks.
    pub fn cell(&self, path: &'static Path, profile: KernelProfile) -> Cell {
        Cell { kind: self.kind, access: self.access, path, profile, callbacks: Callbacks::ALL }
    }

    /// `driver access`, for a table.
    pub fn name(&self) -> String {
        format!("{} {}", self.kind.name, if self.access == Access::Write { "write" } else { "read" })
    }

    /// Is `cell` in this row?
    pub fn has(&self, cell: &Cell) -> bool {
        std::ptr::eq(cell.kind, self.kind) && cell.access == self.access
    }
}

/// One driver binding for writing, and for reading if it can and keeps pages in that way.
pub fn rows_of(kind: &'static Kind) -> impl Iterator<Item = Row> {
    let reads = kind.reads && kind.holds != Holds::ProcessTable;
    let accesses = [Some(Access::Write), reads.then_some(Access::Read)];
    accesses.into_iter().flatten().map(move |access| Row { kind, access })
}

/// The rows of every driver.
pub fn rows() -> Vec<Row> {
    driver::all().flat_map(rows_of).collect()
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
    /// Drivers in kernels in which they never were, too.
    pub anachronisms: bool,
    /// How hard to look.
    pub effort: Effort,
}

/// How hard to look.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Preemptions at most.
    pub bound: u32,
    /// Time for all cells together; `None`: until every one is done.
    pub time: Option<Duration>,
    /// OS threads.
    pub threads: usize,
}

impl Default for Effort {
    fn default() -> Effort {
        Effort { bound: 2, time: Some(Duration::from_secs(50)), threads: 2 }
    }
}

impl Default for Question {
    fn default() -> Question {
        Question {
            rows: rows(),
            paths: PATHS.iter().collect(),
            profiles: vec![KernelProfile::V3_16, KernelProfile::UNWRAPPED_A, KernelProfile::V6_18],
            anachronisms: false,
            effort: Effort::default(),
        }
    }
}

impl Question {
    /// Its cells: by driver, then by profile, then by path.
    pub fn cells(&self) -> Vec<Cell> {
        let mut cells = Vec::new();
        for row in &self.rows {
            for profile in &self.profiles {
                if !self.anachronisms && era(row.kind, profile) == Era::Anachronism {
                    continue;
                }
                cells.extend(self.paths.iter().map(|path| row.cell(path, *profile)));
            }
        }
        cells
    }
}

/// How far it is, for whoever waits: what is done, of how many.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Which.
    pub turn: Turn,
    /// Cells done in this turn.
    pub done: usize,
    /// Cells of this turn.
    pub of: usize,
}

/// Is told how far it is.
pub type Watcher<'a> = &'a (dyn Fn(Progress) + Sync);

/// Answers for `cells`, in their order.
pub fn answer(cx: &mut MaySleep<'_>, cells: Vec<Cell>, effort: Effort, watcher: Watcher<'_>) -> Vec<Answer> {
    let began = Instant::now();
    let mut answers: Vec<Answer> = cells.into_iter().map(Answer::unknown).collect();
    for turn in turns(effort) {
        let mut open: Vec<&mut Answer> = answers.iter_mut().filter(|answer| !answer.settled(turn)).collect();
        in_parallel(cx, effort.threads, &mut open, |answer, done, of| {
            // What one cell leaves over is there for the others; none may take more than four shares.
            let rest = effort.time.map(|time| time.saturating_sub(began.elapsed()));
            let share = |rest: Duration| rest * effort.threads as u32 * 4 / ((of - done) as u32 + 1);
            if rest.is_none_or(|rest| !rest.is_zero()) {
                answer.take(turn, rest.map(|rest| share(rest).min(rest)));
                watcher(Progress { turn, done: done + 1, of });
            }
        });
    }
    answers.iter_mut().for_each(Answer::conclude);
    answers
}

/// Does `work` to each of `items` on some OS threads: with how many were begun before it, and how many there are.
pub fn in_parallel<T: Send>(
    cx: &mut MaySleep<'_>,
    threads: usize,
    items: &mut [T],
    work: impl Fn(&mut T, usize, usize) + Sync,
) {
    let of = items.len();
    let queue = Mutex::new(&QUEUE, items.iter_mut().enumerate());
    let worker = |cx: &mut MaySleep<'_>| {
        loop {
            let next = queue.lock(cx).next();
            let Some((done, item)) = next else { return };
            work(item, done, of);
        }
    };
    scope(cx, |s, _| {
        for _ in 0..threads.max(1) {
            s.spawn("explorer", worker);
        }
    });
}

/// Callbacks of a driver that were run and never had an effect in all of `answers`.
pub fn never_effective<'a>(answers: impl Iterator<Item = &'a Answer>) -> Vec<Callback> {
    let (mut run, mut effects) = ([false; Callback::ALL.len()], [false; Callback::ALL.len()]);
    for answer in answers {
        for kind in Callback::ALL {
            run[kind as usize] |= answer.called(kind);
            effects[kind as usize] |= answer.effective(kind);
        }
    }
    Callback::ALL.into_iter().filter(|&kind| run[kind as usize] && !effects[kind as usize]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::named;

    fn question(threads: usize) -> (Vec<Cell>, Effort) {
        let rows = [&drivers::i915_v3_16::MENDED, &drivers::design_start_with_seq::KIND];
        let question = Question {
            rows: rows.map(|kind| Row { kind, access: Access::Write }).to_vec(),
            paths: ["ksm-clean", "dontneed"].into_iter().filter_map(named).collect(),
            profiles: vec![KernelProfile::V3_16, KernelProfile::UNWRAPPED_A],
            ..Question::default()
        };
        (question.cells(), Effort { bound: 1, time: None, threads })
    }

    fn text(answers: &[Answer]) -> Vec<String> {
        let of = |a: &Answer| {
            let found: Vec<_> = a.broken.iter().map(|(r, f)| format!("{r} {}", f.replay)).collect();
            format!("{} {:?} {} {found:?} {:?}", a.cell, a.reach, a.executions, a.facts)
        };
        answers.iter().map(of).collect()
    }

    #[test]
    fn answers_do_not_depend_on_the_number_of_threads() {
        let texts = [1, 2, 3].map(|threads| {
            MaySleep::enter(|cx| {
                let (cells, effort) = question(threads);
                text(&answer(cx, cells, effort, &|_| {}))
            })
        });
        assert_eq!(texts[0], texts[1]);
        assert_eq!(texts[0], texts[2]);
        assert!(texts[0].iter().any(|line| line.contains("coherence")), "{:?}", texts[0]);
    }

    #[test]
    fn without_time_nothing_is_claimed() {
        let answers = MaySleep::enter(|cx| {
            let (cells, effort) = question(1);
            answer(cx, cells, Effort { time: Some(Duration::ZERO), ..effort }, &|_| {})
        });
        assert!(
            answers.iter().all(|a| a.reach == Reach::Nothing && a.broken.is_empty() && a.executions == 0)
        );
    }
}
