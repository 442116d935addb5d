// SPDX-License-Identifier: MIT OR Apache-2.0
//! What must hold of a secondary MMU, by name, and where the kernel says so.

use interleave::explore::FailureKind;
use std::fmt;

/// What must hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    /// What the device reads or writes through an address is what the CPU has there.
    Coherence,
    /// A device writes only what the CPU may write, or a page that is its process's alone and held.
    WritePermission,
    /// No access to a page that was freed.
    MemorySafety,
    /// No access to a page that only another process has.
    Isolation,
    /// What a device has written is not dropped as clean.
    Dirty,
    /// Each start has its end.
    Pairing,
    /// Nothing blocks where it must not.
    Context,
    /// The graph of locks and waits has no cycle.
    Locks,
    /// Pages got outside the driver's lock are installed only if nothing has changed since.
    Retry,
    /// No callback for what was unregistered or freed.
    Lifetime,
    /// Notifications cover every address whose translation changes.
    Range,
    /// Devices that fault make progress after the end.
    Liveness,
    /// Every frame is free when all is over, and none twice.
    Frames,
}

impl Rule {
    /// All, in the order of the enum.
    pub const ALL: [Rule; 13] = [
        Rule::Coherence,
        Rule::WritePermission,
        Rule::MemorySafety,
        Rule::Isolation,
        Rule::Dirty,
        Rule::Pairing,
        Rule::Context,
        Rule::Locks,
        Rule::Retry,
        Rule::Lifetime,
        Rule::Range,
        Rule::Liveness,
        Rule::Frames,
    ];

    /// A stable name, for tables and the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Rule::Coherence => "coherence",
            Rule::WritePermission => "write-permission",
            Rule::MemorySafety => "memory-safety",
            Rule::Isolation => "isolation",
            Rule::Dirty => "dirty",
            Rule::Pairing => "pairing",
            Rule::Context => "context",
            Rule::Locks => "locks",
            Rule::Retry => "retry",
            Rule::Lifetime => "lifetime",
            Rule::Range => "range",
            Rule::Liveness => "liveness",
            Rule::Frames => "frames",
        }
    }

    /// Where the kernel says so, or relies on it.
    pub const fn source(self) -> &'static str {
        match self {
            Rule::Coherence => "include/linux/mmu_notifier.h: the secondary MMU mirrors the primary one",
            Rule::WritePermission => {
                "mm/memory.c wp_page_copy, mm/ksm.c write_protect_page: nobody writes after the start"
            }
            Rule::MemorySafety => "mm/mmu_notifier.c: pages may be freed once the callback has returned",
            Rule::Isolation => "mm/memory.c do_wp_page: a page is reused only by its sole owner",
            Rule::Dirty => "Documentation/core-api/pin_user_pages.rst: unpin_user_pages_dirty_lock",
            Rule::Pairing => "include/linux/mmu_notifier.h: invalidate_range_start and _end are paired",
            Rule::Context => {
                "include/linux/mmu_notifier.h: change_pte, clear_flush_young and non-blockable ranges may not sleep"
            }
            Rule::Locks => "mm/mmu_notifier.c __mmu_notifier_invalidate_range_start_map, under fs_reclaim",
            Rule::Retry => "Documentation/mm/hmm.rst: mmu_interval_read_retry under the driver's lock",
            Rule::Lifetime => "mm/mmu_notifier.c mmu_notifier_unregister: no callback after it returns",
            Rule::Range => "mm/mmu_notifier.c: the range covers what changes",
            Rule::Liveness => "mm/mmu_notifier.c mmu_interval_read_begin: waits for the end, not for ever",
            Rule::Frames => "mm/page_alloc.c: references balance",
        }
    }

    /// The rule of that name.
    pub fn from_name(name: &str) -> Option<Rule> {
        Rule::ALL.into_iter().find(|rule| rule.name() == name)
    }

    /// The rule that a failure of an exploration breaks; `None` for one that is no verdict (a scenario that is not
    /// deterministic, a panic of the model).
    pub fn of_failure(kind: FailureKind, message: &str) -> Option<Rule> {
        match kind {
            FailureKind::Violation => message.split(':').next().and_then(Rule::from_name),
            FailureKind::Deadlock | FailureKind::LockOrder => Some(Rule::Locks),
            FailureKind::SleepInAtomic => Some(Rule::Context),
            FailureKind::Livelock => Some(Rule::Liveness),
            _ => None,
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
