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
    (318, "getrandom"),
    (332, "statx"),
    (334, "rseq"),
    (426, "io_uring_enter"),
];

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
        Some("clone" | "clone3" | "fork" | "vfork") => "fork".to_owned(),
        Some(name) => name.to_owned(),
        None => match named(FAULTS, &number) {
            Some(name) => format!("page fault in {name}"),
            None => format!("page fault in system call {number}"),
        },
    }
}

/// The cause of a change that somebody else made.
pub(super) fn of_other(pid: u32) -> String {
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let comm = comm.trim_end();
    // Kernel threads have no command line; pid 0 is an idle task, which an interrupt has borrowed.
    let command = std::fs::read(format!("/proc/{pid}/cmdline"));
    match (comm, command) {
        ("", _) => "another process".to_owned(),
        (comm, Ok(line)) if line.is_empty() => {
            // Workers are named by number.
            let family =
                comm.split(['/', ':']).next().unwrap_or(comm).trim_end_matches(|c: char| c.is_ascii_digit());
            format!("kernel: {family}")
        }
        (comm, _) => format!("process {comm}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hostmm::kvm::{Kind, Record};

    fn change(syscall: Option<u32>, third: u64) -> Change {
        let record = Record { kind: Kind::Unmap, start: 0, end: 1, cpu: 0, tgid: 1, pid: 1, ktime_ns: 1 };
        Change { record, syscall, third, stack: Vec::new() }
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
}
