// SPDX-License-Identifier: MIT OR Apache-2.0
//! The framework's rules where kernels differ, and the record of those that a notifier broke.
//!
//! [`Rules`] has what differs *inside* the framework and shows. Other differences are elsewhere, or are none here:
//!
//! | what | kernels | here |
//! |---|---|---|
//! | which callbacks there are | see [`MmuNotifier`](crate::MmuNotifier) | the mm calls those of its version; a notifier names its own in `ops` |
//! | can a start fail? | no (void) until 4.18; of a non-blockable range 4.19+ | whether the mm starts a range non-blockable |
//! | interval notifiers | 5.5+ | whether anyone inserts one |
//! | a notifier without `change_pte` gets `invalidate_page` | until 3.6 | no |
//! | release: read section left before the list is emptied, so that unregister can return while a callback runs | until 3.18 | mended: [`release`](crate::NotifierSubscriptions::release) waits |
//! | list emptied at exit, also of notifiers without `release`; interval notifiers stay and hear the teardown too | all; 5.5+ | so in every version |

use crate::Invalidation;

/// How mm/mmu_notifier.c behaves in one kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Rules {
    /// May one notifier have the secondary-TLB callback beside start or end? 3.19 to 6.5 let it; since 6.6 registration
    /// refuses it (`-EINVAL`). Before 3.19 there is no such callback.
    pub secondary_tlbs_beside_start_end: bool,
    /// Does the end of a range call the secondary-TLB callback before each notifier's end? 3.19 to 6.5 do, unless
    /// the caller asks for the end alone (4.15+).
    pub end_invalidates_secondary_tlbs: bool,
    /// After a failed start (4.19+), do the notifiers whose start succeeded get their end? Since 5.12, which also
    /// warns of a notifier that has an end and fails its start. 4.19 to 5.11 leave them started for ever.
    pub failed_start_ends_others: bool,
    /// After a list notifier failed its start, is the range ended for interval notifiers? No Linux up to 6.13
    /// does: their sequence stays odd, and every reader that collided waits for ever (read in the source; no known
    /// report).
    pub failed_start_ends_intervals: bool,
}

impl Rules {
    /// 3.16 to 3.18.
    pub const LINUX_3_16: Rules = Rules {
        secondary_tlbs_beside_start_end: true,
        end_invalidates_secondary_tlbs: false,
        failed_start_ends_others: false,
        failed_start_ends_intervals: false,
    };
    /// 3.19 to 5.11.
    pub const LINUX_3_19: Rules = Rules { end_invalidates_secondary_tlbs: true, ..Rules::LINUX_3_16 };
    /// 5.12 to 6.5.
    pub const LINUX_5_12: Rules = Rules { failed_start_ends_others: true, ..Rules::LINUX_3_19 };
    /// 6.6 and later.
    pub const LINUX_6_6: Rules = Rules {
        secondary_tlbs_beside_start_end: false,
        end_invalidates_secondary_tlbs: false,
        ..Rules::LINUX_5_12
    };
    /// As 6.6, without its leak.
    pub const MENDED: Rules = Rules { failed_start_ends_intervals: true, ..Rules::LINUX_6_6 };
}

impl Default for Rules {
    fn default() -> Rules {
        Rules::MENDED
    }
}

/// A rule that was broken at run time, where Linux has a `WARN_ON`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Breach {
    /// A callback failed a range that may block. The failure is ignored: the page tables change all the same.
    #[error("a callback failed the blockable invalidation of {}", .0.range)]
    FailedBlockable(Invalidation),
    /// A notifier that has `invalidate_range_end` failed its start (5.12+): it cannot know whether its end will be
    /// called.
    #[error("a notifier with invalidate_range_end failed the start for {}", .0.range)]
    FailedStartWithEnd(Invalidation),
    /// A section was dropped instead of ended.
    #[error("the invalidation of {} was started and never ended", .0.range)]
    NotEnded(Invalidation),
}
