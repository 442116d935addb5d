// SPDX-License-Identifier: MIT OR Apache-2.0
//! What differs between kernel versions, as data. Paths ask the profile at the place where the kernels part.
//!
//! A field comes into being with the first path that needs it, and says from which version to which a value holds.
//! A profile is one point in time, so it says nothing of the versions between two of them.

use crate::rmap_file::IMmapLock;
use mmu_notifier::Rules;

/// Who hears what where set_pte_at_notify stores a pte: copy-on-write, KSM, uprobes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChangePte {
    /// S and E stand around the change (October 2012 and later). Without it, V2 of the proposal of 2014.
    pub pair: bool,
    /// change_pte is called (until 6.9).
    pub called: bool,
    /// What a notifier without change_pte gets where there is no pair.
    pub fallback: Fallback,
}

/// What stands in for change_pte in a notifier that has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// Nothing.
    None,
    /// invalidate_page after the ptl has been dropped, while the old page is still held (proposed in January 2014).
    PageAfterUnlock,
    /// invalidate_page in the place of change_pte, under the ptl (before October 2012).
    PageUnderPtl,
}

/// Who flushes TLBs that walk the CPU's page table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecondaryTlbs {
    /// Nobody: a driver does with S, E, P and C (until 3.18).
    Nobody,
    /// The mm calls invalidate_range where it frees and where it replaces a page; `end` calls it too (3.19 to 6.5).
    Mm,
    /// Whatever flushes the CPUs' TLBs flushes these (6.6 and later).
    CpuFlush,
}

/// How reclaim tells that it unmaps a page from one vma.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmap {
    /// invalidate_page after the ptl has been dropped (until 4.10).
    PageAfterUnlock,
    /// invalidate_page under the ptl (4.11 to 4.13).
    PageUnderPtl,
    /// S before the ptl is taken, E after it has been dropped (4.14 and later).
    Pair,
}

/// When a write fault on a read-only pte may keep its anonymous page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reuse {
    /// No other pte and no swap entry leads to it; references do not count (until 5.8).
    SoleMapping,
    /// Nobody else holds any reference (5.9 to 5.18).
    SoleReference,
    /// PageAnonExclusive, or nobody else holds any reference (5.19 and later).
    Exclusive,
}

/// What a FOLL_FORCE write to a mapping that is not writable takes for a page of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Force {
    /// After a fault for writing, whatever is mapped: FOLL_WRITE is dropped (until 4.8; the dirty COW hole).
    DropsWrite,
    /// After a fault for writing, a dirty pte (FOLL_COW, 4.9 to 5.19).
    DirtyAfterCow,
    /// An exclusive anonymous page (6.0 and later).
    Exclusive,
}

/// How far S of mprotect reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mprotect {
    /// From the first 2 MiB that has a page table to the end of the range, for each GiB (6.10 and before).
    FromFirstPmd,
    /// From the first GiB that has one to the end of the range, for each 512 GiB (6.13 and later).
    FromFirstPud,
}

/// When mremap makes CPUs forget the old address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MremapFlush {
    /// Once everything has moved: meanwhile the page may be freed through its new address (until 4.8).
    AtEnd,
    /// The same, but under the ptl where a pte was dirty (4.9 to 4.19).
    AtEndUnlessDirty,
    /// Under the ptl (4.20 and later).
    UnderPtl,
}

/// The oom reaper beside notifiers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OomReaper {
    /// There is none (until 4.5).
    None,
    /// Zaps without a word (4.6 to 4.13).
    Silent,
    /// Leaves an mm alone that has a list notifier (4.14 to 4.18).
    SparesNotified,
    /// Notifies, and the callbacks must not block (4.19 and later).
    NonBlock,
}

/// How uprobes change a word of a private mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Uprobes {
    /// Replace the page by a changed copy, both ways (until 5.3).
    Replace,
    /// The same; a restored page that is as in the file goes, and the file's page is faulted in (5.4 to 6.15).
    ReplaceOrZap,
    /// Break copy-on-write as a forced write would, and write the word where it is (6.16 and later).
    InPlace,
}

/// One kernel version's choices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelProfile {
    /// As in a table heading.
    pub name: &'static str,
    /// What the notifier framework itself does.
    pub rules: Rules,
    /// S and E say why (5.2 and later).
    pub events: bool,
    /// At set_pte_at_notify.
    pub change_pte: ChangePte,
    /// TLBs that walk the CPU's page table.
    pub secondary_tlbs: SecondaryTlbs,
    /// KSM flushes them before it stores the new pte, though the contents stay (3.19 to 4.14).
    pub ksm_flushes_secondary: bool,
    /// Copy-on-write ends with only_end, since they have been flushed (4.15 to 6.5).
    pub cow_only_ends: bool,
    /// Copy-on-write takes the old page out of the swap cache if nobody needs it there (5.13, perhaps later).
    pub cow_frees_swap_cache: bool,
    /// Reclaim.
    pub unmap: Unmap,
    /// Reclaim asks once more for accesses when it unmaps (until 5.10).
    pub unmap_asks_young: bool,
    /// Reclaim unmaps first and flushes once before it writes or frees (4.3; secondary TLBs whole since 6.6).
    pub unmap_defers_flush: bool,
    /// Reclaim flushes secondary TLBs under the ptl of each pte (4.14).
    pub unmap_flushes_secondary: bool,
    /// Reclaim leaves pages alone that may be pinned (5.11 and later).
    pub reclaim_spares_pinned: bool,
    /// Reclaim may write a dirty page of a file (kswapd, in need; not since filesystems have no writepage, 6b0dfabb3555).
    pub reclaim_writes_files: bool,
    /// clear_young exists (4.2 and later): idle tracking does not flush.
    pub clear_young: bool,
    /// Write faults.
    pub reuse: Reuse,
    /// get_user_pages.
    pub force: Force,
    /// FOLL_PIN exists (5.6 and later); before, a pin is a FOLL_GET.
    pub foll_pin: bool,
    /// FOLL_PIN does not count the zero page (6.5 and later).
    pub zero_page_unpinned: bool,
    /// gup_fast looks at the pte again after it has taken its reference (x86: 4.13 and later).
    pub gup_fast_rechecks: bool,
    /// gup_fast lets go of pins that it took beside fork (write_protect_seq, 5.11 and later).
    pub gup_fast_sees_fork: bool,
    /// A FOLL_PIN read pin of a shared anonymous page copies it first (FAULT_FLAG_UNSHARE, 5.19).
    pub read_pin_unshares: bool,
    /// fork gives the child its own copy of a pinned page at once (5.9; with PageAnonExclusive since 5.19).
    pub fork_copies_pinned: bool,
    /// munmap(2) downgrades mmap_lock to reading before it notifies and zaps (4.20 and later).
    pub munmap_downgrades: bool,
    /// mprotect's notified range.
    pub mprotect: Mprotect,
    /// mprotect makes ptes of exclusive pages writable at once (6.0 and later).
    pub mprotect_upgrades: bool,
    /// mprotect takes back the charge of private memory that loses PROT_WRITE before its first page (6.4, perhaps
    /// before): it no longer merges with memory that had one.
    pub mprotect_unaccounts: bool,
    /// MADV_DONTNEED flushes inside S..E too (4.14 to 4.18).
    pub dontneed_flushes_inside: bool,
    /// MADV_FREE exists (4.5 and later).
    pub madvise_free: bool,
    /// One madvise call flushes and frees once, after the last vma (6.15).
    pub madvise_batches: bool,
    /// The oom reaper.
    pub oom_reaper: OomReaper,
    /// When mremap flushes.
    pub mremap: MremapFlush,
    // The file side.
    /// A dirty page of a file keeps its mapcount until the CPUs' TLBs are flushed (6.2).
    pub zap_delays_rmap: bool,
    /// FOLL_LONGTERM | FOLL_WRITE refuses shared mappings of files with dirty accounting (6.5).
    pub longterm_refuses_files: bool,
    /// Execute in place (until 3.19; DAX since).
    pub xip: bool,
    /// Breakpoints.
    pub uprobes: Uprobes,
    /// How the reverse map of a file is locked.
    pub i_mmap: IMmapLock,
}

impl KernelProfile {
    /// Linux 3.16: the kernel of the exchange.
    pub const V3_16: KernelProfile = KernelProfile {
        name: "v3_16",
        rules: Rules::LINUX_3_16,
        events: false,
        change_pte: ChangePte { pair: true, called: true, fallback: Fallback::None },
        secondary_tlbs: SecondaryTlbs::Nobody,
        ksm_flushes_secondary: false,
        cow_only_ends: false,
        cow_frees_swap_cache: false,
        unmap: Unmap::PageAfterUnlock,
        unmap_asks_young: true,
        unmap_defers_flush: false,
        unmap_flushes_secondary: false,
        reclaim_spares_pinned: false,
        reclaim_writes_files: true,
        clear_young: false,
        reuse: Reuse::SoleMapping,
        force: Force::DropsWrite,
        foll_pin: false,
        zero_page_unpinned: false,
        gup_fast_rechecks: false,
        gup_fast_sees_fork: false,
        read_pin_unshares: false,
        fork_copies_pinned: false,
        munmap_downgrades: false,
        mprotect: Mprotect::FromFirstPmd,
        mprotect_upgrades: false,
        mprotect_unaccounts: false,
        dontneed_flushes_inside: false,
        madvise_free: false,
        madvise_batches: false,
        oom_reaper: OomReaper::None,
        zap_delays_rmap: false,
        longterm_refuses_files: false,
        xip: true,
        uprobes: Uprobes::Replace,
        i_mmap: IMmapLock::Mutex,
        mremap: MremapFlush::AtEnd,
    };
    /// 3.16 without the pair around change_pte, and nothing in its place (V2a).
    pub const UNWRAPPED_A: KernelProfile = KernelProfile {
        name: "unwrapped_a",
        change_pte: ChangePte { pair: false, called: true, fallback: Fallback::None },
        ..KernelProfile::V3_16
    };
    /// 3.16 without the pair; who has no change_pte hears invalidate_page after the unlock (V2b).
    pub const UNWRAPPED_B: KernelProfile = KernelProfile {
        name: "unwrapped_b",
        change_pte: ChangePte { pair: false, called: true, fallback: Fallback::PageAfterUnlock },
        ..KernelProfile::V3_16
    };
    /// 3.16 without the pair; who has no change_pte hears invalidate_page in its place (V2c).
    pub const UNWRAPPED_C: KernelProfile = KernelProfile {
        name: "unwrapped_c",
        change_pte: ChangePte { pair: false, called: true, fallback: Fallback::PageUnderPtl },
        ..KernelProfile::V3_16
    };
    /// Linux 3.19: invalidate_range.
    pub const V3_19: KernelProfile = KernelProfile {
        name: "v3_19",
        rules: Rules::LINUX_3_19,
        secondary_tlbs: SecondaryTlbs::Mm,
        ksm_flushes_secondary: true,
        i_mmap: IMmapLock::TruncateWrites,
        ..KernelProfile::V3_16
    };
    /// Linux 4.12: invalidate_page under the ptl.
    pub const V4_12: KernelProfile = KernelProfile {
        name: "v4_12",
        unmap: Unmap::PageUnderPtl,
        xip: false,
        unmap_defers_flush: true,
        clear_young: true,
        madvise_free: true,
        force: Force::DirtyAfterCow,
        oom_reaper: OomReaper::Silent,
        mremap: MremapFlush::AtEndUnlessDirty,
        ..KernelProfile::V3_19
    };
    /// Linux 4.14: invalidate_page is gone.
    pub const V4_14: KernelProfile = KernelProfile {
        name: "v4_14",
        unmap: Unmap::Pair,
        unmap_flushes_secondary: true,
        gup_fast_rechecks: true,
        dontneed_flushes_inside: true,
        oom_reaper: OomReaper::SparesNotified,
        ..KernelProfile::V4_12
    };
    /// Linux 5.10: a reference is enough to lose a page.
    pub const V5_10: KernelProfile = KernelProfile {
        name: "v5_10",
        events: true,
        ksm_flushes_secondary: false,
        cow_only_ends: true,
        unmap_flushes_secondary: false,
        reuse: Reuse::SoleReference,
        uprobes: Uprobes::ReplaceOrZap,
        foll_pin: true,
        fork_copies_pinned: true,
        munmap_downgrades: true,
        dontneed_flushes_inside: false,
        oom_reaper: OomReaper::NonBlock,
        mremap: MremapFlush::UnderPtl,
        ..KernelProfile::V4_14
    };
    /// Linux 6.18.
    pub const V6_18: KernelProfile = KernelProfile {
        name: "v6_18",
        rules: Rules::LINUX_6_6,
        change_pte: ChangePte { pair: true, called: false, fallback: Fallback::None },
        secondary_tlbs: SecondaryTlbs::CpuFlush,
        cow_only_ends: false,
        cow_frees_swap_cache: true,
        unmap_asks_young: false,
        reclaim_spares_pinned: true,
        reclaim_writes_files: false,
        reuse: Reuse::Exclusive,
        force: Force::Exclusive,
        zero_page_unpinned: true,
        gup_fast_sees_fork: true,
        read_pin_unshares: true,
        mprotect: Mprotect::FromFirstPud,
        mprotect_upgrades: true,
        mprotect_unaccounts: true,
        madvise_batches: true,
        zap_delays_rmap: true,
        longterm_refuses_files: true,
        uprobes: Uprobes::InPlace,
        i_mmap: IMmapLock::TruncateReads,
        ..KernelProfile::V5_10
    };

    /// All of them, the oldest first.
    pub const ALL: [KernelProfile; 9] = [
        KernelProfile::V3_16,
        KernelProfile::UNWRAPPED_A,
        KernelProfile::UNWRAPPED_B,
        KernelProfile::UNWRAPPED_C,
        KernelProfile::V3_19,
        KernelProfile::V4_12,
        KernelProfile::V4_14,
        KernelProfile::V5_10,
        KernelProfile::V6_18,
    ];

    /// The profile of that name.
    pub fn named(name: &str) -> Option<KernelProfile> {
        KernelProfile::ALL.into_iter().find(|profile| profile.name == name)
    }

    /// Do pages have PageAnonExclusive (5.19 and later)?
    pub(crate) const fn has_exclusive(&self) -> bool {
        matches!(self.reuse, Reuse::Exclusive)
    }
}
