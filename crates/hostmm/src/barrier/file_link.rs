// SPDX-License-Identifier: MIT OR Apache-2.0
//! A second mapping of a file, for the sake of the file's `i_mmap` lock.
//!
//! Truncate and hole punch walk the mappings of a file under `i_mmap`, held for reading, and take neither the mmap
//! lock nor a VMA's. Whoever links a mapping to the file, or splits one, takes `i_mmap` for writing (`vma_prepare`) and
//! so waits for them. Unlinking a mapping, though, is an munmap, which is announced to every notifier of the mm: a
//! barrier that did so would move the very counter that its caller is about to check. So the second mapping stays,
//! two pages that nobody ever touches, and each further barrier splits and merges it, which announces nothing.
//!
//! The mapping keeps the file alive, as the mappings that it stands for do: it goes with the last subscription to
//! memory of that file.

use std::io;

use interleave::{LockClass, MaySleep, Mutex};
use mmu_notifier::{PAGE_SIZE, PageAddr, Range};

use crate::page::Vma;
use crate::sys::map::Mapping;
use crate::sys::mm;

static FILE_LINK: LockClass = LockClass::new("file_link");

/// Which file a mapping shows: device and inode.
pub(super) type FileId = ((u32, u32), u64);

/// The file of `vma`, if a page of it can go without the mmap lock and without a second notification.
///
/// Truncate notifies each mapping twice, before and after the pages leave the page cache (`truncate_pagecache`), so
/// whoever got a page in the first gap hears the second. A hole punch in a shared mapping notifies once. In a private
/// mapping a pin for writing has an anonymous copy, which a hole punch leaves alone.
pub(super) fn file_of(vma: &Vma) -> Option<FileId> {
    (vma.shared && vma.inode != 0).then_some((vma.dev, vma.inode))
}

/// The second mapping of one file.
pub(super) struct FileLink {
    file: FileId,
    /// Locked while it is split: two splits at once would be one, and the other no barrier.
    pages: Mutex<Mapping>,
}

impl FileLink {
    /// Link a second mapping of the file that is mapped, shared, at `page`. This is a barrier already.
    pub(super) fn new(file: FileId, page: PageAddr) -> io::Result<FileLink> {
        let pages = Mapping::second(page, 2 * PAGE_SIZE as usize)?;
        Ok(FileLink { file, pages: Mutex::new(&FILE_LINK, pages) })
    }

    pub(super) fn file(&self) -> FileId {
        self.file
    }

    /// Wait for every truncate and hole punch of the file that is among its mappings now.
    pub(super) fn wait(&self, cx: &mut MaySleep<'_>) -> io::Result<()> {
        let pages = self.pages.lock(cx);
        let first = Range::new(pages.ptr().as_ptr() as u64, PAGE_SIZE).map_err(io::Error::other)?;
        // The flag is that of our own mapping, and matters to core dumps alone.
        mm::set_dump(first, false)?;
        mm::set_dump(first, true)
    }
}
