// SPDX-License-Identifier: MIT OR Apache-2.0
//! System calls on a lab's memory, as data.

use mmu_notifier::{PageAddr, Range};
use rustix::io::Errno;

/// What a call returned: the word for a load, 0 otherwise.
pub type Answer = Result<u64, Errno>;

/// What the CPU may do with a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rights {
    /// `PROT_NONE`.
    None,
    /// `PROT_READ`.
    Read,
    /// `PROT_READ | PROT_WRITE`.
    ReadWrite,
}

/// What is behind a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// `MAP_PRIVATE | MAP_ANONYMOUS`.
    Anonymous,
    /// The lab's file from this page on, copied on write.
    PrivateFile(u64),
    /// The lab's file from this page on.
    SharedFile(u64),
}

/// One call. Lengths and offsets of files are in pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Call {
    /// mmap with `MAP_FIXED`.
    Map(Range, Rights, Backing),
    /// munmap.
    Unmap(Range),
    /// mprotect.
    Protect(Range, Rights),
    /// madvise(`MADV_DONTNEED`).
    DontNeed(Range),
    /// madvise(`MADV_FREE`).
    Free(Range),
    /// madvise(`MADV_PAGEOUT`).
    PageOut(Range),
    /// madvise(`MADV_MERGEABLE`), or `MADV_UNMERGEABLE`.
    Mergeable(Range, bool),
    /// mremap of one page with `MREMAP_MAYMOVE` and `MREMAP_FIXED`, to another place.
    Move {
        /// From here.
        from: PageAddr,
        /// To here.
        to: PageAddr,
    },
    /// Load the first word of a page.
    Load(PageAddr),
    /// Store to the first word of a page.
    Store(PageAddr, u64),
    /// Load the first word of a page through a pin for reading, as process_vm_readv takes one.
    ReadPinned(PageAddr),
    /// Store to the first word of a page through a pin for writing.
    WritePinned(PageAddr, u64),
    /// fsync.
    Sync,
    /// ftruncate.
    Truncate {
        /// The new length.
        pages: u64,
    },
    /// fallocate(`FALLOC_FL_PUNCH_HOLE`).
    Punch {
        /// From this page on.
        first: u64,
        /// So many.
        pages: u64,
    },
    /// pwrite of a whole page, every word of it the same.
    WriteFile {
        /// Which.
        page: u64,
        /// The word.
        value: u64,
    },
}

impl Call {
    /// Do the addresses that it changes or touches lie in `arena`?
    #[must_use]
    pub fn is_inside(&self, arena: Range) -> bool {
        let inside = |range: Option<Range>| range.is_none_or(|range| arena.contains(range));
        match *self {
            Call::Move { from, to } => [from, to].into_iter().all(|page| inside(Some(Range::page(page)))),
            _ => inside(self.range()),
        }
    }

    /// The range of addresses that it changes or touches, if it is one.
    fn range(&self) -> Option<Range> {
        match *self {
            Call::Map(range, ..)
            | Call::Unmap(range)
            | Call::Protect(range, _)
            | Call::DontNeed(range)
            | Call::Free(range)
            | Call::PageOut(range)
            | Call::Mergeable(range, _) => Some(range),
            Call::Load(page) | Call::Store(page, _) | Call::ReadPinned(page) | Call::WritePinned(page, _) => {
                Some(Range::page(page))
            }
            Call::Move { .. }
            | Call::Sync
            | Call::Truncate { .. }
            | Call::Punch { .. }
            | Call::WriteFile { .. } => None,
        }
    }
}
