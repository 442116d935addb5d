// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bugs of the catalogue that cannot be shown here, and why.

const NO_DRIVER: &str = "that driver is not modelled";
const NO_THP: &str = "this mm has no huge pages";

/// Number, reason.
pub static ELSEWHERE: &[(&str, &str)] = &[
    ("9", "as 8: a flush that does nothing and no flush are one thing to this device"),
    ("10", "this device has no scanout, so no pin that the callback may not take away"),
    ("12", NO_DRIVER),
    ("13", NO_DRIVER),
    ("14", NO_DRIVER),
    ("15", "this device has one translation and no IOMMU behind it"),
    ("22", "every page has a reference count here: there is no follow_pfn"),
    ("25", "the framework is modelled mended: release waits for whoever unregisters in every version"),
    ("28", "the oom reaper is modelled mended: it finishes what it has gathered"),
    ("30", NO_THP),
    ("31", NO_THP),
    ("32", "this mm has no mremap"),
    ("33", "this mm has no hugetlb"),
    ("34", "parallel zaps are modelled mended: each waits for the flush of the other"),
    ("35", "this mm has no device memory"),
    ("36", "the callback is judged by what it does, and to say that a page is not young is no error"),
    (
        "38",
        "a fault that is answered between start and end goes on after the end: no rule breaks, it costs faults",
    ),
    ("40", "this mm has no mlock"),
    ("42", NO_THP),
    ("43", "this mm has no userfaultfd"),
    ("49", "a page is copied in one step here, so no copy is torn"),
    ("55", "this mm has no migration"),
];
