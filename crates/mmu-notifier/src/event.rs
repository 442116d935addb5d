// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why a range is invalidated: `enum mmu_notifier_event` of Linux (5.2 and later; 4.x kernels send no event).

use std::fmt;

/// What Linux says about an invalidation. The name after `MMU_NOTIFY_` is the kernel's.
///
/// An event tells what kind of change comes, never that it can be ignored: [`Event::ProtectionPage`] may end with
/// another page mapped (the page can be replaced between the event and the next fault).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Event {
    /// The virtual range goes away. munmap, `mmap(MAP_FIXED)` over a mapping, brk shrink, mremap (the old range),
    /// the teardown at exit, the oom reaper (non-blockable, 4.19+). Since 5.2.
    Unmap,
    /// Page table entries are cleared or replaced and the mapping stays. COW and unshare faults, `MADV_DONTNEED`,
    /// `MADV_FREE`, truncate and hole punch, reclaim, migration and compaction, KSM, uprobes, THP split and
    /// collapse, `UFFDIO_MOVE` (6.8+), fork of hugetlb memory. Since 5.2.
    Clear,
    /// The protection of a whole VMA changes. mprotect, NUMA hinting, userfaultfd write protection, `PAGEMAP_SCAN`
    /// write protection (6.7+). Since 5.2.
    ProtectionVma,
    /// Pages become read only and stay mapped. fork of a private mapping (the parent's range), writeback
    /// (`page_mkclean`), DAX write protection (5.18+). Since 5.2.
    ProtectionPage,
    /// `echo 4 > /proc/PID/clear_refs`: write protection of the whole address space to track soft-dirty pages.
    /// Since 5.2.
    SoftDirty,
    /// The mm dies. Sent to interval notifiers alone, over [`Range::ALL`](crate::Range::ALL), before the teardown sends
    /// [`Event::Unmap`]. List notifiers get `release` instead. Since 5.5.
    Release,
    /// `migrate_vma_*`: pages move to or from device memory. Carries the owner, who may ignore his own. Since 5.9.
    Migrate,
    /// `make_device_exclusive` (owner set) and the restore of such an entry (no owner). Since 5.14.
    Exclusive,
}

impl Event {
    /// Every event, in the order of the kernel's enum.
    pub const ALL: [Event; 8] = [
        Event::Unmap,
        Event::Clear,
        Event::ProtectionVma,
        Event::ProtectionPage,
        Event::SoftDirty,
        Event::Release,
        Event::Migrate,
        Event::Exclusive,
    ];

    /// The kernel's name.
    pub const fn name(self) -> &'static str {
        match self {
            Event::Unmap => "MMU_NOTIFY_UNMAP",
            Event::Clear => "MMU_NOTIFY_CLEAR",
            Event::ProtectionVma => "MMU_NOTIFY_PROTECTION_VMA",
            Event::ProtectionPage => "MMU_NOTIFY_PROTECTION_PAGE",
            Event::SoftDirty => "MMU_NOTIFY_SOFT_DIRTY",
            Event::Release => "MMU_NOTIFY_RELEASE",
            Event::Migrate => "MMU_NOTIFY_MIGRATE",
            Event::Exclusive => "MMU_NOTIFY_EXCLUSIVE",
        }
    }

    /// First kernel that sends it, as (major, minor).
    pub const fn since(self) -> (u8, u8) {
        match self {
            Event::Unmap | Event::Clear | Event::ProtectionVma | Event::ProtectionPage | Event::SoftDirty => {
                (5, 2)
            }
            Event::Release => (5, 5),
            Event::Migrate => (5, 9),
            Event::Exclusive => (5, 14),
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
