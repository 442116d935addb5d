// SPDX-License-Identifier: MIT OR Apache-2.0
//! What differs between kernel versions, as data. Paths ask the profile at the place where the kernels part.
//!
//! This slice models one version. A field comes into being with the first path that needs it.

use crate::rmap_file::IMmapLock;
use mmu_notifier::Rules;

/// One kernel version's choices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelProfile {
    /// As in a table heading.
    pub name: &'static str,
    /// What the notifier framework itself does.
    pub rules: Rules,
    /// munmap(2) downgrades mmap_lock to reading before it notifies and zaps (4.20 and later).
    pub munmap_downgrades: bool,
    /// fork gives the child its own copy of a pinned page at once (5.9; with PageAnonExclusive since 5.19).
    pub fork_copies_pinned: bool,
    /// A FOLL_PIN read pin of a shared anonymous page copies it first (FAULT_FLAG_UNSHARE, 5.19).
    pub read_pin_unshares: bool,
    // The file side.
    /// A dirty page of a file keeps its mapcount until the CPUs' TLBs are flushed (6.2).
    pub zap_delays_rmap: bool,
    /// FOLL_LONGTERM | FOLL_WRITE refuses shared mappings of files with dirty accounting (6.5).
    pub longterm_refuses_files: bool,
    /// How the reverse map of a file is locked.
    pub i_mmap: IMmapLock,
}

impl KernelProfile {
    /// Linux 6.18.
    pub const V6_18: KernelProfile = KernelProfile {
        name: "v6_18",
        rules: Rules::LINUX_6_6,
        munmap_downgrades: true,
        fork_copies_pinned: true,
        read_pin_unshares: true,
        zap_delays_rmap: true,
        longterm_refuses_files: true,
        i_mmap: IMmapLock::TruncateReads,
    };
}
