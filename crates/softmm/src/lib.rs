// SPDX-License-Identifier: MIT OR Apache-2.0
//! softmm: a Linux-like mm in Rust that fires every notifier.
//!
//! A [`Machine`] has page frames, page-table pages and CPUs. An [`Mm`] is an address space on it. Threads call the
//! methods of an mm as system calls, load and store through a [`Cpu`] and its TLB, and devices read [`Frames`] by frame
//! number, as DMA does. Whoever mirrors an mm registers with it and is told what Linux tells.
//!
//! One path, one file, named as in the kernel, and each file begins with the notifier sequence that it fires, the locks
//! it holds and what kernels do differently; a [`KernelProfile`] chooses. In those lines: `S`, `E`
//! invalidate_range_start, _end; `C` change_pte; `P` invalidate_page; `Y` clear_flush_young; `X` release; `Xi` the
//! interval notifiers' RELEASE; `R` invalidate_range; `A` arch_invalidate_secondary_tlbs; `clr` pte cleared and TLB
//! flushed; `clr'` cleared, flush deferred; `set` new pte stored; `[ ... ]` under the ptl, must not sleep; `put`
//! the mm drops its reference.
//!
//! What there is, on base pages: private anonymous memory and files (page cache, shared, private and XIP mappings); mmap, fault,
//! copy-on-write, munmap, mprotect, mremap (moves alone), madvise, fork, get_user_pages, KSM, page ageing, reclaim and swap, truncate and hole
//! punch, writeback, uprobes, the oom reaper, exit.
//!
//! Lock order (outer first; the same names are the lock classes):
//! ```text
//! ksm_thread_mutex                    KSM
//! register_rwsem                      uprobes, one per file
//!   dup_mmap_sem                      uprobes write; fork reads
//!     mmap_lock                       parent's; every system call on an mm
//!       mmap_lock/1                   fork: the child's
//! inode_lock                          write(2), truncate, hole punch: without mmap_lock
//!         invalidate_lock             under mmap_lock: file faults, reading; under inode_lock: truncate, hole punch, writing
//!           xip_sparse_mutex          XIP
//!           page_lock                 file faults, swap-in, KSM, writeback, reclaim, truncate, uprobes; elsewhere only tried for
//!             i_mmap                  one per file; writing: link, unlink; who finds ptes by a page: see rmap_file
//!             anon_vma                one per family of forks; writing: link, unlink; reading: rmap walks
//!               mmu_notifier_invalidate_range_start
//!                 locks of drivers    callbacks
//!               page_table_lock       leaf
//!               ptl                   one per page-table page; fork: the child's
//!                 ptl/1               fork: the parent's
//!                   swap_lock         leaf; also taken with no ptl
//!                   cpu_irq           interrupts off; one CPU at a time; leaf; also taken with no ptl (loads, gup_fast)
//!                   locks of drivers  arch_invalidate_secondary_tlbs, change_pte, clear_flush_young: with the ptl held
//!               i_pages
//!                 disk              also taken with no i_pages
//!               uprobes_treelock, anon_vma_rcu, ksm_stable_node   leaves
//! ```
//! [`told`] hears an mm as the live sources hear the kernel; its locks are in its own words.
//!
//! Frames, page-table entries and reference counts are atomics and have no lock. No callback runs under `cpu_irq`,
//! `page_table_lock` or `swap_lock`.

pub mod access;
mod bitmap;
pub mod cow;
pub mod error;
pub mod exit;
pub mod fail;
pub mod fault;
pub mod fault_file;
pub mod fork;
pub mod frame;
pub mod gup;
pub mod ksm;
pub mod machine;
pub mod madvise;
pub mod madvise_free;
pub mod mm;
pub mod mmap;
pub mod mprotect;
pub mod mremap;
pub mod munmap;
mod notify;
pub mod oom;
pub mod page_cache;
pub mod page_table;
pub mod primary;
pub mod profile;
pub mod pte;
pub mod reclaim;
pub mod reclaim_file;
mod rmap;
pub mod rmap_file;
pub mod swap;
pub mod swap_fault;
pub mod tlb;
pub mod told;
pub mod truncate;
pub mod uprobes;
pub mod vma;
pub mod writeback;
pub mod xip;
pub mod zap;

pub use error::{
    AccessError, ChangeError, FaultError, FileError, ForkError, MmapError, MremapError, OutOfMemory,
    UprobeError,
};
pub use fail::Allocation;
pub use frame::{FrameFreed, FrameId, Frames, POISON, ZERO_PAGE};
pub use gup::{Foll, FollRef, UserPages};
pub use ksm::Merge;
pub use machine::{Config, Machine};
pub use mm::{Mm, MmId, MmUser};
pub use mmap::{MapKind, Placement};
pub use oom::Reap;
pub use page_cache::{File, FileKind};
pub use primary::{MmPin, MmSubscription};
pub use profile::KernelProfile;
pub use pte::Pte;
pub use reclaim::Reclaim;
pub use reclaim_file::Reclaimed;
pub use rmap_file::IMmapLock;
pub use swap::Swap;
pub use tlb::Cpu;
pub use vma::Prot;
