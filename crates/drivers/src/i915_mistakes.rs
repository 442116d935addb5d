// SPDX-License-Identifier: MIT OR Apache-2.0
//! i915 userptr of Linux 3.16 with one mistake each: what it does by another way round, and what later versions got wrong.
//!
//! * [`GUP_LOCKED`]: pages are got under struct_mutex and not in a worker. get_user_pages takes mmap_lock, which callbacks of munmap hold
//!   when they take struct_mutex; and where it breaks copy-on-write, its own callback takes struct_mutex again. That is why there is a
//!   worker (bug 3 in short: i915 met it where it revoked a GTT mapping over the object).
//! * [`LOCKS_PAGE`]: the callback marks pages dirty with set_page_dirty_lock (2019, reverted). KSM, uprobes, reclaim and migration
//!   hold the lock of the page when they call (bug 7b).
//! * [`NO_DIRTY`]: what the GPU wrote is not marked dirty when it is put: what becomes of a trylock_page that fails (bug 7c).
//! * [`NO_FLUSH`]: nobody flushes the TLB of the GPU (until 5.17, bug 8).
//!
//! Lock order and all else: as in [`crate::i915_v3_16`].

use crate::driver::Kind;
use crate::i915_v3_16::{self, Config, I915};

/// get_user_pages under struct_mutex.
pub static GUP_LOCKED: Kind = Kind {
    name: "i915-gup-locked",
    kernel: "none",
    summary: "as i915-3.16, get_user_pages under struct_mutex",
    open: |cx, mm, device, options| Ok(I915::open(cx, mm, device, options, GUP_LOCKED_CONFIG)?),
    ..i915_v3_16::MENDED
};

/// lock_page in the callback.
pub static LOCKS_PAGE: Kind = Kind {
    name: "i915-locks-page",
    kernel: "5.3-rc",
    summary: "as i915-3.16, set_page_dirty_lock in the callback",
    open: |cx, mm, device, options| Ok(I915::open(cx, mm, device, options, LOCKS_PAGE_CONFIG)?),
    ..i915_v3_16::MENDED
};

/// Pages are put clean.
pub static NO_DIRTY: Kind = Kind {
    name: "i915-no-dirty",
    kernel: "none",
    summary: "as i915-3.16, pages that were written are put clean",
    open: |cx, mm, device, options| Ok(I915::open(cx, mm, device, options, NO_DIRTY_CONFIG)?),
    ..i915_v3_16::MENDED
};

/// The TLB is never flushed.
pub static NO_FLUSH: Kind = Kind {
    name: "i915-no-flush",
    kernel: "until 5.17, in effect",
    summary: "as i915-3.16, nobody flushes the TLB",
    open: |cx, mm, device, options| Ok(I915::open(cx, mm, device, options, NO_FLUSH_CONFIG)?),
    ..i915_v3_16::MENDED
};

const GUP_LOCKED_CONFIG: Config =
    Config { kind: &GUP_LOCKED, gup_under_struct_mutex: true, ..Config::MENDED };
const LOCKS_PAGE_CONFIG: Config = Config { kind: &LOCKS_PAGE, locks_page: true, ..Config::MENDED };
const NO_DIRTY_CONFIG: Config = Config { kind: &NO_DIRTY, sets_dirty: false, ..Config::MENDED };
const NO_FLUSH_CONFIG: Config = Config { kind: &NO_FLUSH, flushes: false, ..Config::MENDED };
