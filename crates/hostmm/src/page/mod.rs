// SPDX-License-Identifier: MIT OR Apache-2.0
//! Page identity: which physical page is behind an address, and what kind of page it is.
//!
//! This is the oracle for a device that caches page frame numbers: record the [`Frame`] when the device maps the page
//! and compare when it uses it. A frame number is true at the moment of reading only. Compaction, KSM and khugepaged
//! move pages at any time, and a freed frame is given out again: two equal frames with a change in between look like
//! no change. So compare under a notifier's sequence check, or hold a pin.

mod entry;
mod error;
mod maps;
mod pagemap;
#[cfg(test)]
mod tests;

use mmu_notifier::PageAddr;
/// The flags of a page frame, as `/proc/kpageflags` names them.
pub use procfs::PhysicalPageFlags as PageFlags;

pub use entry::{Frame, PagemapEntry, Pfn, SwapEntry};
pub use error::PageError;
pub use maps::{Maps, VmFlags, Vma};
pub use pagemap::{Pagemap, PidOrSelf};

use pagemap::FrameFile;

/// How often [`Pages::detail`] looks again at a page that moves while it looks.
const ATTEMPTS: usize = 8;

/// What is behind one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageIdentity {
    /// The address.
    pub page: PageAddr,
    /// The page frame, or why there is none.
    pub frame: Frame,
    /// The whole entry: exclusive, file, uffd-wp, soft-dirty.
    pub entry: PagemapEntry,
}

impl PageIdentity {
    /// The page frame number, if there is one and we may know.
    #[must_use]
    pub fn pfn(&self) -> Option<Pfn> {
        match self.frame {
            Frame::Present(pfn) => Some(pfn),
            _ => None,
        }
    }
}

/// A page, and its frame's own properties.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageDetail {
    /// What is behind the address.
    pub identity: PageIdentity,
    /// Flags of the frame: KSM, THP, ZERO_PAGE, ANON, ... `None` without a frame number or without `/proc/kpageflags`.
    pub flags: Option<PageFlags>,
    /// How many ptes map the frame. `None` as for the flags. A KVM guest is not counted: it does not raise it.
    pub map_count: Option<u64>,
}

/// The pages of one process.
#[derive(Debug)]
pub struct Pages {
    pagemap: Pagemap,
    maps: Maps,
    flags: Option<FrameFile>,
    count: Option<FrameFile>,
}

impl Pages {
    /// Open what there is: `pagemap` and `maps` of the process must open, `kpageflags` and `kpagecount` may.
    ///
    /// # Errors
    /// [`PageError::Permission`], [`PageError::NoProcess`].
    pub fn open(who: PidOrSelf) -> Result<Pages, PageError> {
        Ok(Pages {
            pagemap: Pagemap::open(who)?,
            maps: Maps::open(who)?,
            flags: FrameFile::open("/proc/kpageflags").ok(),
            count: FrameFile::open("/proc/kpagecount").ok(),
        })
    }

    /// Raw entries, by the batch.
    #[must_use]
    pub fn pagemap(&self) -> &Pagemap {
        &self.pagemap
    }

    /// The mappings.
    #[must_use]
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// What is behind `page`. Below 1 us; as much again where nothing is, to tell a hole from an untouched page.
    ///
    /// # Errors
    /// [`PageError::Unmapped`] where no mapping is, [`PageError::Forked`].
    pub fn identity(&self, page: PageAddr) -> Result<PageIdentity, PageError> {
        let entry = self.pagemap.entry(page)?;
        let frame = entry.frame();
        if frame == Frame::None {
            // An untouched page and a hole have the same entry.
            self.maps.at(page)?;
        }
        Ok(PageIdentity { page, frame, entry })
    }

    /// What is behind `page`, and the flags and map count of the frame while it was there.
    ///
    /// # Errors
    /// As for [`Pages::identity`], and [`PageError::Unsettled`].
    pub fn detail(&self, page: PageAddr) -> Result<PageDetail, PageError> {
        for _ in 0..ATTEMPTS {
            let identity = self.identity(page)?;
            let word = |file: &Option<FrameFile>| match (file, identity.pfn()) {
                (Some(file), Some(pfn)) => file.word(pfn).map(Some),
                _ => Ok(None),
            };
            let (flags, map_count) = (word(&self.flags)?, word(&self.count)?);
            // Somebody else's flags, if the frame has been given away meanwhile.
            if self.pagemap.entry(page)?.frame() == identity.frame {
                return Ok(PageDetail { identity, flags: flags.map(PageFlags::from_bits_retain), map_count });
            }
        }
        Err(PageError::Unsettled(page))
    }
}
