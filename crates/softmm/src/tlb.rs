// SPDX-License-Identifier: MIT OR Apache-2.0
//! The TLB of each CPU, its shootdown, and the mmu_gather that defers both flush and free (x86-64; all versions).
//!
//! Sequence of every user of `MmuGather`: S; [ clr' ] per pte, pages gathered; E; free_pgtables; **flush; put**.
//! So the CPU flush and the free come *after* E, except when a batch fills up: then flush and put happen inside S..E.
//! Nothing that was gathered is put before the flush that follows its gathering.
//!
//! A CPU holds its `cpu_irq` lock while it runs with interrupts off. Three things do: a load or store (between two
//! instructions a CPU takes interrupts, within one it does not), the MMU's walk that fills the TLB, and gup_fast. A
//! shootdown interrupts every CPU, that is, it takes each `cpu_irq` in turn: when it returns, no access by an old
//! translation, no walk that read an old pte and no gup_fast that did is still going on. Page-table pages may then
//! be freed too (MMU_GATHER_RCU_TABLE_FREE gives walkers the same guarantee).
//!
//! Lock order: `cpu_irq` is a leaf, under the ptl in ptep_clear_flush.

use crate::frame::FrameId;
use crate::machine::Machine;
use crate::mm::{Mm, MmId};
use crate::page_table::TableId;
use crate::profile::SecondaryTlbs;
use crate::pte::Pte;
use interleave::{Context, Digest, LockClass, SpinGuard, SpinLock};
use mmu_notifier::{PageAddr, Pfn, Range};
use std::collections::BTreeMap;

static CPU_IRQ: LockClass = LockClass::new("cpu_irq");

/// One virtual CPU. Any thread may run on any CPU, one access at a time.
pub struct Cpu {
    irq: SpinLock<Tlb>,
}

/// The pte as it was when it was walked, accessed and dirty bits set, and which life of the frame it led to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TlbEntry {
    pub(crate) pte: Pte,
    pub(crate) frame: FrameId,
}

/// What a CPU remembers of page tables.
#[derive(Default)]
pub(crate) struct Tlb {
    entries: BTreeMap<(MmId, PageAddr), TlbEntry>,
}

impl Cpu {
    pub(crate) fn new() -> Cpu {
        Cpu { irq: SpinLock::with_digest(&CPU_IRQ, Tlb::default(), Tlb::digest) }
    }

    /// Runs with interrupts off until the guard is dropped: no shootdown completes meanwhile (local_irq_save).
    pub(crate) fn irq_off<'l, 'c, C: Context + ?Sized>(&'l self, cx: &'c mut C) -> SpinGuard<'l, 'c, Tlb> {
        self.irq.lock(cx)
    }

    /// Translations cached, of all mms.
    pub fn cached<C: Context + ?Sized>(&self, cx: &mut C) -> usize {
        self.irq.lock(cx).entries.len()
    }
}

impl Digest for Tlb {
    fn digest(&self) -> u64 {
        let entry = |(&(mm, page), entry): (&(MmId, PageAddr), &TlbEntry)| {
            (mm.number(), page.get(), entry.pte.bits(), entry.frame)
        };
        self.entries.iter().map(entry).collect::<Vec<_>>().digest()
    }
}

impl Tlb {
    pub(crate) fn lookup(&self, mm: MmId, page: PageAddr) -> Option<TlbEntry> {
        self.entries.get(&(mm, page)).copied()
    }

    pub(crate) fn fill(&mut self, mm: MmId, page: PageAddr, entry: TlbEntry) {
        self.entries.insert((mm, page), entry);
    }

    /// invlpg: a CPU also drops the entry that made it fault.
    pub(crate) fn drop_page(&mut self, mm: MmId, page: PageAddr) {
        self.entries.remove(&(mm, page));
    }

    fn drop_range(&mut self, mm: MmId, range: Range) {
        match range.iter_pages().next() {
            Some(page) if range.pages() == 1 => self.drop_page(mm, page),
            _ => self.entries.retain(|&(of, page), _| of != mm || !range.contains_addr(page.get())),
        }
    }
}

impl Machine {
    /// flush_tlb_mm_range: when it returns, no CPU uses an older translation of `range`. May be called under a ptl.
    pub(crate) fn flush_tlb_range<C: Context + ?Sized>(&self, cx: &mut C, mm: &Mm, range: Range) {
        self.flush_cpus(cx, mm, range);
        // A comes last in x86's flush_tlb_mm_range (6.6 and later): a secondary TLB refilled from a page table that
        // CPUs still cached would be flushed here all the same.
        if self.profile().secondary_tlbs == SecondaryTlbs::CpuFlush {
            mm.secondary_tlbs(cx, range);
        }
    }

    /// The CPUs alone: what a batched flush of reclaim does (arch_tlbbatch_flush).
    pub(crate) fn flush_cpus<C: Context + ?Sized>(&self, cx: &mut C, mm: &Mm, range: Range) {
        for cpu in self.cpus() {
            cpu.irq_off(cx).drop_range(mm.id(), range);
        }
    }
}

/// Pages and page-table pages on their way out: not freed until every CPU has forgotten them.
pub(crate) struct MmuGather<'m> {
    mm: &'m Mm,
    /// The bytes whose ptes were cleared since the last flush.
    dirty: Option<Range>,
    pages: Vec<Pfn>,
    tables: Vec<TableId>,
}

impl<'m> MmuGather<'m> {
    /// tlb_gather_mmu.
    pub(crate) fn new(mm: &'m Mm) -> MmuGather<'m> {
        MmuGather { mm, dirty: None, pages: Vec::new(), tables: Vec::new() }
    }

    /// A pte that was cleared, with the page whose reference it held if the page is counted. True: the batch is
    /// full, and the caller must drop the ptl and [`MmuGather::flush`].
    #[must_use]
    pub(crate) fn remove_page(&mut self, page: PageAddr, pfn: Option<Pfn>) -> bool {
        self.cover(Range::page(page));
        self.pages.extend(pfn);
        self.pages.len() >= self.mm.machine().config().gather_batch
    }

    /// A page-table page that has been unlinked; `page` is the first of the unmapped span under it. Only that page
    /// counts as changed (tlb_flush_pmd_range).
    pub(crate) fn remove_table(&mut self, page: PageAddr, table: TableId) {
        self.cover(Range::page(page));
        self.tables.push(table);
    }

    pub(crate) fn is_dirty(&self) -> bool {
        self.dirty.is_some()
    }

    pub(crate) fn cover(&mut self, range: Range) {
        let (start, end) = match self.dirty {
            Some(dirty) => (dirty.start().min(range.start()), dirty.end().max(range.end())),
            None => (range.start(), range.end()),
        };
        self.dirty = Range::new(start, end - start).ok();
    }

    /// tlb_flush_mmu_tlbonly: nobody uses what was cleared any more; nothing is freed. May be called under a ptl.
    pub(crate) fn flush_tlb<C: Context + ?Sized>(&mut self, cx: &mut C) {
        if let Some(range) = self.dirty.take() {
            self.mm.machine().flush_tlb_range(cx, self.mm, range);
            self.mm.invalidate_secondary(cx, range);
        }
    }

    /// tlb_flush_mmu: flush, then free what was gathered.
    pub(crate) fn flush<C: Context + ?Sized>(&mut self, cx: &mut C) {
        let machine = self.mm.machine();
        self.flush_tlb(cx);
        for pfn in self.pages.drain(..) {
            machine.free_swap_cache(cx, pfn);
            machine.frames().put(pfn, 1);
        }
        self.tables.drain(..).for_each(|table| machine.tables().free(table));
    }

    /// tlb_finish_mmu: the final flush and free.
    pub(crate) fn finish<C: Context + ?Sized>(mut self, cx: &mut C) {
        self.flush(cx);
    }
}
