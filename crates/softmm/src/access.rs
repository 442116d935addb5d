// SPDX-License-Identifier: MIT OR Apache-2.0
//! Loads and stores of a CPU, through its TLB.
//!
//! One instruction runs with interrupts off: TLB lookup, page walk, accessed and dirty bits, and the access itself are
//! one step for a shootdown. A walk that finds nothing usable faults with interrupts on and starts again.
//! The TLB is believed without looking at the page table, which is what makes a missing flush visible; a fault drops
//! the entry that caused it, as x86 does, so a permission that was *added* needs no shootdown.

use crate::error::AccessError;
use crate::frame::FrameId;
use crate::machine::Machine;
use crate::mm::Mm;
use crate::pte::Pte;
use crate::tlb::{Cpu, Tlb, TlbEntry};
use interleave::MaySleep;
use mmu_notifier::{Access, PAGE_SIZE, PageAddr};

impl Cpu {
    /// Loads the word at `addr`, faulting as needed.
    ///
    /// # Errors
    /// [`AccessError`]: the fault that failed, or an address that softmm stores nothing for.
    pub fn load(&self, cx: &mut MaySleep<'_>, mm: &Mm, addr: u64) -> Result<u64, AccessError> {
        self.access(cx, mm, addr, None)
    }

    /// Stores `value` at `addr`, faulting as needed.
    ///
    /// # Errors
    /// As [`Cpu::load`].
    pub fn store(&self, cx: &mut MaySleep<'_>, mm: &Mm, addr: u64, value: u64) -> Result<(), AccessError> {
        self.access(cx, mm, addr, Some(value)).map(drop)
    }

    fn access(
        &self,
        cx: &mut MaySleep<'_>,
        mm: &Mm,
        addr: u64,
        store: Option<u64>,
    ) -> Result<u64, AccessError> {
        let machine = mm.machine();
        let word = word_of(machine, addr)?;
        let page = PageAddr::containing(addr).map_err(|_| AccessError::NotUser(addr))?;
        let kind = if store.is_some() { Access::Write } else { Access::Read };
        loop {
            {
                let mut tlb = self.irq_off(cx);
                if let Some(frame) = translate(&mut tlb, mm, page, kind) {
                    return match store {
                        Some(value) => machine.frames().write(frame, word, value).map(|()| 0),
                        None => machine.frames().read(frame, word),
                    }
                    .map_err(AccessError::Freed);
                }
            }
            mm.page_fault(cx, page, kind)?;
        }
    }
}

fn word_of(machine: &Machine, addr: u64) -> Result<usize, AccessError> {
    if !addr.is_multiple_of(8) {
        return Err(AccessError::Unaligned(addr));
    }
    let word = (addr % PAGE_SIZE / 8) as usize;
    if word < machine.frames().words_per_page() { Ok(word) } else { Err(AccessError::NotStored(addr)) }
}

/// The translation to use, from the TLB or from a walk that fills it; `None`: page fault.
fn translate(tlb: &mut Tlb, mm: &Mm, page: PageAddr, kind: Access) -> Option<FrameId> {
    if let Some(TlbEntry { pte, frame }) = tlb.lookup(mm.id(), page) {
        if allows(pte, kind) && pte.with(wanted(kind)) == pte {
            return Some(frame);
        }
        tlb.drop_page(mm.id(), page);
    }
    let (frame, pte) = mm.walk(page, kind)?;
    tlb.fill(mm.id(), page, TlbEntry { pte, frame });
    Some(frame)
}

impl Mm {
    /// The walk that an MMU does, of a CPU or of a device that shares the page table (IOMMU with a process address
    /// space): sets the accessed bit, and the dirty bit for a write. `None`: not present or not allowed, a page fault.
    ///
    /// What it returns may be cached until a shootdown (`arch_invalidate_secondary_tlbs`), which the walker must not
    /// be able to overtake: it walks under the lock that its flush takes.
    pub fn walk(&self, page: PageAddr, kind: Access) -> Option<(FrameId, Pte)> {
        loop {
            let seen = self.peek_pte(page);
            if !allows(seen, kind) {
                return None;
            }
            let pte = seen.with(wanted(kind));
            if pte == seen || self.page_table.mmu_update(self.machine().tables(), page, seen, pte) {
                return Some((self.machine().frames().id(pte.pfn()), pte));
            }
        }
    }
}

fn allows(pte: Pte, kind: Access) -> bool {
    pte.is_present() && (kind == Access::Read || pte.is_writable())
}

fn wanted(kind: Access) -> u64 {
    match kind {
        Access::Read => Pte::ACCESSED,
        // A store through an entry without the dirty bit walks again to set it.
        Access::Write => Pte::ACCESSED | Pte::DIRTY,
    }
}
