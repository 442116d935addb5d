// SPDX-License-Identifier: MIT OR Apache-2.0
//! One invalidation: `struct mmu_notifier_range` of Linux.

use crate::{Event, Range};

/// Who causes an invalidation, so that he can leave his own alone (`mmu_notifier_range.owner`; the kernel uses the
/// address of the driver's `dev_pagemap` owner).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner(pub u64);

/// A range whose translations are about to change.
///
/// Immutable from start to end; both callbacks of a pair see the same value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Invalidation {
    /// Covers every address whose translation changes; it may be larger (huge pages, hugetlb PMD sharing).
    pub range: Range,
    /// The kind of change. `None`: the source cannot know, and does not guess.
    pub event: Option<Event>,
    /// May callbacks sleep? Only the oom reaper says no (4.19+).
    pub blockable: bool,
    /// Set by migration to device memory and by exclusive access.
    pub owner: Option<Owner>,
}

impl Invalidation {
    /// A blockable change without an owner.
    pub const fn new(range: Range, event: Event) -> Invalidation {
        Invalidation { range, event: Some(event), blockable: true, owner: None }
    }

    /// A blockable change of a kind that the source cannot know.
    pub const fn of_unknown_kind(range: Range) -> Invalidation {
        Invalidation { range, event: None, blockable: true, owner: None }
    }

    /// The same change, with callbacks that must not sleep.
    pub const fn nonblock(self) -> Invalidation {
        Invalidation { blockable: false, ..self }
    }

    /// The same change, caused by `owner`.
    pub const fn by(self, owner: Owner) -> Invalidation {
        Invalidation { owner: Some(owner), ..self }
    }
}
