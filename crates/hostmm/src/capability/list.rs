// SPDX-License-Identifier: MIT OR Apache-2.0
//! The list of what can be there or not.

use std::fmt;

macro_rules! capabilities {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $needed_for:literal;)*) => {
        /// One thing that a source, a device or a test may need.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Capability {
            $($(#[$doc])* $variant,)*
        }

        impl Capability {
            /// All of them, in the order of a report.
            pub const ALL: &[Capability] = &[$(Capability::$variant,)*];

            /// Its name in reports, in `skipped:` lines and in JSON.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Capability::$variant => $name,)*
                }
            }

            /// What does not work without it.
            #[must_use]
            pub const fn needed_for(self) -> &'static str {
                match self {
                    $(Capability::$variant => $needed_for,)*
                }
            }
        }
    };
}

capabilities! {
    /// `/dev/kvm` opens and makes a VM: that puts a notifier of the kernel on this process.
    DevKvm = "dev_kvm", "source kvm";
    /// The trace event `kvm:kvm_unmap_hva_range`, which names each range that the notifier hears.
    KvmTracepoint = "kvm_tracepoint", "source kvm";
    /// BPF: a map that user space maps, and programs on tracepoints.
    Bpf = "bpf", "source kvm, by counters: the fast way";
    /// A perf ring on that event for all tasks, kernel threads among them.
    PerfRing = "perf_ring", "source kvm, where BPF is refused";
    /// userfaultfd, by system call or device. Partial where it is for faults of user mode only and without
    /// fork events.
    Userfaultfd = "userfaultfd", "source uffd";
    /// io_uring with a sparse table of fixed buffers.
    IoUring = "io_uring", "pins; the device that pins in `userptr live`";
    /// Page frame numbers in `/proc/self/pagemap`.
    Pfn = "pfn", "page identity; the device that does not pin in `userptr live`";
    /// `/proc/kpageflags`.
    Kpageflags = "kpageflags", "telling KSM, huge and zero pages apart";
    /// `/proc/kpagecount`.
    Kpagecount = "kpagecount", "how often a page is mapped";
    /// The ioctl `PROCMAP_QUERY`. Without it `/proc/PID/maps` is read.
    ProcmapQuery = "procmap_query", "finding mappings quickly";
    /// The ioctl `PAGEMAP_SCAN`.
    PagemapScan = "pagemap_scan", "which pages were written";
    /// Kernel same-page merging. Partial where it runs but may not be set.
    Ksm = "ksm", "the KSM rows of `userptr live`";
    /// Swap space, active.
    Swap = "swap", "swapping out without adding a device for it";
    /// zram devices can be added, to swap to for a while.
    Zram = "zram", "the swap rows of `userptr live`";
    /// uprobes through perf.
    Uprobes = "uprobes", "the uprobe rows of `userptr live`";
    /// Transparent huge pages. Partial where only MADV_COLLAPSE makes them.
    Thp = "thp", "the huge page rows of `userptr live`";
    /// The trigger `/proc/sys/vm/compact_memory`.
    Compaction = "compaction", "the compaction row of `userptr live`";
    /// `MADV_GUARD_INSTALL`.
    GuardPages = "guard_pages", "the guard row of `userptr live`";
    /// `process_madvise` of oneself with any advice (6.13).
    ProcessMadvise = "process_madvise", "the process_madvise row of `userptr live`";
    /// System V shared memory.
    SysV = "sysv", "the shmdt and SHM_REMAP rows of `userptr live`";
    /// A DAMON thread that watches physical memory (`operations` is `paddr`).
    Damon = "damon", "the page ageing row of `userptr live`";
    /// The directory for temporary files is on a file system that writes back to a disk.
    DiskFile = "disk_file", "the rows of mapped files in `userptr live`";
    /// The number of huge pages can be set.
    Hugetlb = "hugetlb", "testing that hugetlb mappings are heard";
    /// `mseal`.
    Mseal = "mseal", "sealed pools, which need fewer events";
    /// `memfd_secret`.
    MemfdSecret = "memfd_secret", "testing that secret memory is refused";
    /// More than one NUMA node.
    Numa = "numa", "migration between nodes";
    /// ptrace of a child.
    Ptrace = "ptrace", "`userptr watch`";
    /// `pidfd_getfd`.
    PidfdGetfd = "pidfd_getfd", "`userptr watch`";
    /// tracefs, mounted or through a mount of our own that is attached nowhere.
    Tracefs = "tracefs", "trace events";
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
