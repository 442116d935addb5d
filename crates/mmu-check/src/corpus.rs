// SPDX-License-Identifier: MIT OR Apache-2.0
//! Known bugs of this class, as cells: one in which the bug is and one in which it was mended. What breaks is computed; that
//! the first breaks something and the second nothing is what a check of the corpus holds.

use crate::path::named;
use crate::scenario::Cell;
use drivers::{Callbacks, Kind};
use mmu_notifier::Access;
use softmm::KernelProfile;

/// One bug.
#[derive(Debug, Clone, Copy)]
pub struct Bug {
    /// Its number in the catalogue.
    pub number: u32,
    /// In a line.
    pub title: &'static str,
    broken: Spec,
    mended: Option<Spec>,
}

#[derive(Debug, Clone, Copy)]
struct Spec {
    kind: &'static Kind,
    access: Access,
    path: &'static str,
    profile: KernelProfile,
    callbacks: Callbacks,
}

impl Spec {
    const fn new(kind: &'static Kind, path: &'static str, profile: KernelProfile) -> Spec {
        Spec { kind, access: Access::Write, path, profile, callbacks: Callbacks::ALL }
    }

    const fn reading(self) -> Spec {
        Spec { access: Access::Read, ..self }
    }

    const fn with(self, callbacks: Callbacks) -> Spec {
        Spec { callbacks, ..self }
    }

    fn cell(self) -> Option<Cell> {
        let Spec { kind, access, path, profile, callbacks } = self;
        named(path).map(|path| Cell { kind, access, path, profile, callbacks })
    }
}

impl Bug {
    /// Where it is.
    pub fn broken(&self) -> Option<Cell> {
        self.broken.cell()
    }

    /// Where it is not any more. `None`: it never was mended in the driver or the mm.
    pub fn mended(&self) -> Option<Cell> {
        self.mended.and_then(Spec::cell)
    }
}

const I915: &Kind = &drivers::i915_v3_16::MENDED;
const I915_5_13: &Kind = &drivers::i915_v5_13::KIND;
const KVM: &Kind = &drivers::kvm_v3_16::KIND;
const VFIO: &Kind = &drivers::vfio::KIND;
const V3_16: KernelProfile = KernelProfile::V3_16;
const V5_10: KernelProfile = KernelProfile::V5_10;
const V6_18: KernelProfile = KernelProfile::V6_18;

const fn bug(number: u32, title: &'static str, broken: Spec, mended: Spec) -> Bug {
    Bug { number, title, broken, mended: Some(mended) }
}

/// Those that this mm and these drivers can express.
pub static BUGS: &[Bug] = &[
    bug(
        1,
        "pages got between invalidate_range_start and the change",
        Spec::new(I915, "dontneed", V3_16),
        Spec::new(I915_5_13, "dontneed", V3_16),
    ),
    bug(
        23,
        "invalidate_page after the page table lock was dropped",
        Spec::new(KVM, "writeback", V3_16),
        Spec::new(KVM, "writeback", KernelProfile::V4_14),
    ),
    bug(
        24,
        "invalidate_page under the page table lock, and a mutex in it",
        Spec::new(&drivers::i915_sleeping::INVALIDATE_PAGE, "swap-out", KernelProfile::V4_12),
        Spec::new(&drivers::i915_sleeping::INVALIDATE_PAGE, "swap-out", KernelProfile::V4_14),
    ),
    bug(
        27,
        "the oom reaper tells nobody",
        Spec::new(KVM, "oom-reap", KernelProfile::V4_12),
        Spec::new(KVM, "oom-reap", V6_18),
    ),
    bug(
        47,
        "fork takes the page that a device writes",
        Spec::new(VFIO, "fork", V3_16),
        Spec::new(VFIO, "fork", V6_18),
    ),
    bug(
        51,
        "KSM looks for no pin on a page that is read-only and clean",
        Spec::new(VFIO, "ksm-clean", V5_10),
        Spec::new(VFIO, "ksm-clean", V6_18),
    ),
    bug(
        52,
        "a pin of the zero page",
        Spec::new(VFIO, "cow-zero", V5_10).reading(),
        Spec::new(VFIO, "cow-zero", V6_18).reading(),
    ),
    bug(
        54,
        "userptr without a notifier",
        Spec::new(I915, "dontneed", V3_16).with(Callbacks::NONE),
        Spec::new(I915_5_13, "dontneed", V3_16),
    ),
];

/// The bug of that number.
pub fn numbered(number: u32) -> Option<&'static Bug> {
    BUGS.iter().find(|bug| bug.number == number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::explore;
    use interleave::explore::Strategy;

    #[test]
    fn each_bug_is_found_and_gone_where_it_was_mended() {
        for bug in BUGS {
            let broken = bug.broken().expect("a path");
            let found = [0, 1, 2]
                .into_iter()
                .map(|bound| explore(&broken, Strategy::Preemptions(bound), None))
                .find(|outcome| !outcome.failures.is_empty());
            assert!(found.is_some(), "{} {broken}", bug.number);
            let mended = bug.mended().expect("a path");
            let outcome = explore(&mended, Strategy::Preemptions(1), None);
            let rules: Vec<_> = outcome.failures.iter().map(|(rule, f)| format!("{rule} {f}")).collect();
            assert!(rules.is_empty(), "{} {mended}: {}", bug.number, rules[0]);
            assert!(
                outcome.facts.accesses > 0 && outcome.facts.refused.is_none(),
                "{mended}: {:?}",
                outcome.facts
            );
        }
    }
}
