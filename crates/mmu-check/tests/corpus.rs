// SPDX-License-Identifier: MIT OR Apache-2.0
//! Each bug of the corpus is found where it is, by a schedule that fails again, and not where it was mended.

use mmu_check::corpus::{BUGS, ELSEWHERE, Finding, Found};
use mmu_check::explain::{LINES, explain, lanes};
use mmu_check::scenario::replay;
use std::collections::BTreeSet;
use std::time::Duration;

/// Preemptions that a search goes up to.
const BOUND: u32 = 2;
/// Far more than a search takes.
const TIME: Option<Duration> = Some(Duration::from_secs(60));
/// For each cell in which there must be nothing. `userptr check --all` goes on to the end.
const SILENT_TIME: Option<Duration> = Some(Duration::from_secs(2));

#[test]
fn each_bug_is_found_and_its_schedule_fails_again() {
    let mut missed = Vec::new();
    for bug in BUGS {
        match bug.find(BOUND, TIME).expect("the path is there") {
            Found::Broken(cell, rule, failure) => {
                let again = replay(&cell, &failure.replay).flatten().expect("the schedule fails again");
                assert_eq!(again.message, failure.message, "{}", bug.id);
                let diagram = lanes(&failure);
                assert!(diagram.lines().count() <= LINES, "{}:\n{diagram}", bug.id);
                let text = explain(&cell, rule, &failure);
                assert!(text.contains(rule.name()) && text.contains(&failure.replay), "{text}");
            }
            Found::Dead(callback, run) => assert!(run > 0, "{}: {callback}", bug.id),
            Found::Nothing(cell) => missed.push(format!("{} {cell}", bug.id)),
        }
    }
    assert!(missed.is_empty(), "{missed:#?}");
}

#[test]
fn nothing_is_found_where_a_bug_was_mended() {
    let (mut wrong, mut seen) = (Vec::new(), BTreeSet::new());
    for bug in BUGS {
        let cell = bug.mended().expect("the path is there");
        // Several bugs were mended in the same way.
        if matches!(bug.finding, Finding::Breaks(_)) && !seen.insert(cell.name()) {
            continue;
        }
        let (cell, outcome) = bug.check_mended(1, SILENT_TIME).expect("the path is there");
        if !bug.is_mended(&outcome) {
            let failure = outcome.failures.first().map(|(rule, failure)| explain(&cell, *rule, failure));
            let odd = outcome.odd.first().map(ToString::to_string);
            let what = failure.or(odd).unwrap_or_else(|| format!("{:?}", outcome.facts));
            wrong.push(format!("{} {cell}: {what}", bug.id));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn a_number_is_either_shown_or_excused() {
    let shown: BTreeSet<&str> = BUGS.iter().map(|bug| bug.id).collect();
    let excused: BTreeSet<&str> = ELSEWHERE.iter().map(|(id, _)| *id).collect();
    assert_eq!((shown.len(), excused.len()), (BUGS.len(), ELSEWHERE.len()));
    assert!(shown.is_disjoint(&excused));
}
