// SPDX-License-Identifier: MIT OR Apache-2.0
//! What changed the memory, in words.

use hostmm::kvm::stream::Change;

/// System calls whose work is to change mappings or the files behind them. Any other in which memory changes has only
/// faulted: it read or wrote the program's memory.
const CHANGES: &[(u32, &str)] = &[
    (2, "open"),
    (9, "mmap"),
    (10, "mprotect"),
    (11, "munmap"),
    (12, "brk"),
    (25, "mremap"),
    (26, "msync"),
    (28, "madvise"),
    (30, "shmat"),
    (56, "clone"),
    (57, "fork"),
    (58, "vfork"),
    (59, "execve"),
    (67, "shmdt"),
    (74, "fsync"),
    (75, "fdatasync"),
    (76, "truncate"),
    (77, "ftruncate"),
    (85, "creat"),
    (157, "prctl"),
    (162, "sync"),
    (216, "remap_file_pages"),
    (237, "mbind"),
    (238, "set_mempolicy"),
    (256, "migrate_pages"),
    (257, "openat"),
    (277, "sync_file_range"),
    (279, "move_pages"),
    (285, "fallocate"),
    (306, "syncfs"),
    (322, "execveat"),
    (329, "pkey_mprotect"),
    (435, "clone3"),
    (437, "openat2"),
    (440, "process_madvise"),
];

/// Some that only fault, by name; the others by number.
const FAULTS: &[(u32, &str)] = &[
    (0, "read"),
    (1, "write"),
    (4, "stat"),
    (5, "fstat"),
    (7, "poll"),
    (13, "rt_sigaction"),
    (14, "rt_sigprocmask"),
    (16, "ioctl"),
    (17, "pread64"),
    (19, "readv"),
    (22, "pipe"),
    (23, "select"),
    (35, "nanosleep"),
    (45, "recvfrom"),
    (47, "recvmsg"),
    (61, "wait4"),
    (72, "fcntl"),
    (79, "getcwd"),
    (96, "gettimeofday"),
    (97, "getrlimit"),
    (98, "getrusage"),
    (202, "futex"),
    (217, "getdents64"),
    (228, "clock_gettime"),
    (230, "clock_nanosleep"),
    (232, "epoll_wait"),
    (247, "waitid"),
    (262, "newfstatat"),
    (281, "epoll_pwait"),
    (293, "pipe2"),
    (302, "prlimit64"),
    (310, "process_vm_readv"),
    (311, "process_vm_writev"),
    (318, "getrandom"),
    (332, "statx"),
    (334, "rseq"),
    (426, "io_uring_enter"),
];

/// All calls that make a process.
pub(super) const FORK: &str = "fork";

const ADVICE: &[(u64, &str)] = &[
    (4, "MADV_DONTNEED"),
    (8, "MADV_FREE"),
    (9, "MADV_REMOVE"),
    (12, "MADV_MERGEABLE"),
    (13, "MADV_UNMERGEABLE"),
    (14, "MADV_HUGEPAGE"),
    (20, "MADV_COLD"),
    (21, "MADV_PAGEOUT"),
    (24, "MADV_DONTNEED_LOCKED"),
    (25, "MADV_COLLAPSE"),
    (101, "MADV_SOFT_OFFLINE"),
    (102, "MADV_GUARD_INSTALL"),
    (103, "MADV_GUARD_REMOVE"),
];

fn named<K: PartialEq>(table: &[(K, &'static str)], key: &K) -> Option<&'static str> {
    table.iter().find(|(k, _)| k == key).map(|(_, name)| *name)
}

/// The cause of a change that a task of the watched program made.
pub(super) fn of_task(change: &Change) -> String {
    let Some(number) = change.syscall else { return "page fault".to_owned() };
    match named(CHANGES, &number) {
        Some("madvise") => match named(ADVICE, &change.third) {
            Some(advice) => format!("madvise({advice})"),
            None => format!("madvise({})", change.third),
        },
        // What they announce is fork's write protection of the parent's pages.
        Some("clone" | "clone3" | "fork" | "vfork") => FORK.to_owned(),
        Some(name) => name.to_owned(),
        None => match named(FAULTS, &number) {
            Some(name) => format!("page fault in {name}"),
            None => format!("page fault in system call {number}"),
        },
    }
}

/// Calls by which a program changes memory that is not its own as well: files' and other processes'.
const REACHES: &[u32] = &[2, 26, 74, 75, 76, 77, 85, 162, 256, 257, 277, 279, 285, 306, 437, 440];

/// Is it such a call?
pub(super) fn reaches_others(change: &Change) -> bool {
    change.syscall.is_some_and(|number| REACHES.contains(&number))
}

/// Is the change surely of the memory of the task that made it? So is all that changes mappings. A fault, in that or in any
/// other call, may have to reclaim, which can be anybody's memory.
pub(super) fn is_of_own(change: &Change) -> bool {
    !reaches_others(change) && change.syscall.is_some_and(|number| named(CHANGES, &number).is_some())
}

/// The cause of a change that somebody else made.
pub(super) fn of_other(change: &Change) -> String {
    let comm = change.comm();
    if change.by_kernel_thread() {
        // Workers are named by number; one that works on something has that as its name.
        let family = comm.split(['/', ':']).next().unwrap_or(&comm);
        return format!("kernel: {}", family.trim_end_matches(|c: char| c.is_ascii_digit()));
    }
    format!("{} by process {comm}", of_task(change))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hostmm::kvm::{Kind, Record};

    fn change(syscall: Option<u32>, third: u64) -> Change {
        let record = Record { kind: Kind::Unmap, start: 0, end: 1, cpu: 0, tgid: 1, pid: 1, ktime_ns: 1 };
        Change::invented(record, syscall, third, Vec::new())
    }

    #[test]
    fn calls_that_change_memory_are_told_from_calls_that_fault() {
        assert_eq!(of_task(&change(Some(28), 4)), "madvise(MADV_DONTNEED)");
        assert_eq!(of_task(&change(Some(28), 77)), "madvise(77)");
        assert_eq!(of_task(&change(Some(56), 0)), "fork");
        assert_eq!(of_task(&change(Some(0), 0)), "page fault in read");
        assert_eq!(of_task(&change(Some(999), 0)), "page fault in system call 999");
        assert_eq!(of_task(&change(None, 0)), "page fault");
    }

    #[test]
    fn what_is_done_to_mappings_is_done_to_ones_own() {
        assert!(is_of_own(&change(Some(11), 0)) && is_of_own(&change(Some(28), 4)));
        assert!(!is_of_own(&change(Some(77), 0)) && reaches_others(&change(Some(77), 0)));
        assert!(!is_of_own(&change(None, 0)) && !reaches_others(&change(None, 0)));
        assert!(!is_of_own(&change(Some(1), 0)) && !reaches_others(&change(Some(1), 0)));
    }

    #[test]
    fn every_call_that_reaches_others_has_a_name() {
        assert!(REACHES.iter().all(|number| named(CHANGES, number).is_some()));
    }
}
