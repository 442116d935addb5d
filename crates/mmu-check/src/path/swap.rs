// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reclaim of an anonymous page: page ageing, swap-out, and the way back.

use super::{ANON, Path, User, X, page};
use crate::oracle::mapped;

pub(super) const OUT: Path = Path {
    name: "swap-out",
    kernel: "try_to_unmap, then do_swap_page",
    run: |cx, s| {
        s.swap_out(cx);
        s.store(cx, X, 2);
    },
    ..ANON
};

/// Nothing moves: whoever was asked may have taken its translation away.
pub(super) const AGE: Path = Path {
    name: "age",
    kernel: "page_referenced, then a store",
    run: |cx, s| {
        if let Some((frame, _)) = mapped(&s.mm, page(X)) {
            s.machine.page_referenced(cx, frame);
        }
        s.store(cx, X, 2);
    },
    ..ANON
};

/// The read fault maps the page read-only, and the write fault counts references.
pub(super) const READ_BACK: Path = Path {
    name: "swap-read-back",
    kernel: "do_swap_page for reading, then do_wp_page",
    run: |cx, s| {
        s.swap_out(cx);
        s.load(cx, X);
        s.store(cx, X, 2);
    },
    ..ANON
};

/// The pin comes after reclaim has looked for one.
pub(super) const PINNED_LATE: Path = Path { name: "swap-pinned-late", user: User::Binds, ..READ_BACK };

/// Reclaim comes twice: what the device writes in between is lost if it is let go clean.
pub(super) const OUT_UNBIND: Path = Path {
    name: "swap-out-unbind",
    kernel: "shrink_page_list, twice",
    user: User::Unbinds,
    run: |cx, s| {
        if let Some((frame, _)) = mapped(&s.mm, page(X)) {
            s.machine.reclaim_page(cx, frame, true);
            s.machine.reclaim_page(cx, frame, true);
        }
    },
    ..ANON
};
