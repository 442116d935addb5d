// SPDX-License-Identifier: MIT OR Apache-2.0
//! Addresses and ranges of a user address space.
//!
//! Invariants: a [`Range`] is never empty, both ends are page aligned and it lies inside the user half of the
//! address space; a [`PageAddr`] is page aligned and in the same half. Whoever holds one need not check again.

use std::fmt;

/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a base page (x86-64).
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// First address that is not user space with four-level page tables (x86-64: 2^47 less one guard page).
pub const TASK_SIZE: u64 = (1 << 47) - PAGE_SIZE;

/// Why bytes `[start, start + len)` are not a [`Range`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// No byte in it.
    #[error("range at {start:#x} is empty: give at least one page")]
    Empty {
        /// First byte.
        start: u64,
    },
    /// One end is not a multiple of [`PAGE_SIZE`].
    #[error(
        "range [{start:#x}, +{len:#x}) is not aligned to {PAGE_SIZE} bytes: round it, or use Range::enclosing"
    )]
    Unaligned {
        /// First byte.
        start: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The end lies past the user half of the address space, or the sum overflows.
    #[error("range [{start:#x}, +{len:#x}) reaches past the end of user space {TASK_SIZE:#x}")]
    Overflow {
        /// First byte.
        start: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// The address of one page of user space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageAddr(u64);

impl PageAddr {
    /// The page that starts at `addr`.
    ///
    /// # Errors
    /// [`RangeError`] if `addr` is not page aligned or not in user space.
    pub const fn new(addr: u64) -> Result<PageAddr, RangeError> {
        if !addr.is_multiple_of(PAGE_SIZE) {
            return Err(RangeError::Unaligned { start: addr, len: PAGE_SIZE });
        }
        PageAddr::containing(addr)
    }

    /// The page that holds the byte at `addr`.
    ///
    /// # Errors
    /// [`RangeError::Overflow`] if `addr` is not in user space.
    pub const fn containing(addr: u64) -> Result<PageAddr, RangeError> {
        if addr >= TASK_SIZE {
            return Err(RangeError::Overflow { start: addr, len: 1 });
        }
        Ok(PageAddr(addr & !(PAGE_SIZE - 1)))
    }

    /// The address in bytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The virtual page number.
    pub const fn vpn(self) -> u64 {
        self.0 >> PAGE_SHIFT
    }
}

impl fmt::Debug for PageAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Bytes `[start, end)` of a user address space: not empty, both ends page aligned.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Range {
    start: u64,
    end: u64,
}

impl Range {
    /// The whole user address space. `clear_refs` notifies this, and so does a source that lost records.
    pub const ALL: Range = Range { start: 0, end: TASK_SIZE };

    /// `len` bytes from `start`.
    ///
    /// # Errors
    /// [`RangeError`] if it is empty, unaligned or reaches past user space.
    pub const fn new(start: u64, len: u64) -> Result<Range, RangeError> {
        if len == 0 {
            return Err(RangeError::Empty { start });
        }
        if !start.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return Err(RangeError::Unaligned { start, len });
        }
        match start.checked_add(len) {
            Some(end) if end <= TASK_SIZE => Ok(Range { start, end }),
            _ => Err(RangeError::Overflow { start, len }),
        }
    }

    /// The pages that hold the bytes `[start, start + len)`.
    ///
    /// # Errors
    /// [`RangeError`] if there is no byte or the pages reach past user space.
    #[inline]
    pub const fn enclosing(start: u64, len: u64) -> Result<Range, RangeError> {
        if len == 0 {
            return Err(RangeError::Empty { start });
        }
        match start.checked_add(len - 1) {
            Some(last) if last < TASK_SIZE => {
                Ok(Range { start: start & !(PAGE_SIZE - 1), end: (last | (PAGE_SIZE - 1)) + 1 })
            }
            _ => Err(RangeError::Overflow { start, len }),
        }
    }

    /// Bytes `[start, end)`, which were a range before.
    pub(crate) const fn from_bounds(start: u64, end: u64) -> Range {
        debug_assert!(start < end && end <= TASK_SIZE);
        Range { start, end }
    }

    /// The one page at `page`.
    pub const fn page(page: PageAddr) -> Range {
        Range { start: page.0, end: page.0 + PAGE_SIZE }
    }

    /// The first page.
    pub const fn first_page(self) -> PageAddr {
        PageAddr(self.start)
    }

    /// The last page.
    pub const fn last_page(self) -> PageAddr {
        PageAddr(self.end - PAGE_SIZE)
    }

    /// First byte.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// First byte after the range.
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Length in bytes; never 0.
    #[expect(clippy::len_without_is_empty, reason = "a Range is never empty")]
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// Length in pages; never 0.
    pub const fn pages(self) -> u64 {
        self.len() >> PAGE_SHIFT
    }

    /// Is the byte `addr` inside?
    pub const fn contains_addr(self, addr: u64) -> bool {
        self.start <= addr && addr < self.end
    }

    /// Is all of `other` inside?
    pub const fn contains(self, other: Range) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Does it share a page with `other`?
    pub const fn overlaps(self, other: Range) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// The pages in both, if any.
    pub fn intersection(self, other: Range) -> Option<Range> {
        let (start, end) = (self.start.max(other.start), self.end.min(other.end));
        (start < end).then_some(Range { start, end })
    }

    /// Every page, in order.
    pub fn iter_pages(self) -> impl ExactSizeIterator<Item = PageAddr> + DoubleEndedIterator {
        let first = self.start;
        (0..self.pages() as usize).map(move |i| PageAddr(first + ((i as u64) << PAGE_SHIFT)))
    }
}

impl fmt::Debug for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x})", self.start, self.end)
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_ranges_are_refused_by_name() {
        assert_eq!(Range::new(0x1000, 0), Err(RangeError::Empty { start: 0x1000 }));
        assert_eq!(Range::new(0x1001, 0x1000), Err(RangeError::Unaligned { start: 0x1001, len: 0x1000 }));
        assert_eq!(Range::new(0x1000, 0xfff), Err(RangeError::Unaligned { start: 0x1000, len: 0xfff }));
        let (start, len) = (!0xfff, 0x2000);
        assert_eq!(Range::new(start, len), Err(RangeError::Overflow { start, len }));
        assert!(Range::new(TASK_SIZE - PAGE_SIZE, PAGE_SIZE).is_ok());
        assert!(matches!(Range::new(TASK_SIZE, PAGE_SIZE), Err(RangeError::Overflow { .. })));
        assert!(matches!(Range::enclosing(u64::MAX, 2), Err(RangeError::Overflow { .. })));
        assert!(matches!(Range::enclosing(0, u64::MAX), Err(RangeError::Overflow { .. })));
    }

    #[test]
    fn a_page_address_is_a_page_of_user_space() {
        let last = PageAddr::new(TASK_SIZE - PAGE_SIZE).unwrap();
        assert_eq!(Range::page(last).end(), TASK_SIZE);
        assert_eq!(PageAddr::containing(TASK_SIZE - 1), Ok(last));
        assert_eq!(PageAddr::new(0x1001), Err(RangeError::Unaligned { start: 0x1001, len: PAGE_SIZE }));
        for addr in [TASK_SIZE, !0xfff] {
            assert!(matches!(PageAddr::new(addr), Err(RangeError::Overflow { .. })));
            assert!(matches!(PageAddr::containing(addr), Err(RangeError::Overflow { .. })));
        }
    }

    #[test]
    fn enclosing_rounds_outwards() {
        let r = Range::enclosing(0x1fff, 2).unwrap();
        assert_eq!((r.start(), r.end(), r.pages()), (0x1000, 0x3000, 2));
        assert_eq!(r.iter_pages().map(PageAddr::get).collect::<Vec<_>>(), [0x1000, 0x2000]);
        assert_eq!(Range::enclosing(TASK_SIZE - 1, 1).unwrap().end(), TASK_SIZE);
        assert_eq!(Range::enclosing(5, 0), Err(RangeError::Empty { start: 5 }));
        for (start, len) in [(TASK_SIZE - 1, 2), (TASK_SIZE, 1), (u64::MAX, 1), (u64::MAX - 3, 9)] {
            assert_eq!(Range::enclosing(start, len), Err(RangeError::Overflow { start, len }));
        }
    }

    #[test]
    fn overlap_is_half_open() {
        let a = Range::new(0x1000, 0x1000).unwrap();
        let b = Range::new(0x2000, 0x1000).unwrap();
        assert!(!a.overlaps(b) && a.overlaps(a) && a.intersection(b).is_none());
    }
}
