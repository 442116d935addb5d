// SPDX-License-Identifier: MIT OR Apache-2.0
//! The claims ledger: what was said and asked in 2014, each as statements about cells, and what the cells say.
//!
//! A statement names the cells that it is about and what must be so in each ([`Test`]). Whether it is true, and under
//! which condition, follows from the cells ([`condition`]); nothing here says how it comes out.

pub mod claims;
pub mod condition;
pub mod markdown;
pub mod trace;

use crate::answer::cost::operation;
use crate::answer::{Answer, Effort, Reach, Row, Watcher, answer};
use crate::oracle::Rule;
use crate::path::Path;
use crate::scenario::Cell;
use drivers::{Callback, Callbacks};
use interleave::MaySleep;
use softmm::KernelProfile;
use std::collections::HashMap;

/// What must be so in a cell for the statement to be true of it.
#[derive(Debug, Clone, Copy)]
pub enum Test {
    /// No rule breaks.
    Right,
    /// This rule does not break.
    Keeps(Rule),
    /// No rule breaks that does not break in the other cell too.
    NoWorseThan(fn(&Cell) -> Cell),
    /// The callback is run, and has an effect.
    Effective(Callback),
    /// The callback is run.
    Called(Callback),
    /// The callback is not run.
    Silent(Callback),
    /// Nothing of the driver is run.
    Unheard,
    /// One after the other, more pages are taken from the device than in the other cell.
    UnbindsMoreThan(fn(&Cell) -> Cell),
    /// The same, and nothing breaks in the other cell that does not break in this one.
    UnbindsInVain(fn(&Cell) -> Cell),
}

impl Test {
    /// The cell that it compares with.
    fn other(self, cell: &Cell) -> Option<Cell> {
        match self {
            Test::NoWorseThan(other) | Test::UnbindsInVain(other) => Some(other(cell)),
            _ => None,
        }
    }
}

/// Something that is true or not.
#[derive(Debug, Clone)]
pub struct Statement {
    /// In words.
    pub says: &'static str,
    /// Of which cells.
    pub about: Vec<Cell>,
    /// What it says of each.
    pub test: Test,
    /// Preemptions up to which the cells are explored, at least.
    pub bound: u32,
}

/// What stands in the ledger beside the statements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// What change_pte is good for to each driver.
    Worth,
    /// The callbacks that each driver cannot do without.
    Minimal,
    /// What each design costs.
    Cost,
}

/// A claim or a question of the exchange.
#[derive(Debug, Clone)]
pub struct Claim {
    /// Its number.
    pub number: u32,
    /// In our own words.
    pub title: &'static str,
    /// What it comes to, to be decided.
    pub statements: Vec<Statement>,
    /// A table that belongs to it.
    pub table: Option<Table>,
    /// Events of the running kernel whose notifications are shown beside it, each with the path that is the same in softmm.
    pub live: &'static [(&'static str, &'static str)],
}

/// How a statement comes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// In every cell.
    True,
    /// In none.
    False,
    /// In some: see the condition.
    Sometimes,
    /// No cell says anything.
    Open,
}

/// A statement, decided.
#[derive(Debug, Clone)]
pub struct Decided {
    /// The statement.
    pub statement: Statement,
    /// How it comes out.
    pub verdict: Verdict,
    /// The condition, a line each.
    pub condition: Vec<String>,
    /// Cells of which it is true.
    pub holds: usize,
    /// Cells of which it is not.
    pub fails: usize,
    /// Cells that say nothing: the driver does not take the memory, or the model gave up.
    pub mute: usize,
    /// How far all cells without a broken rule were explored; `None` if there is none.
    pub reach: Option<Reach>,
    /// Cells without a broken rule of which every order was tried.
    pub exhausted: usize,
    /// The cell with a broken rule that needs the fewest preemptions, and of these the shortest schedule.
    pub witness: Option<Answer>,
}

/// Cells that were explored, by what they are.
pub struct Explored(HashMap<(String, Callbacks), Answer>);

fn key(cell: &Cell) -> (String, Callbacks) {
    (cell.name(), cell.callbacks.intersection(cell.kind.callbacks))
}

impl Explored {
    /// Explores all that `claims` are about, each cell once, as far as its statements say or `effort` if that is more.
    pub fn new(cx: &mut MaySleep<'_>, claims: &[Claim], effort: Effort, watcher: Watcher<'_>) -> Explored {
        let mut explored = Explored(HashMap::new());
        let mut wanted: HashMap<(String, Callbacks), (Cell, u32)> = HashMap::new();
        let mut order = Vec::new();
        for statement in claims.iter().flat_map(|claim| &claim.statements) {
            let others = statement.about.iter().filter_map(|cell| statement.test.other(cell));
            for cell in statement.about.iter().copied().chain(others) {
                let bound = statement.bound.max(effort.bound);
                let entry = wanted.entry(key(&cell)).or_insert_with(|| {
                    order.push(key(&cell));
                    (cell, bound)
                });
                entry.1 = entry.1.max(bound);
            }
        }
        let most = wanted.values().map(|(_, bound)| *bound).max().unwrap_or_default();
        for bound in 0..=most {
            let cells: Vec<Cell> =
                order.iter().map(|key| wanted[key]).filter(|(_, b)| *b == bound).map(|(c, _)| c).collect();
            for answer in answer(cx, cells, Effort { bound, ..effort }, watcher) {
                explored.0.insert(key(&answer.cell), answer);
            }
        }
        explored
    }

    /// What is known of `cell`.
    pub fn get(&self, cell: &Cell) -> Option<&Answer> {
        self.0.get(&key(cell))
    }

    /// Is `test` so in `cell`? `None`: the cell says nothing about it.
    fn judge(&self, cx: &mut MaySleep<'_>, test: Test, cell: &Cell) -> Option<bool> {
        let answer = self.get(cell)?;
        let known = |answer: &Answer| {
            answer.facts.refused.is_none()
                && answer.odd.is_empty()
                && (!answer.broken.is_empty() || answer.reach != Reach::Nothing)
        };
        if !known(answer) {
            return None;
        }
        let worse = |than: &Answer| answer.rules().any(|rule| !than.rules().any(|other| other == rule));
        match test {
            Test::Right => Some(answer.broken.is_empty()),
            Test::Keeps(rule) => Some(answer.rules().all(|broken| broken != rule)),
            Test::NoWorseThan(other) => {
                self.get(&other(cell)).filter(|other| known(other)).map(|other| !worse(other))
            }
            Test::Effective(callback) => answer.called(callback).then(|| answer.effective(callback)),
            Test::Called(callback) => Some(answer.called(callback)),
            Test::Silent(callback) => Some(!answer.called(callback)),
            Test::Unheard => Some(answer.facts.callbacks.iter().all(|run| *run == 0)),
            Test::UnbindsMoreThan(other) => unbinds_more(cx, cell, &other(cell)),
            Test::UnbindsInVain(other) => {
                let other = other(cell);
                let theirs = self.get(&other).filter(|other| known(other))?;
                let gains = theirs.rules().any(|rule| !answer.rules().any(|mine| mine == rule));
                Some(unbinds_more(cx, cell, &other)? && !gains)
            }
        }
    }

    /// Decides `statement`.
    pub fn decide(&self, cx: &mut MaySleep<'_>, statement: &Statement) -> Decided {
        let judged: Vec<(Cell, bool)> = statement
            .about
            .iter()
            .filter_map(|cell| self.judge(cx, statement.test, cell).map(|holds| (*cell, holds)))
            .collect();
        let holds = judged.iter().filter(|(_, holds)| *holds).count();
        let fails = judged.len() - holds;
        let verdict = match (holds, fails) {
            (0, 0) => Verdict::Open,
            (_, 0) => Verdict::True,
            (0, _) => Verdict::False,
            _ => Verdict::Sometimes,
        };
        let mine = || judged.iter().filter_map(|(cell, holds)| Some((self.get(cell)?, *holds)));
        let quiet = || mine().filter(|(answer, _)| answer.broken.is_empty()).map(|(answer, _)| answer.reach);
        let cost = |answer: &Answer| {
            answer.broken.iter().map(|(_, f)| (f.preemptions, f.schedule.len())).min().unwrap_or_default()
        };
        let broken = mine().filter(|(answer, holds)| !holds && !answer.broken.is_empty());
        let witness = broken.map(|(answer, _)| answer).min_by_key(|answer| cost(answer)).cloned();
        Decided {
            statement: statement.clone(),
            verdict,
            condition: condition::condition(&judged),
            holds,
            fails,
            mute: statement.about.len() - judged.len(),
            reach: quiet().min(),
            exhausted: quiet().filter(|reach| *reach == Reach::Everything).count(),
            witness,
        }
    }
}

fn unbinds_more(cx: &mut MaySleep<'_>, cell: &Cell, other: &Cell) -> Option<bool> {
    Some(operation(cx, cell)?.unbinds > operation(cx, other)?.unbinds)
}

/// Rows and paths and profiles, as cells with all callbacks.
pub(crate) fn cells(rows: &[Row], paths: &[&'static Path], profiles: &[KernelProfile]) -> Vec<Cell> {
    let mut cells = Vec::new();
    for row in rows {
        for path in paths {
            cells.extend(profiles.iter().map(|profile| row.cell(path, *profile)));
        }
    }
    cells
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::named;
    use mmu_notifier::Access;

    fn decide(test: Test, row: Row, paths: &[&str], profiles: &[KernelProfile]) -> Decided {
        let paths: Vec<_> = paths.iter().filter_map(|name| named(name)).collect();
        let statement = Statement { says: "", about: cells(&[row], &paths, profiles), test, bound: 0 };
        let claim =
            Claim { number: 0, title: "", statements: vec![statement.clone()], table: None, live: &[] };
        let effort = Effort { bound: 0, time: None, threads: 1 };
        MaySleep::enter(|cx| Explored::new(cx, &[claim], effort, &|_| {}).decide(cx, &statement))
    }

    const VFIO: Row = Row { kind: &drivers::vfio::KIND, access: Access::Write };

    #[test]
    fn a_verdict_is_what_the_cells_say() {
        let profiles = [KernelProfile::V3_16, KernelProfile::V6_18];
        let found = decide(Test::Right, VFIO, &["fork"], &profiles);
        assert_eq!((found.verdict, found.holds, found.fails), (Verdict::Sometimes, 1, 1));
        assert_eq!(found.condition, ["true: kernel v6_18", "false: kernel v3_16"]);
        assert!(found.witness.is_some_and(|answer| answer.cell.profile.name == "v3_16"));
        assert_eq!(decide(Test::Right, VFIO, &["fork"], &profiles[..1]).verdict, Verdict::False);
        assert_eq!(decide(Test::Right, VFIO, &["fork"], &profiles[1..]).verdict, Verdict::True);
    }

    #[test]
    fn a_cell_that_says_nothing_decides_nothing() {
        let found = decide(Test::Effective(Callback::Start), VFIO, &["fork"], &[KernelProfile::V6_18]);
        assert_eq!((found.verdict, found.mute), (Verdict::Open, 1));
    }

    #[test]
    fn comparisons_are_with_the_cell_that_the_statement_names() {
        let older = |cell: &Cell| Cell { profile: KernelProfile::V3_16, ..*cell };
        let newer = |cell: &Cell| Cell { profile: KernelProfile::V6_18, ..*cell };
        let v = [KernelProfile::V3_16];
        assert_eq!(decide(Test::NoWorseThan(newer), VFIO, &["fork"], &v).verdict, Verdict::False);
        assert_eq!(decide(Test::NoWorseThan(older), VFIO, &["fork"], &v).verdict, Verdict::True);
    }
}
