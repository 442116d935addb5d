// SPDX-License-Identifier: MIT OR Apache-2.0
//! Copy-on-write: do_wp_page, and fork, which makes it necessary.

use super::{ANON, Path, STORES, User, X, range};
use softmm::{MapKind, Prot};

pub(super) const AFTER_FORK: Path = Path {
    name: "cow",
    kernel: "do_wp_page after fork",
    prepare: |cx, s| {
        s.filled(cx);
        s.fork(cx);
    },
    run: |cx, s| {
        s.store(cx, X, 2);
        s.child_stores(cx, 3);
    },
    other: STORES,
    ..ANON
};

pub(super) const ZERO: Path = Path {
    name: "cow-zero",
    kernel: "do_wp_page on the zero page",
    prepare: |cx, s| {
        s.anonymous(cx);
        s.load(cx, X);
    },
    run: |cx, s| s.store(cx, X, 2),
    other: STORES,
    ..ANON
};

pub(super) const FILE: Path = Path {
    name: "cow-file",
    kernel: "do_wp_page on a private file page",
    prepare: |cx, s| {
        s.of_file(cx, Prot::ReadWrite, MapKind::Private);
        s.load(cx, X);
    },
    run: |cx, s| s.store(cx, X, 2),
    other: STORES,
    ..ANON
};

pub(super) const FORK: Path = Path {
    name: "fork",
    kernel: "copy_page_range, then do_wp_page",
    run: |cx, s| {
        s.fork(cx);
        s.store(cx, X, 2);
        s.child_stores(cx, 3);
    },
    ..ANON
};

/// The driver has nothing to let go of when fork tells it, and gets the page in the middle.
pub(super) const FORK_IDLE: Path = Path { name: "fork-idle", user: User::Binds, ..FORK };

/// A fault of the device is in flight while the page is replaced, and then the last other mapping of the old page goes.
pub(super) const IN_FLIGHT: Path = Path {
    name: "cow-in-flight",
    kernel: "do_wp_page beside a fault of the device",
    bound: |cx, s| s.make_cold(cx),
    run: |cx, s| {
        s.store(cx, X, 2);
        s.children_exit(cx);
    },
    other: None,
    ..AFTER_FORK
};

/// The process gives its share of the page up, and the child, whose alone it is now, writes in place.
pub(super) const OTHER_WAY: Path = Path {
    name: "cow-other-way",
    kernel: "do_wp_page reuses what another process has pinned",
    explicit: true,
    leaves_memory: false,
    run: |cx, s| {
        s.mm.munmap(cx, range(X));
        s.child_stores(cx, 3);
    },
    other: None,
    ..AFTER_FORK
};
