// SPDX-License-Identifier: MIT OR Apache-2.0
//! Switching operations off: each kind is found, noticed where it matters, and silent where it does not.

use interleave::explore::{Config, FailureKind, Mutant, SiteKind, Strategy, explore, mutated, violation};
use interleave::{LockClass, MaySleep, Mutex, SpinLock, scope};
use std::panic::Location;

static DATA: LockClass = LockClass::new("data");
static BARE: LockClass = LockClass::new("bare");

fn config() -> Config {
    Config::new(Strategy::Preemptions(1))
}

/// What can be switched off in `scenario`, of the places in this file.
fn sites(scenario: impl Fn(&mut MaySleep<'_>)) -> Vec<Mutant> {
    let report = explore(&config().find_sites(), scenario);
    report.assert_ok();
    report.sites.into_iter().filter(|mutant| mutant.site.file() == file!()).collect()
}

fn failure(mutant: Mutant, scenario: impl Fn(&mut MaySleep<'_>)) -> Option<(FailureKind, String)> {
    let report = explore(&config().without(mutant), scenario);
    report.failures.into_iter().next().map(|failure| (failure.kind, failure.message))
}

#[track_caller]
fn check() -> bool {
    !mutated(SiteKind::Retry, Location::caller())
}

fn counted(cx: &mut MaySleep<'_>) {
    let data = Mutex::new(&DATA, 0);
    scope(cx, |s, _| {
        for name in ["a", "b"] {
            s.spawn(name, |cx| *data.lock(cx) += 1);
        }
    });
    assert_eq!(data.into_inner(), 2);
}

#[test]
fn two_sections_of_a_lock_that_guards_data_are_a_race() {
    let sites = sites(counted);
    assert_eq!(sites.iter().map(|mutant| mutant.kind).collect::<Vec<_>>(), [SiteKind::Lock]);
    let (kind, message) = failure(sites[0], counted).expect("both threads pass it");
    assert_eq!(kind, FailureKind::Race);
    assert!(message.starts_with("data race on data.lock between `"), "{message}");
    assert!(message.contains(file!()), "{message}");
}

#[test]
fn a_lock_that_one_thread_takes_alone_is_not_missed() {
    let alone = |cx: &mut MaySleep<'_>| {
        let data = SpinLock::new(&DATA, 0);
        *data.lock(cx) += 1;
        scope(cx, |s, _| {
            s.spawn("a", |cx| *data.lock(cx) += 1);
        });
    };
    for mutant in sites(alone) {
        assert_eq!(failure(mutant, alone), None, "{mutant}");
    }
}

#[test]
fn a_lock_without_data_lets_both_in_and_the_scenario_shows_what_follows() {
    let guarded = |cx: &mut MaySleep<'_>| {
        let (bare, data) = (Mutex::new(&BARE, ()), SpinLock::new(&DATA, 0));
        scope(cx, |s, _| {
            for name in ["a", "b"] {
                s.spawn(name, |cx| {
                    let _bare = bare.lock(cx);
                    let read = *data.lock(cx);
                    *data.lock(cx) = read + 1;
                });
            }
        });
        assert_eq!(data.into_inner(), 2);
    };
    let sites = sites(guarded);
    assert_eq!(sites.len(), 3, "{sites:?}");
    let (kind, message) = failure(sites[0], guarded).expect("an update is lost");
    assert_eq!(kind, FailureKind::Panic);
    assert!(message.contains("left: 1"), "{message}");
    // Under the bare lock, nobody comes to the others at the same time.
    assert_eq!(failure(sites[1], guarded), None);
    assert_eq!(failure(sites[2], guarded), None);
}

#[test]
fn whoever_asks_is_told_and_only_at_the_place_that_is_off() {
    let asking = |_: &mut MaySleep<'_>| {
        let first = check();
        let second = check();
        if !first || !second {
            violation(|| format!("{first} {second}"));
        }
    };
    let sites = sites(asking);
    assert_eq!(sites.len(), 2);
    for (mutant, told) in sites.into_iter().zip(["false true", "true false"]) {
        let (kind, message) = failure(mutant, asking).expect("it is told");
        assert!(kind == FailureKind::Violation && message.starts_with(told), "{message}");
    }
    assert!(check(), "nothing is off outside of an exploration");
}
