// SPDX-License-Identifier: MIT OR Apache-2.0
//! mmap(2): private anonymous memory and files (all versions).
//!
//! Sequence: nothing for a new mapping. [`Placement::Fixed`] on top of mappings: the munmap sequence for them, over the
//! whole new range, **with mmap_lock held for writing** (no downgrade), before the new vma is in the tree.
//!
//! Locks: mmap_lock for writing; under it i_mmap of the file, to link the new vma.

use crate::error::{FileError, MmapError};
use crate::mm::Mm;
use crate::page_cache::File;
use crate::vma::{Prot, Vma, VmaFile};
use interleave::MaySleep;
use mmu_notifier::{PAGE_SHIFT, Range, RangeError, TASK_SIZE};
use std::sync::Arc;

/// Lowest address handed out (vm.mmap_min_addr).
const MMAP_MIN: u64 = 0x1_0000;
/// Where the search for a free range starts, downwards.
const MMAP_BASE: u64 = TASK_SIZE - (1 << 30);

/// Where a mapping shall be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// The highest gap that is large enough.
    Anywhere {
        /// Length in bytes, a multiple of the page size.
        len: u64,
    },
    /// Exactly here, replacing what is mapped (MAP_FIXED).
    Fixed(Range),
    /// Exactly here, if nothing is mapped (MAP_FIXED_NOREPLACE).
    FixedNoReplace(Range),
}

impl Placement {
    const fn len(self) -> u64 {
        match self {
            Placement::Anywhere { len } => len,
            Placement::Fixed(range) | Placement::FixedNoReplace(range) => range.len(),
        }
    }
}

/// Who sees what is written to a mapping of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapKind {
    /// The process alone: written pages are copied (MAP_PRIVATE).
    Private,
    /// Everybody (MAP_SHARED).
    Shared,
}

impl Mm {
    /// Maps anonymous private memory and says where. No page is made present.
    ///
    /// # Errors
    /// [`MmapError`]; nothing was changed.
    pub fn mmap(&self, cx: &mut MaySleep<'_>, placement: Placement, prot: Prot) -> Result<Range, MmapError> {
        self.mmap_region(cx, placement, |range| Vma::new(range, prot))
    }

    /// Maps `file` from its page `pgoff` on. Past the end of the file there is nothing but SIGBUS until it grows.
    ///
    /// # Errors
    /// [`MmapError`]; nothing was changed.
    pub fn mmap_file(
        &self,
        cx: &mut MaySleep<'_>,
        placement: Placement,
        prot: Prot,
        file: &Arc<File>,
        pgoff: u64,
        kind: MapKind,
    ) -> Result<Range, MmapError> {
        let pages = placement.len() >> PAGE_SHIFT;
        if pgoff.checked_add(pages).is_none_or(|end| end > FileError::PAGES_MAX) {
            return Err(MmapError::Offset(pgoff));
        }
        let shared = kind == MapKind::Shared;
        let vma_file = VmaFile { file: file.clone(), pgoff, shared };
        self.mmap_region(cx, placement, |range| Vma::of_file(range, prot, vma_file))
    }

    fn mmap_region(
        &self,
        cx: &mut MaySleep<'_>,
        placement: Placement,
        vma: impl FnOnce(Range) -> Vma,
    ) -> Result<Range, MmapError> {
        let mut vmas = self.vmas.write(cx);
        if vmas.exited {
            return Err(MmapError::Exited);
        }
        let range = match placement {
            Placement::Anywhere { len } => {
                match Range::new(0, len) {
                    Err(RangeError::Overflow { .. }) => return Err(MmapError::NoSpace(len)),
                    Err(_) => return Err(MmapError::Length(len)),
                    Ok(_) => {}
                }
                vmas.find_gap(len, MMAP_MIN, MMAP_BASE).ok_or(MmapError::NoSpace(len))?
            }
            Placement::Fixed(range) => {
                self.munmap_locked(cx, &mut vmas, range);
                range
            }
            Placement::FixedNoReplace(range) => {
                if vmas.overlapping(range).next().is_some() {
                    return Err(MmapError::Exists(range));
                }
                range
            }
        };
        vmas.insert_merging(vma(range));
        if let Some(vma) = vmas.find(range.start()) {
            self.anon_vma_link(cx, vma);
        }
        self.relink_files(cx, &vmas, range, &[], false);
        self.uprobe_mmap(cx, &mut vmas, range);
        Ok(range)
    }
}
