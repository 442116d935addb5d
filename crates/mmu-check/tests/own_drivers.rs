// SPDX-License-Identifier: MIT OR Apache-2.0
//! What people embed, judged as what the kernel has: the cache and the objects of the crate `userptr` beside every path.

use drivers::{Callbacks, Kind};
use interleave::MaySleep;
use interleave::explore::Strategy;
use mmu_check::answer::rows_of;
use mmu_check::driver::{self, OWN};
use mmu_check::mutate::{Limits, Subject, mutate};
use mmu_check::path::{PATHS, Path, named};
use mmu_check::scenario::{Cell, Outcome, explore};
use mmu_notifier::Access;
use softmm::KernelProfile;

fn explored(cell: &Cell, bound: u32) -> Outcome {
    let outcome = explore(cell, Strategy::Preemptions(bound), None);
    assert!(outcome.odd.is_empty() && (outcome.report.exhausted || !outcome.failures.is_empty()), "{cell}");
    outcome
}

fn holds(cell: &Cell, bound: u32) -> Outcome {
    let outcome = explored(cell, bound);
    assert!(outcome.failures.is_empty(), "{cell}: {}", outcome.failures[0].1);
    outcome
}

fn write(kind: &'static Kind, path: &'static Path, profile: KernelProfile) -> Cell {
    Cell { kind, access: Access::Write, path, profile, callbacks: Callbacks::ALL }
}

#[test]
fn in_their_own_kernel_no_path_breaks_a_rule() {
    for row in OWN.iter().copied().flat_map(rows_of) {
        let mut used = 0;
        for path in PATHS {
            let outcome = holds(&row.cell(path, KernelProfile::V6_18), 0);
            used += u64::from(outcome.facts.accesses > 0);
        }
        // Memory that may not be written, or not be pinned for it, is refused.
        assert!(used >= 17, "{}: only {used} paths met a device at work", row.name());
    }
}

#[test]
fn no_order_with_one_preemption_shows_what_was_given_up() {
    for kind in OWN {
        for path in ["dontneed", "munmap", "dontneed-close"].into_iter().filter_map(named) {
            let outcome = holds(&write(kind, path, KernelProfile::V6_18), 1);
            assert!(outcome.report.executions > 100, "only {}", outcome.report.executions);
        }
    }
}

/// Where a pin does not keep copy-on-write away (before 5.19) a device can be parted from the process, and then it was so
/// under a lease: what was asked for after the change is never the past.
#[test]
fn where_pins_do_not_hold_what_is_left_behind_is_a_lease() {
    for kind in [&driver::cache::KIND, &driver::objects::KIND] {
        for profile in [KernelProfile::V3_16, KernelProfile::UNWRAPPED_A] {
            for (path, access) in [("uprobe-remove", Access::Write), ("xip", Access::Read)] {
                let path = named(path).expect("a path");
                let cell = Cell { access, ..write(kind, path, profile) };
                assert!(!explored(&cell, 1).failures.is_empty(), "{cell}");
                let given_up: &'static Path = Box::leak(Box::new(Path { explicit: true, ..*path }));
                holds(&Cell { path: given_up, ..cell }, 1);
            }
        }
    }
}

#[test]
fn deaf_they_show_the_past() {
    for kind in OWN {
        for path in ["dontneed", "munmap"].into_iter().filter_map(named) {
            let deaf = write(kind, path, KernelProfile::V6_18).with(Callbacks::NONE);
            assert!(!explored(&deaf, 1).failures.is_empty(), "{} {}", kind.name, path.name);
        }
    }
}

/// The one question on which everything rests, at each use; the others save work or speak of the past.
#[test]
fn without_its_check_each_is_noticed() {
    let checks = [
        (&driver::cache::KIND, "retry check in stands"),
        (&driver::cache::KIND, "retry check in doubted"),
        (&driver::objects::KIND, "retry check in is_current"),
        (&driver::objects::EXACT, "sequence bump in invalidate"),
    ];
    for (kind, check) in checks {
        let paths = &["dontneed", "munmap"];
        let kinds: &[&Kind] = &*Box::leak(Box::new([kind]));
        let subject = Subject { kinds, profiles: &[KernelProfile::V6_18], paths, scenes: &[] };
        let mutation = MaySleep::enter(|cx| mutate(cx, &[subject], &Limits::default(), &|_, _| ()));
        assert!(mutation.left_out.is_empty(), "{}: it breaks by itself", kind.name);
        let fate = mutation.fates.iter().find(|fate| fate.off.to_string().starts_with(check));
        let fate = fate.unwrap_or_else(|| panic!("{}: no {check}", kind.name));
        assert!(fate.noticed.is_some(), "{}: {} survived", kind.name, fate.off);
    }
}
