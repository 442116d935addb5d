// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which driver lived in which kernel. A cell of a driver in another kernel than its own is an anachronism: what breaks in it
//! says something about the callbacks that kernel has, and nothing about any kernel that ever was.

use drivers::Kind;
use softmm::KernelProfile;

/// What a cell of a driver in a kernel says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Era {
    /// The driver was in that kernel.
    Lived,
    /// It was not, and it is what the question of 2014 asks about: a kernel that was proposed, or a driver of our own.
    Asked,
    /// Neither.
    Anachronism,
}

const V3: &[&str] = &["v3_16", "v3_19"];
const PROPOSED: &[&str] = &["unwrapped_a", "unwrapped_b", "unwrapped_c"];

/// Where a driver lived, and whether the proposals of 2014 are about it.
const LIVED: &[(&str, &[&str], bool)] = &[
    ("i915-3.16", &["v3_16"], true),
    ("i915-3.16-mended", V3, true),
    ("i915-4.19", &["v4_12", "v4_14"], false),
    ("i915-5.13", &["v5_10"], false),
    ("i915-6.10", &["v6_18"], false),
    ("kvm-3.16", &["v3_16", "v3_19", "v4_12", "v4_14", "v5_10"], true),
    // Of 2021, and an answer to the question whether change_pte could live alone again.
    ("kvm-5.13", &["v5_10"], true),
    ("kvm-6.18", &["v6_18"], false),
    ("amd-iommu-v2-3.16", &["v3_16"], true),
    ("amd-iommu-v2-3.19", &["v3_19", "v4_12"], false),
    ("iommu-sva-6.13", &["v4_14", "v5_10", "v6_18"], false),
    ("rdma-odp-6.13", &["v5_10", "v6_18"], false),
    // Pins without a notifier are as old as the question; they are modelled with the calls of 6.13.
    ("vfio-6.13", &["v3_16", "v3_19", "v4_12", "v4_14", "v5_10", "v6_18"], true),
    // UFFD_EVENT_UNMAP is of 4.11, mmu_interval_notifier of 5.5.
    ("userptr-cache-late", &["v4_12", "v4_14", "v5_10", "v6_18"], false),
    ("userptr-objects-exact", &["v5_10", "v6_18"], false),
    // invalidate_page could be called under the ptl.
    ("i915-sleeping-invalidate-page", &["v4_12"], true),
];

/// What a cell of `kind` under `profile` says.
pub fn era(kind: &Kind, profile: &KernelProfile) -> Era {
    let known = LIVED.iter().find(|(name, ..)| *name == kind.name);
    let lived = known.is_some_and(|(_, kernels, _)| kernels.contains(&profile.name));
    // What no kernel had is asked about in the kernels of the question and wherever it could be used.
    let asked = known.is_none_or(|(_, _, asked)| *asked && PROPOSED.contains(&profile.name));
    match (lived, asked) {
        (true, _) => Era::Lived,
        (false, true) => Era::Asked,
        (false, false) => Era::Anachronism,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_that_of_a_driver_and_of_a_kernel() {
        for (name, kernels, _) in LIVED {
            assert!(crate::driver::named(name).is_some(), "{name}");
            assert!(kernels.iter().all(|kernel| KernelProfile::named(kernel).is_some()), "{kernels:?}");
        }
        assert!(PROPOSED.iter().all(|kernel| KernelProfile::named(kernel).is_some()));
    }

    #[test]
    fn a_driver_of_2024_did_not_live_in_2014() {
        assert_eq!(era(&drivers::kvm_v6_18::KIND, &KernelProfile::V3_16), Era::Anachronism);
        assert_eq!(era(&drivers::kvm_v3_16::KIND, &KernelProfile::V3_16), Era::Lived);
        assert_eq!(era(&drivers::kvm_v3_16::KIND, &KernelProfile::UNWRAPPED_A), Era::Asked);
        assert_eq!(era(&drivers::design_drop_everything::KIND, &KernelProfile::V6_18), Era::Asked);
    }
}
