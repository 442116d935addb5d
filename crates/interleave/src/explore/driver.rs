// SPDX-License-Identifier: MIT OR Apache-2.0
//! From a scenario and a configuration to a report.
//!
//! Every failure is run again under its exact schedule, with everything written down: a run that differs is a failure
//! of its own. Then the same failure is looked for with fewer preemptions.

use std::panic::Location;
use std::time::Instant;

use super::config::{Config, Strategy};
use super::contend::Learnt;
use super::engine::{Engine, Inner, Inside};
use super::exec::{Fault, Tid};
use super::fiber::Job;
use super::hooks;
use super::path::{Path, Reduction};
use super::replay::{self, Follow};
use super::report::{Event, Failure, FailureKind, Report};
use super::search::{Exact, Pct, Random, Search};
use crate::MaySleep;
use crate::lockdep::Site;
use crate::world::{Op, OpKind};

/// Runs `scenario` under many interleavings, on the calling OS thread. Several may run at once, on several.
///
/// # Panics
/// Under exploration already, and if there is no memory for the stacks of the virtual threads.
#[track_caller]
pub fn explore(config: &Config, scenario: impl Fn(&mut MaySleep<'_>)) -> Report {
    Explorer::new(config, &scenario, Location::caller()).explore()
}

/// What a replay came to.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Replay {
    /// The failure, if it still fails.
    pub failure: Option<Failure>,
    /// Turns of the schedule that could not be taken, because the code has changed.
    pub missed: Vec<String>,
}

/// Runs `scenario` once, under the schedule of [`Failure::replay`]. `None` if `schedule` cannot be read.
///
/// # Panics
/// As [`explore`].
#[track_caller]
pub fn replay(config: &Config, schedule: &str, scenario: impl Fn(&mut MaySleep<'_>)) -> Option<Replay> {
    let schedule = replay::read(schedule)?;
    Some(Explorer::new(config, &scenario, Location::caller()).replay(schedule))
}

/// The search starts over for free so soon after it began, and learns what else there is in so many executions later.
const SOON: u64 = 16;
const LOOKS: u64 = 32;

struct Explorer<'a> {
    config: &'a Config,
    scenario: &'a dyn Fn(&mut MaySleep<'_>),
    site: Site,
    report: Report,
    /// By the searches before.
    learnt: Learnt,
    started: Instant,
}

/// A schedule that failed, by thread numbers.
struct Found {
    fault: Fault,
    exact: Vec<Tid>,
    preemptions: usize,
    /// Without it there would be other steps.
    learnt: Learnt,
}

impl<'a> Explorer<'a> {
    fn new(config: &'a Config, scenario: &'a dyn Fn(&mut MaySleep<'_>), site: Site) -> Explorer<'a> {
        assert!(!super::exploring(), "an exploration at {site} within an exploration");
        hooks::install();
        Explorer {
            config,
            scenario,
            site,
            report: Report::default(),
            learnt: Learnt::default(),
            started: Instant::now(),
        }
    }

    fn engine(&self, search: Search, learnt: &Learnt) -> Engine {
        Engine::new(search, self.config, learnt.clone())
    }

    fn explore(mut self) -> Report {
        let path = |reduction, bound, cached| Search::Path(Path::new(reduction, bound, cached));
        match self.config.strategy {
            Strategy::Plain => self.run(path(Reduction::None, None, false), u64::MAX),
            Strategy::Sleep => self.run(path(Reduction::Sleep, None, false), u64::MAX),
            Strategy::Dpor => self.run(path(Reduction::Dpor, None, false), u64::MAX),
            Strategy::ValueCache => self.run(path(Reduction::None, None, true), u64::MAX),
            Strategy::Preemptions(most) => self.bounded(most, false),
            Strategy::CachedPreemptions(most) => self.bounded(most, true),
            Strategy::Pct { depth, seed, executions } => {
                self.run(Search::Pct(Pct::new(depth, seed)), executions);
                self.report.exhausted = false;
            }
            Strategy::Random { seed, executions } => {
                self.run(Search::Random(Random::new(seed)), executions);
                self.report.exhausted = false;
            }
        }
        self.report.elapsed = self.started.elapsed();
        self.report
    }

    fn bounded(&mut self, most: u32, cached: bool) {
        for bound in 0..=most {
            let before = self.report.failures.len();
            self.run(Search::Path(Path::new(Reduction::None, Some(bound), cached)), u64::MAX);
            if !self.report.exhausted || self.report.failures.len() > before && self.full() {
                return;
            }
            if self.report.bound.is_none() {
                // No schedule needed more preemptions than this.
                return;
            }
        }
    }

    fn full(&self) -> bool {
        self.report.failures.len() >= self.config.failures.max(1)
    }

    fn over(&self) -> bool {
        self.report.executions >= self.config.max_executions
            || self.report.executions.is_multiple_of(64)
                && self.config.max_time.is_some_and(|most| self.started.elapsed() >= most)
    }

    /// Runs executions until the search has no more, or enough failures are found.
    fn run(&mut self, search: Search, most: u64) {
        let engine = self.engine(search, &self.learnt);
        self.report.exhausted = false;
        let mut began = self.report.executions;
        let mut left = most;
        loop {
            if left == 0 || self.over() {
                break;
            }
            left -= 1;
            let found = self.execute(&engine);
            self.report.executions += 1;
            {
                let inner = &mut *engine.inner.borrow_mut();
                self.report.steps += inner.exec.steps.len() as u64;
                self.report.pruned += u64::from(inner.draining);
            }
            if engine.inner.borrow_mut().starts_over() {
                if self.report.executions - began > SOON {
                    self.look_around(&engine);
                }
                began = self.report.executions;
                continue;
            }
            let nondeterminism =
                found.as_ref().is_some_and(|found| found.fault.kind == FailureKind::Nondeterminism);
            if let Some(found) = found {
                engine.rest();
                self.keep(found);
                if self.full() || nondeterminism {
                    break;
                }
            }
            let inner = &mut *engine.inner.borrow_mut();
            if !inner.search.next(&inner.exec) {
                self.report.exhausted = true;
                break;
            }
        }
        if let Some(seen) = &engine.mutation.seen {
            let mut sites = std::mem::take(&mut *seen.borrow_mut());
            sites.extend(self.report.sites.drain(..));
            self.report.sites.extend(sites);
        }
        let inner = &mut *engine.inner.borrow_mut();
        self.learnt = std::mem::take(&mut inner.learnt);
        if let Search::Path(path) = &inner.search {
            self.report.states = path.states();
            self.report.bound = path.cut();
        }
    }

    /// Learns what there is to learn from executions by chance, lest a search start over each time that it comes to more.
    fn look_around(&mut self, engine: &Engine) {
        let by_chance = Search::Random(Random::new(0));
        let search = std::mem::replace(&mut engine.inner.borrow_mut().search, by_chance);
        for _ in 0..LOOKS {
            // What fails is found again by the search, or is beyond its bound.
            let _found = self.execute(engine);
            self.report.executions += 1;
            engine.inner.borrow_mut().starts_over();
        }
        let inner = &mut *engine.inner.borrow_mut();
        inner.search = search;
        inner.forget_orders();
    }

    /// One execution.
    fn execute(&self, engine: &Engine) -> Option<Found> {
        let scenario = self.scenario;
        let main: Box<dyn FnOnce() + '_> = Box::new(move || MaySleep::enter(scenario));
        // SAFETY: the closure is called a `'static` one, and borrows `self`. It runs on a stack that `execute` below
        // brings to its end, or unwinds, before it returns.
        let main: Job = unsafe { std::mem::transmute(main) };
        // SAFETY: `engine` outlives this function, and `execute` leaves no thread behind.
        let _inside = unsafe { Inside::new(engine) };
        engine.execute(main, Op { kind: OpKind::Spawn, object: None, class: None, site: self.site });
        let inner = &mut *engine.inner.borrow_mut();
        let exec = &mut inner.exec;
        let fault = exec.fault.take()?;
        Some(Found {
            fault,
            exact: exec.steps.iter().map(|s| s.tid).collect(),
            preemptions: exec.steps.iter().filter(|s| s.preempts).count(),
            learnt: inner.learnt.clone(),
        })
    }

    /// Makes a failure out of what was found, unless there is one like it.
    fn keep(&mut self, found: Found) {
        if found.fault.kind == FailureKind::Nondeterminism {
            let text = String::new();
            self.push(found.fault, text, Vec::new(), found.preemptions);
            return;
        }
        if self.report.failures.iter().any(|f| f.kind == found.fault.kind && f.message == found.fault.message)
        {
            return;
        }
        let best = self.smaller(&found).unwrap_or(found);
        let first = self.again(&best, true);
        let second = self.again(&best, false);
        let same = first.history == second.history && first.message == second.message;
        let as_found = best.fault.kind == FailureKind::LockOrder
            || first.message.as_deref() == Some(&best.fault.message);
        if !same || !as_found {
            let message = format!(
                "the same schedule, run again, did not end the same way; it had failed with: {}: {}",
                best.fault.kind, best.fault.message
            );
            let fault = Fault { kind: FailureKind::Nondeterminism, message };
            self.push(fault, first.text, first.events, best.preemptions);
            return;
        }
        self.push(best.fault, first.text, first.events, best.preemptions);
    }

    fn push(&mut self, fault: Fault, replay: String, schedule: Vec<Event>, preemptions: usize) {
        let Fault { kind, message } = fault;
        let execution = self.report.executions;
        self.report.failures.push(Failure { kind, message, replay, schedule, preemptions, execution });
    }

    /// The same failure with fewer preemptions, if it is found within the budget.
    fn smaller(&self, found: &Found) -> Option<Found> {
        let bounded =
            matches!(self.config.strategy, Strategy::Preemptions(_) | Strategy::CachedPreemptions(_));
        let mut left = self.config.minimise;
        for bound in 0..found.preemptions as u32 {
            if bounded || left == 0 {
                break;
            }
            let engine =
                self.engine(Search::Path(Path::new(Reduction::None, Some(bound), true)), &found.learnt);
            while left > 0 {
                left -= 1;
                let better = self.execute(&engine);
                if engine.inner.borrow_mut().starts_over() {
                    continue;
                }
                if let Some(better) = better {
                    let same = better.fault.message == found.fault.message;
                    if better.fault.kind == found.fault.kind
                        && (same || better.fault.kind == FailureKind::Deadlock)
                    {
                        return Some(better);
                    }
                    // Told once, an order is not told again: alone, a later execution would fail by it first.
                    engine.inner.borrow_mut().forget_orders();
                }
                let inner = &mut *engine.inner.borrow_mut();
                if !inner.search.next(&inner.exec) {
                    break;
                }
            }
        }
        None
    }

    /// Runs a schedule again, and writes down everything if `events` are wanted.
    fn again(&self, found: &Found, events: bool) -> Again {
        let engine = self.engine(Search::Exact(Exact::new(found.exact.clone())), &found.learnt);
        {
            let inner = &mut *engine.inner.borrow_mut();
            // An order that an earlier execution was blamed for is no news in this one.
            inner.orders = found.fault.kind == FailureKind::LockOrder;
            inner.exec.remembering = true;
            inner.exec.events = events.then(Vec::new);
        }
        let found = self.execute(&engine);
        let Inner { exec, learnt, .. } = &mut *engine.inner.borrow_mut();
        Again {
            history: exec.history,
            message: found.map(|found| found.fault.message),
            text: replay::write(&learnt.watched, &replay::turns(exec)),
            events: exec.events.take().unwrap_or_default(),
        }
    }

    fn replay(self, schedule: replay::Schedule) -> Replay {
        let turns = schedule.turns;
        let engine = self.engine(Search::Follow(Follow::new(turns.clone())), &self.learnt);
        {
            let inner = &mut *engine.inner.borrow_mut();
            inner.learnt.watched = schedule.watched;
            inner.exec.remembering = true;
            inner.exec.events = Some(Vec::new());
        }
        let mut found = self.execute(&engine);
        while engine.inner.borrow_mut().starts_over() {
            // It takes a run to learn which unlocks are steps.
            engine.inner.borrow_mut().search = Search::Follow(Follow::new(turns.clone()));
            found = self.execute(&engine);
        }
        let inner = &mut *engine.inner.borrow_mut();
        let failure = found.map(|found| Failure {
            kind: found.fault.kind,
            message: found.fault.message,
            replay: replay::write(&inner.learnt.watched, &replay::turns(&inner.exec)),
            schedule: inner.exec.events.take().unwrap_or_default(),
            preemptions: found.preemptions,
            execution: 1,
        });
        let missed = match &mut inner.search {
            Search::Follow(follow) => std::mem::take(&mut follow.missed),
            _ => Vec::new(),
        };
        Replay { failure, missed }
    }
}

/// A second run of a schedule.
struct Again {
    history: u64,
    message: Option<String>,
    text: String,
    events: Vec<Event>,
}
