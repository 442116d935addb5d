// SPDX-License-Identifier: MIT OR Apache-2.0
//! KSM: write_protect_page and replace_page, and the store that takes the page apart again.

use super::{ANON, Path, STORES, Step, X, Y};

const MERGE_AND_STORE: Step = |cx, s| {
    s.merge(cx);
    s.store(cx, X, 2);
};

pub(super) const PROTECT: Path = Path {
    name: "ksm-protect",
    kernel: "write_protect_page, contents differ",
    prepare: |cx, s| s.mergeable(cx, 1, 7),
    run: MERGE_AND_STORE,
    other: STORES,
    ..ANON
};

pub(super) const REPLACE: Path = Path {
    name: "ksm-replace",
    kernel: "replace_page, then do_wp_page",
    prepare: |cx, s| s.mergeable(cx, 1, 1),
    run: MERGE_AND_STORE,
    ..ANON
};

/// ksmd protected the page in an earlier pass, when its twin was another, and looks for no reference now.
pub(super) const SECOND_PASS: Path = Path {
    name: "ksm-second-pass",
    kernel: "replace_page of a page that ksmd protected before",
    prepare: |cx, s| {
        s.mergeable(cx, 1, 7);
        s.merge(cx);
        s.store(cx, Y, 1);
    },
    ..REPLACE
};

/// Swapped out and read back: read-only and clean, and the device's reference does not show.
pub(super) const CLEAN: Path = Path {
    name: "ksm-clean",
    kernel: "replace_page of a page that is read-only and clean",
    bound: |cx, s| {
        s.swap_out(cx);
        s.load(cx, X);
    },
    ..REPLACE
};
