// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a secondary MMU learns about a page table entry.

use std::fmt;

/// Page frame number: a physical address divided by the page size.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pfn(pub u64);

impl fmt::Debug for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pfn {:#x}", self.0)
    }
}

/// A present page table entry, as much of it as users of `change_pte` look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pte {
    /// The page.
    pub pfn: Pfn,
    /// May the CPU write through it?
    pub writable: bool,
}

/// How memory is going to be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Access {
    /// Read only: whatever is mapped will do, also a shared page or the zero page.
    Read,
    /// Read and write (`FOLL_WRITE`): copy-on-write is broken first.
    Write,
}
