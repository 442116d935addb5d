// SPDX-License-Identifier: MIT OR Apache-2.0
//! A cell in which memory runs out once: the first allocation after the process was set up, in a second run the second one, and so
//! on until there is none left to fail. What must hold: every rule, nothing kept afterwards, and where the driver cannot go
//! on, an error that says why.

use super::{Cell, Facts, Outcome, Refusal, execute_in};
use drivers::{BindError, DeviceFault, DriverError, SubmitError};
use interleave::explore::{self, Config, Failure, Strategy};
use softmm::{Allocation, FaultError, Machine};
use std::cell::{self, RefCell};
use std::fmt;

/// More allocations of one kind than a cell could make: the count would never come to an end.
const MOST: u64 = 200;

/// Which allocation fails, and what came of it in the executions of one exploration.
pub(super) struct Shortage {
    what: Allocation,
    nth: u64,
    /// In some execution there was such an allocation.
    struck: cell::Cell<bool>,
    refused: RefCell<Vec<Refusal>>,
}

impl Shortage {
    /// The process is set up.
    pub(super) fn begin(&self, machine: &Machine) {
        machine.fail_nth(self.what, self.nth);
    }

    /// The execution is over.
    pub(super) fn end(&self, machine: &Machine) {
        self.struck.set(self.struck.get() | !machine.failure_is_due(self.what));
    }

    pub(super) fn refused(&self, refusal: Refusal) {
        self.refused.borrow_mut().push(refusal);
    }
}

impl Refusal {
    /// Is it for want of memory, and says so?
    pub fn is_out_of_memory(&self) -> bool {
        let fault = match self {
            Refusal::Bind(BindError::Fault { source, .. }) => source,
            Refusal::Access(DriverError::Submit(SubmitError::Fault(source))) => source,
            Refusal::Access(DriverError::Device(DeviceFault::Refused { source, .. })) => source,
            _ => return false,
        };
        matches!(fault, FaultError::OutOfMemory(_))
    }
}

/// What went wrong when an allocation failed.
#[derive(Debug, Clone)]
pub enum Wrong {
    /// A rule was broken, frames were kept, or the model itself failed.
    Broken(Failure),
    /// The driver gave up with an error that does not say why.
    Unclean(Refusal),
}

/// One allocation that failed, and what went wrong then.
#[derive(Debug, Clone)]
pub struct Starved {
    /// What ran out.
    pub what: Allocation,
    /// At the so manieth allocation of that kind after the process was set up.
    pub nth: u64,
    /// How it showed.
    pub wrong: Wrong,
}

impl fmt::Display for Starved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {} cannot be had: ", self.what, self.nth)?;
        match &self.wrong {
            Wrong::Broken(failure) => failure.fmt(f),
            Wrong::Unclean(refusal) => write!(f, "the driver gives up with: {refusal}"),
        }
    }
}

/// What came of a cell, one failed allocation after the other.
#[derive(Debug, Clone, Default)]
pub struct Sweep {
    /// Allocations that failed, each in an exploration of its own.
    pub failed: u64,
    /// Of these, those after which the driver did not get the memory, and said why.
    pub refused: u64,
    /// Executions.
    pub executions: u64,
    /// What went wrong.
    pub wrong: Vec<Starved>,
}

impl Sweep {
    /// Adds what came of another cell.
    pub fn add(&mut self, other: Sweep) {
        self.failed += other.failed;
        self.refused += other.refused;
        self.executions += other.executions;
        self.wrong.extend(other.wrong);
    }
}

/// Lets every allocation of `cell` fail, each in every order of at most `bound` preemptions. `None`: the cell breaks or is refused
/// although there is memory, and says nothing here.
///
/// # Panics
/// Under exploration, and if there is no memory for the stacks of threads.
pub fn starve(cell: &Cell, bound: u32) -> Option<Sweep> {
    let config = Config::new(Strategy::Preemptions(bound)).minimise(0);
    let plenty = super::explore_with(cell, &config);
    if plenty.facts.refused.is_some() || !plenty.failures.is_empty() || !plenty.odd.is_empty() {
        return None;
    }
    let mut sweep = Sweep::default();
    for what in Allocation::ALL {
        let struck = |nth: &u64| one(cell, &config, what, *nth, &mut sweep);
        (1..=MOST).take_while(struck).for_each(drop);
    }
    Some(sweep)
}

/// Was there such an allocation?
fn one(cell: &Cell, config: &Config, what: Allocation, nth: u64, sweep: &mut Sweep) -> bool {
    let shortage = Shortage { what, nth, struck: cell::Cell::new(false), refused: RefCell::default() };
    let facts = RefCell::new(Facts::default());
    let report = explore::explore(config, |cx| execute_in(cx, cell, &facts, Some(&shortage)));
    let Outcome { failures, odd, report, .. } = Outcome::new(report, facts.into_inner());
    let broken: Vec<Failure> = failures.into_iter().map(|(_, failure)| failure).chain(odd).collect();
    let struck = shortage.struck.get() || !broken.is_empty();
    let refused = shortage.refused.into_inner();
    sweep.failed += u64::from(struck);
    sweep.refused += u64::from(!refused.is_empty());
    sweep.executions += report.executions;
    let unclean = refused.into_iter().find(|refusal| !refusal.is_out_of_memory()).map(Wrong::Unclean);
    let wrong = broken.into_iter().map(Wrong::Broken).chain(unclean);
    sweep.wrong.extend(wrong.map(|wrong| Starved { what, nth, wrong }));
    struck
}
