// SPDX-License-Identifier: MIT OR Apache-2.0
//! The corpus.

use super::{Bug, Finding, Spec};
use crate::oracle::Rule;
use drivers::{Callback, Callbacks, Kind};
use softmm::KernelProfile;

const I915: &Kind = &drivers::i915_v3_16::MENDED;
const I915_AS_RELEASED: &Kind = &drivers::i915_v3_16::KIND;
const I915_RO: &Kind = &drivers::i915_v3_16_ro::KIND;
const I915_5_13: &Kind = &drivers::i915_v5_13::KIND;
const SEQ: &Kind = &drivers::design_start_with_seq::KIND;
const KVM: &Kind = &drivers::kvm_v3_16::KIND;
const AMD: &Kind = &drivers::amd_iommu_v2_3_16::KIND;
const VFIO: &Kind = &drivers::vfio::KIND;

const V3_16: KernelProfile = KernelProfile::V3_16;
const V2A: KernelProfile = KernelProfile::UNWRAPPED_A;
const V2B: KernelProfile = KernelProfile::UNWRAPPED_B;
const V3_19: KernelProfile = KernelProfile::V3_19;
const V4_12: KernelProfile = KernelProfile::V4_12;
const V4_14: KernelProfile = KernelProfile::V4_14;
const V5_10: KernelProfile = KernelProfile::V5_10;
/// Reclaim looks for pins, and references still decide who may write in place.
const V5_15: KernelProfile = KernelProfile { name: "v5_15", reclaim_spares_pinned: true, ..V5_10 };
const V6_18: KernelProfile = KernelProfile::V6_18;

const NO_CHANGE_PTE: Callbacks = Callbacks::ALL.without(Callback::ChangePte);

const STALE: &[Rule] = &[Rule::Coherence, Rule::Isolation];
const LOCKS: &[Rule] = &[Rule::Locks];
const WRITES: &[Rule] = &[Rule::WritePermission];
const FREED: &[Rule] = &[Rule::MemorySafety];

const fn bug(
    id: &'static str,
    title: &'static str,
    breaks: &'static [Rule],
    broken: Spec,
    mended: Spec,
) -> Bug {
    Bug { id, title, finding: Finding::Breaks(breaks), refuses: false, broken, mended }
}

/// Those that this mm and these drivers can express.
pub static BUGS: &[Bug] = &[
    bug(
        "1",
        "pages got between invalidate_range_start and the change",
        STALE,
        Spec::new(I915, "dontneed", V3_16),
        Spec::new(I915_5_13, "dontneed", V6_18),
    ),
    bug(
        "3",
        "get_user_pages under struct_mutex, which the callback of its own copy-on-write takes again",
        LOCKS,
        Spec::new(&drivers::i915_mistakes::GUP_LOCKED, "cow", V3_16),
        Spec::new(SEQ, "cow", V3_16),
    ),
    bug(
        "4",
        "a callback revives an object that is being freed",
        &[Rule::Lifetime],
        Spec::new(I915_AS_RELEASED, "dontneed-unbind", V3_16),
        Spec::new(SEQ, "dontneed-unbind", V3_16),
    ),
    bug(
        "5",
        "pages that share an entry of the scatter list are never put",
        &[Rule::Frames, Rule::Dirty],
        Spec::new(I915_AS_RELEASED, "dontneed-two", V3_16),
        Spec::new(SEQ, "dontneed-two", V3_16),
    ),
    bug(
        "6",
        "the last mmput, and so exit_mmap, under struct_mutex",
        LOCKS,
        Spec::new(I915_AS_RELEASED, "exit-last-object", V3_16),
        Spec::new(I915, "exit-last-object", V3_16),
    ),
    bug(
        "7",
        "a callback waits for the lock of a page that its caller holds",
        LOCKS,
        Spec::new(&drivers::i915_mistakes::LOCKS_PAGE, "ksm-protect", V3_16),
        Spec::new(I915, "ksm-protect", V3_16),
    ),
    bug(
        "7c",
        "a page that the device wrote is let go clean",
        &[Rule::Dirty],
        Spec::new(&drivers::i915_mistakes::NO_DIRTY, "swap-out-unbind", V3_16),
        Spec::new(I915, "swap-out-unbind", V4_14),
    ),
    bug(
        "8",
        "the TLB of the device is not flushed before pages go back",
        FREED,
        Spec::new(&drivers::i915_mistakes::NO_FLUSH, "dontneed", V3_16),
        Spec::new(SEQ, "dontneed", V3_16),
    ),
    Bug {
        id: "17",
        title: "change_pte is dead code inside the pair",
        finding: Finding::Dead(Callback::ChangePte),
        refuses: false,
        broken: Spec::new(KVM, "cow", V3_16),
        mended: Spec::new(KVM, "cow", V2A),
    },
    bug(
        "18",
        "invalidate_page after the new page is there: another CPU writes it, the device reads the old one",
        STALE,
        Spec::new(KVM, "cow-zero", V2B).reading().with(NO_CHANGE_PTE),
        Spec::new(KVM, "cow-zero", V2B).reading(),
    ),
    bug(
        "19",
        "change_pte without a pair does not stop a fault in flight",
        &[Rule::MemorySafety, Rule::Isolation, Rule::Coherence],
        Spec::new(&drivers::kvm_v3_16::NO_BUMP, "cow-in-flight", V2A).reading(),
        Spec::new(KVM, "cow-in-flight", V2A).reading(),
    ),
    bug(
        "23",
        "invalidate_page after the page table lock was dropped",
        WRITES,
        Spec::new(KVM, "writeback", V3_16),
        Spec::new(KVM, "writeback", V4_14),
    ),
    bug(
        "24",
        "invalidate_page under the page table lock, and a mutex in it",
        &[Rule::Context],
        Spec::new(&drivers::i915_sleeping::INVALIDATE_PAGE, "swap-out", V4_12),
        Spec::new(&drivers::i915_sleeping::INVALIDATE_PAGE, "swap-out", V4_14),
    ),
    bug(
        "27",
        "the oom reaper tells nobody",
        FREED,
        Spec::new(KVM, "oom-reap", V4_12),
        Spec::new(&drivers::kvm_v6_18::KIND, "oom-reap", V6_18),
    ),
    bug(
        "37",
        "a device that walks the page table hears of lost pages, not of lost permissions",
        WRITES,
        Spec::new(&drivers::amd_iommu_invalidate_range::KIND, "writeback-alone", V3_19),
        Spec::new(&drivers::amd_iommu_invalidate_range::KIND, "writeback-alone", V6_18),
    ),
    bug(
        "41",
        "dirty COW: a forced write ends in the page cache",
        WRITES,
        Spec::new(&drivers::proc_mem::KIND, "dontneed-forced", V3_16),
        Spec::new(&drivers::proc_mem::KIND, "dontneed-forced", V4_14),
    ),
    bug(
        "44",
        "copy-on-write breaks the other way: what is pinned for reading is written in place",
        &[Rule::Isolation],
        Spec::new(VFIO, "cow-other-way", V3_16).reading(),
        Spec::new(VFIO, "cow-other-way", V6_18).reading(),
    ),
    bug(
        "45",
        "a reference is enough to lose the page to copy-on-write",
        STALE,
        Spec::new(VFIO, "swap-read-back", V5_10),
        Spec::new(VFIO, "swap-read-back", V6_18),
    ),
    bug(
        "46",
        "the same, pinned after reclaim has looked",
        STALE,
        Spec::new(VFIO, "swap-pinned-late", V5_15),
        Spec::new(VFIO, "swap-pinned-late", V6_18),
    ),
    bug(
        "47",
        "fork takes the page that a device writes",
        STALE,
        Spec::new(VFIO, "fork", V3_16),
        Spec::new(VFIO, "fork", V6_18),
    ),
    Bug {
        refuses: true,
        ..bug(
            "50",
            "a page of a file is written after it was made clean",
            WRITES,
            Spec::new(VFIO, "writeback", V5_10),
            Spec::new(VFIO, "writeback", V6_18),
        )
    },
    bug(
        "51",
        "KSM looks for no pin on a page that is read-only and clean",
        STALE,
        Spec::new(VFIO, "ksm-clean", V5_10),
        Spec::new(VFIO, "ksm-clean", V6_18),
    ),
    bug(
        "51a",
        "the same, of a page that ksmd had protected before it was pinned for reading",
        STALE,
        Spec::new(VFIO, "ksm-second-pass", V5_10).reading(),
        Spec::new(VFIO, "ksm-second-pass", V6_18).reading(),
    ),
    bug(
        "52",
        "a pin of the zero page",
        STALE,
        Spec::new(VFIO, "cow-zero", V5_10).reading(),
        Spec::new(VFIO, "cow-zero", V6_18).reading(),
    ),
    bug(
        "53",
        "a breakpoint is taken out under a page that is pinned for writing",
        STALE,
        Spec::new(I915, "uprobe-remove", V2A),
        Spec::new(SEQ, "uprobe-remove", V3_16),
    ),
    bug(
        "54",
        "userptr without a notifier",
        STALE,
        Spec::new(I915, "dontneed", V3_16).with(Callbacks::NONE),
        Spec::new(SEQ, "dontneed", V3_16),
    ),
    bug(
        "S1",
        "a pin for writing, got while fork runs, stays on what becomes the child's page",
        STALE,
        Spec::new(I915, "fork-idle", V2A),
        Spec::new(SEQ, "fork-idle", V3_16),
    ),
    bug(
        "S2",
        "a pin for writing is lost to KSM after swap",
        STALE,
        Spec::new(I915, "ksm-clean", V2A),
        Spec::new(I915, "ksm-clean", V3_16),
    ),
    bug(
        "S5",
        "a pin for reading stays on the old page after copy-on-write",
        STALE,
        Spec::new(I915_RO, "cow", V2A).reading(),
        Spec::new(SEQ, "cow", V3_16).reading(),
    ),
    bug(
        "S6",
        "a pin for reading of the zero page",
        STALE,
        Spec::new(I915_RO, "cow-zero", V2A).reading(),
        Spec::new(SEQ, "cow-zero", V3_16).reading(),
    ),
    bug(
        "S7",
        "a pin for reading of a page of a private file mapping",
        STALE,
        Spec::new(I915_RO, "cow-file", V2A).reading(),
        Spec::new(SEQ, "cow-file", V3_16).reading(),
    ),
    bug(
        "S8",
        "a pin for reading, merged away by KSM: stale when the CPU writes next",
        STALE,
        Spec::new(I915_RO, "ksm-second-pass", V2A).reading(),
        Spec::new(SEQ, "ksm-second-pass", V3_16).reading(),
    ),
    bug(
        "S10",
        "a pin for reading, got again between the start and the change: the pair alone is not enough",
        STALE,
        Spec::new(I915_RO, "cow", V3_16).reading(),
        Spec::new(SEQ, "cow", V3_16).reading(),
    ),
    bug(
        "S11",
        "without the pair, what is neither pinned nor told by change_pte is used after it was freed",
        FREED,
        Spec::new(KVM, "ksm-replace", V2A).with(NO_CHANGE_PTE),
        Spec::new(KVM, "ksm-replace", V2A),
    ),
    bug(
        "S16",
        "a device that walks the page table needs a flush between clear and set",
        FREED,
        Spec::new(AMD, "ksm-replace", V2A).with(NO_CHANGE_PTE),
        Spec::new(AMD, "ksm-replace", V2A),
    ),
    bug(
        "flag",
        "change_pte that notes and leaves the work to others: stale until they have done it",
        STALE,
        Spec::new(&drivers::design_flag_change_pte::KIND, "cow-zero", V2A).reading(),
        Spec::new(&drivers::design_atomic_change_pte::KIND, "cow-zero", V2A).reading(),
    ),
    bug(
        "sleep",
        "a mutex in change_pte",
        &[Rule::Context],
        Spec::new(&drivers::i915_sleeping::CHANGE_PTE, "cow", V3_16).reading(),
        Spec::new(&drivers::design_flag_change_pte::KIND, "cow", V3_16).reading(),
    ),
];
