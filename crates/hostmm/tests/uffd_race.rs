// SPDX-License-Identifier: MIT OR Apache-2.0
//! Address reuse across threads: never stale with the probe, and sometimes without, or the race has no teeth.

#[macro_use]
mod uffd_support;

use std::time::{Duration, Instant};

use hostmm::race::{Nothing, Outcome, RaceError, Way, churn, reuse};
use hostmm::testing::{self, skip_for};
use hostmm::uffd::raced::{Ordered, Strict};
use uffd_support::*;

/// Rounds for what must never be stale, if they take no longer than [`LONG`].
const ROUNDS: u64 = 20_000;
/// Where threads wait for time slices a round takes milliseconds.
const LONG: Duration = Duration::from_secs(10);
const PIECE: u64 = 200;

/// `race` in pieces of some rounds: how many of them were stale.
fn stale(race: impl Fn(u64) -> Result<Outcome, RaceError>) -> u64 {
    let (start, mut rounds, mut stale) = (Instant::now(), 0, 0);
    while rounds < ROUNDS && start.elapsed() < LONG {
        stale += race(PIECE).unwrap().stale;
        rounds += PIECE;
    }
    println!("{stale} stale of {rounds} in {:?}", start.elapsed());
    stale
}

/// The control: without the probe some round is stale.
fn has_teeth(race: impl Fn(u64) -> Result<Outcome, RaceError>) {
    if std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() == 1) {
        // The thread that unmaps wakes the monitor, which comes before whoever has been running all the time.
        skip_for("two_cpus", "the control: on one CPU the monitor comes first");
        return;
    }
    let shown = testing::until(|| (race(PIECE).unwrap().stale > 0).then_some(()));
    assert!(shown.is_some(), "the control has no teeth");
}

live!(without_a_source_every_reuse_is_stale, || {
    let out = reuse(&Nothing, Way::Munmap, 1000, 0).unwrap();
    assert_eq!(out.stale, 1000);
});

live!(reuse_while_in_munmap, || {
    let source = open();
    for hogs in [0, 3] {
        assert_eq!(stale(|rounds| reuse(&Strict(source.clone()), Way::Munmap, rounds, hogs)), 0);
    }
    has_teeth(|rounds| reuse(&Ordered(source.clone()), Way::Munmap, rounds, 0));
});

live!(reuse_while_in_mremap, || {
    let source = open();
    assert_eq!(stale(|rounds| reuse(&Strict(source.clone()), Way::Mremap, rounds, 0)), 0);
    has_teeth(|rounds| reuse(&Ordered(source.clone()), Way::Mremap, rounds, 0));
});

live!(churn_of_malloc_and_free, || {
    let source = open();
    for threads in [1, 2, 4, 8] {
        assert_eq!(stale(|rounds| churn(&Strict(source.clone()), threads, rounds)), 0);
    }
    // One thread only meets what has returned, which needs no probe.
    assert_eq!(stale(|rounds| churn(&Ordered(source.clone()), 1, rounds)), 0);
    has_teeth(|rounds| churn(&Ordered(source.clone()), 4, rounds));
    assert_eq!(source.stats().gave_up, 0);
});
