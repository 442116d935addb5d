// SPDX-License-Identifier: MIT OR Apache-2.0
//! Address reuse across threads: never stale with the probe, and sometimes without, or the race has no teeth.

#[macro_use]
mod uffd_support;

use std::time::Duration;

use hostmm::race::{Length, Nothing, Outcome, RaceError, Way, churn, has_two_cpus, repeat, reuse};
use hostmm::testing::{PATIENCE, skip_for};
use hostmm::uffd::raced::{Ordered, Strict};
use uffd_support::*;

/// What must never be stale.
fn stale(race: impl Fn(u64) -> Result<Outcome, RaceError>) -> u64 {
    let length = Length { rounds: 20_000, time: Duration::from_secs(10), until_stale: false };
    let out = repeat(length, race).unwrap();
    println!("{out:?}");
    out.stale
}

/// The control: without the probe some round is stale.
fn has_teeth(race: impl Fn(u64) -> Result<Outcome, RaceError>) {
    if !has_two_cpus() {
        skip_for("two_cpus", "the control has no race to lose");
        return;
    }
    let control = repeat(Length { rounds: 1, time: PATIENCE, until_stale: true }, race).unwrap();
    assert!(control.stale > 0, "the control has no teeth: {control:?}");
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
