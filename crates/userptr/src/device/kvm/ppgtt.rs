// SPDX-License-Identifier: MIT OR Apache-2.0
//! Device page tables: four levels of x86-64, one tree for each address space.
//!
//! The host never writes an entry that the guest may have used. KVM without EPT or NPT shadows these tables and does
//! not see what the host stores into them, so changes are worked out here, as runs of entries ([`Update`]), and the
//! command processor writes them. That is as right with EPT or NPT, where it costs nothing.
//!
//! Invariants:
//! * an update is executed to its end before the next one is worked out: what is in memory is the truth;
//! * a table goes back to the pool when the update that unlinked it has been executed, with a flush;
//! * entries of two address spaces never point to the same table, but for the system's.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;

use super::layout::{LARGE, PAGE, POOL, SHARED_PDPT, SYSTEM, SYSTEM_LEN};
use super::memory::SystemMemory;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
pub(super) const LARGE_PAGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// What entries that point to tables have: rights are the leaf's business.
pub(super) const PRESENT_RW: u64 = PRESENT | WRITABLE | USER;
const ENTRIES: u64 = 512;

/// `count` entries from guest physical address `at` on: `first`, `first + step`, ...
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) at: u64,
    pub(super) first: u64,
    pub(super) step: u64,
    pub(super) count: u64,
}

/// A change of an address space, to be executed in order.
#[derive(Debug, Default)]
pub(super) struct Update {
    pub(super) runs: Vec<Run>,
    /// Tables that it takes from the pool.
    taken: HashSet<u64>,
    /// Tables that it unlinks.
    freed: Vec<u64>,
    /// Links that it writes.
    links: HashMap<u64, u64>,
}

/// The pool is used up.
#[derive(Debug)]
pub(super) struct NoTables;

/// Tables that no address space uses.
#[derive(Debug)]
pub(super) struct Pool {
    free: Vec<u64>,
    /// Those from here on have never been used.
    fresh: u64,
}

impl Pool {
    pub(super) fn new() -> Pool {
        Pool { free: Vec::new(), fresh: POOL }
    }

    fn take(&mut self) -> Result<u64, NoTables> {
        if let Some(table) = self.free.pop() {
            return Ok(table);
        }
        if self.fresh == SYSTEM_LEN {
            return Err(NoTables);
        }
        self.fresh += PAGE;
        Ok(self.fresh - PAGE)
    }

    /// The update was not executed.
    pub(super) fn abandon(&mut self, update: Update) {
        self.free.extend(update.taken);
    }

    /// The update was executed, and followed by a flush if it took anything away.
    pub(super) fn settle(&mut self, update: Update) {
        self.free.extend(update.freed);
    }
}

/// Index of the entry for `va` in a table of `level`, as an offset. Level 1 has the pages, level 4 is the top.
fn offset(va: u64, level: u32) -> u64 {
    (va >> (12 + 9 * (level - 1))) % ENTRIES * 8
}

/// A new, empty address space: its top table.
pub(super) fn create(pool: &mut Pool, update: &mut Update) -> Result<u64, NoTables> {
    let root = update.table(pool)?;
    update.link(root + offset(SYSTEM, 4), SHARED_PDPT);
    Ok(root)
}

impl Update {
    fn table(&mut self, pool: &mut Pool) -> Result<u64, NoTables> {
        let table = pool.take()?;
        self.taken.insert(table);
        // Also one that is all zeroes in memory: a shadow of its former self may be left.
        self.runs.push(Run { at: table, first: 0, step: 0, count: ENTRIES });
        Ok(table)
    }

    fn link(&mut self, at: u64, table: u64) {
        let entry = if table == 0 { 0 } else { table | PRESENT_RW };
        self.links.insert(at, entry);
        self.runs.push(Run { at, first: entry, step: 0, count: 1 });
    }

    /// The entry at `at`, once the update so far has been executed. Not for leaves that it wrote.
    fn entry(&self, memory: &SystemMemory, at: u64) -> u64 {
        match self.links.get(&at) {
            Some(entry) => *entry,
            None if self.taken.contains(&(at & !(PAGE - 1))) => 0,
            None => memory.word(at).load(Ordering::Relaxed),
        }
    }

    /// Maps `len` bytes at guest physical address `gpa` from `va` on, where nothing is mapped: whole pages, large ones
    /// where both addresses are aligned to them.
    pub(super) fn map(
        &mut self,
        pool: &mut Pool,
        memory: &SystemMemory,
        root: u64,
        va: u64,
        gpa: u64,
        len: u64,
        writable: bool,
    ) -> Result<(), NoTables> {
        let flags = PRESENT | USER | NO_EXECUTE | if writable { WRITABLE } else { 0 };
        let mut done = 0;
        while done < len {
            let (va, gpa, left) = (va + done, gpa + done, len - done);
            let directory = self.descend(pool, memory, root, va, 2)?;
            let at = directory + offset(va, 2);
            let entry = self.entry(memory, at);
            if entry & PRESENT == 0 && left >= LARGE && va.is_multiple_of(LARGE) && gpa.is_multiple_of(LARGE) {
                self.runs.push(Run { at, first: gpa | flags | LARGE_PAGE, step: 0, count: 1 });
                done += LARGE;
            } else {
                let table = self.descend(pool, memory, root, va, 1)?;
                let bytes = left.min(LARGE - va % LARGE);
                let run = Run { at: table + offset(va, 1), first: gpa | flags, step: PAGE, count: bytes / PAGE };
                self.runs.push(run);
                done += bytes;
            }
        }
        Ok(())
    }

    /// The table of `level` for `va`, linked if it was not.
    fn descend(
        &mut self,
        pool: &mut Pool,
        memory: &SystemMemory,
        root: u64,
        va: u64,
        level: u32,
    ) -> Result<u64, NoTables> {
        let mut table = root;
        for above in (level + 1..=4).rev() {
            let at = table + offset(va, above);
            let entry = self.entry(memory, at);
            table = if entry & PRESENT == 0 {
                let new = self.table(pool)?;
                self.link(at, new);
                new
            } else {
                entry & ADDRESS
            };
        }
        Ok(table)
    }

    /// Takes the mapping `[va, va + len)` away, exactly as it was mapped. Needs a flush.
    pub(super) fn unmap(&mut self, memory: &SystemMemory, root: u64, va: u64, len: u64) {
        let end = va + len;
        let mut va = va;
        while va < end {
            let step = (LARGE - va % LARGE).min(end - va);
            if let Some(at) = self.find(memory, root, va, 2) {
                let entry = self.entry(memory, at);
                if entry & (PRESENT | LARGE_PAGE) == PRESENT | LARGE_PAGE {
                    self.runs.push(Run { at, first: 0, step: 0, count: 1 });
                } else if entry & PRESENT != 0 {
                    self.clear(memory, at, entry & ADDRESS, offset(va, 1) / 8, step / PAGE);
                }
            }
            va += step;
        }
    }

    /// Clears `count` entries of the last-level table that the entry at `link` points to, or unlinks it if nothing else
    /// is in it.
    fn clear(&mut self, memory: &SystemMemory, link: u64, table: u64, first: u64, count: u64) {
        let others = (0..first).chain(first + count..ENTRIES);
        let used = |entry: u64| memory.word(table + entry * 8).load(Ordering::Relaxed) != 0;
        if others.into_iter().any(used) {
            self.runs.push(Run { at: table + first * 8, first: 0, step: 0, count });
        } else {
            self.link(link, 0);
            self.freed.push(table);
        }
    }

    /// Guest physical address of the entry for `va` in the table of `level`, if there is that table.
    fn find(&self, memory: &SystemMemory, root: u64, va: u64, level: u32) -> Option<u64> {
        let mut table = root;
        for above in (level + 1..=4).rev() {
            let entry = self.entry(memory, table + offset(va, above));
            if entry & PRESENT == 0 {
                return None;
            }
            table = entry & ADDRESS;
        }
        Some(table + offset(va, level))
    }

    /// Gives every table of the address space back. Nothing must run in it any more, and it is never loaded again.
    pub(super) fn destroy(&mut self, memory: &SystemMemory, root: u64) {
        self.tables(memory, root, 4);
    }

    fn tables(&mut self, memory: &SystemMemory, table: u64, level: u32) {
        self.freed.push(table);
        if level == 1 {
            return;
        }
        for at in (table..table + PAGE).step_by(8) {
            let entry = memory.word(at).load(Ordering::Relaxed);
            let is_system = level == 4 && at == table + offset(SYSTEM, 4);
            if entry & (PRESENT | LARGE_PAGE) == PRESENT && !is_system {
                self.tables(memory, entry & ADDRESS, level - 1);
            }
        }
    }
}

/// Guest physical address that `va` is translated to, as the guest's processor would do it.
pub(super) fn translate(memory: &SystemMemory, root: u64, va: u64) -> Option<u64> {
    let update = Update::default();
    let entry = memory.word(update.find(memory, root, va, 2)?).load(Ordering::Relaxed);
    if entry & (PRESENT | LARGE_PAGE) == PRESENT | LARGE_PAGE {
        return Some((entry & ADDRESS & !(LARGE - 1)) + va % LARGE);
    }
    let entry = memory.word(update.find(memory, root, va, 1)?).load(Ordering::Relaxed);
    (entry & PRESENT != 0).then_some((entry & ADDRESS) + va % PAGE)
}
