// SPDX-License-Identifier: MIT OR Apache-2.0
//! Page tables: x86-64, four levels of 512 entries, one spinlock per page-table page (v6.18,
//! SPLIT_PTE_PTLOCKS).
//!
//! Entries are atomic words, because the MMU of each CPU and `gup_fast` read them without a lock. Rules:
//! * A pte changes only under the ptl of its table, except for the accessed and dirty bits that the MMU sets.
//! * An entry of an upper level changes only under the mm's `page_table_lock`. Tables come into being while
//!   mmap_lock is held at least for reading, and go in `free_pgtables` when no vma can reach them.
//! * A table is given back only after every CPU has left the section in which it may walk without a lock: the TLB
//!   flush of `MmuGather` takes each CPU's interrupt lock, and a walker holds its own.
//!
//! Page-table pages come from a pool of the machine, so that an index, not a pointer, links the levels: a walker
//! that comes too late reads another life of the table, as hardware does, and never unmapped Rust memory.
//!
//! Lock order: `ptl` -> `ptl` (subclass 1, fork: child's first, parent's nested) -> `cpu_irq`. `page_table_lock` is a
//! leaf.

use crate::bitmap::Bitmap;
use crate::error::OutOfMemory;
use crate::pte::Pte;
use interleave::{
    Atomic, AtomicWord, AtomicWords, Context, Digest, LockClass, MaySleep, Ordering, SpinGuard, SpinLock,
};
use mmu_notifier::{PAGE_SHIFT, PageAddr, Range, TASK_SIZE};
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};

static PTL: LockClass = LockClass::new("ptl");
static PAGE_TABLE_LOCK: LockClass = LockClass::new("page_table_lock");

const LEVELS: u32 = 4;
const INDEX_BITS: u32 = 9;
const ENTRIES: usize = 1 << INDEX_BITS;

/// The number of a page-table page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TableId(u32);

struct Table {
    ptl: SpinLock<()>,
    entries: AtomicWords,
}

/// All page-table pages of a machine. A free one is all zero.
pub(crate) struct Tables {
    tables: Box<[Table]>,
    allocated: Bitmap,
}

impl Tables {
    pub(crate) fn new(count: u32) -> Tables {
        let table = || Table {
            ptl: SpinLock::with_digest(&PTL, (), <()>::digest),
            entries: AtomicWords::new(ENTRIES, 0),
        };
        Tables { tables: (0..count).map(|_| table()).collect(), allocated: Bitmap::new(count as usize) }
    }

    /// The free list, to make it fail.
    pub(crate) fn bitmap(&self) -> &Bitmap {
        &self.allocated
    }

    pub(crate) fn in_use(&self) -> usize {
        self.allocated.bits() - self.allocated.zeros()
    }

    pub(crate) fn alloc(&self) -> Result<TableId, OutOfMemory> {
        let index = self.allocated.take_lowest().ok_or(OutOfMemory::Tables)?;
        Ok(TableId(index as u32))
    }

    /// Gives back a table that is all zero and that no walker can reach.
    pub(crate) fn free(&self, id: TableId) {
        self.allocated.give_back(id.0 as usize);
    }

    fn ptl(&self, id: TableId) -> &SpinLock<()> {
        &self.tables[id.0 as usize].ptl
    }

    fn entry(&self, id: TableId, index: usize) -> AtomicWord<'_> {
        self.tables[id.0 as usize].entries.word(index)
    }
}

/// Where in its table (0 is the leaf level) the entry for `addr` is.
const fn index_at(level: u32, addr: u64) -> usize {
    (addr >> (PAGE_SHIFT + INDEX_BITS * level)) as usize & (ENTRIES - 1)
}

/// Bytes under one entry of a table at `level`.
pub(crate) const fn entry_span(level: u32) -> u64 {
    1 << (PAGE_SHIFT + INDEX_BITS * level)
}

const fn child(entry: u64) -> Option<TableId> {
    if entry & Pte::PRESENT == 0 { None } else { Some(TableId((entry >> PAGE_SHIFT) as u32)) }
}

/// An entry of an upper level: the table that holds it, and the one that it leads to.
type Upper = (TableId, TableId);

/// The page table of one mm.
pub(crate) struct PageTable {
    pgd: TableId,
    /// page_table_lock, and the entries of upper levels that are there, by level and first address: teardown finds them
    /// without looking at the 512 entries of each table.
    upper: SpinLock<BTreeMap<(u32, u64), Upper>>,
}

impl PageTable {
    pub(crate) fn new(tables: &Tables) -> Result<PageTable, OutOfMemory> {
        let upper = SpinLock::with_digest(&PAGE_TABLE_LOCK, BTreeMap::new(), digest_upper);
        Ok(PageTable { pgd: tables.alloc()?, upper })
    }

    /// Gives the top level back. Everything below has gone in [`PageTable::free_tables`].
    pub(crate) fn destroy(&mut self, tables: &Tables) {
        tables.free(self.pgd);
    }

    /// The leaf table of `page`, if there is one. Walks without a lock: the caller holds mmap_lock over a vma there,
    /// or the interrupt lock of a CPU.
    pub(crate) fn leaf(&self, tables: &Tables, page: PageAddr) -> Option<TableId> {
        let mut table = self.pgd;
        for level in (1..LEVELS).rev() {
            table = child(tables.entry(table, index_at(level, page.get())).load(Ordering::SeqCst))?;
        }
        Some(table)
    }

    /// Is there anything under the entry of `addr` in the tables of `level` (pmd_none and pud_none, negated)?
    pub(crate) fn populated(&self, tables: &Tables, level: u32, addr: u64) -> bool {
        let mut table = self.pgd;
        for at in (level..LEVELS).rev() {
            match child(tables.entry(table, index_at(at, addr)).load(Ordering::SeqCst)) {
                Some(next) => table = next,
                None => return false,
            }
        }
        true
    }

    /// The leaf table of `page`; makes the levels that are missing (pte_alloc, GFP_KERNEL: may sleep).
    pub(crate) fn alloc_leaf(
        &self,
        cx: &mut MaySleep<'_>,
        tables: &Tables,
        page: PageAddr,
    ) -> Result<TableId, OutOfMemory> {
        let mut table = self.pgd;
        for level in (1..LEVELS).rev() {
            let entry = tables.entry(table, index_at(level, page.get()));
            table = match child(entry.load(Ordering::SeqCst)) {
                Some(next) => next,
                None => {
                    let new = tables.alloc()?;
                    let mut upper = self.upper.lock(cx);
                    let raced = child(entry.load(Ordering::SeqCst));
                    if raced.is_none() {
                        upper.insert((level, page.get() & !(entry_span(level) - 1)), (table, new));
                        entry.store(u64::from(new.0) << PAGE_SHIFT | Pte::PRESENT, Ordering::SeqCst);
                    }
                    drop(upper);
                    if raced.is_some() {
                        tables.free(new);
                    }
                    raced.unwrap_or(new)
                }
            };
        }
        Ok(table)
    }

    /// The pte of `page` as a walker without a lock sees it.
    pub(crate) fn peek(&self, tables: &Tables, page: PageAddr) -> Pte {
        self.leaf(tables, page).map_or(Pte::NONE, |leaf| peek_in(tables, leaf, page))
    }

    /// The MMU sets accessed (and dirty) in the pte of `page` if it still is `seen`.
    pub(crate) fn mmu_update(&self, tables: &Tables, page: PageAddr, seen: Pte, new: Pte) -> bool {
        self.leaf(tables, page).is_some_and(|leaf| {
            tables
                .entry(leaf, index_at(0, page.get()))
                .compare_exchange(seen.bits(), new.bits(), Ordering::SeqCst, Ordering::SeqCst)
                .is_ok()
        })
    }

    /// Unlinks every table that lies wholly inside `[floor, ceiling)` and under `range`, and hands it to `gone`
    /// with the first page of `range` under it (free_pgtables). No vma may lie between floor and ceiling, and
    /// every pte there is none.
    pub(crate) fn free_tables<C: Context + ?Sized>(
        &self,
        cx: &mut C,
        tables: &Tables,
        range: Range,
        (floor, ceiling): (u64, u64),
        gone: &mut dyn FnMut(PageAddr, TableId),
    ) {
        let mut upper = self.upper.lock(cx);
        for level in 1..LEVELS {
            let span = entry_span(level);
            // From the entry that holds the first address to the one that holds the last, and wholly between the neighbours.
            let first = (range.start() & !(span - 1)).max(floor);
            let Some(below) = ceiling.checked_sub(span) else { break };
            let last = below.min(range.end() - 1);
            if first > last {
                continue;
            }
            let unlinked: Vec<u64> =
                upper.range((level, first)..=(level, last)).map(|(&(_, start), _)| start).collect();
            for start in unlinked {
                let Some((table, child)) = upper.remove(&(level, start)) else { continue };
                tables.entry(table, index_at(level, start)).store(0, Ordering::SeqCst);
                if let Ok(first) = PageAddr::new(start.max(range.start())) {
                    gone(first, child);
                }
            }
        }
    }
}

fn digest_upper(upper: &BTreeMap<(u32, u64), Upper>) -> u64 {
    upper.iter().map(|(&at, &(table, child))| (at, table.0, child.0)).collect::<Vec<_>>().digest()
}

fn peek_in(tables: &Tables, leaf: TableId, page: PageAddr) -> Pte {
    Pte::from_bits(tables.entry(leaf, index_at(0, page.get())).load(Ordering::SeqCst))
}

/// The ptes of one leaf table, in the hands of whoever holds its ptl.
pub(crate) struct Ptes<'l> {
    tables: &'l Tables,
    leaf: TableId,
}

impl Ptes<'_> {
    fn entry(&self, page: PageAddr) -> AtomicWord<'_> {
        self.tables.entry(self.leaf, index_at(0, page.get()))
    }

    pub(crate) fn get(&self, page: PageAddr) -> Pte {
        peek_in(self.tables, self.leaf, page)
    }

    /// ptep_get_and_clear: what the MMU set up to this instant is in the answer.
    pub(crate) fn get_and_clear(&mut self, page: PageAddr) -> Pte {
        Pte::from_bits(self.entry(page).swap(0, Ordering::SeqCst))
    }

    /// set_pte_at: on a pte that the MMU cannot follow.
    pub(crate) fn set(&mut self, page: PageAddr, pte: Pte) {
        self.entry(page).store(pte.bits(), Ordering::SeqCst);
    }

    /// Sets bits of a live pte in one step, so that no accessed or dirty bit is lost (ptep_set_access_flags).
    pub(crate) fn set_bits(&mut self, page: PageAddr, bits: u64) {
        self.entry(page).fetch_or(bits, Ordering::SeqCst);
    }

    /// Forgets that the page was accessed; was it (ptep_test_and_clear_young)?
    pub(crate) fn test_and_clear_young(&mut self, page: PageAddr) -> bool {
        self.entry(page).fetch_and(!Pte::ACCESSED, Ordering::SeqCst) & Pte::ACCESSED != 0
    }

    /// The page counts as never used (clear_young_dirty_ptes). CPUs may keep writing without a mark until their TLB is flushed.
    pub(crate) fn make_clean_and_old(&mut self, page: PageAddr) {
        self.entry(page).fetch_and(!(Pte::ACCESSED | Pte::DIRTY), Ordering::SeqCst);
    }

    /// ptep_set_wrprotect: as [`Ptes::set_bits`]. CPUs may keep writing until their TLB is flushed.
    pub(crate) fn write_protect(&mut self, page: PageAddr) {
        self.entry(page).fetch_and(!Pte::WRITE, Ordering::SeqCst);
    }
}

/// The ptl of one leaf table, held. Atomic context while it lives (pte_offset_map_lock).
pub(crate) struct PteGuard<'l, 'c> {
    ptes: Ptes<'l>,
    guard: SpinGuard<'l, 'c, ()>,
}

impl<'l, 'c> PteGuard<'l, 'c> {
    pub(crate) fn lock<C: Context + ?Sized>(
        tables: &'l Tables,
        leaf: TableId,
        cx: &'c mut C,
    ) -> PteGuard<'l, 'c> {
        PteGuard { ptes: Ptes { tables, leaf }, guard: tables.ptl(leaf).lock(cx) }
    }

    /// The second ptl of fork: the parent's, under the child's (SINGLE_DEPTH_NESTING).
    pub(crate) fn lock_nested<C: Context + ?Sized>(
        tables: &'l Tables,
        leaf: TableId,
        cx: &'c mut C,
    ) -> PteGuard<'l, 'c> {
        PteGuard { ptes: Ptes { tables, leaf }, guard: tables.ptl(leaf).lock_nested(cx, 1) }
    }

    /// The ptes, and the context to do more with while they are held.
    pub(crate) fn split(&mut self) -> (&mut Ptes<'l>, &mut Atomic<'c>) {
        (&mut self.ptes, self.guard.split().1)
    }
}

impl<'l> Deref for PteGuard<'l, '_> {
    type Target = Ptes<'l>;

    fn deref(&self) -> &Ptes<'l> {
        &self.ptes
    }
}

impl<'l> DerefMut for PteGuard<'l, '_> {
    fn deref_mut(&mut self) -> &mut Ptes<'l> {
        &mut self.ptes
    }
}

/// The pages of `range` under one leaf table after the other.
pub(crate) fn by_leaf(range: Range) -> impl Iterator<Item = Range> {
    let span = entry_span(1);
    let mut at = range.start();
    std::iter::from_fn(move || {
        let end = (at & !(span - 1)).saturating_add(span).min(range.end()).min(TASK_SIZE);
        let piece = Range::new(at, end.checked_sub(at)?).ok()?;
        at = end;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(addr: u64) -> PageAddr {
        PageAddr::containing(addr).unwrap()
    }

    #[test]
    fn leaves_split_at_two_mib() {
        let r = Range::new(0x1f_f000, 0x20_2000).unwrap();
        let pieces: Vec<_> = by_leaf(r).map(|r| (r.start(), r.pages())).collect();
        assert_eq!(pieces, [(0x1f_f000, 1), (0x20_0000, 512), (0x40_0000, 1)]);
        let last = Range::new(TASK_SIZE - 0x1000, 0x1000).unwrap();
        assert_eq!(by_leaf(last).collect::<Vec<_>>(), [last]);
    }

    #[test]
    fn tables_go_only_where_no_neighbour_needs_them() {
        let tables = Tables::new(8);
        MaySleep::enter(|cx| {
            let mut table = PageTable::new(&tables).unwrap();
            let a = table.alloc_leaf(cx, &tables, page(0x1000)).unwrap();
            assert_eq!(table.alloc_leaf(cx, &tables, page(0x5000)).unwrap(), a);
            assert_ne!(table.alloc_leaf(cx, &tables, page(0x20_0000)).unwrap(), a);
            assert_eq!(tables.in_use(), 5);
            let mut gone = Vec::new();
            let range = Range::new(0x1000, 0x20_0000).unwrap();
            table
                .free_tables(cx, &tables, range, (0, 0x30_0000), &mut |page, table| gone.push((page, table)));
            assert_eq!(gone, [(page(0x1000), a)], "the second leaf reaches past the ceiling");
            assert_eq!(table.peek(&tables, page(0x1000)), Pte::NONE);
            table.free_tables(cx, &tables, Range::ALL, (0, u64::MAX), &mut |page, table| {
                gone.push((page, table))
            });
            assert_eq!(gone.len(), 4);
            gone.into_iter().for_each(|(_, table)| tables.free(table));
            table.destroy(&tables);
            assert_eq!(tables.in_use(), 0);
        });
    }
}
