// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a driver costs: callbacks, pages unbound, pages got again and faults for one operation of the mm, and the time
//! that its callbacks take.
//!
//! Nothing is explored: one thread binds, uses, runs the path on plain locks, and uses again. The counts are exact and
//! depend on nothing; the times are the machine's.

use crate::path::{Stage, X, range};
use crate::scenario::Cell;
use drivers::{Binding, Callback, Callbacks, Counts, Device, DeviceOp, Driver, Options, WorkMode};
use interleave::MaySleep;
use mmu_notifier::Access;
use softmm::Machine;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What one operation costs a driver.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Operation {
    /// Callbacks run, by kind.
    pub callbacks: [u64; Callback::ALL.len()],
    /// Pages taken from the device.
    pub unbinds: u64,
    /// Pages got again afterwards.
    pub repins: u64,
    /// Faults of the device afterwards.
    pub faults: u64,
}

impl Operation {
    fn between(before: &Counts, after: &Counts) -> Operation {
        Operation {
            callbacks: std::array::from_fn(|i| after.callbacks[i] - before.callbacks[i]),
            unbinds: after.unbinds - before.unbinds,
            repins: after.repins - before.repins,
            faults: after.faults - before.faults,
        }
    }

    /// Callbacks of all kinds.
    pub fn all_callbacks(&self) -> u64 {
        self.callbacks.iter().sum()
    }

    pub(crate) fn add(&mut self, other: &Operation) {
        for (sum, more) in self.callbacks.iter_mut().zip(other.callbacks) {
            *sum += more;
        }
        self.unbinds += other.unbinds;
        self.repins += other.repins;
        self.faults += other.faults;
    }
}

/// Times of one operation, medians.
#[derive(Debug, Clone, Copy, Default)]
pub struct Times {
    /// The operation without the driver.
    pub alone: Duration,
    /// With it.
    pub watched: Duration,
    /// The callbacks, of all kinds together.
    pub callbacks: Duration,
    /// The device's next use: pages got again, faults.
    pub next_use: Duration,
}

/// One run of a path beside a driver.
struct Run {
    operation: Operation,
    path: Duration,
    callbacks: Duration,
    next_use: Duration,
}

fn stage(cell: &Cell) -> Option<Stage> {
    let machine = Machine::new(softmm::Config {
        frames: 64,
        tables: 32,
        swap_slots: 16,
        words_per_page: 2,
        profile: cell.profile,
        ..softmm::Config::default()
    });
    let user = machine.new_mm().ok()?;
    Some(Stage::new(machine, user, cell.path.file))
}

/// `None`: the driver does not take this memory.
fn run(cx: &mut MaySleep<'_>, cell: &Cell, measure: bool) -> Option<Run> {
    let stage = stage(cell)?;
    (cell.path.prepare)(cx, &stage);
    let device = Device::new(Arc::new(()));
    let options =
        Options { callbacks: cell.callbacks, work: WorkMode::Manual, measure, ..Options::default() };
    let driver = (cell.kind.open)(cx, &stage.mm, &device, options).ok()?;
    let run = bound(cx, cell, &stage, &*driver);
    driver.close(cx);
    run
}

fn bound(cx: &mut MaySleep<'_>, cell: &Cell, stage: &Stage, driver: &dyn Driver) -> Option<Run> {
    let binding = driver.bind(cx, range(X), cell.access).ok()?;
    driver.access(cx, binding, DeviceOp::Read(X << 12)).ok()?;
    (cell.path.bound)(cx, stage);
    // What `bound` did is not what the operation costs: the device is back at work before it.
    // It only reads: KSM merges what is equal.
    turn(cx, driver, binding, Access::Read);
    let (before, spent) = (driver.counts(), spent(driver));
    let began = Instant::now();
    (cell.path.run)(cx, stage);
    let path = began.elapsed();
    let callbacks = self::spent(driver).saturating_sub(spent);
    let began = Instant::now();
    while driver.run_work(cx) {}
    turn(cx, driver, binding, cell.access);
    let next_use = began.elapsed();
    Some(Run { operation: Operation::between(&before, &driver.counts()), path, callbacks, next_use })
}

fn turn(cx: &mut MaySleep<'_>, driver: &dyn Driver, binding: Binding, access: Access) {
    // Refused where the path has taken the memory away: that costs nothing more.
    let _ = driver.access(cx, binding, DeviceOp::Read(X << 12));
    if access == Access::Write {
        let _ = driver.access(cx, binding, DeviceOp::Write((X << 12) + 8, 9));
    }
}

fn spent(driver: &dyn Driver) -> Duration {
    let counters = driver.context().counters();
    Callback::ALL.into_iter().map(|callback| counters.time(callback)).sum()
}

/// What the path of `cell` costs its driver, once; `None` if the driver does not take this memory.
pub fn operation(cx: &mut MaySleep<'_>, cell: &Cell) -> Option<Operation> {
    run(cx, cell, false).map(|run| run.operation)
}

/// How long it takes: the medians of `rounds` runs on plain locks. `None` as in [`operation`].
pub fn times(cx: &mut MaySleep<'_>, cell: &Cell, rounds: usize) -> Option<Times> {
    let deaf = cell.with(Callbacks::NONE);
    let (mut alone, mut watched, mut callbacks, mut next_use) = (vec![], vec![], vec![], vec![]);
    for _ in 0..rounds.max(1) {
        let stage = stage(&deaf)?;
        (cell.path.prepare)(cx, &stage);
        (cell.path.bound)(cx, &stage);
        let began = Instant::now();
        (cell.path.run)(cx, &stage);
        alone.push(began.elapsed());
        let run = run(cx, cell, true)?;
        watched.push(run.path);
        callbacks.push(run.callbacks);
        next_use.push(run.next_use);
    }
    let median = |mut times: Vec<Duration>| {
        times.sort_unstable();
        times[times.len() / 2]
    };
    Some(Times {
        alone: median(alone),
        watched: median(watched),
        callbacks: median(callbacks),
        next_use: median(next_use),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::Row;
    use crate::path::named;
    use softmm::KernelProfile;

    fn cost(kind: &'static drivers::Kind, path: &str, profile: KernelProfile) -> Operation {
        let cell = Row { kind, access: Access::Read }.cell(named(path).expect("a path"), profile);
        MaySleep::enter(|cx| operation(cx, &cell)).expect("the driver takes it")
    }

    #[test]
    fn the_pair_costs_a_device_its_page_and_change_pte_alone_does_not_reach_who_has_none() {
        let kind = &drivers::design_exact_start_only::KIND;
        let wrapped = cost(kind, "cow-zero", KernelProfile::V3_16);
        let start = Callback::Start as usize;
        assert_eq!((wrapped.callbacks[start], wrapped.unbinds, wrapped.repins), (1, 1, 1), "{wrapped:?}");
        let bare = cost(kind, "cow-zero", KernelProfile::UNWRAPPED_A);
        assert_eq!((bare.all_callbacks(), bare.unbinds), (0, 0), "{bare:?}");
    }

    #[test]
    fn no_time_is_spent_in_callbacks_that_there_are_not() {
        let row = Row { kind: &drivers::vfio::KIND, access: Access::Read };
        let cell = row.cell(named("cow-zero").expect("a path"), KernelProfile::V3_16);
        let times = MaySleep::enter(|cx| times(cx, &cell, 3)).expect("the driver takes it");
        assert_eq!(times.callbacks, Duration::ZERO);
    }
}
