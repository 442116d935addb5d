// SPDX-License-Identifier: MIT OR Apache-2.0
//! What can be switched off in a driver, beside its locks: each names the place that it is called from
//! ([`interleave::explore::mutated`]).

use interleave::explore::{SiteKind, mutated};
use std::panic::Location;

/// Moves a sequence, or counts an invalidation that begins.
#[track_caller]
pub(crate) fn bump(count: &mut u64) {
    if !mutated(SiteKind::Bump, Location::caller()) {
        *count += 1;
    }
}

/// Counts an invalidation that ends. There may be none: callbacks can be switched off.
#[track_caller]
pub(crate) fn unbump(count: &mut u64) {
    if !mutated(SiteKind::Bump, Location::caller()) {
        *count = count.saturating_sub(1);
    }
}

/// What a look for changes since the pages were got has found.
#[track_caller]
#[must_use]
pub(crate) fn changed(found: bool) -> bool {
    !mutated(SiteKind::Retry, Location::caller()) && found
}
