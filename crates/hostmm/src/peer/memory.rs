// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory for a measurement: mapped, registered by address, and unmapped through the C library, so that whoever
//! patches that is told.

use std::io;

use mmu_notifier::{PAGE_SIZE, Range};

use crate::sys::map::Mapping;

/// Private anonymous pages. Nobody has a reference into them; to drop them is one munmap.
#[derive(Debug)]
pub struct Anonymous {
    mapping: Mapping,
    pages: usize,
}

impl Anonymous {
    /// `pages` pages, none present.
    ///
    /// # Errors
    /// What mmap says.
    pub fn new(pages: usize) -> io::Result<Anonymous> {
        let mapping = Mapping::anonymous(pages * PAGE_SIZE as usize)?;
        Ok(Anonymous { mapping, pages })
    }

    /// Address of page `n`.
    #[must_use]
    pub fn page(&self, n: usize) -> usize {
        self.mapping.ptr().as_ptr().expose_provenance() + n % self.pages * PAGE_SIZE as usize
    }

    /// All of it.
    ///
    /// # Errors
    /// Never, for what the kernel maps for a process.
    pub fn range(&self) -> Result<Range, mmu_notifier::RangeError> {
        Range::enclosing(self.page(0) as u64, self.pages as u64 * PAGE_SIZE)
    }

    /// A store to each page.
    pub fn touch(&self) {
        for n in 0..self.pages {
            // SAFETY: inside our mapping, which is writable, aligned, and to which no reference exists.
            unsafe { std::ptr::with_exposed_provenance_mut::<u64>(self.page(n)).write_volatile(n as u64) };
        }
    }
}
