// SPDX-License-Identifier: MIT OR Apache-2.0
//! One driver beside one path: a small machine, a process, a device that uses one page of it, and every order of their
//! steps up to a bound.
//!
//! Threads: `mm` runs the path on CPU 1; `device` is the driver's user on CPU 0 and the hardware too: it reads and then
//! writes (where it may), and gets the page again whenever the driver says so; `cpu`, where the path has one, is another
//! thread of the process on CPU 2, which stores through whatever is mapped. When all are done the driver's work items run, and
//! the device uses the page once more: what is stale then is stale for ever.
//!
//! Two list notifiers look on: one behind the driver's in the list (its start comes after the driver's) and one before it
//! (its end comes before the driver's).

mod facts;
mod starve;
mod watch;

pub use facts::{Facts, Refusal};
pub use starve::{Starved, Sweep, Wrong, starve};

use crate::oracle::{Oracle, Rule, mapped};
use crate::path::{Path, Stage, User, X, page};
use drivers::{
    BindError, Binding, Callback, Callbacks, Device, DeviceFault, DeviceOp, Driver, DriverError, Kind,
    Options, SubmitError, WorkMode,
};
use interleave::explore::{self, Config, Failure, Report, Strategy};
use interleave::{MaySleep, scope};
use mmu_notifier::{Access, Range};
use softmm::{FaultError, KernelProfile, Machine, Mm};
use starve::Shortage;
use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use watch::{Before, Behind};

/// What is checked against what.
#[derive(Debug, Clone, Copy)]
pub struct Cell {
    /// The driver.
    pub kind: &'static Kind,
    /// How it binds the page.
    pub access: Access,
    /// What the mm does.
    pub path: &'static Path,
    /// In which kernel.
    pub profile: KernelProfile,
    /// Callbacks that are switched on.
    pub callbacks: Callbacks,
}

impl Cell {
    /// The same with other callbacks switched on.
    pub fn with(&self, callbacks: Callbacks) -> Cell {
        Cell { callbacks, ..*self }
    }

    /// `driver access path profile`, as the command line takes it.
    pub fn name(&self) -> String {
        let access = if self.access == Access::Write { "write" } else { "read" };
        format!("{}/{access}/{}/{}", self.kind.name, self.path.name, self.profile.name)
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.name())
    }
}

/// The answer for one cell.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// What was broken: each rule once, with a schedule that shows it.
    pub failures: Vec<(Rule, Failure)>,
    /// Failures that are no verdict: the model's own.
    pub odd: Vec<Failure>,
    /// What the executions saw.
    pub facts: Facts,
    /// How far the exploration came.
    pub report: Report,
}

/// Explores a cell.
pub fn explore(cell: &Cell, strategy: Strategy, time: Option<Duration>) -> Outcome {
    explore_within(cell, strategy, u64::MAX, time)
}

/// Explores a cell in at most so many executions.
pub fn explore_within(cell: &Cell, strategy: Strategy, executions: u64, time: Option<Duration>) -> Outcome {
    let mut config = Config::new(strategy).failures(3).minimise(200).max_executions(executions);
    if let Some(time) = time {
        config = config.max_time(time);
    }
    explore_with(cell, &config)
}

fn explore_with(cell: &Cell, config: &Config) -> Outcome {
    let facts = RefCell::new(Facts::default());
    let report = explore::explore(config, |cx| execute(cx, cell, &facts));
    Outcome::new(report, facts.into_inner())
}

impl Outcome {
    fn new(mut report: Report, facts: Facts) -> Outcome {
        let (mut failures, mut odd) = (Vec::<(Rule, Failure)>::new(), Vec::new());
        for failure in std::mem::take(&mut report.failures) {
            match Rule::of_failure(failure.kind, &failure.message) {
                Some(rule) if failures.iter().all(|(r, _)| *r != rule) => failures.push((rule, failure)),
                Some(_) => {}
                None => odd.push(failure),
            }
        }
        Outcome { failures, odd, facts, report }
    }
}

/// Runs the schedule `text` of a cell again. `None` if it is not a schedule; then what went wrong, if anything did.
pub fn replay(cell: &Cell, text: &str) -> Option<Option<Failure>> {
    let facts = RefCell::new(Facts::default());
    let config = Config::new(Strategy::Preemptions(0));
    let replay = explore::replay(&config, text, |cx| execute(cx, cell, &facts));
    replay.map(|replay| replay.failure)
}

/// Small, so that an execution is short.
fn machine(cell: &Cell) -> Arc<Machine> {
    Machine::new(softmm::Config {
        frames: 10,
        tables: 12,
        swap_slots: 3,
        cpus: if cell.path.other.is_some() { 3 } else { 2 },
        words_per_page: 2,
        gather_batch: 8,
        fault_around: 1,
        profile: cell.profile,
    })
}

/// One execution; inside or outside an exploration.
pub fn execute(cx: &mut MaySleep<'_>, cell: &Cell, facts: &RefCell<Facts>) {
    execute_in(cx, cell, facts, None);
}

/// One execution, in which an allocation may fail.
fn execute_in(cx: &mut MaySleep<'_>, cell: &Cell, facts: &RefCell<Facts>, shortage: Option<&Shortage>) {
    let machine = machine(cell);
    let Ok(user) = machine.new_mm() else { return };
    let stage = Stage::new(machine.clone(), user, cell.path.file);
    let intervals = cell.kind.callbacks.contains(Callback::Invalidate);
    let oracle = Arc::new(Oracle::new(cell.kind.holds, cell.path.explicit, !intervals));
    (cell.path.prepare)(cx, &stage);
    if let Some(shortage) = shortage {
        shortage.begin(&machine);
    }
    let behind = stage.mm.notifiers().register(cx, Arc::new(Behind(oracle.clone())));
    let device = Device::new(oracle.clone());
    let options = Options { callbacks: cell.callbacks, work: WorkMode::Manual, ..Options::default() };
    let refused = |refusal| {
        facts.borrow_mut().refused = Some(refusal);
        if let Some(shortage) = shortage {
            shortage.refused(refusal);
        }
    };
    let closed = match (cell.kind.open)(cx, &stage.mm, &device, options) {
        Err(error) => {
            refused(Refusal::Open(error));
            None
        }
        Ok(driver) => {
            let before = stage.mm.notifiers().register(cx, Arc::new(Before(oracle.clone())));
            match use_once(cx, cell, &*driver) {
                Err(refusal) => refused(refusal),
                Ok(binding) => {
                    let binding = race(cx, cell, &stage, &*driver, binding, &oracle);
                    if cell.path.user != User::Closes {
                        judge_end(cx, cell, &stage, &*driver, binding, &oracle);
                    }
                }
            }
            driver.close(cx);
            let counts = driver.counts();
            facts.borrow_mut().add(&counts);
            if let Ok(before) = before {
                let _ = before.unregister(cx);
            }
            Some((driver, counts))
        }
    };
    if let Ok(behind) = behind {
        let _ = behind.unregister(cx);
    }
    end(cx, stage, &oracle);
    if let Some((driver, counts)) = closed {
        oracle.judge_silence(&counts, &driver.counts());
    }
    // The driver has let go of the mm.
    let (tables, slots) = (machine.tables_in_use(), machine.swap().in_use(cx));
    if tables + slots > 0 {
        let what = format!("{tables} page tables and {slots} swap slots are never free again");
        oracle.broken(Rule::Frames, what);
    }
    if let Some(shortage) = shortage {
        shortage.end(&machine);
    }
}

fn bind(cx: &mut MaySleep<'_>, cell: &Cell, driver: &dyn Driver) -> Result<Binding, BindError> {
    let range = Range::new(X << 12, cell.path.pages << 12).unwrap_or(Range::page(page(X)));
    driver.bind(cx, range, cell.access)
}

/// Binds the page and uses it, so that the path finds a device that has it.
fn use_once(cx: &mut MaySleep<'_>, cell: &Cell, driver: &dyn Driver) -> Result<Option<Binding>, Refusal> {
    let binding = bind(cx, cell, driver).map_err(Refusal::Bind)?;
    // A read: KSM's pages must stay equal.
    driver.access(cx, binding, DeviceOp::Read(X << 12)).map_err(Refusal::Access)?;
    if cell.access == Access::Write && !cell.path.writable {
        driver.access(cx, binding, DeviceOp::Write(DEVICE_WORD, 0)).map_err(Refusal::Access)?;
    }
    if cell.path.user != User::Binds {
        return Ok(Some(binding));
    }
    // It was bound a moment ago.
    let _ = driver.unbind(cx, binding);
    Ok(None)
}

const DEVICE_WORD: u64 = (X << 12) + 8;

/// What the device does, once.
fn turn(
    cx: &mut MaySleep<'_>,
    cell: &Cell,
    driver: &dyn Driver,
    binding: Binding,
    value: u64,
) -> Result<(), DriverError> {
    driver.access(cx, binding, DeviceOp::Read(X << 12))?;
    if cell.access == Access::Write {
        driver.access(cx, binding, DeviceOp::Write(DEVICE_WORD, value))?;
    }
    Ok(())
}

/// The device's user. A device that is refused has done nothing: what it may not be refused is judged at the end.
fn user(
    cx: &mut MaySleep<'_>,
    cell: &Cell,
    driver: &dyn Driver,
    binding: Option<Binding>,
) -> Option<Binding> {
    let binding = binding.or_else(|| bind(cx, cell, driver).ok())?;
    let _ = turn(cx, cell, driver, binding, 101);
    match cell.path.user {
        User::Uses | User::Binds => return Some(binding),
        User::Unbinds => drop(driver.unbind(cx, binding)),
        User::Closes => driver.close(cx),
    }
    None
}

/// The binding that there is afterwards.
fn race(
    cx: &mut MaySleep<'_>,
    cell: &Cell,
    stage: &Stage,
    driver: &dyn Driver,
    binding: Option<Binding>,
    oracle: &Oracle,
) -> Option<Binding> {
    (cell.path.bound)(cx, stage);
    let frame = |mm: &Mm| mapped(mm, page(X)).map(|(frame, _)| frame);
    let before = frame(&stage.mm);
    let after = scope(cx, |s, cx| {
        s.spawn("mm", |cx| (cell.path.run)(cx, stage));
        let device = s.spawn("device", |cx| user(cx, cell, driver, binding));
        if let Some(other) = cell.path.other {
            s.spawn("cpu", move |cx| other(cx, stage));
        }
        device.join(cx).ok().flatten()
    });
    oracle.settle();
    while driver.run_work(cx) {}
    oracle.judge_range(page(X), before, frame(&stage.mm));
    after
}

fn judge_end(
    cx: &mut MaySleep<'_>,
    cell: &Cell,
    stage: &Stage,
    driver: &dyn Driver,
    binding: Option<Binding>,
    oracle: &Oracle,
) {
    let both = Callbacks::of(&[Callback::Start, Callback::End]);
    if driver.kind().callbacks.intersection(cell.callbacks).intersection(both) == both {
        oracle.judge_pairing(&driver.counts());
    }
    if binding.is_none() && !cell.path.explicit {
        judge_written(cx, cell, stage, oracle);
    }
    let Some(binding) = binding.or_else(|| bind(cx, cell, driver).ok()) else { return };
    // A worker's error of before is told once.
    let last = (0..3).map(|_| turn(cx, cell, driver, binding, 102)).find(Result::is_ok);
    let last = last.unwrap_or_else(|| turn(cx, cell, driver, binding, 102));
    if let Err(error) = last
        && cell.path.leaves_memory
        && stands_still(&error)
    {
        oracle.broken(Rule::Liveness, format!("nothing goes on any more, and still: {error}"));
    }
    let follows = driver.kind().callbacks.is_empty();
    if last.is_ok() && !(cell.path.explicit && follows) {
        judge_written(cx, cell, stage, oracle);
    }
}

/// Has the device not got what the process could have? Not so if what is mapped by then is memory that nobody can hold.
fn stands_still(error: &DriverError) -> bool {
    match error {
        DriverError::Device(DeviceFault::Refused { source: FaultError::NotPinnable(_), .. })
        | DriverError::Submit(SubmitError::Fault(FaultError::NotPinnable(_))) => false,
        DriverError::Device(DeviceFault::GaveUp { .. } | DeviceFault::Refused { .. }) => true,
        DriverError::Submit(error) => matches!(error, SubmitError::Again | SubmitError::Fault(_)),
        DriverError::Device(_) => false,
    }
}

/// Does the CPU read what the device wrote last?
fn judge_written(cx: &mut MaySleep<'_>, cell: &Cell, stage: &Stage, oracle: &Oracle) {
    if cell.path.leaves_memory
        && let Some(written) = oracle.written(page(X), 1)
        && let Ok(read) = stage.machine.cpus()[1].load(cx, &stage.mm, DEVICE_WORD)
        && read != written
    {
        oracle.broken(Rule::Dirty, format!("the device wrote {written} and the CPU reads {read}"));
    }
}

/// Ends all processes and counts the frames.
fn end(cx: &mut MaySleep<'_>, stage: Stage, oracle: &Oracle) {
    let Stage { machine, mm, file, user, children } = stage;
    for child in children.into_inner() {
        child.mmput(cx);
    }
    if let Some(user) = user.into_inner() {
        user.mmput(cx);
    }
    drop((mm, file));
    // What a locked page left behind in the swap cache is reclaim's to find, as in the kernel.
    for frame in machine.swap_cache(cx) {
        machine.reclaim_page(cx, frame, true);
    }
    let (free, total) = (machine.frames().free_frames(), machine.frames().total_frames());
    if free != total {
        oracle.broken(Rule::Frames, format!("{} of {total} frames are never free again", total - free));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path;

    fn cell(kind: &'static Kind, access: Access, path: &str, profile: KernelProfile) -> Cell {
        let path = path::named(path).expect("a path");
        Cell { kind, access, path, profile, callbacks: Callbacks::ALL }
    }

    fn rules(cell: &Cell, bound: u32) -> Vec<Rule> {
        let outcome = explore(cell, Strategy::Preemptions(bound), None);
        assert!(outcome.odd.is_empty(), "{cell}: {}", outcome.odd[0]);
        assert!(outcome.facts.accesses > 0, "{cell}: {:?}", outcome.facts);
        if let Some((_, failure)) = outcome.failures.first() {
            let again = replay(cell, &failure.replay).flatten().expect("the schedule fails again");
            assert_eq!(again.message, failure.message, "{cell}");
        }
        outcome.failures.iter().map(|(rule, _)| *rule).collect()
    }

    #[test]
    fn the_start_gap_is_found_and_a_sequence_closes_it() {
        let gap = |kind| rules(&cell(kind, Access::Write, "dontneed", KernelProfile::V3_16), 1);
        assert_eq!(gap(&drivers::i915_v3_16::MENDED), [Rule::Coherence]);
        assert_eq!(gap(&drivers::i915_v5_13::KIND), []);
    }

    #[test]
    fn without_the_pair_a_clean_pinned_page_is_lost_to_ksm() {
        let kind = &drivers::i915_v3_16::MENDED;
        let lost = |profile| rules(&cell(kind, Access::Write, "ksm-clean", profile), 0);
        assert_eq!(lost(KernelProfile::UNWRAPPED_A), [Rule::Coherence]);
        assert_eq!(lost(KernelProfile::V3_16), []);
    }

    #[test]
    fn what_is_not_pinned_and_has_no_change_pte_needs_the_pair() {
        let kind = &drivers::kvm_v6_18::KIND;
        let used = |profile| rules(&cell(kind, Access::Write, "ksm-replace", profile), 0);
        assert!(used(KernelProfile::UNWRAPPED_A).contains(&Rule::MemorySafety));
        assert_eq!(used(KernelProfile::V3_16), []);
    }
}
