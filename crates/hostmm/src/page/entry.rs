// SPDX-License-Identifier: MIT OR Apache-2.0
//! One word of `/proc/PID/pagemap`, as `Documentation/admin-guide/mm/pagemap.rst` lays it out.

use std::fmt;

const PFN_MASK: u64 = (1 << 55) - 1;
const SOFT_DIRTY: u64 = 1 << 55;
const EXCLUSIVE: u64 = 1 << 56;
const UFFD_WP: u64 = 1 << 57;
const GUARD: u64 = 1 << 58;
const FILE: u64 = 1 << 61;
const SWAP: u64 = 1 << 62;
const PRESENT: u64 = 1 << 63;
/// Width of the swap type in a swapped entry.
const SWAP_TYPE_BITS: u32 = 5;

/// A physical page frame number; never 0, which is what the kernel shows to those who may not know.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pfn(std::num::NonZeroU64);

impl Pfn {
    pub(super) const fn new(pfn: u64) -> Option<Pfn> {
        match std::num::NonZeroU64::new(pfn) {
            Some(pfn) => Some(Pfn(pfn)),
            None => None,
        }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0.get()
    }
}

impl fmt::Debug for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pfn:{:#x}", self.get())
    }
}

/// Where a swapped page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SwapEntry {
    /// Number of the swap area. The highest few are not areas: a page under migration, a device-private page, and
    /// the markers that uffd-wp and poison leave look like this too.
    pub area: u8,
    /// Page in the area.
    pub offset: u64,
}

/// What a pte points at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Frame {
    /// Nothing: never touched, or taken away.
    None,
    /// This page frame.
    Present(Pfn),
    /// Some page frame. Its number is for `CAP_SYS_ADMIN` in the initial user namespace (Linux 4.2).
    Hidden,
    /// A swap entry; `None` where the kernel hides it, by the same rule as the page frame number.
    Swapped(Option<SwapEntry>),
    /// A guard page (`MADV_GUARD_INSTALL`; shown since Linux 6.15, before it looks swapped).
    Guard,
}

/// One word of pagemap.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PagemapEntry(u64);

impl PagemapEntry {
    /// The word as read; any value is valid, unknown bits are kept and ignored.
    #[must_use]
    pub const fn from_raw(word: u64) -> PagemapEntry {
        PagemapEntry(word)
    }

    /// The word as read.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// What the pte points at.
    #[must_use]
    pub const fn frame(self) -> Frame {
        let low = self.0 & PFN_MASK;
        if self.0 & PRESENT != 0 {
            match Pfn::new(low) {
                Some(pfn) => Frame::Present(pfn),
                None => Frame::Hidden,
            }
        } else if self.0 & GUARD != 0 {
            Frame::Guard
        } else if self.0 & SWAP != 0 {
            // Page 0 of an area is its header, so the word 0 is never a place.
            let area = (low & ((1 << SWAP_TYPE_BITS) - 1)) as u8;
            match low {
                0 => Frame::Swapped(None),
                _ => Frame::Swapped(Some(SwapEntry { area, offset: low >> SWAP_TYPE_BITS })),
            }
        } else {
            Frame::None
        }
    }

    /// A frame is mapped, whether or not its number is shown.
    #[must_use]
    pub const fn is_present(self) -> bool {
        self.0 & PRESENT != 0
    }

    /// The pte is soft-dirty. Always false without `CONFIG_MEM_SOFT_DIRTY`.
    #[must_use]
    pub const fn is_soft_dirty(self) -> bool {
        self.0 & SOFT_DIRTY != 0
    }

    /// No other page table maps the page (Linux 4.2).
    #[must_use]
    pub const fn is_exclusive(self) -> bool {
        self.0 & EXCLUSIVE != 0
    }

    /// The pte is write-protected through userfaultfd (Linux 5.13).
    #[must_use]
    pub const fn is_uffd_wp(self) -> bool {
        self.0 & UFFD_WP != 0
    }

    /// The page is of a file or of shared anonymous memory.
    #[must_use]
    pub const fn is_file(self) -> bool {
        self.0 & FILE != 0
    }
}

impl fmt::Debug for PagemapEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.frame())?;
        let names = [
            (self.is_file(), "file"),
            (self.is_exclusive(), "exclusive"),
            (self.is_uffd_wp(), "uffd-wp"),
            (self.is_soft_dirty(), "soft-dirty"),
        ];
        names.iter().filter(|(on, _)| *on).try_for_each(|(_, name)| write!(f, "|{name}"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_hidden_frame_is_not_frame_zero() {
        assert_eq!(PagemapEntry::from_raw(PRESENT | EXCLUSIVE).frame(), Frame::Hidden);
        assert_eq!(PagemapEntry::from_raw(SWAP).frame(), Frame::Swapped(None));
        assert_eq!(PagemapEntry::from_raw(0).frame(), Frame::None);
        // A frame number without the present bit is no frame.
        assert_eq!(PagemapEntry::from_raw(0x1234).frame(), Frame::None);
    }

    proptest! {
        #[test]
        fn every_word_is_one_thing_and_loses_nothing(word: u64) {
            let e = PagemapEntry::from_raw(word);
            prop_assert_eq!(e.raw(), word);
            prop_assert_eq!(e.is_present(), matches!(e.frame(), Frame::Present(_) | Frame::Hidden));
            match e.frame() {
                Frame::Present(pfn) => prop_assert_eq!(pfn.get(), word % (1 << 55)),
                Frame::Swapped(Some(s)) => prop_assert_eq!((s.offset << 5) + u64::from(s.area), word % (1 << 55)),
                Frame::Hidden | Frame::Swapped(None) => prop_assert_eq!(word % (1 << 55), 0),
                Frame::Guard => prop_assert!(word >> 58 & 1 == 1),
                Frame::None => prop_assert!(word >> 62 == 0),
            }
        }
    }
}
