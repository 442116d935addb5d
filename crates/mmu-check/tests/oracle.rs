// SPDX-License-Identifier: MIT OR Apache-2.0
//! Each rule of the oracle breaks somewhere, and holds in the cell beside it that does as much.

mod common;

use drivers::{Callback, Callbacks, Kind};
use interleave::explore::Strategy;
use mmu_check::Rule;
use mmu_check::path;
use mmu_check::scenario::{Cell, Outcome, explore, replay};
use mmu_notifier::Access;
use softmm::KernelProfile;

const V3_16: KernelProfile = KernelProfile::V3_16;
const V4_12: KernelProfile = KernelProfile::V4_12;
const V5_10: KernelProfile = KernelProfile::V5_10;
const V6_18: KernelProfile = KernelProfile::V6_18;

const I915: &Kind = &drivers::i915_v3_16::MENDED;
const AS_RELEASED: &Kind = &drivers::i915_v3_16::KIND;
const I915_5_13: &Kind = &drivers::i915_v5_13::KIND;
const SEQ: &Kind = &drivers::design_start_with_seq::KIND;
const KVM: &Kind = &drivers::kvm_v3_16::KIND;
const VFIO: &Kind = &drivers::vfio::KIND;

fn cell(kind: &'static Kind, path: &str, profile: KernelProfile, callbacks: Callbacks) -> Cell {
    let path = path::named(path).expect("a path");
    Cell { kind, access: Access::Write, path, profile, callbacks }
}

fn explored(cell: &Cell) -> Outcome {
    let outcome = explore(cell, Strategy::Preemptions(1), None);
    assert!(outcome.odd.is_empty(), "{cell}: {}", outcome.odd[0]);
    outcome
}

/// `rule` breaks in `broken`, by a schedule that breaks it again, and no rule breaks in `sound`.
fn judges(rule: Rule, broken: Cell, sound: Cell) {
    let outcome = explored(&broken);
    let found = outcome.failures.iter().find(|(found, _)| *found == rule);
    let all: Vec<_> = outcome.failures.iter().map(|(rule, failure)| (rule, &failure.message)).collect();
    let (_, failure) = found.unwrap_or_else(|| panic!("{rule} holds in {broken}: {all:?}"));
    let again = replay(&broken, &failure.replay).flatten().expect("the schedule fails again");
    assert_eq!(again.message, failure.message, "{broken}");

    let outcome = explored(&sound);
    if let Some((rule, failure)) = outcome.failures.first() {
        panic!("{rule} breaks in {sound}: {failure}");
    }
    assert!(outcome.report.exhausted && outcome.facts.accesses > 0, "{sound}: {:?}", outcome.facts);
}

const ALL: Callbacks = Callbacks::ALL;

#[test]
fn coherence() {
    let sound = cell(I915_5_13, "dontneed", V6_18, ALL);
    judges(Rule::Coherence, cell(I915, "dontneed", V3_16, ALL), sound);
}

#[test]
fn write_permission() {
    let sound = cell(KVM, "writeback", KernelProfile::V4_14, ALL);
    judges(Rule::WritePermission, cell(VFIO, "writeback", V5_10, ALL), sound);
}

#[test]
fn memory_safety() {
    let deaf = cell(KVM, "dontneed", V3_16, Callbacks::NONE);
    judges(Rule::MemorySafety, deaf, cell(KVM, "dontneed", V3_16, ALL));
}

#[test]
fn isolation() {
    judges(Rule::Isolation, cell(VFIO, "fork", V3_16, ALL), cell(VFIO, "fork", V6_18, ALL));
}

#[test]
fn dirty() {
    let broken = cell(&drivers::i915_mistakes::NO_DIRTY, "swap-out-unbind", V3_16, ALL);
    judges(Rule::Dirty, broken, cell(I915, "swap-out-unbind", V3_16, ALL));
}

/// 4.19 to 5.11: whoever has started before another refuses is never told of the end.
#[test]
fn pairing() {
    let broken = cell(&beside_a_refuser::KIND, "oom-reap", V5_10, ALL);
    judges(Rule::Pairing, broken, cell(&beside_a_refuser::KIND, "oom-reap", V6_18, ALL));
}

#[test]
fn context() {
    let broken = cell(&drivers::i915_sleeping::INVALIDATE_PAGE, "swap-out", V4_12, ALL);
    let sound = cell(&drivers::i915_sleeping::INVALIDATE_PAGE, "swap-out", V3_16, ALL);
    judges(Rule::Context, broken, sound);
}

#[test]
fn locks() {
    let broken = cell(&drivers::i915_mistakes::GUP_LOCKED, "mprotect", V3_16, ALL);
    judges(Rule::Locks, broken, cell(I915, "mprotect", V3_16, ALL));
}

#[test]
fn retry() {
    let broken = cell(&drivers::kvm_v3_16::NO_RETRY, "mprotect", V3_16, ALL);
    judges(Rule::Retry, broken, cell(KVM, "mprotect", V3_16, ALL));
}

#[test]
fn lifetime() {
    judges(
        Rule::Lifetime,
        cell(&never_closed::KIND, "dontneed", V3_16, ALL),
        cell(SEQ, "dontneed", V3_16, ALL),
    );
    judges(
        Rule::Lifetime,
        cell(AS_RELEASED, "dontneed-unbind", V3_16, ALL),
        cell(SEQ, "dontneed-unbind", V3_16, ALL),
    );
}

#[test]
fn range() {
    judges(Rule::Range, cell(KVM, "oom-reap", V4_12, ALL), cell(KVM, "oom-reap", V5_10, ALL));
}

#[test]
fn liveness() {
    let endless = cell(KVM, "dontneed", V3_16, ALL.without(Callback::End));
    judges(Rule::Liveness, endless, cell(KVM, "dontneed", V3_16, ALL));
}

#[test]
fn frames() {
    let broken = cell(AS_RELEASED, "dontneed-two", V3_16, ALL);
    judges(Rule::Frames, broken, cell(SEQ, "dontneed-two", V3_16, ALL));
}

#[test]
fn a_callback_that_never_has_an_effect_is_seen() {
    let dead = |profile| {
        let outcome = explored(&cell(KVM, "ksm-replace", profile, ALL));
        assert!(outcome.facts.callbacks[Callback::ChangePte as usize] > 0);
        outcome.facts.dead().any(|callback| callback == Callback::ChangePte)
    };
    assert!(dead(V3_16), "the start has taken the translation away already");
    assert!(!dead(KernelProfile::UNWRAPPED_A));
}

/// KVM, on an mm that has another notifier, which refuses what must not block.
mod beside_a_refuser {
    use crate::common::{Around, BIND, Close};
    use drivers::{Kind, kvm_v3_16};
    use interleave::Sleep;
    use mmu_notifier::{Invalidation, MmuNotifier, Ops, WouldBlock};
    use std::sync::Arc;

    struct Refuser;

    impl MmuNotifier for Refuser {
        fn ops(&self) -> Ops {
            Ops::START
        }

        fn invalidate_range_start(&self, cx: Sleep<'_, '_>, _: &Invalidation) -> Result<(), WouldBlock> {
            if matches!(cx, Sleep::May(_)) { Ok(()) } else { Err(WouldBlock) }
        }
    }

    pub(crate) static KIND: Kind = Kind {
        name: "kvm-beside-a-refuser",
        open: |cx, mm, device, options| {
            // The list is called from its newest entry on: KVM has started when this one refuses.
            let beside = Some(mm.notifiers().register(cx, Arc::new(Refuser))?);
            let inside = (kvm_v3_16::KIND.open)(cx, mm, device, options)?;
            let close: Close = |cx, driver| driver.close(cx);
            Ok(Arc::new(Around { kind: &KIND, inside, bind: BIND, close, _beside: beside }))
        },
        ..kvm_v3_16::KIND
    };
}

/// A design that is told to close and does not.
mod never_closed {
    use crate::common::{Around, BIND, Close};
    use drivers::{Kind, design_drop_everything};
    use std::sync::Arc;

    pub(crate) static KIND: Kind = Kind {
        name: "never-closed",
        open: |cx, mm, device, options| {
            let inside = (design_drop_everything::KIND.open)(cx, mm, device, options)?;
            let close: Close = |cx, driver| {
                // It lets go of its pages, and stays registered.
                for (binding, ..) in driver.context().entries(cx) {
                    let _ = driver.unbind(cx, binding);
                }
            };
            Ok(Arc::new(Around { kind: &KIND, inside, bind: BIND, close, _beside: None }))
        },
        ..design_drop_everything::KIND
    };
}
