// SPDX-License-Identifier: MIT OR Apache-2.0
//! A small driver with everything switched off, one thing at a time. (`userptr mutate` does it to all.)

use drivers::Callback;
use interleave::MaySleep;
use interleave::explore::{FailureKind, SiteKind};
use mmu_check::Rule;
use mmu_check::mutate::{Fate, Limits, Mutation, Off, SUBJECTS, Subject, mutate};

fn of(driver: &str) -> Mutation {
    let subjects: Vec<Subject> = SUBJECTS.iter().filter(|s| s.name() == driver).copied().collect();
    assert_eq!(subjects.len(), 1, "{driver}");
    MaySleep::enter(|cx| mutate(cx, &subjects, &Limits::default(), &|_, _| ()))
}

#[test]
fn every_lock_and_the_flush_of_a_driver_without_callbacks_are_noticed() {
    let mutation = of("vfio-6.13");
    let kind = |fate: &Fate| match fate.off {
        Off::Site(mutant) => mutant.kind,
        Off::Callback(callback) => panic!("it has no callback {callback}"),
    };
    assert_eq!(mutation.fates.iter().filter(|fate| kind(fate) == SiteKind::Lock).count(), 4);
    assert_eq!(mutation.fates.iter().filter(|fate| kind(fate) == SiteKind::Flush).count(), 1);
    for fate in &mutation.fates {
        let noticed = fate.noticed.as_ref().unwrap_or_else(|| panic!("{} survived", fate.off));
        let expected = if kind(fate) == SiteKind::Lock { FailureKind::Race } else { FailureKind::Violation };
        assert_eq!(noticed.failure.kind, expected, "{}: {}", fate.off, noticed.failure);
    }
}

#[test]
fn who_shares_the_page_table_cannot_do_without_its_flush() {
    let mutation = of("iommu-sva-6.13");
    let fate = |off: &dyn Fn(Off) -> bool| {
        let fate = mutation.fates.iter().find(|fate| off(fate.off)).expect("it is switched off");
        fate.noticed.as_ref().and_then(|noticed| noticed.rule)
    };
    let tlbs = fate(&|off| off == Off::Callback(Callback::SecondaryTlbs));
    let flush = fate(&|off| off.to_string().starts_with("flush in arch_invalidate_secondary_tlbs at "));
    assert!(tlbs.is_some() && tlbs == flush, "{tlbs:?} {flush:?}");
    assert_eq!(fate(&|off| off == Off::Callback(Callback::Release)), Some(Rule::MemorySafety));
    assert!(mutation.enough(), "{} of {}", mutation.noticed(), mutation.fates.len());
}
