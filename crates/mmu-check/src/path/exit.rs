// SPDX-License-Identifier: MIT OR Apache-2.0
//! The end of a process: exit, and the oom reaper.

use super::{ANON, Path, User};

pub(super) const EXIT: Path = Path {
    name: "exit",
    kernel: "exit_mmap",
    explicit: true,
    leaves_memory: false,
    run: |cx, s| s.exit(cx),
    ..ANON
};

/// The driver has heard an invalidation before, and its object is the last that keeps the address space.
pub(super) const LAST_OBJECT: Path =
    Path { name: "exit-last-object", bound: |cx, s| s.make_cold(cx), ..EXIT };

/// The driver is closed at the same time.
pub(super) const CLOSE: Path = Path {
    name: "exit-close",
    kernel: "exit_mmap beside mmu_notifier_unregister",
    user: User::Closes,
    ..EXIT
};

pub(super) const OOM_REAP: Path = Path {
    name: "oom-reap",
    kernel: "__oom_reap_task_mm",
    run: |cx, s| {
        s.mm.oom_reap(cx);
    },
    ..EXIT
};
