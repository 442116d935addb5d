// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who maps a file: the i_mmap of an address_space (mm/interval_tree.c, the file half of mm/rmap.c).
//!
//! Whoever changes what a file's pages are finds the ptes through here, **without mmap_lock**: truncate, writeback,
//! reclaim, uprobes. So a driver cannot use mmap_lock to keep their notifications away.
//!
//! Invariants:
//! * Under mmap_lock for writing, the entries of an mm are its vmas of that file, split and merged as the tree says, and
//!   those that munmap has taken out of the tree but whose ptes may still be there.
//! * A vma leaves before its page tables are freed: who holds i_mmap may walk the page tables of what it finds.
//! * Entries are visited by offset, then by age, so fork's child comes after its parent: truncate cannot miss a pte that
//!   is copied behind its back.
//!
//! Locks: i_mmap. A mutex until 3.18; a rwsem since 3.19, which reverse-map walkers and uprobes take for reading and which
//! truncate took for writing until it was content with reading (5.17). Under it: ptl. Over it: mmap_lock, page lock.

use crate::mm::{Mm, MmId};
use crate::page_cache::File;
use crate::vma::{Vma, VmaTree};
use interleave::{Digest, MaySleep, ReadGuard, WriteGuard};
use mmu_notifier::{PAGE_SHIFT, PAGE_SIZE, PageAddr, Range, TASK_SIZE};
use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::{Arc, Weak};

/// How i_mmap is locked: what differs between kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IMmapLock {
    /// i_mmap_mutex: everybody excludes everybody (until 3.18).
    Mutex,
    /// i_mmap_rwsem: truncate excludes reverse-map walkers (3.19 to 5.16).
    TruncateWrites,
    /// i_mmap_rwsem: truncate does not (5.17 and later).
    TruncateReads,
}

/// One vma that maps a file.
#[derive(Clone)]
pub(crate) struct Rmap {
    mm: Weak<Mm>,
    mm_id: MmId,
    pub(crate) range: Range,
    /// Which page of the file the range begins with.
    pgoff: u64,
    pub(crate) shared: bool,
}

impl Rmap {
    fn of(mm: &Mm, vma: &Vma) -> Option<(Arc<File>, Rmap)> {
        let file = vma.file.as_ref()?;
        let (mm_id, range, pgoff, shared) = (mm.id(), vma.range, file.pgoff, file.shared);
        Some((file.file.clone(), Rmap { mm: mm.weak().clone(), mm_id, range, pgoff, shared }))
    }

    fn is(&self, other: &Rmap) -> bool {
        (self.mm_id, self.range, self.pgoff, self.shared)
            == (other.mm_id, other.range, other.pgoff, other.shared)
    }

    /// The mm; `None` if its struct is on its way out, and then nothing of it is mapped.
    pub(crate) fn mm(&self) -> Option<Arc<Mm>> {
        self.mm.upgrade()
    }

    /// Where the pages `[first, end)` of the file are mapped.
    pub(crate) fn addresses(&self, first: u64, end: u64) -> Option<Range> {
        let (first, end) = (first.max(self.pgoff), end.min(self.pgoff + self.range.pages()));
        let start = self.range.start() + (first.checked_sub(self.pgoff)? << PAGE_SHIFT);
        Range::new(start, end.checked_sub(first)? << PAGE_SHIFT).ok()
    }

    /// Where page `index` of the file is mapped (vma_address).
    pub(crate) fn address(&self, index: u64) -> Option<PageAddr> {
        self.addresses(index, index + 1).map(Range::first_page)
    }
}

/// The vmas that map one file.
#[derive(Default)]
pub(crate) struct IMmap {
    entries: BTreeMap<(u64, u64), Rmap>,
    next: u64,
}

impl Digest for Rmap {
    fn digest(&self) -> u64 {
        (self.mm_id.number(), self.range.start(), self.range.end(), self.pgoff, self.shared).digest()
    }
}

impl Digest for IMmap {
    fn digest(&self) -> u64 {
        (&self.entries, self.next).digest()
    }
}

impl IMmap {
    /// In the order in which the kernel visits them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Rmap> {
        self.entries.values()
    }

    fn insert(&mut self, rmap: Rmap) {
        self.entries.insert((rmap.pgoff, self.next), rmap);
        self.next += 1;
    }
}

/// i_mmap, held one way or the other.
pub(crate) enum IMmapGuard<'l> {
    Read(ReadGuard<'l, IMmap>),
    Write(WriteGuard<'l, IMmap>),
}

impl Deref for IMmapGuard<'_> {
    type Target = IMmap;

    fn deref(&self) -> &IMmap {
        match self {
            IMmapGuard::Read(guard) => guard,
            IMmapGuard::Write(guard) => guard,
        }
    }
}

impl File {
    /// For reverse-map walkers (rmap_walk_file).
    pub(crate) fn i_mmap_lock_read(&self, cx: &mut MaySleep<'_>) -> IMmapGuard<'_> {
        match self.machine().profile().i_mmap {
            IMmapLock::Mutex => IMmapGuard::Write(self.i_mmap.write(cx)),
            IMmapLock::TruncateWrites | IMmapLock::TruncateReads => IMmapGuard::Read(self.i_mmap.read(cx)),
        }
    }

    /// For truncate and hole punch (unmap_mapping_range).
    pub(crate) fn i_mmap_lock_truncate(&self, cx: &mut MaySleep<'_>) -> IMmapGuard<'_> {
        match self.machine().profile().i_mmap {
            IMmapLock::Mutex | IMmapLock::TruncateWrites => IMmapGuard::Write(self.i_mmap.write(cx)),
            IMmapLock::TruncateReads => IMmapGuard::Read(self.i_mmap.read(cx)),
        }
    }
}

impl Mm {
    /// Makes i_mmap follow the tree, for the files that are mapped in `span` or beside it, after the tree has changed
    /// there. `pieces` have been taken out of the tree: they stay linked while `still_mapped`, and go otherwise.
    /// mmap_lock is held for writing, or the pieces are the caller's alone (a downgraded munmap).
    pub(crate) fn relink_files(
        &self,
        cx: &mut MaySleep<'_>,
        vmas: &VmaTree,
        span: Range,
        pieces: &[Vma],
        still_mapped: bool,
    ) {
        let (low, high) = (span.start().saturating_sub(PAGE_SIZE), (span.end() + PAGE_SIZE).min(TASK_SIZE));
        let Ok(near) = Range::new(low, high - low) else { return };
        let mut by_file: BTreeMap<u64, (Arc<File>, Vec<Rmap>)> = BTreeMap::new();
        let linked = vmas.overlapping(near).filter_map(|vma| Rmap::of(self, vma)).map(|found| (found, true));
        let taken_out =
            pieces.iter().filter_map(|vma| Rmap::of(self, vma)).map(|found| (found, still_mapped));
        for ((file, rmap), keep) in linked.chain(taken_out) {
            let (_, wanted) = by_file.entry(file.id()).or_insert_with(|| (file, Vec::new()));
            wanted.extend(keep.then_some(rmap));
        }
        for (file, wanted) in by_file.into_values() {
            let mut i_mmap = file.i_mmap.write(cx);
            i_mmap.entries.retain(|_, have| {
                have.mm_id != self.id() || !have.range.overlaps(near) || wanted.iter().any(|w| w.is(have))
            });
            for rmap in wanted {
                if !i_mmap.iter().any(|have| have.is(&rmap)) {
                    i_mmap.insert(rmap);
                }
            }
        }
    }
}
