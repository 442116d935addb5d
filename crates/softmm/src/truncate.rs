// SPDX-License-Identifier: MIT OR Apache-2.0
//! ftruncate(2) and fallocate(FALLOC_FL_PUNCH_HOLE): truncate_pagecache, unmap_mapping_range (mm/truncate.c,
//! mm/memory.c; 3.16 to 6.18).
//!
//! Sequence of truncate: the new size; then for each vma that maps what went away, **twice**: S(CLEAR, those pages, mapped
//! or not); [ clr' ] of all pages, private copies included; E; flush; put. Between the two the page cache is emptied: per
//! page, if somebody has mapped it again meanwhile, S(CLEAR, that page); [ clr' ] of pages of the file alone; E; flush; put.
//! The second round is for private copies that were made in between. A regular file notifies like this whenever its size
//! is set, also when it grows (truncate_pagecache knows no better); shmem only when it shrinks.
//!
//! Sequence of a hole: the first round once, for **pages of the file alone**: private copies stay and stay mapped.
//!
//! A page that somebody holds leaves the file but not its holder, and what he writes is lost.
//!
//! Locks: inode_lock; regular files: invalidate_lock for writing; each round: i_mmap (a mutex until 3.18, for writing until
//! 5.16, for reading since); the emptying: the page lock over i_mmap. **No mmap_lock**: the caller may map the file or not,
//! and the mms that hear it may be exiting.

use crate::error::FileError;
use crate::page_cache::{File, FileKind};
use crate::zap::Zap;
use interleave::MaySleep;
use std::ops::Range;

impl File {
    /// Makes the file `pages` long. What lay past that is gone from every mapping, private copies included.
    ///
    /// # Errors
    /// [`FileError::TooBig`].
    pub fn truncate(&self, cx: &mut MaySleep<'_>, pages: u64) -> Result<(), FileError> {
        if pages > FileError::PAGES_MAX {
            return Err(FileError::TooBig(pages));
        }
        let _inode = self.inode_lock.lock(cx);
        let regular = self.kind() != FileKind::Shmem;
        let _filling = regular.then(|| self.invalidate_lock.write(cx));
        let shrinks = pages < self.pages();
        self.set_pages(pages);
        if regular || shrinks {
            let gone = pages..u64::MAX;
            self.unmap_mapping_range(cx, gone.clone(), Zap::All);
            if self.kind() != FileKind::Xip {
                self.empty(cx, gone.clone());
            }
            self.unmap_mapping_range(cx, gone.clone(), Zap::All);
            if self.kind() == FileKind::Xip {
                self.free_xip_blocks(cx, gone);
            }
        }
        Ok(())
    }

    /// Frees `pages`: they read as zeros afterwards. The file keeps its length.
    pub fn punch_hole(&self, cx: &mut MaySleep<'_>, pages: Range<u64>) {
        if pages.is_empty() {
            return;
        }
        let _inode = self.inode_lock.lock(cx);
        let _filling = (self.kind() != FileKind::Shmem).then(|| self.invalidate_lock.write(cx));
        self.unmap_mapping_range(cx, pages.clone(), Zap::FilePages);
        match self.kind() {
            FileKind::Xip => self.free_xip_blocks(cx, pages),
            FileKind::Regular | FileKind::Shmem => self.empty(cx, pages),
        }
    }

    /// truncate_inode_pages_range, and the blocks behind.
    fn empty(&self, cx: &mut MaySleep<'_>, pages: Range<u64>) {
        loop {
            let cached = self.cached_in(cx, pages.clone());
            if cached.is_empty() {
                break;
            }
            for index in cached {
                let Some(page) = self.find_lock(cx, index) else { continue };
                if self.frames().mapcount(page.pfn()) > 0 {
                    self.unmap_mapping_range(cx, index..index + 1, Zap::FilePages);
                }
                self.remove(cx, index, &page);
            }
        }
        self.free_blocks(cx, pages);
    }

    pub(crate) fn unmap_mapping_range(&self, cx: &mut MaySleep<'_>, pages: Range<u64>, what: Zap) {
        let i_mmap = self.i_mmap_lock_truncate(cx);
        for rmap in i_mmap.iter() {
            let Some((mm, range)) = rmap.mm().zip(rmap.addresses(pages.start, pages.end)) else { continue };
            mm.zap_page_range_single(cx, range, what);
        }
    }
}
