// SPDX-License-Identifier: MIT OR Apache-2.0
//! What userfaultfd does not report, as data: `userptr live` prints it, and the tests hold the kernel to it.

/// One way to change memory without an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deaf {
    /// What is done.
    pub operation: &'static str,
    /// Why there is no event.
    pub reason: &'static str,
    /// Whether a cached page can go stale by it.
    pub goes_stale: bool,
    /// What a user of this source does about it.
    pub policy: &'static str,
}

const fn deaf(operation: &'static str, goes_stale: bool, reason: &'static str, policy: &'static str) -> Deaf {
    Deaf { operation, reason, goes_stale, policy }
}

/// See [`Deaf`]. As found on Linux 6.18.
pub const DEAF: &[Deaf] = &[
    deaf(
        "mprotect",
        false,
        "no event exists; the page stays",
        "a device keeps the access that it was given: take it back yourself",
    ),
    deaf(
        "copy on write",
        true,
        "page faults are not events",
        "pin with write intent, which breaks COW first; do not cache pages that are only read-mapped",
    ),
    deaf(
        "ksm merge",
        true,
        "rmap changes, made by ksmd, have no event",
        "a pin keeps KSM away; else use the kvm source",
    ),
    deaf(
        "MADV_PAGEOUT, swap",
        true,
        "reclaim has no event",
        "a pin keeps reclaim away; else use the kvm source",
    ),
    deaf(
        "MADV_COLLAPSE, khugepaged",
        true,
        "no event exists",
        "a pin keeps collapse away; else use the kvm source",
    ),
    deaf(
        "migration, compaction",
        true,
        "no event exists",
        "a long-term pin keeps migration away; else use the kvm source",
    ),
    deaf(
        "MADV_GUARD_INSTALL",
        true,
        "zaps pages and sends nothing (6.13)",
        "whoever installs guards in watched memory drops its watch first",
    ),
    deaf(
        "fallocate PUNCH_HOLE, ftruncate",
        true,
        "the change is made through the file, perhaps by another process",
        "cache memfd only when sealed F_SEAL_SHRINK and F_SEAL_FUTURE_WRITE; other files one registration per use",
    ),
    deaf("shmdt", true, "does not prepare userfaultfd for the unmap", "do not cache System V shared memory"),
    deaf("shmat SHM_REMAP", true, "as shmdt", "do not cache System V shared memory"),
    deaf(
        "remap_file_pages",
        true,
        "maps over without an event",
        "do not cache what a user of this obsolete call maps",
    ),
    deaf(
        "fork",
        true,
        "EVENT_FORK needs privilege and stops fork until it is read",
        "a pin keeps the parent's pages; a child opens a source of its own and its handles refuse",
    ),
    deaf(
        "the end of MADV_DONTNEED, FREE, REMOVE",
        true,
        "REMOVE is announced before the pages go; madvise then takes its locks again and nothing tells when it is done",
        "do not get pages while another thread is giving them up; what madvise has returned from is safe",
    ),
    deaf("exit, exec", false, "the kernel skips events of a dying mm", "the source goes with the process"),
    deaf("uprobes", true, "replaces a page of program text through rmap", "do not share program text"),
    deaf(
        "writeback",
        false,
        "write-protects the page of a shared file mapping, which stays",
        "a device that writes must mark pages dirty when it lets go",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_says_what_and_why_and_what_to_do_once() {
        for (i, row) in DEAF.iter().enumerate() {
            assert!(!row.operation.is_empty() && !row.reason.is_empty() && !row.policy.is_empty());
            assert!(
                DEAF[..i].iter().all(|other| other.operation != row.operation),
                "{} twice",
                row.operation
            );
        }
    }
}
