// SPDX-License-Identifier: MIT OR Apache-2.0
//! A driver of one's own beside every path of the mm, in one expression: what a `#[test]` calls.
//!
//! ```
//! # use drivers::{Mirror, Port};
//! # use interleave::{LockClass, MaySleep, Mutex};
//! # use mmu_notifier::{Access, Invalidation, PageAddr, SeqMoved, SetSeq};
//! # use softmm::FaultError;
//! # static LOCK: LockClass = LockClass::new("my lock");
//! struct Mine(Mutex<()>);
//!
//! impl Mirror for Mine {
//!     fn new() -> Mine {
//!         Mine(Mutex::new(&LOCK, ()))
//!     }
//!
//!     fn fault(&self, cx: &mut MaySleep<'_>, port: &Port<'_>, page: PageAddr, access: Access) -> Result<(), FaultError> {
//!         let seq = port.read_begin(cx);
//!         let got = port.get_page(cx, page, access)?;
//!         let _lock = self.0.lock(cx);
//!         if !port.read_retry(seq) {
//!             port.map(cx, page, &got, access);
//!         }
//!         Ok(())
//!     }
//!
//!     fn invalidate(&self, cx: &mut MaySleep<'_>, port: &Port<'_>, inv: &Invalidation, seq: SetSeq<'_>) -> SeqMoved {
//!         let _lock = self.0.lock(cx);
//!         let moved = seq.set();
//!         port.unmap(cx, inv.range);
//!         port.flush(cx, inv.range);
//!         moved
//!     }
//! }
//!
//! mmu_check::check::<Mine>().paths(&["dontneed", "fork"]).run().assert_safe();
//! ```

use crate::explain::explain;
use crate::oracle::Rule;
use crate::path::{PATHS, Path, VARIANTS};
use crate::scenario::{Cell, Outcome, explore};
use drivers::{Callbacks, Kind, Mirror, mirror};
use interleave::explore::{Failure, Strategy};
use mmu_notifier::Access;
use softmm::KernelProfile;
use std::fmt;
use std::time::Duration;

/// A check of the driver `M`: every path, for writing and for reading, in Linux 6.18, every order of at most one preemption.
pub fn check<M: Mirror>() -> Check {
    Check::of(mirror::kind::<M>())
}

/// What is to be checked.
#[derive(Debug, Clone)]
#[must_use = "nothing is checked before `run`"]
pub struct Check {
    kind: &'static Kind,
    accesses: Vec<Access>,
    paths: Vec<&'static Path>,
    profile: KernelProfile,
    bound: u32,
    time: Option<Duration>,
}

impl Check {
    /// A check of any driver.
    pub fn of(kind: &'static Kind) -> Check {
        Check {
            kind,
            accesses: vec![Access::Write, Access::Read],
            paths: PATHS.iter().chain(VARIANTS).collect(),
            profile: KernelProfile::V6_18,
            bound: 1,
            time: None,
        }
    }

    /// In another kernel.
    pub fn under(self, profile: KernelProfile) -> Check {
        Check { profile, ..self }
    }

    /// Only these paths, by name ([`PATHS`] and [`VARIANTS`] have them all). A name that there is not is nothing; a check of no
    /// path at all is not safe.
    pub fn paths(self, names: &[&str]) -> Check {
        let all = PATHS.iter().chain(VARIANTS);
        Check { paths: all.filter(|path| names.contains(&path.name)).collect(), ..self }
    }

    /// Bound for this access only.
    pub fn access(self, access: Access) -> Check {
        Check { accesses: vec![access], ..self }
    }

    /// Every order of at most this many preemptions; two takes minutes.
    pub fn preemptions(self, bound: u32) -> Check {
        Check { bound, ..self }
    }

    /// At most this long for each path and access; what is not finished by then is not safe.
    pub fn time(self, time: Duration) -> Check {
        Check { time: Some(time), ..self }
    }

    /// Explores, on this thread.
    ///
    /// # Panics
    /// Under exploration, and if there is no memory for the stacks of its threads.
    pub fn run(&self) -> Checked {
        let mut outcomes = Vec::new();
        for &access in &self.accesses {
            for &path in &self.paths {
                let Check { kind, profile, .. } = *self;
                let cell = Cell { kind, access, path, profile, callbacks: Callbacks::ALL };
                outcomes.push((cell, explore(&cell, Strategy::Preemptions(self.bound), self.time)));
            }
        }
        Checked { outcomes }
    }
}

/// What came of a [`Check`].
#[derive(Debug, Clone)]
pub struct Checked {
    /// Each path and access.
    pub outcomes: Vec<(Cell, Outcome)>,
}

impl Checked {
    /// Each rule that breaks, with a schedule that shows it.
    pub fn broken(&self) -> impl Iterator<Item = (&Cell, Rule, &Failure)> {
        self.outcomes.iter().flat_map(|(cell, outcome)| {
            outcome.failures.iter().map(move |(rule, failure)| (cell, *rule, failure))
        })
    }

    /// The driver is safe: something was explored, all of it to the end, the device did use the memory, and no rule broke.
    pub fn safe(&self) -> bool {
        let used: u64 = self.outcomes.iter().map(|(_, outcome)| outcome.facts.accesses).sum();
        used > 0 && self.outcomes.iter().all(|(_, outcome)| finished(outcome))
    }

    /// For tests.
    ///
    /// # Panics
    /// If it is not [`safe`](Checked::safe), with the first counterexample as a lane diagram.
    #[track_caller]
    pub fn assert_safe(&self) {
        assert!(self.safe(), "{self}");
    }
}

fn finished(outcome: &Outcome) -> bool {
    outcome.failures.is_empty() && outcome.odd.is_empty() && outcome.report.exhausted
}

impl fmt::Display for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((cell, rule, failure)) = self.broken().next() {
            return f.write_str(&explain(cell, rule, failure));
        }
        if let Some((cell, outcome)) = self.outcomes.iter().find(|(_, outcome)| !finished(outcome)) {
            return match outcome.odd.first() {
                Some(odd) => write!(f, "{cell}: {odd}"),
                None => write!(f, "{cell}: not finished after {} executions", outcome.report.executions),
            };
        }
        let sum = |of: fn(&Outcome) -> u64| self.outcomes.iter().map(|(_, outcome)| of(outcome)).sum::<u64>();
        let (executions, accesses) = (sum(|o| o.report.executions), sum(|o| o.facts.accesses));
        if accesses == 0 {
            return f.write_str("the device never used the memory: nothing was checked");
        }
        write!(f, "no rule broke in {executions} executions with {accesses} accesses of the device")
    }
}
