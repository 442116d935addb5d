// SPDX-License-Identifier: MIT OR Apache-2.0
//! i915 userptr of Linux 3.16 with READ_ONLY honoured: what the exchange asks about when it asks what would follow.
//!
//! The algorithm is that of [`crate::i915_v3_16`], with one difference: pages of a READ_ONLY object are got without
//! FOLL_WRITE. Such a get_user_pages breaks no copy-on-write and returns whatever is mapped: a page shared with a child, a KSM page, the zero
//! page, a page of the page cache. When the CPU later writes, it writes to another page, and the GPU stays behind unless
//! it was told before. It is told by invalidate_range_start alone, and what it gets again between that and the change is the
//! old page: for reading that works, other than for writing, since the old pte may be read.
//!
//! Two kinds: the GPU's page table can forbid writes, or cannot (why 3.16 answered ENODEV).
//!
//! Lock order and all else: as there. Mended of its three mistakes that have nothing to do with the mm.

use crate::driver::Kind;
use crate::i915_v3_16::{self, Config, I915, ReadOnly};

/// The GPU's page table says read-only.
pub static KIND: Kind = Kind {
    name: "i915-3.16-ro",
    summary: "as i915-3.16, READ_ONLY got without FOLL_WRITE",
    reads: true,
    open: |cx, mm, device, options| Ok(I915::open(cx, mm, device, options, ENFORCED)?),
    ..i915_v3_16::MENDED
};

/// The GPU may write what was got for reading.
pub static UNENFORCED: Kind = Kind {
    name: "i915-3.16-ro-unenforced",
    summary: "as i915-3.16-ro, on hardware that cannot forbid writes",
    open: |cx, mm, device, options| Ok(I915::open(cx, mm, device, options, LAX)?),
    ..KIND
};

const ENFORCED: Config = Config { kind: &KIND, read_only: ReadOnly::Enforced, ..Config::MENDED };
const LAX: Config = Config { kind: &UNENFORCED, read_only: ReadOnly::Unenforced, ..Config::MENDED };
