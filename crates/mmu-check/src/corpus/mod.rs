// SPDX-License-Identifier: MIT OR Apache-2.0
//! Known bugs of this class, as cells: one in which the bug is and one in which it was mended. What breaks is computed; that
//! the first breaks the rule that the bug is about and the second breaks none is what a check of the corpus holds.

mod bugs;
mod elsewhere;

pub use bugs::BUGS;
pub use elsewhere::ELSEWHERE;

use crate::oracle::Rule;
use crate::path::{PATHS, Path, named as path_named};
use crate::scenario::{Cell, Facts, Outcome, explore};
use drivers::{Callback, Callbacks, Kind};
use interleave::explore::{Failure, Strategy};
use mmu_notifier::Access;
use softmm::KernelProfile;
use std::time::Duration;

/// For each path, while a callback is looked for that has no effect on any.
const DEAD_TIME: Duration = Duration::from_millis(500);

/// One bug.
#[derive(Debug, Clone, Copy)]
pub struct Bug {
    /// Its number in the catalogue, or what the question of 2014 calls it.
    pub id: &'static str,
    /// In a line.
    pub title: &'static str,
    /// What is wrong in `broken`.
    pub finding: Finding,
    /// It was mended by refusing the memory.
    pub refuses: bool,
    broken: Spec,
    mended: Spec,
}

/// What there is to find.
#[derive(Debug, Clone, Copy)]
pub enum Finding {
    /// One of these rules breaks.
    Breaks(&'static [Rule]),
    /// A callback runs on some path and has an effect on none.
    Dead(Callback),
}

/// A cell, but for the path's address.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spec {
    kind: &'static Kind,
    access: Access,
    path: &'static str,
    profile: KernelProfile,
    callbacks: Callbacks,
}

impl Spec {
    pub(crate) const fn new(kind: &'static Kind, path: &'static str, profile: KernelProfile) -> Spec {
        Spec { kind, access: Access::Write, path, profile, callbacks: Callbacks::ALL }
    }

    pub(crate) const fn reading(self) -> Spec {
        Spec { access: Access::Read, ..self }
    }

    pub(crate) const fn with(self, callbacks: Callbacks) -> Spec {
        Spec { callbacks, ..self }
    }

    fn at(self, path: &'static Path) -> Cell {
        let Spec { kind, access, profile, callbacks, .. } = self;
        Cell { kind, access, path, profile, callbacks }
    }

    fn cell(self) -> Option<Cell> {
        path_named(self.path).map(|path| self.at(path))
    }
}

/// What was seen where the bug is.
#[derive(Debug, Clone)]
pub enum Found {
    /// This rule breaks, in this schedule.
    Broken(Cell, Rule, Box<Failure>),
    /// It ran this often on all paths together, and never had an effect.
    Dead(Callback, u64),
    /// Not found.
    Nothing(Cell),
}

impl Bug {
    /// Where it is.
    pub fn broken(&self) -> Option<Cell> {
        self.broken.cell()
    }

    /// Where it is not any more.
    pub fn mended(&self) -> Option<Cell> {
        self.mended.cell()
    }

    /// Looks for it with no preemption, then with one, up to `bound`.
    pub fn find(&self, bound: u32, time: Option<Duration>) -> Option<Found> {
        let cell = self.broken()?;
        let rules = match self.finding {
            Finding::Breaks(rules) => rules,
            Finding::Dead(callback) => return Some(self.find_dead(cell, callback, time)),
        };
        for bound in 0..=bound {
            let outcome = explore(&cell, Strategy::Preemptions(bound), time);
            let mut failures = outcome.failures.into_iter();
            if let Some((rule, failure)) = failures.find(|(rule, _)| rules.contains(rule)) {
                return Some(Found::Broken(cell, rule, Box::new(failure)));
            }
        }
        Some(Found::Nothing(cell))
    }

    fn find_dead(&self, cell: Cell, callback: Callback, time: Option<Duration>) -> Found {
        let mut all = Facts::default();
        let each = time.map_or(DEAD_TIME, |time| time.min(DEAD_TIME));
        for path in PATHS {
            let outcome = explore(&self.broken.at(path), Strategy::Preemptions(1), Some(each));
            all.merge(&outcome.facts);
        }
        let (run, effects) = (all.callbacks[callback as usize], all.effects[callback as usize]);
        if run > 0 && effects == 0 { Found::Dead(callback, run) } else { Found::Nothing(cell) }
    }

    /// Explores where it was mended.
    pub fn check_mended(&self, bound: u32, time: Option<Duration>) -> Option<(Cell, Outcome)> {
        let cell = self.mended()?;
        Some((cell, explore(&cell, Strategy::Preemptions(bound), time)))
    }

    /// Is that what it must be: no rule broken, and not because nothing happened?
    pub fn is_mended(&self, outcome: &Outcome) -> bool {
        let facts = &outcome.facts;
        let quiet = outcome.failures.is_empty() && outcome.odd.is_empty();
        let alive = if self.refuses {
            facts.refused.is_some()
        } else {
            facts.refused.is_none() && facts.accesses > 0 && self.hears(facts)
        };
        quiet && alive
    }

    /// Did each callback that makes the difference run, and do something?
    fn hears(&self, facts: &Facts) -> bool {
        match self.finding {
            Finding::Dead(callback) => facts.effects[callback as usize] > 0,
            Finding::Breaks(_) => {
                let listens = !self.mended.kind.callbacks.intersection(self.mended.callbacks).is_empty();
                !listens || facts.callbacks.iter().sum::<u64>() > 0
            }
        }
    }
}

/// The bug of that number or name.
pub fn named(id: &str) -> Option<&'static Bug> {
    BUGS.iter().find(|bug| bug.id.eq_ignore_ascii_case(id))
}
