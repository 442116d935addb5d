// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an event needs of the machine.

use super::Arena;
use crate::capability::{self, Capability, State};

/// What an event needs of the machine. The caller checks; a set-up without it fails with a clear error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// `/proc/self/pagemap` with page frame numbers (`CAP_SYS_ADMIN`): the event waits for a page to move.
    PageFrames,
    /// `/sys/kernel/mm/ksm` and the right to start it.
    Ksm,
    /// The right to add swap space: a zram device that is added and removed again.
    Swap,
    /// The uprobe PMU and the right to use it (`CAP_PERFMON`).
    Uprobe,
    /// `/proc/sys/vm/compact_memory`.
    Compaction,
    /// Transparent huge pages, at least for those who ask with `madvise`.
    Thp,
    /// A directory on a file system that writes back to a disk (ext4, xfs, btrfs), as the arena's directory.
    DiskFile,
    /// System V shared memory.
    SysV,
    /// A DAMON thread that watches physical memory (`operations` is `paddr`).
    Damon,
    /// `MADV_GUARD_INSTALL` (6.13).
    Guard,
    /// `process_madvise` of oneself with any advice (6.13).
    ProcessMadvise,
}

impl Need {
    /// The capability that it is.
    #[must_use]
    pub const fn capability(self) -> Capability {
        match self {
            Need::PageFrames => Capability::Pfn,
            Need::Ksm => Capability::Ksm,
            Need::Swap => Capability::Zram,
            Need::Uprobe => Capability::Uprobes,
            Need::Compaction => Capability::Compaction,
            Need::Thp => Capability::Thp,
            Need::DiskFile => Capability::DiskFile,
            Need::SysV => Capability::SysV,
            Need::Damon => Capability::Damon,
            Need::Guard => Capability::GuardPages,
            Need::ProcessMadvise => Capability::ProcessMadvise,
        }
    }

    /// Why an event with this need cannot run here; `None` if it can as far as one can tell without trying. Changes
    /// nothing.
    #[must_use]
    pub fn missing(self, arena: &Arena) -> Option<String> {
        let state = match self {
            Need::DiskFile => capability::disk_file(arena.dir()),
            other => capability::probe(other.capability()),
        };
        match state {
            State::There(_) => None,
            // An event needs all of it: ksmd that runs and may not be stopped, or huge pages that only a collapse
            // makes, are not enough.
            State::Partial(why) | State::Missing(why) => Some(why),
        }
    }
}
