// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a process does to its own mappings: munmap, madvise, mprotect.

use super::{ANON, Path, User, X, Y, range};
use mmu_notifier::Range;
use softmm::{MapKind, Placement, Prot};

pub(super) const MUNMAP: Path = Path {
    name: "munmap",
    kernel: "unmap_region, and a new mapping there",
    explicit: true,
    run: |cx, s| {
        s.mm.munmap(cx, range(X));
        let _ = s.mm.mmap(cx, Placement::FixedNoReplace(range(X)), Prot::ReadWrite);
        s.store(cx, X, 2);
    },
    ..ANON
};

pub(super) const DONTNEED: Path = Path {
    name: "dontneed",
    kernel: "zap_page_range (MADV_DONTNEED), then a fault",
    explicit: true,
    run: |cx, s| {
        s.dontneed(cx, range(X));
        s.store(cx, X, 2);
    },
    ..ANON
};

/// Two pages that lie beside each other in memory too: one entry of a scatter list.
pub(super) const DONTNEED_TWO: Path = Path {
    name: "dontneed-two",
    pages: 2,
    prepare: |cx, s| {
        s.filled(cx);
        s.store(cx, Y, 1);
    },
    run: |cx, s| {
        s.dontneed(cx, Range::new(X << 12, 2 << 12).unwrap_or(range(X)));
        s.store(cx, X, 2);
    },
    ..DONTNEED
};

/// The device's user lets the binding go at the same time.
pub(super) const UNBIND: Path = Path { name: "dontneed-unbind", user: User::Unbinds, ..DONTNEED };

/// The page is given up, taken away if nobody wrote it since, and used again. A kernel without MADV_FREE swaps it out.
pub(super) const FREE: Path = Path {
    name: "free",
    kernel: "madvise_free_single_vma, try_to_unmap, then a fault",
    explicit: true,
    run: |cx, s| {
        s.free(cx, range(X));
        s.swap_out(cx);
        s.store(cx, X, 2);
    },
    ..ANON
};

/// The page goes elsewhere, and a new mapping comes to its old place.
pub(super) const MREMAP: Path = Path {
    name: "mremap",
    kernel: "move_page_tables, and a new mapping at the old place",
    explicit: true,
    run: |cx, s| {
        s.mremap(cx, X, AWAY);
        let _ = s.mm.mmap(cx, Placement::FixedNoReplace(range(X)), Prot::ReadWrite);
        s.store(cx, X, 2);
    },
    ..ANON
};

/// Where mremap moves the page, under the same leaf table.
const AWAY: u64 = 32;

pub(super) const MPROTECT: Path = Path {
    name: "mprotect",
    kernel: "change_protection, and back",
    run: |cx, s| {
        s.make_cold(cx);
        s.store(cx, X, 2);
    },
    ..ANON
};

/// Memory that the process may only read, and that a debugger writes by force.
pub(super) const FORCED: Path = Path {
    name: "dontneed-forced",
    kernel: "faultin_page, zap_page_range (MADV_DONTNEED)",
    prepare: |cx, s| {
        s.of_file(cx, Prot::Read, MapKind::Private);
        s.load(cx, X);
    },
    run: |cx, s| {
        s.dontneed(cx, range(X));
        s.load(cx, X);
    },
    ..DONTNEED
};
