// SPDX-License-Identifier: MIT OR Apache-2.0
//! A page-table entry of x86-64, as far as this slice uses it.
//!
//! A pte is a value: what a table holds is an atomic word, and a [`Pte`] is what it was when it was read.

use crate::swap::Slot;
use crate::vma::Prot;
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
    /// Present for the mm, not for the MMU (_PAGE_PROTNONE).
    pub(crate) const PROTNONE: u64 = 1 << 8;
    pub(crate) const SPECIAL: u64 = 1 << 9;
    /// Of a swap entry: the page was exclusive (_PAGE_SWP_EXCLUSIVE, 5.19).
    const SWAP_EXCLUSIVE: u64 = 1 << 3;

    pub(crate) const fn new(pfn: Pfn, bits: u64) -> Pte {
        Pte(pfn.0 << PAGE_SHIFT | Pte::PRESENT | bits)
    }

    /// A swap entry: where the contents are.
    pub(crate) const fn swap(slot: Slot, exclusive: bool) -> Pte {
        let exclusive = if exclusive { Pte::SWAP_EXCLUSIVE } else { 0 };
        Pte((slot.0 as u64 + 1) << PAGE_SHIFT | exclusive)
    }

    /// The slot of a swap entry.
    pub(crate) const fn swap_slot(self) -> Option<Slot> {
        if self.is_none() || self.is_mapped() { None } else { Some(Slot((self.0 >> PAGE_SHIFT) as u32 - 1)) }
    }

    pub(crate) const fn swap_exclusive(self) -> bool {
        self.has(Pte::SWAP_EXCLUSIVE)
    }

    /// Of a swap entry: no longer exclusive.
    pub(crate) const fn swap_shared(self) -> Pte {
        self.without(Pte::SWAP_EXCLUSIVE)
    }

    /// pte_modify: the page, accessed and dirty stay; a private mapping gets no write permission from it.
    pub(crate) const fn modify(self, prot: Prot) -> Pte {
        let kept = self.without(Pte::PRESENT | Pte::PROTNONE | Pte::WRITE);
        kept.with(if prot.readable() { Pte::PRESENT } else { Pte::PROTNONE })
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

    /// Does a page belong to it (the kernel's pte_present)? True also where PROT_NONE keeps the MMU away.
    pub const fn is_mapped(self) -> bool {
        self.0 & (Pte::PRESENT | Pte::PROTNONE) != 0
    }

    /// Does it say where in swap the contents are?
    pub const fn is_swap(self) -> bool {
        !self.is_none() && !self.is_mapped()
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

    /// The frame. Meaningful if mapped.
    pub const fn pfn(self) -> Pfn {
        Pfn(self.0 >> PAGE_SHIFT)
    }
}

impl fmt::Debug for Pte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_none() {
            return f.write_str("none");
        }
        if let Some(slot) = self.swap_slot() {
            return write!(f, "swap {}{}", slot.0, if self.swap_exclusive() { " exclusive" } else { "" });
        }
        write!(f, "{:?} ", self.pfn())?;
        for (bit, name) in [
            (Pte::WRITE, 'w'),
            (Pte::ACCESSED, 'a'),
            (Pte::DIRTY, 'd'),
            (Pte::SPECIAL, 's'),
            (Pte::PROTNONE, 'n'),
        ] {
            write!(f, "{}", if self.has(bit) { name } else { '-' })?;
        }
        Ok(())
    }
}
