// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an operation on an address space can fail with, in the kernel's terms.

use crate::frame::FrameFreed;
use mmu_notifier::{PageAddr, Range};

/// The machine has none left (-ENOMEM). Nothing was changed by the step that failed; what earlier steps of the same
/// system call did stays, as in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OutOfMemory {
    /// No free page frame.
    #[error("out of page frames: give Config::frames more, or free some")]
    Frames,
    /// No free page-table page.
    #[error("out of page-table pages: give Config::tables more, or free some")]
    Tables,
}

/// Why a page could not be made present.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FaultError {
    /// No mapping there (SIGSEGV, SEGV_MAPERR), or the mm has exited.
    #[error("nothing is mapped at {0:?}: mmap it first")]
    Unmapped(PageAddr),
    /// The mapping does not allow it (SIGSEGV, SEGV_ACCERR).
    #[error("the mapping at {0:?} does not allow this access")]
    Access(PageAddr),
    /// The oom reaper has been here: what was in the page is lost (SIGBUS, MMF_UNSTABLE).
    #[error("{0:?}: the mm was reaped for lack of memory, its contents are lost")]
    Reaped(PageAddr),
    /// At or past the end of the mapped file (SIGBUS).
    #[error("{0:?} lies past the end of the mapped file")]
    PastEnd(PageAddr),
    /// FOLL_LONGTERM for writing on a shared mapping of a file that tracks dirty pages (-EFAULT, 6.5), or a page that
    /// no reference can hold.
    #[error("the page at {0:?} may not be held this way: pin anonymous or shmem memory, or without longterm")]
    NotPinnable(PageAddr),
    /// No memory for the page or for its page tables.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
}

/// Why a CPU load or store did not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// The page fault failed.
    #[error(transparent)]
    Fault(#[from] FaultError),
    /// The address is not a multiple of 8.
    #[error("address {0:#x} is not a multiple of 8: softmm loads and stores whole words")]
    Unaligned(u64),
    /// Not in the user half of the address space.
    #[error("address {0:#x} is not in user space")]
    NotUser(u64),
    /// Past the words that a frame stores.
    #[error("address {0:#x} is past the words that a page stores: see Config::words_per_page")]
    NotStored(u64),
    /// The TLB led to a free frame: softmm itself (or a mutant of it) failed to flush.
    #[error("the CPU reached a free frame through its TLB: {0}")]
    Freed(#[from] FrameFreed),
}

/// Why nothing was mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MmapError {
    /// MAP_FIXED_NOREPLACE on something mapped (-EEXIST).
    #[error("{0} overlaps a mapping: use Placement::Fixed to replace it")]
    Exists(Range),
    /// No gap of that many bytes (-ENOMEM).
    #[error("no free {0:#x} bytes of address space")]
    NoSpace(u64),
    /// Length 0 or not a multiple of the page size (-EINVAL).
    #[error("length {0:#x} is not a positive multiple of the page size")]
    Length(u64),
    /// The mapping would reach past the largest file (-EOVERFLOW).
    #[error("{0} pages into the file is past the largest file")]
    Offset(u64),
    /// The last user is gone; the address space is torn down (-ESRCH).
    #[error("the mm has exited")]
    Exited,
}

/// Why a read or write of a file did not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// A read at or past the end.
    #[error("page {0} lies at or past the end of the file")]
    PastEnd(u64),
    /// The file would get too big (-EFBIG).
    #[error("page {0} is past the largest file: {max} pages", max = FileError::PAGES_MAX)]
    TooBig(u64),
    /// Past the words that a page stores.
    #[error("word {0} is past the words that a page stores: see Config::words_per_page")]
    NotStored(usize),
    /// No memory for the page.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
}

impl FileError {
    /// The longest file, in pages.
    pub const PAGES_MAX: u64 = 1 << 51;
}

/// Why a breakpoint was not set or taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UprobeError {
    /// There is a probe already.
    #[error("there is a probe at this place already")]
    Exists,
    /// There is no probe.
    #[error("there is no probe at this place")]
    Missing,
    /// The file holds a breakpoint there itself (-ENOTSUPP).
    #[error("the word is a breakpoint already")]
    IsBreakpoint,
    /// The file has no page cache (-EIO).
    #[error("an XIP file cannot be probed")]
    NoPageCache,
    /// The word cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// No memory for the copy of a page.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
}

/// Why there is no child.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ForkError {
    /// No memory for the child's page tables or for copies of pinned pages. What had been built is gone again; the
    /// parent's pages may have become copy-on-write, which it does not see.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
    /// The parent has exited.
    #[error("the mm has exited")]
    Exited,
}

/// Why nothing was moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MremapError {
    /// The two ranges overlap or differ in length (-EINVAL).
    #[error("the ranges overlap or differ in length: softmm moves, and neither grows nor shrinks")]
    Ranges,
    /// Not all of it lies in one mapping (-EFAULT).
    #[error("the range is not inside one mapping")]
    NotOneVma,
    /// The last user is gone; the address space is torn down (-ESRCH).
    #[error("the mm has exited")]
    Exited,
    /// No memory for the page tables of the new place, which is unmapped now, or to give KSM's pages back their own copies.
    #[error(transparent)]
    Fault(#[from] FaultError),
}

/// Why a change of a range stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// MADV_FREE of a mapping of a file, or where there is no MADV_FREE (-EINVAL).
    #[error("what is mapped at {0:?} is not anonymous memory that this kernel can free")]
    NotAnonymous(PageAddr),
    /// Not all of it is mapped (-ENOMEM). mprotect has changed what comes before the hole; madvise everything else.
    #[error("nothing is mapped at {0:?}: what was mapped has been changed as far as the kernel does")]
    Hole(PageAddr),
    /// The last user is gone; the address space is torn down (-ESRCH).
    #[error("the mm has exited")]
    Exited,
    /// No memory to give KSM's pages back their own copies.
    #[error(transparent)]
    Fault(#[from] FaultError),
}
