// SPDX-License-Identifier: MIT OR Apache-2.0
//! A page-table entry of x86-64, as far as this slice uses it.
//!
//! A pte is a value: what a table holds is an atomic word, and a [`Pte`] is what it was when it was read.

use mmu_notifier::{PAGE_SHIFT, Pfn};
use std::fmt;

/// A page-table entry with the x86-64 bits that this slice uses.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Pte(u64);

impl Pte {
    /// Nothing mapped.
    pub const NONE: Pte = Pte(0);
    pub(crate) const PRESENT: u64 = 1 << 0;
    pub(crate) const WRITE: u64 = 1 << 1;
    pub(crate) const ACCESSED: u64 = 1 << 5;
    pub(crate) const DIRTY: u64 = 1 << 6;
    pub(crate) const SPECIAL: u64 = 1 << 9;

    pub(crate) const fn new(pfn: Pfn, bits: u64) -> Pte {
        Pte(pfn.0 << PAGE_SHIFT | Pte::PRESENT | bits)
    }

    pub(crate) const fn with(self, bits: u64) -> Pte {
        Pte(self.0 | bits)
    }

    pub(crate) const fn without(self, bits: u64) -> Pte {
        Pte(self.0 & !bits)
    }

    pub(crate) const fn from_bits(bits: u64) -> Pte {
        Pte(bits)
    }

    const fn has(self, bits: u64) -> bool {
        self.0 & bits == bits
    }

    /// The entry as the MMU reads it.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Nothing at all.
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }

    /// Does the MMU follow it?
    pub const fn is_present(self) -> bool {
        self.has(Pte::PRESENT)
    }

    /// May the CPU write?
    pub const fn is_writable(self) -> bool {
        self.has(Pte::WRITE)
    }

    /// Has the CPU written?
    pub const fn is_dirty(self) -> bool {
        self.has(Pte::DIRTY)
    }

    /// Has the CPU touched it?
    pub const fn is_young(self) -> bool {
        self.has(Pte::ACCESSED)
    }

    /// Maps a page that is not reference counted: the zero page (vm_normal_page says none).
    pub const fn is_special(self) -> bool {
        self.has(Pte::SPECIAL)
    }

    /// The frame. Meaningful if present.
    pub const fn pfn(self) -> Pfn {
        Pfn(self.0 >> PAGE_SHIFT)
    }
}

impl fmt::Debug for Pte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_none() {
            return f.write_str("none");
        }
        write!(f, "{:?} ", self.pfn())?;
        for (bit, name) in [(Pte::WRITE, 'w'), (Pte::ACCESSED, 'a'), (Pte::DIRTY, 'd'), (Pte::SPECIAL, 's')] {
            write!(f, "{}", if self.has(bit) { name } else { '-' })?;
        }
        Ok(())
    }
}
